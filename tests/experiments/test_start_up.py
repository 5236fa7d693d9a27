"""A second process loads all its compiled programs, with the same numbers."""

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
def test_a_second_process_compiles_nothing(trained, tmp_path) -> None:
    """The first process is that of the tests, with the same cache."""
    counted = tmp_path / "counted.json"
    script = str(ROOT / "experiments" / "main.py")
    done = subprocess.run(
        [
            *(sys.executable, "-c", SCRIPT, str(counted), script, "--test"),
            *(*trained.training, f"--workdir={tmp_path / 'run'}"),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for word in ("warning", "error", "cache", "machine"):
        assert word not in done.stderr.lower(), done.stderr
    events = json.loads(counted.read_text())
    prefix = "/jax/compilation_cache/"
    assert events[f"{prefix}compile_requests_use_cache"] > 5
    assert f"{prefix}cache_misses" not in events
    first, second = (
        json.loads((workdir / "results.json").read_text())
        for workdir in (trained.workdir, tmp_path / "run")
    )
    for split in ("validation", "test"):
        assert first[split] == second[split]
