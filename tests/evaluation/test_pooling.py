"""Pooled cells against all users' values together."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaecf.evaluation.evaluator import mean_and_stderr
from vaecf.evaluation.pooling import pool, pool_cells

METRIC = "ndcg@10"


@given(st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1))
def test_pooled_cells_are_those_of_all_values(folds):
    cells = [mean_and_stderr(np.array(values)) for values in folds]
    every = np.concatenate([np.array(values) for values in folds])
    expected = mean_and_stderr(every)
    assert pool_cells(cells) == {
        key: pytest.approx(value, abs=1e-7) if value is not None else None
        for key, value in expected.items()
    }


def test_a_metric_without_values_per_user():
    """Coverage: the mean of the folds, by users."""
    cells = [
        {"mean": 0.2, "stderr": None, "users": 3},
        {"mean": 0.6, "stderr": None, "users": 1},
    ]
    assert pool_cells(cells) == {
        "mean": pytest.approx(0.3), "stderr": None, "users": 4,
    }  # fmt: skip


def fold(number, l2, with_baseline=True):
    """Five users, the second of whom has nothing held out."""
    rng = np.random.default_rng(number)
    results = {"train": {"best_epoch": number}, "users_left_out": 1}
    results["refit"] = True
    frames = {}
    for name in ("own", "ease")[: 1 + with_baseline]:
        values = rng.random(5)
        values[1] = np.nan
        cells = {METRIC: mean_and_stderr(values)}
        part = {"validation": cells, "test": cells}
        # As if all held-out items were in the head.
        part["item_popularity"] = [{"bucket": "head", **cells[METRIC]}]
        label = name
        if name == "ease":
            results["ease"] = {**part, "l2": l2, "fit_seconds": 2.0}
            label = f"ease (l2 {l2:g})"
        else:
            results |= part
        frames[label] = pl.DataFrame(
            {
                "model": [label] * 5,
                "user": [f"{number}-{u}" for u in range(5)],
                "fold_in": [1, 2, 3, 4, 5],
                "held_out": [1, 0, 1, 1, 1],
                METRIC: values,
            }
        )
    return results, frames


@pytest.mark.parametrize("settings", [(500.0, 500.0), (500.0, 200.0)])
def test_models_are_pooled_by_name(settings):
    folds = [fold(n, l2) for n, l2 in enumerate(settings)]
    pooled, frames = pool(folds, "own", METRIC)
    same = settings[0] == settings[1]
    ease = f"ease ({'l2 500' if same else 'tuned per fold'})"
    assert list(frames) == ["own", ease]
    assert pooled["ease"].get("l2") == (500.0 if same else None)
    assert [f["ease"]["l2"] for f in pooled["folds"]] == [*settings]
    assert pooled["ease"]["fit_seconds"] == 4.0
    assert pooled["users_left_out"] == 2 and pooled["refit"] is True
    for label, cells in (
        ("own", pooled["test"]),
        (ease, pooled["ease"]["test"]),
    ):
        part = frames[label]
        assert part["model"].unique().to_list() == [label]
        assert part["user"].to_list() == [
            f"{n}-{u}" for n in (0, 1) for u in range(5)
        ]
        values = part[METRIC].to_numpy()
        real = values[~np.isnan(values)]
        assert cells[METRIC] == {
            "mean": pytest.approx(real.mean(), abs=1e-12),
            "stderr": pytest.approx(real.std(ddof=1) / math.sqrt(8)),
            "users": 8,
        }
    for model in (pooled, pooled["ease"]):
        lengths = model["history_length"]
        assert sum(row["users"] for row in lengths) == 8
        (head,) = model["item_popularity"]
        assert head == {"bucket": "head", **model["test"][METRIC]}
    assert "item_popularity" not in pooled["folds"][0]["ease"]


def test_a_baseline_of_one_fold_is_left_out():
    folds = [fold(0, 500.0), fold(1, 500.0, with_baseline=False)]
    pooled, frames = pool(folds, "own", METRIC)
    assert "ease" not in pooled and list(frames) == ["own"]


def test_without_a_test():
    folds = [fold(n, 500.0, with_baseline=False) for n in (0, 1)]
    for results, _ in folds:
        del results["test"]
    pooled, frames = pool(folds, "own", METRIC)
    assert pooled["validation"][METRIC]["users"] == 8
    assert "test" not in pooled and frames == {}
