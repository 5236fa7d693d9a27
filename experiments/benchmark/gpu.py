"""Runs every benchmark of a GPU and writes one JSON.

    python experiments/benchmark/gpu.py --json=gpu.json

Each benchmark runs in a process of its own. The interpreter needs jax, flax,
optax, orbax-checkpoint and SciPy; vaecf itself need not be installed. Where
PyTorch is installed, torch.compile in bf16 is measured too. If a benchmark
fails, its error is recorded and the next one starts.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, machine
from vaecf import cli, workdir
from vaecf.errors import VaecfError

FLAGS = flags.FLAGS
common.define_json()
flags.mark_flag_as_required("json")
flags.DEFINE_float(
    "limit", 440.0, "Seconds after which no further benchmark starts."
)

_BIG = "--batch_size=24576"
_BF16 = ("training", "--precision=bf16", _BIG)
_TORCH = "--peers=torch_compile_bf16"
# The most important ones first, because the time may end.
RUNS: tuple[tuple[str, ...], ...] = (
    (*_BF16, "--seconds=5", _TORCH),
    ("inference", "--precision=bf16", "--batch_sizes=1,8,64,512,4096,10000"),
    ("training", "--precision=tf32", _BIG, "--seconds=4"),
    ("evaluation", "--precision=bf16", "--batch_size=10000", "--seconds=3"),
    ("training", "--precision=fp16", _BIG, "--seconds=4"),
    (
        "training",
        "--precision=bf16",
        "--batch_size=4096",
        "--seconds=4",
        _TORCH,
    ),
    ("training", "--precision=fp32", _BIG, "--seconds=4"),
    ("inference", "--precision=fp32", "--batch_sizes=1"),
    # The other input layer, and the cost of saving memory.
    (*_BF16, "--set=model.input=gather", "--seconds=4"),
    (*_BF16, "--set=train.microbatch=8192", "--seconds=4"),
)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs one benchmark; returns {'arguments', 'result' or 'error'}."""
    name, *flags_ = arguments
    record = {"arguments": list(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "result.json"
        script = f"benchmark/{name}.py"
        try:
            machine.run_script(script, *flags_, f"--json={path}", echo=True)
        except VaecfError as error:
            return {**record, "error": str(error)}
        return {**record, "result": workdir.read_json(path)}


def main(argv: Sequence[str]) -> int:
    """Runs all benchmarks; 1 if any of them failed or had no time left."""
    has_torch = importlib.util.find_spec("torch") is not None
    began, records = time.monotonic(), []
    for arguments in RUNS:
        if not has_torch:
            arguments = tuple(x for x in arguments if x != _TORCH)
        cli.log(f"\n--- {' '.join(arguments)}")
        if time.monotonic() - began < FLAGS.limit:
            records.append(run(arguments))
        else:
            records.append({"arguments": arguments, "error": "no time left"})
        # After every benchmark, in case the machine is lost.
        common.write_json({"runs": records})
    failed = [record for record in records if "error" in record]
    for record in failed:
        cli.log(f"failed: {' '.join(record['arguments'])}: {record['error']}")
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main)
