"""Pools the results of folds: every user counts once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.evaluation import baselines
from vaecf.evaluation.baselines import BASELINES
from vaecf.evaluation.evaluator import by_history_length

if TYPE_CHECKING:
    import polars as pl

# One fold: the content of its results.json, and its per-user metrics by model.
Fold = tuple[Mapping[str, Any], Mapping[str, "pl.DataFrame"]]


def pool(
    folds: Sequence[Fold], model: str, metric: str
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """Returns results and per-user metrics over the users of all folds.

    Both are like those of a single run. A baseline counts if all folds have
    it. Its settings are given if they are the same in all folds; the entry
    'folds' has those of each fold.

    Args:
      model: name of the model that the folds trained.
      metric: the metric of the groups (`Evaluator.groups`). The head of the
        catalogue may differ between folds.
    """
    every = [results for results, _ in folds]
    pooled: dict[str, Any] = {"validation": _pool_split(every, "validation")}
    frames: dict[str, pl.DataFrame] = {}
    if all("test" in results for results in every):
        pooled["test"] = _pool_split(every, "test")
        pooled["users_left_out"] = sum(r["users_left_out"] for r in every)
        frames[model] = _concatenated([f[model] for _, f in folds], model)
        pooled |= _pool_groups(every, frames[model], metric)
    if any("refit" in results for results in every):
        pooled["refit"] = all(results.get("refit") for results in every)
    for name in BASELINES:
        if not all(name in results for results in every):
            continue
        of_folds = [results[name] for results in every]
        keys = [key for key in BASELINES[name].settings if key in of_folds[0]]
        settings = [{key: r[key] for key in keys} for r in of_folds]
        is_common = settings.count(settings[0]) == len(folds)
        pooled[name] = {
            "validation": _pool_split(of_folds, "validation"),
            "fit_seconds": sum(r["fit_seconds"] for r in of_folds),
            "test": _pool_split(of_folds, "test"),
            **(settings[0] if is_common else {}),
        }
        label = baselines.label(name, pooled[name])
        parts = [f[baselines.label(name, r[name])] for r, f in folds]
        frames[label] = _concatenated(parts, label)
        pooled[name] |= _pool_groups(of_folds, frames[label], metric)
    names = ("train", "linear", *BASELINES)
    pooled["folds"] = [
        {
            name: {
                key: value
                for key, value in results[name].items()
                if not isinstance(value, Mapping | list)
            }
            for name in names
            if name in results
        }
        for results in every
    ]
    return pooled, frames


def _concatenated(parts: Sequence[pl.DataFrame], model: str) -> pl.DataFrame:
    import polars as pl

    return pl.concat(parts).with_columns(model=pl.lit(model))


def _pool_groups(
    results: Sequence[Mapping[str, Any]], frame: pl.DataFrame, metric: str
) -> dict[str, list[dict[str, Any]]]:
    """Returns the groups of one model over all users; `frame` has them all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    if metric in frame.columns:
        values, lengths = (frame[key].to_numpy() for key in (metric, "fold_in"))
        groups["history_length"] = by_history_length(values, lengths)
    key = "item_popularity"
    if all(key in result for result in results):
        groups[key] = [
            {"bucket": rows[0]["bucket"], **pool_cells(rows)}
            for rows in zip(*(result[key] for result in results), strict=True)
        ]
    return groups


def _pool_split(
    results: Sequence[Mapping[str, Any]], split: str
) -> dict[str, dict[str, Any]]:
    summaries = [r[split] for r in results]
    return {
        metric: pool_cells([summary[metric] for summary in summaries])
        for metric in summaries[0]
        if all(metric in summary for summary in summaries)
    }


def pool_cells(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns mean and standard error over the users of all cells.

    The result is that of `mean_and_stderr` on all users' values, up to
    rounding. A metric without values per user, such as coverage, has the mean
    of the folds, weighted by their users, and no standard error.

    Args:
      cells: {'mean', 'stderr', 'users'} of disjoint users.
    """
    cells = [cell for cell in cells if cell["mean"] is not None]
    users = np.array([cell["users"] for cell in cells])
    n = int(users.sum())
    if not n:
        return {"mean": None, "stderr": None, "users": 0}
    means = np.array([cell["mean"] for cell in cells])
    mean = float(users @ means / n)
    # Squared deviations from the common mean: within and between the folds.
    squares = float(users @ (means - mean) ** 2)
    has_stderr = n > 1
    for cell in cells:
        if cell["stderr"] is not None:
            squares += cell["stderr"] ** 2 * cell["users"] * (cell["users"] - 1)
        elif cell["users"] > 1:
            has_stderr = False
    stderr = math.sqrt(squares / (n - 1) / n) if has_stderr else None
    return {"mean": mean, "stderr": stderr, "users": n}
