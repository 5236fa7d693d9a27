"""A second process loads all its compiled programs, with the same numbers."""

import sys

import pytest
from oracles import ROOT, process

from vaecf.workdir import read_json

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
    script = ROOT / "experiments" / "main.py"
    results = []
    for name in ("first", "second"):
        done = process(
            *(sys.executable, "-c", SCRIPT, counted, script, *tiny),
            *("--train", "--test", f"--data_dir={data_dir}"),
            f"--workdir={tmp_path / name}",
        )
        assert done.returncode == 0, done.stderr
        path = tmp_path / name / "results.json"
        results.append(read_json(path))
    for word in ("warning", "error", "cache", "machine"):
        assert word not in done.stderr.lower(), done.stderr
    events = read_json(counted)
    prefix = "/jax/compilation_cache/"
    assert events[f"{prefix}compile_requests_use_cache"] > 5
    assert f"{prefix}cache_misses" not in events
    for split in ("validation", "test"):
        assert results[0][split] == results[1][split]
