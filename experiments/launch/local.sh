#!/usr/bin/env bash
# Several processes of one run on this machine:
#
#     experiments/launch/local.sh 2 --config=configs/ml1m.py \
#         --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test
#
# Output of process 0 goes to the terminal, that of the others to
# <workdir>/process-<n>.log. When one fails, all end, and so does this, with its
# status. Two hosts need no script: the same command in a shell on each, with
#
#     --coordinator_address=first-host:1234 --num_processes=2 --process_id=0
#
# on the first and --process_id=1 on the second; the workdir is on a file system
# that both see.
set -euo pipefail

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: $0 PROCESSES FLAGS_OF_MAIN..." >&2
  exit 2
fi
processes=$1
shift
workdir=.
for flag in "$@"; do
  case $flag in --workdir=*) workdir=${flag#*=} ;; esac
done
mkdir -p "$workdir"

python=${PYTHON:-python}
main=$(dirname "$0")/../main.py
port=${PORT:-$("$python" -c 'import socket
s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

started=()
trap 'kill "${started[@]}" 2>/dev/null || true' INT TERM
for ((i = processes - 1; i >= 0; i--)); do
  out=/dev/stdout
  ((i)) && out=$workdir/process-$i.log
  "$python" "$main" "$@" --coordinator_address="localhost:$port" \
    --num_processes="$processes" --process_id="$i" >"$out" 2>&1 &
  started+=($!)
done

status=0
for _ in "${started[@]}"; do
  code=0
  wait -n || code=$?
  if ((code && !status)); then
    status=$code
    echo "error: a process ended with status $code; others follow" >&2
  fi
done
exit "$status"
