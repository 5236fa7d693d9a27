"""A second process loads all its compiled programs, with the same numbers."""

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
def test_a_second_process_compiles_nothing(tiny, data_dir, tmp_path):
    counted = tmp_path / "counted.json"
    script = str(ROOT / "experiments" / "main.py")
    results = []
    for name in ("first", "second"):
        done = subprocess.run(
            [
                *(sys.executable, "-c", SCRIPT, str(counted), script, *tiny),
                *("--train", "--test", f"--data_dir={data_dir}"),
                f"--workdir={tmp_path / name}",
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        path = tmp_path / name / "results.json"
        results.append(json.loads(path.read_text()))
    for word in ("warning", "error", "cache", "machine"):
        assert word not in done.stderr.lower(), done.stderr
    events = json.loads(counted.read_text())
    prefix = "/jax/compilation_cache/"
    assert events[f"{prefix}compile_requests_use_cache"] > 5
    assert f"{prefix}cache_misses" not in events
    for split in ("validation", "test"):
        assert results[0][split] == results[1][split]
