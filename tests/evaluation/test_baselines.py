"""Baselines chosen on the validation users, and the same on every mesh."""

from __future__ import annotations

import itertools
import types
import weakref

import numpy as np
import pytest

from vaecf.data import synthetic
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines, evaluator, ranking
from vaecf.parallel import mesh as mesh_lib

METRICS = ("ndcg@10", "recall@5")
GRIDS = {
    "popularity": {},
    "itemknn": {"neighbours": (2, 5, 30), "shrinkage": (0.0, 5.0)},
    "ials": {"l2": (0.01, 0.1), "alpha": (0.1, 1.0), "factors": (3, 5)},
    "ease": {"l2": (1.0, 10.0, 100.0)},
}
SETTINGS = baselines.Settings(ials_factors=3, ials_iterations=3)


@pytest.fixture(scope="module")
def data():
    return synthetic.make(
        "synthetic",
        n_train_users=80,
        n_held_out_users=24,
        n_items=40,
        n_groups=4,
    )


def model(data: int = 1, item: int = 1, metrics=METRICS):
    """What the baselines ask of a model."""
    return types.SimpleNamespace(
        setup=types.SimpleNamespace(mesh=mesh_lib.make_mesh(data, item)),
        config=types.SimpleNamespace(
            eval=types.SimpleNamespace(
                metrics=metrics, batch_size=16, best_metric="ndcg@10"
            )
        ),
    )


def value(scorer, held, data) -> float:
    """NDCG@10 of a split, without `baselines`."""
    ranker = ranking.Ranker(scorer, mesh_lib.make_mesh(1, 1), 10)
    ranked = ranker(
        scorer.params, held.fold_in.indptr, held.fold_in.indices, batch_size=64
    )
    share = data.train.item_counts() / data.train.n_users
    result = evaluator.from_ranked(
        ranked, held.held_out, names=METRICS, item_share_I=share
    )
    return result.summary["ndcg@10"]["mean"]


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_the_best_of_the_grid_on_validation(name, data, monkeypatch):
    monkeypatch.setattr(baselines, "GRIDS", GRIDS)
    result, test = baselines.evaluate(name, model(), data, SETTINGS, tuned=True)
    given = SETTINGS.of(name)
    grids = {k: sorted({*grid, given[k]}) for k, grid in GRIDS[name].items()}
    settings = [
        given | dict(zip(grids, values))
        for values in itertools.product(*grids.values())
    ]
    fitted = [baselines.fit(name, data.train, s) for s in settings]
    values = [value(scorer, data.validation, data) for scorer in fitted]
    chosen = {key: result[key] for key in given}
    best = settings.index(chosen)
    assert result["validation"]["ndcg@10"]["mean"] == pytest.approx(
        values[best]
    )
    assert result["test"] == test.summary
    assert result["test"]["ndcg@10"]["mean"] == pytest.approx(
        value(fitted[best], data.test, data)
    )
    assert result["fit_seconds"] > 0
    if name == "popularity":
        assert "tuned" not in result
        assert baselines.tuned_line(name, result) is None
        return
    tuned = result["tuned"]
    assert tuned["metric"] == "ndcg@10"
    assert tuned["value"] == pytest.approx(values[best])
    assert len(set(values)) > 1  # a grid whose choices differ
    of_tried = {}
    for t in tuned["tried"]:
        its = {key: t[key] for key in given}
        of_tried[settings.index(its)] = t["value"]
        assert t["value"] == pytest.approx(values[settings.index(its)])
    assert len(of_tried) == len(tuned["tried"])  # none twice
    assert settings.index(given) in of_tried  # what it begins with
    assert values[best] == pytest.approx(max(of_tried.values()))
    turns = [{key: 1} for key in grids]
    if name == "ials":
        turns = [{"l2": 1}, {"alpha": 1, "l2": -1}]
    for turn in turns:
        for sign in (1, -1):  # no neighbour is better
            at = {k: grids[k].index(chosen[k]) + sign * turn[k] for k in turn}
            if all(0 <= i < len(grids[k]) for k, i in at.items()):
                other = chosen | {k: grids[k][i] for k, i in at.items()}
                assert settings.index(other) in of_tried
    line = baselines.tuned_line(name, result)
    assert f"best of {len(of_tried)} by validation ndcg@10" in line
    assert baselines.label(name, result) in line


def test_a_long_grid_says_how_far_it_is(data, monkeypatch):
    monkeypatch.setattr(baselines, "GRIDS", GRIDS)
    monkeypatch.setattr(baselines, "_SECONDS_BETWEEN_LINES", 1e9)
    lines = []
    baselines.evaluate(
        "ease", model(), data, SETTINGS, tuned=True, log=lines.append
    )
    assert not lines
    monkeypatch.setattr(baselines, "_SECONDS_BETWEEN_LINES", -1.0)
    result, _ = baselines.evaluate(
        "ease", model(), data, SETTINGS, tuned=True, log=lines.append
    )
    for line, t in zip(lines, result["tuned"]["tried"], strict=True):
        assert line == (
            f"tried ease (l2 {t['l2']:g}): ndcg@10 {t['value']:.4f} of the "
            "validation users"
        )


def test_one_matrix_of_a_grid_is_held_at_a_time(data, monkeypatch):
    fit, held = baselines.fit, []

    def watched(name, train, settings):
        assert all(reference() is None for reference in held)
        scorer = fit(name, train, settings)
        held.append(weakref.ref(scorer.params["item_item"]))
        return scorer

    monkeypatch.setattr(baselines, "GRIDS", GRIDS)
    monkeypatch.setattr(baselines, "fit", watched)
    baselines.evaluate("ease", model(), data, SETTINGS, tuned=True)
    assert len(held) >= 3


@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)])
@pytest.mark.parametrize("name", ["itemknn", "ials"])
def test_the_same_lists_on_every_mesh(name, mesh, data):
    (_, one), (_, several) = (
        baselines.evaluate(name, model(*m), data, SETTINGS)
        for m in ((1, 1), mesh)
    )
    np.testing.assert_allclose(
        one.ranked.score_UK, several.ranked.score_UK, atol=1e-5
    )
    if name == "itemknn":
        # Sums of the same numbers; rounding may order iALS' near ties.
        same = one.ranked.item_UK == several.ranked.item_UK
        assert same.mean() > 0.99
    for metric in METRICS:
        assert one.summary[metric]["mean"] == pytest.approx(
            several.summary[metric]["mean"], abs=1e-3
        )


def test_tuning_needs_the_metric(data):
    with pytest.raises(VaecfError, match="--baselines_tuned chooses by ndcg"):
        baselines.evaluate(
            "ease", model(metrics=("recall@5",)), data, SETTINGS, tuned=True
        )
    untuned, _ = baselines.evaluate(
        "ease", model(metrics=("recall@5",)), data, SETTINGS
    )
    assert untuned["l2"] == 500 and "tuned" not in untuned


def test_labels_and_settings():
    assert set(baselines.GRIDS) == set(baselines.BASELINES)
    for name, grid in baselines.GRIDS.items():
        assert set(grid) <= set(baselines.Settings().of(name))
    assert baselines.label("popularity", {"test": {}}) == "popularity"
    assert (
        baselines.label("itemknn", {"neighbours": 100, "shrinkage": 0.0})
        == "itemknn (neighbours 100, shrinkage 0)"
    )
