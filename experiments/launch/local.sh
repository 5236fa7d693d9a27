#!/usr/bin/env bash
# Runs several processes of one run on this machine:
#
#     experiments/launch/local.sh 2 --config=configs/ml1m.py \
#         --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test
#
# Process 0 prints to the terminal, process n to <workdir>/process-<n>.log
# (<workdir> is that of --workdir or --checkpoint_dir, else this directory). If
# one process fails, all processes end and the script exits with its status. Use
# it on CPUs only: one process drives all GPUs of a machine, and several would
# compete for them.
#
# Two hosts need no script. Start the same command on both, with
#
#     --coordinator_address=first-host:1234 --num_processes=2 --process_id=0
#
# on the first host and --process_id=1 on the second. Both hosts must see the
# workdir.
set -euo pipefail

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: $0 PROCESSES FLAGS_OF_MAIN..." >&2
  exit 2
fi
processes=$1
shift
workdir=.
previous=
for flag in "$@"; do
  case $flag in --workdir=* | --checkpoint_dir=*) workdir=${flag#*=} ;; esac
  case $previous in --workdir | --checkpoint_dir) workdir=$flag ;; esac
  previous=$flag
done
workdir=${workdir/#\~\//$HOME/}
mkdir -p "$workdir"

python=${PYTHON:-python}
main=$(dirname "$0")/../main.py
port=${PORT:-$("$python" -c 'import socket
s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
common=(--coordinator_address="localhost:$port" --num_processes="$processes")

declare -A number_of
start() { # number
  "$python" "$main" "$@" &
  number_of[$!]=$number
}
for ((number = processes - 1; number > 0; number--)); do
  start "$@" "${common[@]}" --process_id="$number" \
    >"$workdir/process-$number.log" 2>&1
done
number=0
start "$@" "${common[@]}" --process_id=0

# Pass signals on to all processes, which save and stop.
trap 'kill -TERM "${!number_of[@]}" 2>/dev/null || true' INT TERM

status=0
while ((${#number_of[@]})); do
  code=0
  wait -n -p ended "${!number_of[@]}" || code=$?
  # If no process has ended, the trap interrupted `wait`.
  [[ -n "${ended:-}" ]] || continue
  number=${number_of[$ended]}
  unset "number_of[$ended]"
  if ((code && !status)); then
    status=$code
    where=
    ((number)) && where=": see $workdir/process-$number.log"
    echo "process $number ended with status $code$where" >&2
  fi
done
exit "$status"
