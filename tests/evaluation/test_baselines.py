"""Baselines: tuned on the validation users, equal on every mesh."""

import dataclasses
import itertools
import weakref

import numpy as np
import pytest
from oracles import generated, refuses

from vaecf.config import EvalConfig
from vaecf.evaluation import baselines, scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import linear
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting import progress
from vaecf.setting import setting

METRICS = ("ndcg@10", "recall@5")
GRIDS = {
    "itemknn": {"neighbours": (2, 5, 30), "shrinkage": (0.0, 5.0)},
    "ials": {"factors": (3, 5), "l2": (0.01, 0.1), "alpha": (0.1, 1.0)},
    "ease": {"l2": (1.0, 10.0, 100.0)},
}
CHANGES = {"ials": {"factors": 3, "l2": 0.01, "alpha": 0.1, "iterations": 3}}


@pytest.fixture(scope="module")
def data():
    return generated(80, 24, 40, 4)


@pytest.fixture
def small_grids(monkeypatch):
    for name, grids in GRIDS.items():
        baseline = baselines.BASELINES[name]
        settings = {
            key: setting(
                field.default,
                "",
                field.metadata["rule"],
                grid=grids.get(key, ()),
            )
            for key, field in baseline.settings.items()
        }
        monkeypatch.setitem(
            baselines.BASELINES, name, baseline._replace(settings=settings)
        )


def evaluators(dataset, mesh=(1, 1)):
    config = EvalConfig(metrics=METRICS, batch_size=16, best_metric="ndcg@10")
    return [
        Evaluator.for_split(dataset, split, config, mesh_lib.make_mesh(*mesh))
        for split in ("validation", "test")
    ]


def run(name, dataset, mesh=(1, 1), **how):
    return baselines.evaluate(
        name, *evaluators(dataset, mesh), changes=CHANGES.get(name), **how
    )


def fresh_values(name, settings, evaluator):
    """NDCG@10 of a new fit with each of the settings."""
    ranker = evaluator.compile(scorers.fitted(name, evaluator.train.n_items))
    fit = baselines.BASELINES[name].model.fit
    return [
        evaluator.best_value(ranker, ranker.place(fit(evaluator.train, **s)))
        for s in settings
    ]


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_tuning_chooses_the_best_by_validation(name, data, small_grids):
    lines = []
    result, on_test = run(name, data, tuned=True, log=lines.append)
    start = baselines.settings(name, CHANGES.get(name))
    chosen = {key: result[key] for key in start}
    grids = {
        key: sorted({*grid, start[key]})
        for key, grid in baselines.BASELINES[name].grids.items()
    }
    settings = [
        start | dict(zip(grids, values))
        for values in itertools.product(*grids.values())
    ]
    validation, test = evaluators(data)
    values = fresh_values(name, settings, validation)
    best = pytest.approx(values[settings.index(chosen)])
    assert result["validation"]["ndcg@10"]["mean"] == best
    assert result["test"] == on_test.summary
    assert result["test"]["ndcg@10"]["mean"] == pytest.approx(
        *fresh_values(name, [chosen], test)
    )
    assert result["fit_seconds"] > 0
    if name == "popularity":
        assert "tuned" not in result and lines == []
        return
    tuned = result["tuned"]
    assert tuned["metric"] == "ndcg@10" and tuned["value"] == best
    assert len(set(values)) > 1  # the candidates differ
    tried = {}
    for t in tuned["tried"]:
        at = settings.index({key: t[key] for key in start})
        tried[at] = t["value"]
        assert t["value"] == pytest.approx(values[at])
    assert len(tried) == len(tuned["tried"])  # none twice
    assert settings.index(start) in tried
    assert max(tried.values()) == best
    # All neighbours of the chosen settings were tried.
    directions = baselines.BASELINES[name].directions
    for direction in directions or [{key: 1} for key in grids]:
        for sign in (1, -1):
            at = {
                key: grids[key].index(chosen[key]) + sign * step
                for key, step in direction.items()
            }
            if all(0 <= i < len(grids[key]) for key, i in at.items()):
                other = chosen | {key: grids[key][i] for key, i in at.items()}
                assert settings.index(other) in tried
    assert f"best of {len(tried)} by validation ndcg@10" in lines[-1]
    assert baselines.label(name, result) in lines[-1]


def test_a_search_logs_its_candidates_and_keeps_the_last_fit(
    data, monkeypatch, small_grids
):
    fit, lines, held = linear.fit, [], []

    def watched(train, l2):
        assert all(reference() is None for reference in held)
        params = fit(train, l2)
        held.append(weakref.ref(params["item_item"]))
        return params

    monkeypatch.setattr(linear, "fit", watched)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    result, _ = run("ease", data, tuned=True, log=lines.append)
    assert len(held) >= 3
    for line, t in zip(lines[:-1], result["tuned"]["tried"], strict=True):
        assert f"ease (l2 {t['l2']:g})" in line
        assert f"{t['value']:.4f}" in line


@pytest.mark.parametrize(
    ("name", "mesh"), [("itemknn", (2, 2)), ("ials", (1, 4))]
)
def test_the_same_lists_on_every_mesh(name, mesh, data):
    (_, one), (_, several) = run(name, data), run(name, data, mesh)
    np.testing.assert_allclose(
        one.lists.score_UK, several.lists.score_UK, atol=1e-5
    )
    if name == "itemknn":
        # Sums of equal numbers. Rounding may reorder near ties of iALS.
        same = one.lists.item_UK == several.lists.item_UK
        assert same.mean() > 0.99
    for metric in METRICS:
        assert one.summary[metric]["mean"] == pytest.approx(
            several.summary[metric]["mean"], abs=1e-3
        )


def test_tuning_needs_validation_users(data):
    validation, test = (
        dataclasses.replace(e, held_out=e.held_out.rows(np.zeros(0, int)))
        for e in evaluators(data)
    )
    with refuses(r"ndcg@10 .*validation users"):
        baselines.evaluate("ease", validation, test, tuned=True)
    untuned, on_test = baselines.evaluate("ease", validation, test)
    assert untuned["l2"] == 500 and "tuned" not in untuned
    assert untuned["test"] == on_test.summary == {}


def test_settings_and_labels():
    assert baselines.settings("ease", {"l2": 3.0}) == {"l2": 3.0}
    assert baselines.settings("itemknn") == {"neighbours": 100, "shrinkage": 0}
    assert baselines.label("popularity", {"test": {}}) == "popularity"
    assert (
        baselines.label("itemknn", {"neighbours": 100, "shrinkage": 0.0})
        == "itemknn (neighbours 100, shrinkage 0)"
    )
    for name, changes, message in (
        ("esae", {}, r"'esae' is unknown.*did you mean ease"),
        ("ease", {"l1": 3.0}, r"ease_l1 .*did you mean l2"),
        ("ease", {"l2": float("nan")}, "ease_l2=nan must be above 0"),
        ("ials", {"factors": 0}, "ials_factors=0 must be at least 1"),
        (
            "itemknn",
            {"shrinkage": -1.0},
            "itemknn_shrinkage=-1 must be at least 0",
        ),
    ):
        with refuses(message):
            baselines.settings(name, changes)


def test_grouped_results():
    cell = {"ndcg@100": {"mean": 0.5, "stderr": 0.1, "users": 9}}
    both = {"test": cell, "validation": cell}
    results = {
        "train": {"seconds": 1.0},
        "inference": {"batch_1_mean_latency": 1.0},
        **both,
        "users_left_out": 2,
        "popularity": both,
        "oracle": both,
    }
    assert baselines.grouped(results) == {
        "train": {"seconds": 1.0},
        "validation": cell,
        "test": cell,
        "users_left_out": 2,
        "baselines": {"popularity": both},
        "references": {"oracle": both},
    }
    assert baselines.grouped({}) == {"baselines": {}, "references": {}}
