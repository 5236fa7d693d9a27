"""experiments/population.py, and what other entry points make of its runs."""

import math

import pandas as pd
import pytest
from oracles import ROOT, refuses

from vaecf import Recommender, open_dataset
from vaecf import workdir as workdir_lib
from vaecf.workdir import read_json


@pytest.fixture
def flags(tmp_path, data_dir):
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


def test_members_are_tested_and_compared(flags, tmp_path, succeeds):
    """Every combination of the values is a member."""
    rates = "--members=optimizer.learning_rate=1e-3,1"
    out = succeeds("population", *flags, "--members=seed=3,4", rates)
    rows = pd.read_csv(tmp_path / "pop" / "members.csv")
    names = [
        f"seed={s},learning_rate={r}" for s in (3, 4) for r in (0.001, 1.0)
    ]
    assert sorted(rows["member"]) == names
    assert {"seed", "optimizer.learning_rate"} < set(rows.columns)
    assert all(name in out for name in names)
    folders = [tmp_path / "pop" / name for name in names[::2]]
    config = workdir_lib.read_config(folders[1])
    assert (config.seed, config.optimizer.learning_rate) == (4, 0.001)
    for folder in folders:
        succeeds("main", f"--workdir={folder}", "--test")
    compared = tmp_path / "compared.json"
    succeeds("compare", *folders, "--nobaselines", f"--json={compared}")
    assert read_json(compared)["groups"]["mult_vae"]["seeds"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--members=model.latent=3,4", "model.latent changes the program"),
        ("--members=sed=1", "config.sed is not a known key; did you mean seed"),
        ("--members=seed=1", "--members: seed=1 is there twice"),
        ("--members=loss.gamma=0,1,0", "gamma=0.0 is there twice"),
        ("--members=loss.gamma=1,x", "--members=loss.gamma=1,x must be"),
        ("--members=loss.gamma", "--members: give a setting and its values"),
        ("--members=model.dropout_rate=1", "config.model.dropout_rate=1.0 m"),
        ("--config.mesh.data=2", "config.mesh.data=1 and"),
        ("--config.data.feed=streamed", "config.data.feed='resident'"),
        ("--config.seeed=1", "seeed"),
        ("--data_dir=nosuch", "nosuch"),
        ("--workdir=/proc/nosuch", "cannot be written"),
    ],
)
def test_mistakes_are_one_line(changed, message, flags, refused):
    given = [*flags, "--members=seed=0,1", changed]
    refused("population", given, message, writes="streamed" in changed)


def test_failed_members_and_a_second_call(flags, data_dir, tmp_path, succeeds):
    """One of two members fails; the table ranks blends as they are tuned."""
    flags = [*flags, "--config.linear.l2=5", "--config.train.epochs=3"]
    rates = "--members=optimizer.learning_rate=0.01,1e30,0.001"
    out = succeeds("population", *flags, rates)
    data = open_dataset(data_dir)
    assert "learning_rate=1e+30 failed: the loss is" in out
    rows = pd.read_csv(tmp_path / "pop" / "members.csv").to_dict("records")
    assert len(rows) == 3 and rows[2]["member"] == "learning_rate=1e+30"
    values = [row["validation/ndcg@100"] for row in rows]
    assert values[0] >= values[1] and math.isnan(values[2])
    for row, value in zip(rows[:2], values):
        folder = tmp_path / "pop" / row["member"]
        results = read_json(folder / "results.json")
        assert (folder / "linear" / "weights.json").exists()
        tuned = Recommender.load(folder).evaluate(data, split="validation")
        means = tuned.set_index("metric")["mean"]
        assert value == pytest.approx(means["ndcg@100"])
        assert results["train"]["epochs"] == row["epochs"] == 3
    best = f"--test --workdir={tmp_path / 'pop' / rows[0]['member']}"
    assert best in out
    # Nothing is trained again; a member is added.
    before = {row["member"]: row["validation/ndcg@100"] for row in rows[:2]}
    rates = "--members=optimizer.learning_rate=0.01,0.02"
    succeeds("population", *flags, rates)
    again = pd.read_csv(tmp_path / "pop" / "members.csv")
    values = dict(zip(again["member"], again["validation/ndcg@100"]))
    assert set(values) == {"learning_rate=0.01", "learning_rate=0.02"}
    assert values["learning_rate=0.01"] == before["learning_rate=0.01"]
    with refuses("holds a population"):
        workdir_lib.require_no_other(tmp_path / "pop", "run")


def test_all_members_fail(flags, command):
    rates = "--members=optimizer.learning_rate=1e30"
    done = command("population", *flags, rates)
    assert done.status == 2
    # A line of progress may come before.
    assert done.err.splitlines()[-1].startswith("error: every member failed")
