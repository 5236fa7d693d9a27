#!/bin/sh
# Runs every benchmark of a GPU: sh experiments/benchmark/gpu.sh OUTPUT_DIR
#
# The n-th benchmark writes OUTPUT_DIR/<benchmark>-gpu-<n>.json. python3 needs
# jax, flax, optax, orbax-checkpoint and SciPy; vaecf need not be installed.
# Where PyTorch is installed, torch.compile in bf16 is measured too. The most
# important benchmarks come first, because the time on a GPU may end. One that
# fails does not stop the others; the exit status is then 1.
here=$(dirname "$0") n=0 status=0
if python3 -c 'import torch' 2>/dev/null; then
  torch=--peer=torch_compile_bf16
fi

run() {
  n=$((n + 1))
  echo "--- $*"
  json="$output/$1-gpu-$n.json" script="$here/$1.py"
  shift
  python3 "$script" "$@" --json="$json" || status=1
}

output=${1:?"give the directory of the results"}
if python3 -c 'import hypothesis, pytest' 2>/dev/null; then
  # The kernels against their definitions.
  XLA_FLAGS= VAECF_TEST_PLATFORM=cuda python3 -m pytest -q -W ignore \
    -p no:cacheprovider "$here/../../tests/models/test_gpu_kernels.py" ||
    status=1
fi
big=--batch_size=24576
run training --precision=bf16 $big --seconds=5 --epochs=400 $torch
run training --precision=bf16 $big --seconds=3 --set=model.input=dense
run inference --precision=bf16 --batch_sizes=1,8,64,512,4096,10000
run populations --precision=bf16
small="--batch_size=500 --users=5040 --items=3502"
run training --precision=bf16 $small --seconds=3
run training --precision=bf16 $small --seconds=3 --set=model.name=rec_vae \
  '--set=train.alternating_epochs=(3, 1)'
run evaluation --precision=bf16 --batch_size=10000 --seconds=3
run training --precision=bf16 --batch_size=4096 --seconds=4 $torch
run training --precision=fp16 $big --seconds=3
run training --precision=tf32 $big --seconds=3
run training --precision=fp32 $big --seconds=3
run inference --precision=fp32 --batch_sizes=1
# What the compiled programs predict for this GPU, beside what was measured.
device=$(nvidia-smi -L 2>/dev/null | grep -oiE '[vah][12]00' | head -n 1 |
  tr A-Z a-z)
run gpu_program --device="${device:-h100}" --precision=bf16 $big
exit $status
