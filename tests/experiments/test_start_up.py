"""A second run loads all its compiled programs, with the same numbers."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Runs a script as python would, and counts the events of JAX's cache.
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


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path, tiny, data_dir) -> None:
    # The cache is in the home directory, not the one of the test session.
    environment = {k: v for k, v in os.environ.items() if k[:4] != "JAX_"}
    environment |= {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }

    def train(name: str) -> tuple[dict, str, dict, list]:
        """(cache events, stderr, results.json, losses) in a new process."""
        workdir, counted = tmp_path / name, tmp_path / "counted.json"
        script = str(ROOT / "experiments" / "main.py")
        flags = (f"--data_dir={data_dir}", f"--workdir={workdir}", "--train")
        done = subprocess.run(
            [
                *(sys.executable, "-c", SCRIPT, str(counted), script),
                *(*tiny, *flags, "--test"),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        events = json.loads(counted.read_text())
        results = json.loads((workdir / "results.json").read_text())
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("train/loss") for line in lines]
        return events, done.stderr, results, losses

    prefix = "/jax/compilation_cache/"
    asked = f"{prefix}compile_requests_use_cache"
    hits, misses = f"{prefix}cache_hits", f"{prefix}cache_misses"
    events, _, cold, cold_losses = train("cold")
    # Two rankers of one process already share a program.
    assert events[misses] > 5
    assert events[asked] == events.get(hits, 0) + events[misses]
    stored = sorted(tmp_path.rglob("*-cache"))
    assert len(stored) == events[misses]
    again, err, warm, warm_losses = train("warm")
    assert again[asked] == again[hits] == events[asked]
    assert misses not in again
    assert sorted(tmp_path.rglob("*-cache")) == stored
    for word in ("warning", "error", "cache", "machine"):
        assert word not in err.lower(), err
    for split in ("validation", "test"):
        assert warm[split] == cold[split]
    assert warm_losses == cold_losses and any(warm_losses)
    assert warm["train"]["compile_seconds"] < cold["train"]["compile_seconds"]
