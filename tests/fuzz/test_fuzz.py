"""A short part of each fuzz target; `make fuzz` runs the long one."""

from __future__ import annotations

import os

import harness
import pytest

from vaecf.data import text_files

INPUTS = int(os.environ.get("VAECF_FUZZ_INPUTS", 50))
# Targets that load a model, or start a process for every input.
SLOW = {"model": 10, "resume": 6, "id_table": 10}


@pytest.mark.parametrize("name", harness.TARGETS)
def test_target(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", text_files.BLOCK_BYTES)
    inputs = min(INPUTS, SLOW.get(name, INPUTS))
    outcomes = harness.run(name, 0, 0, inputs, tmp_path)
    assert outcomes[""] == 0, capsys.readouterr().out
    assert sum(outcomes.values()) == inputs
    # An input that is always refused would prove nothing.
    assert sum(n for word, n in outcomes.items() if word != "refused")
