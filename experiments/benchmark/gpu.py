"""Everything that is measured on a GPU, one process after the other.

    python experiments/benchmark/gpu.py --json=gpu.json

Runs under an interpreter that has jax, flax, optax, orbax-checkpoint and SciPy;
vaecf itself need not be installed. The peer (torch.compile, bf16) is measured
where PyTorch is there. A run that fails is recorded as such, and the others go
on.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_JSON = flags.DEFINE_string(
    "json", None, "File to write the results to.", required=True
)
_LIMIT = flags.DEFINE_float(
    "limit", 440.0, "Seconds after which no further run starts."
)

_BIG = "--batch_size=24576"
RUNS: tuple[tuple[str, ...], ...] = (
    ("training", "--precision=bf16", _BIG, "--evaluate", "--seconds=20"),
    ("inference", "--precision=bf16", "--batch_sizes=1,8,64,512,4096,10000"),
    ("evaluation", "--precision=bf16", "--batch_size=10000", "--seconds=10"),
    ("training", "--precision=tf32", _BIG, "--seconds=15"),
    ("training", "--precision=fp32", _BIG, "--seconds=15"),
    ("training", "--precision=fp16", _BIG, "--seconds=15"),
    ("training", "--precision=bf16", "--batch_size=4096", "--seconds=15"),
    ("inference", "--precision=fp32", "--batch_sizes=1"),
    # Is the choice of the input layer right here, and what does memory cost?
    ("training", "--precision=bf16", _BIG, "--input=gather", "--seconds=10"),
    ("training", "--precision=bf16", _BIG, "--microbatch=8192", "--seconds=10"),
)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """One benchmark in a process of its own: {'arguments', 'result'}.

    'error', its last line, instead of 'result' when it fails.
    """
    name, *rest = arguments
    script = pathlib.Path(__file__).with_name(f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, str(script), *rest, f"--json={path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        cli.log(done.stdout.rstrip())
        if done.returncode == 0:
            result = json.loads(path.read_text())
            return {"arguments": list(arguments), "result": result}
    lines = done.stdout.strip().splitlines() or ["it printed nothing"]
    return {"arguments": list(arguments), "error": lines[-1]}


def main(argv: Sequence[str]) -> int:
    """Runs all, writes the JSON; 1 if any failed or had no time left."""
    del argv
    from vaecf import workdir as workdir_lib

    peers = ["--peers=torch_compile_bf16"]
    has_torch = importlib.util.find_spec("torch") is not None
    began, records = time.monotonic(), []
    for arguments in RUNS:
        if has_torch and arguments[:2] == ("training", "--precision=bf16"):
            arguments = (*arguments, *peers)
        cli.log(f"\n--- {' '.join(arguments)}")
        if time.monotonic() - began > _LIMIT.value:
            records.append(
                {"arguments": list(arguments), "error": "no time left"}
            )
            continue
        records.append(run(arguments))
        # After every run, so that a machine that goes takes nothing with it.
        text = json.dumps({"runs": records}, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())
    failed = [record for record in records if "error" in record]
    for record in failed:
        cli.log(f"failed: {' '.join(record['arguments'])}: {record['error']}")
    return int(bool(failed))


if __name__ == "__main__":
    cli.run(main)
