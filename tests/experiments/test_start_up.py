"""A command that is run again compiles nothing, and gives the same numbers."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Counts what JAX says of its cache, then runs a script as python would.
SCRIPT = """
import collections, json, pathlib, runpy, sys
import jax

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
counted, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    pathlib.Path(counted).write_text(json.dumps(counts))
"""


def run(
    folder: pathlib.Path, script: str, *arguments: str
) -> tuple[list[int], str]:
    """A command in a new process, by a user whose home is `folder`.

    Returns:
      ([programs wanted, loaded, compiled and kept], stderr).
    """
    # The test session's own cache is not that user's.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JAX_")
    }
    environment |= {
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    counted = folder / "counted.json"
    path = str(ROOT / "experiments" / f"{script}.py")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(counted), path, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(counted.read_text())
    prefix = "/jax/compilation_cache/"
    names = ("compile_requests_use_cache", "cache_hits", "cache_misses")
    return [events.get(prefix + name, 0) for name in names], done.stderr


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path, tiny, data_dir) -> None:
    def train(name: str) -> tuple[list[int], str, dict[str, Any]]:
        workdir = tmp_path / name
        flags = (f"--data_dir={data_dir}", f"--workdir={workdir}")
        counts, err = run(tmp_path, "main", *tiny, *flags, "--train", "--test")
        return counts, err, json.loads((workdir / "results.json").read_text())

    def kept() -> list[pathlib.Path]:
        return sorted(tmp_path.rglob("*-cache"))

    (asked, hits, misses), _, cold = train("cold")
    # Two rankers of a process share a program already.
    assert misses > 5 and asked == hits + misses
    stored = kept()
    assert len(stored) == misses
    (asked_again, hits, misses), err, warm = train("warm")
    assert (asked_again, hits, misses) == (asked, asked, 0)
    assert kept() == stored
    for word in ("warning", "error", "cache", "machine"):
        assert word not in err.lower(), err
    # Loaded programs are the same programs, to the last bit.
    assert warm["test"] == cold["test"]
    assert warm["validation"] == cold["validation"]
    first, second = (
        [
            {k: v for k, v in json.loads(line).items() if "loss" in k}
            for line in (tmp_path / name / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for name in ("cold", "warm")
    )
    assert first == second and any("train/loss" in record for record in first)
    assert warm["train"]["compile_seconds"] < cold["train"]["compile_seconds"]
