"""The demo twice, with one epoch."""

from __future__ import annotations

import json
import re

import pytest


@pytest.mark.slow
def test_the_demo_twice(tmp_path, command) -> None:
    arguments = ("demo", "--epochs=1", f"--workdir={tmp_path / 'demo'}")
    first = command(*arguments)
    assert first.status == 0, first.err
    assert "4,000 training users, 1,000 items" in first.out
    table, _, shown = first.out.partition("Ten recommendations for three users")
    rows = dict(re.findall(r"^(\w[\w ()]*?) +(0\.\d{4}) ±", table, re.M))
    assert set(rows) == {"mult_vae", "popularity", "ease (l2 500)", "oracle"}
    # No model beats the distribution that generated the data.
    assert max(rows, key=lambda name: float(rows[name])) == "oracle"
    # The test users come after 4,000 training and 400 validation users.
    assert all(str(user) in shown for user in (4401, 4402, 4403))
    assert len(set(re.findall(r"item-\d{4}", shown))) >= 10
    assert len(re.findall(r"^ *10 ", shown, re.M)) == 3
    assert (tmp_path / "demo" / "run" / "report.html").exists()

    path = tmp_path / "demo" / "run" / "results.json"
    before = json.loads(path.read_text())
    second = command(*arguments)
    assert second.status == 0, second.err
    assert json.loads(path.read_text())["test"] == before["test"]
    assert (
        second.out.partition("Ten recommendations")[2]
        == (first.out.partition("Ten recommendations")[2])
    )
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
