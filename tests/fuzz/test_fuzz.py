"""A short part of each fuzz target; `make fuzz` runs the long one."""

from __future__ import annotations

import os

import harness
import pytest

from vaecf.data import text_files

INPUTS = int(os.environ.get("VAECF_FUZZ_INPUTS", 150))


@pytest.mark.parametrize("name", harness.TARGETS)
def test_target(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", text_files.BLOCK_BYTES)
    outcomes = harness.run(name, 0, 0, INPUTS, tmp_path)
    assert outcomes[""] == 0, capsys.readouterr().out
    assert sum(outcomes.values()) == INPUTS
    # An input that is always refused would prove nothing.
    assert sum(n for word, n in outcomes.items() if word != "refused")
