"""experiments/population.py, and what other entry points make of its runs."""

from __future__ import annotations

import json
import math
import pathlib

import pandas as pd
import pytest

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(tmp_path, data_dir) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'synthetic.py'}",
        f"--data_dir={data_dir}",
        "--config.model.hidden=()",
        "--config.model.latent=6",
        "--config.mesh.data=1",
        "--config.train.batch_size=50",
        "--config.train.epochs=2",
        "--config.eval.every_epochs=1",
        f"--workdir={tmp_path / 'pop'}",
    ]


def test_members_are_tested_and_compared(flags, tmp_path, command) -> None:
    done = command("population", *flags, "--members=seed=0,1")
    assert done.status == 0, done.err
    folders = [tmp_path / "pop" / f"seed={s}" for s in (0, 1)]
    for folder in folders:
        assert str(folder.name) in done.out
        done_test = command("main", f"--workdir={folder}", "--test")
        assert done_test.status == 0, done_test.err
    compared = tmp_path / "compared.json"
    done = command("compare", *folders, "--nobaselines", f"--json={compared}")
    assert done.status == 0, done.err
    assert json.loads(compared.read_text())["groups"]["mult_vae"]["seeds"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--members=model.latent=3,4", "model.latent changes the program"),
        ("--config.mesh.data=2", "config.mesh.data=1 and config.mesh.item=1"),
        ("--config.seeed=1", "seeed"),
        ("--data_dir=nosuch", "nosuch"),
        ("--workdir=/proc/nosuch", "cannot be written"),
    ],
)
def test_mistakes_are_one_line(changed, message, flags, command) -> None:
    done = command("population", *flags, "--members=seed=0,1", changed)
    assert done.status == 2
    assert message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_failed_members_and_a_directory_in_use(
    flags, tmp_path, command
) -> None:
    """One of two members fails; the table ranks blends as they are tuned."""
    flags = [*flags, "--config.linear.l2=5", "--config.train.epochs=3"]
    rates = "--members=optimizer.learning_rate=0.01,1e30,0.001"
    done = command("population", *flags, rates)
    assert done.status == 0, done.err
    assert "learning_rate=1e+30 failed: the loss is" in done.out
    rows = pd.read_csv(tmp_path / "pop" / "members.csv").to_dict("records")
    assert len(rows) == 3 and rows[2]["member"] == "learning_rate=1e+30"
    values = [row["validation/ndcg@100"] for row in rows]
    assert values[0] >= values[1] and math.isnan(values[2])
    for row, value in zip(rows[:2], values):
        folder = tmp_path / "pop" / row["member"]
        chosen = json.loads((folder / "linear" / "weights.json").read_text())
        assert value == pytest.approx(chosen["value"])
        results = json.loads((folder / "results.json").read_text())
        assert results["train"]["members"] == 3
        assert results["train"]["epochs"] == row["epochs"] == 3
    best = f"--workdir={tmp_path / 'pop' / rows[0]['member']} --test"
    assert best in done.out
    done = command("population", *flags, rates)
    assert done.status == 2
    assert "holds a trained population" in done.err
    with pytest.raises(VaecfError, match="holds a population"):
        workdir_lib.require_no_other(tmp_path / "pop", "run")


def test_all_members_fail(flags, command) -> None:
    rates = "--members=optimizer.learning_rate=1e30"
    done = command("population", *flags, rates)
    assert done.status == 2
    assert "every member failed" in done.err
