"""Tuning of a blend's weights, compared with scores in NumPy."""

import dataclasses
import shutil

import numpy as np
import oracles
import pytest
from oracles import generated, item_item, ranked, refuses

from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data.dataset import open_dataset, write_dataset
from vaecf.evaluation import blend_tuning
from vaecf.evaluation.evaluator import Evaluation, Evaluator
from vaecf.models import blend
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import trained_model
from vaecf.training import linear_branch
from vaecf.workdir import read_json


def made(directory, **changes):
    small = {
        "data.dir": str(directory),
        "model.hidden": (8,),
        "model.latent": 4,
        "linear.l2": 5.0,
        "linear.experts": ("ease",),
        "train.epochs": 2,
        "train.batch_size": 32,
        "train.ema": 0.9,
        "eval.metrics": ("ndcg@10", "recall@5"),
        "eval.best_metric": "ndcg@10",
    }
    return config_lib.replace(config_lib.Config(), small | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("blend") / "data"
    return write_dataset(path, generated(90, 40, 60, 3)).path


@pytest.fixture(scope="module", params=[0, 5], ids=["whole", "low rank"])
def done(request, data, tmp_path_factory):
    """(workdir, logged lines, results) of a run."""
    workdir = tmp_path_factory.mktemp("blend") / "run"
    lines = []
    results = experiment.run(
        made(data, **{"linear.rank": request.param}),
        workdir,
        experiment.Actions(train=True, test=True),
        log=lines.append,
    )
    return workdir, lines, results


def arrays_of(model):
    return [name for name in model.branch if name in blend.PARTITION]


def split_of(model, data, split="validation", **changes):
    config = dataclasses.replace(model.config.eval, **changes)
    mesh = model.mesh
    return Evaluator.for_split(open_dataset(data), split, config, mesh)


def ndcg_U(model, dataset, gain, prior):
    """NDCG@10 of each validation user, from scores in NumPy."""
    held = dataset.validation
    x = held.fold_in.to_scipy().toarray().astype(np.float64)
    alone = dataclasses.replace(model, branch=None)
    depth = dataset.n_items
    lists = alone.ranker(depth, exclude_seen=False)(
        alone.scorer_params,
        held.fold_in.indptr,
        held.fold_in.indices,
        batch_size=64,
    )
    logits = np.empty_like(x)
    np.put_along_axis(logits, lists.item_UK, lists.score_UK, axis=1)
    weights = item_item(model.branch, depth)
    share = (dataset.train.item_counts() + 5) / (dataset.train.n_users + 5)
    linear = np.log(np.maximum(x @ weights, 0) + 0.003)
    scores = logits + gain * (linear - prior * np.log(share))
    scores[x > 0] = -np.inf
    wanted = [set(held.held_out.row(u)) for u in range(len(x))]
    return np.array(
        [oracles.ndcg(ranked(s, ()), w, 10) for s, w in zip(scores, wanted)]
    )


def test_weights_are_those_of_a_cautious_search(data, done):
    dataset = open_dataset(data)
    model = trained_model.load(done[0])
    validation = split_of(model, data)
    found = blend_tuning.search(
        validation, model.ranker(10), model.scorer_params, split_again=False
    )
    assert found["users"] == validation.fold_in.n_users
    assert found["splits"] == 1
    values = {}
    for t in found["tried"]:
        at = t["gain"], t["prior"]
        values[at] = ndcg_U(model, dataset, *at)
        assert t["value"] == pytest.approx(values[at].mean(), abs=1e-4), at
    # First the gain, then single moves; both for a gain above the standard error.
    line = [(1.4 * factor, 0.2) for factor in blend_tuning.FACTORS]
    assert found["model_alone"] == pytest.approx(
        values[0, 0.2].mean(), abs=1e-4
    )

    def certain(at):
        gain_U = values[at] - values[start]
        error = gain_U.std(ddof=1) / np.sqrt(len(gain_U))
        return gain_U.mean() - error

    start = 1.4, 0.2
    best = max(line, key=lambda at: values[at].mean())
    start = best if certain(best) > 0 else start
    chosen = found["gain"], found["prior"]
    moves = [at for at in values if at not in line]
    assert chosen == start or certain(chosen) > 0
    assert certain(chosen) >= max(map(certain, [start, *moves])) - 1e-4
    assert (start[0], 0.3) in values and (start[0], 0.1) in values


def test_results_are_those_of_the_chosen_weights(data, done):
    workdir, lines, results = done
    kept = read_json(workdir / "linear" / "weights.json")
    assert kept["splits"] == 10
    for name, weight in results["linear"].items():
        assert weight == pytest.approx(kept[name]), name
    model = trained_model.load(workdir)
    expected = ndcg_U(model, open_dataset(data), kept["gain"], kept["prior"])
    validation = results["validation"]["ndcg@10"]["mean"]
    assert validation == pytest.approx(expected.mean(), abs=1e-4)
    assert any("linear branch: gain" in line for line in lines)


def test_few_histories_are_split_again_and_many_users_sampled(
    data, done, monkeypatch
):
    model = trained_model.load(done[0])
    whole = split_of(model, data)
    asked, n_splits = blend_tuning._users_to_ask(whole, True)
    n = whole.fold_in.n_users
    assert n_splits == 10 and asked.fold_in.n_users == 10 * n
    held = set()
    for row in range(10 * n):
        seen, left = asked.fold_in.row(row), asked.held_out.row(row)
        known = whole.fold_in.row(row % n), whole.held_out.row(row % n)
        assert len(left) == len(known[1])
        assert sorted([*seen, *left]) == sorted(np.concatenate(known))
        held.add((row % n, *left))
    assert len(held) > 5 * n
    once, n_splits = blend_tuning._users_to_ask(whole, False)
    assert n_splits == 1
    np.testing.assert_array_equal(once.held_out.indices, whole.held_out.indices)
    monkeypatch.setattr(blend_tuning, "_MOST_USERS", n - 2)
    some, _ = blend_tuning._users_to_ask(whole, False)
    rows = {tuple(whole.held_out.row(u)) for u in range(n)}
    assert some.held_out.n_users == n - 2
    assert {tuple(some.held_out.row(u)) for u in range(n - 2)} <= rows


@pytest.mark.parametrize("noise, prior", [(1.0, 0.2), (0.001, 0.3)])
def test_a_gain_within_the_noise_moves_no_weight(
    data, done, monkeypatch, noise, prior
):
    model = trained_model.load(done[0])
    validation = split_of(model, data)
    user_U = np.arange(validation.fold_in.n_users)

    def better_with_more_prior(self, ranker, params):
        at = float(params.linear["prior"])
        value_U = -abs(at - 0.3) + noise * np.sin(user_U * 7 + 100 * at)
        summary = {"ndcg@10": {"mean": value_U.mean()}}
        return Evaluation(summary, {"ndcg@10": value_U}, 0, None)

    monkeypatch.setattr(Evaluator, "__call__", better_with_more_prior)
    found = blend_tuning.search(validation, None, model.scorer_params)
    assert found["prior"] == pytest.approx(prior)
    assert found["gain"] == pytest.approx(1.4)


def test_weights_are_tuned_once_per_best_epoch(data, done, monkeypatch):
    workdir, _, _ = done
    model = trained_model.load(workdir)
    before = linear_branch.read_weights(workdir)
    lines = []
    # The tuning metric need not be one of those that are shown.
    validation = split_of(model, data, metrics=("recall@5",))
    again = trained_model.tune_blend(model, validation, log=lines.append)
    assert lines == []
    assert float(again.branch["gain"]) == float(model.branch["gain"])
    later = dataclasses.replace(model, progress=model.progress | {"epoch": 99})
    monkeypatch.setattr(
        linear_branch, "write_weights", lambda _, found: lines.append(found)
    )
    trained_model.tune_blend(later, validation, log=lines.append)
    assert lines[0]["epoch"] == 99 and "linear branch" in lines[1]
    for name in ("gain", "prior", "metric", "value"):
        assert lines[0][name] == before[name]


def test_a_branch_that_only_harms_has_no_weight(data, done, monkeypatch):
    monkeypatch.setattr(linear_branch, "read_weights", lambda _: {})
    monkeypatch.setattr(linear_branch, "write_weights", lambda *_: None)

    def worse_with_it(self, ranker, params):
        value = 1 / (1 + float(params.linear["gain"]))
        return Evaluation({"ndcg@10": {"mean": value}}, {}, 0, None)

    monkeypatch.setattr(Evaluator, "__call__", worse_with_it)
    model = trained_model.load(done[0])
    validation = split_of(model, data)
    chosen = trained_model.tune_blend(model, validation)
    assert float(chosen.branch["gain"]) == 0.0
    # Without validation users the model keeps its weights.
    nobody = validation.held_out.rows(np.zeros(0, int))
    empty = dataclasses.replace(validation, held_out=nobody)
    assert trained_model.tune_blend(model, empty) is model


def test_a_branch_on_item_shards(data, done, tmp_path):
    workdir, _, results = done
    gone = shutil.copytree(workdir, tmp_path / "gone")
    model = trained_model.load(gone, mesh=mesh_lib.make_mesh(2, 4))
    shutil.rmtree(gone)
    for name in arrays_of(model):
        array = model.branch[name]
        part = array.addressable_shards[0].data
        assert part.size == array.size // 4, name
    test = split_of(model, data, "test")
    found = test(model.ranker(test.depth), model.scorer_params).summary
    for name, cell in results["test"].items():
        assert found[name]["mean"] == pytest.approx(cell["mean"], abs=1e-6)
    assert model.branch["log_share"].shape[0] > len(model.items)
    model.save(tmp_path / "copy")
    for name in arrays_of(model):
        mine, its = (
            (folder / "linear" / f"{name}.npy").read_bytes()
            for folder in (tmp_path / "copy", workdir)
        )
        assert mine == its, name
    kept, before = map(linear_branch.read_weights, (tmp_path / "copy", workdir))
    for name in ("gain", "prior"):
        assert kept[name] == pytest.approx(before[name])
    with refuses("no saved model"):
        model.save(workdir, overwrite=True)  # a workdir is never replaced
