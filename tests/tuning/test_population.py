"""Members out of flags, and what a population leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest

from vaecf import Recommender
from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.data.dataset import find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting.writers import read_records
from vaecf.serving.trained_model import load
from vaecf.tuning import population


def test_every_combination_is_a_member(base):
    members = population.grid(
        ["seed=3,4", "optimizer.learning_rate=1e-3,1"], base
    )
    assert [*members] == [
        "seed=3,learning_rate=0.001",
        "seed=3,learning_rate=1.0",
        "seed=4,learning_rate=0.001",
        "seed=4,learning_rate=1.0",
    ]
    last = members["seed=4,learning_rate=1.0"]
    assert (last.seed, last.optimizer.learning_rate) == (4, 1.0)
    assert (last.train, last.loss) == (base.train, base.loss)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--members is missing"),
        (["sed=1"], "'sed' is not a key of the config; did you mean seed"),
        (["model.latent=3,4"], "model.latent changes the program or the sha"),
        (["seed=1", "seed=2"], "--members=seed=2: seed is there twice"),
        (["seed=1,2,1"], "--members=seed=1,2,1: '1' is there twice"),
        (["seed=1.5"], "'1.5' must be a whole number"),
        (["loss.gamma=1,x"], "'x' must be a number"),
        (["seed"], "--members=seed: give values, such as seed=0"),
        (["seed=1,"], "'' must be a whole number"),
        (["model.dropout_rate=1"], "config.model.dropout_rate=1.0 must be in"),
        (["loss.gamma=nan"], "config.loss.gamma=nan must be finite"),
    ],
)  # fmt: skip
def test_mistakes(flags, message, base):
    with pytest.raises(VaecfError) as error:
        population.grid(flags, base)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_members_are_runs(base, tmp_path):
    """Two that learn, one that is lost; a fourth is added, the best loaded."""
    said = []
    flags = ["optimizer.learning_rate=0.001,0.05,1e30"]
    folder = tmp_path / "pop"
    ranked = population.train(base, flags, folder, log=said.append)
    names = [f"learning_rate={rate}" for rate in ("0.05", "0.001", "1e+30")]
    assert [m.name for m in ranked] == names
    with open(folder / "members.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [r["member"] for r in rows] == names
    assert [r["optimizer.learning_rate"] for r in rows] == ["0.05", "0.001", "1e+30"]  # fmt: skip
    values = [float(r["validation/ndcg@10"]) for r in rows[:2]]
    assert values[0] > values[1] and rows[2]["validation/ndcg@10"] == ""
    assert rows[2]["error"].startswith("the loss is nan")
    for name, value in zip(names, values):
        records = read_records(folder / name / "metrics.jsonl")
        curve = [r["validation/ndcg@10"] for r in records if "validation/ndcg@10" in r]  # fmt: skip
        assert max(curve) == value
        results = json.loads((folder / name / "results.json").read_text())
        assert results["train"]["epochs"] == base.train.epochs
        assert results["train"]["members"] == 3
    text = "\n".join(said)
    assert "learning_rate=1e+30 failed: the loss is nan" in text
    assert text.index("learning_rate=0.05 ") < text.index("learning_rate=0.001 ")  # fmt: skip
    assert f"--workdir={folder / names[0]} --test" in text
    assert len(Recommender.load(folder / names[0]).recommend({"u": []}, k=3))

    more = ["optimizer.learning_rate=0.001,0.02"]
    again = {m.name: m for m in population.train(base, more, folder)}
    assert again[names[1]].position.best == values[1]
    assert again["learning_rate=0.02"].position.epoch == base.train.epochs
    with (
        workdir_lib.locked(folder / names[1]),
        pytest.raises(VaecfError, match="is in use by process"),
    ):
        population.train(base, more, folder)


def test_a_runs_own_directory_is_refused(base, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VaecfError, match=r"holds a run .*: a population needs"):
        population.train(base, ["seed=1"], tmp_path)
    assert not (tmp_path / "seed=1").exists()
    (tmp_path / "config.json").rename(tmp_path / "sweep.json")
    with pytest.raises(VaecfError, match=r"holds a sweep .*: a population"):
        population.train(base, ["seed=1"], tmp_path)
    (tmp_path / "sweep.json").rename(tmp_path / "members.csv")
    with pytest.raises(VaecfError, match=r"holds a population .*: a run needs"):
        workdir_lib.check_or_create(tmp_path, base, None)


def test_blends_are_ranked_by_what_they_are_weighed_to(base, tmp_path):
    path = config_lib.LinearConfig(
        l2=5.0, dropout=0.3, user_exponent=0.0, rank=0
    )
    blend = dataclasses.replace(base, linear=path)
    ranked = population.train(blend, ["seed=1,2,3"], tmp_path)
    with open(tmp_path / "members.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["member"] for row in rows] == [m.name for m in ranked]
    values = [float(row["validation/ndcg@10"]) for row in rows]
    assert values == sorted(values, reverse=True)
    validation = Evaluator.for_split(
        find_dataset(base.data.dir),
        "validation",
        base.eval,
        mesh_lib.make_mesh(),
    )
    for row, member, value in zip(rows, ranked, values):
        # Ranked anew by what a user would load.
        model = load(tmp_path / row["member"])
        summary = validation.summary(model.ranker(10), model.scorer_params)
        assert value == pytest.approx(summary["ndcg@10"]["mean"])
        assert value >= member.position.best
    assert any(v > m.position.best for v, m in zip(values, ranked))


def test_all_fail(base, tmp_path):
    with pytest.raises(VaecfError, match="every member failed, see above"):
        population.train(base, ["optimizer.learning_rate=1e30"], tmp_path)
