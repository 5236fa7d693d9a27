"""Held-out users → per-user values → means and standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vaecf.evaluation import metrics
from vaecf.evaluation.ranking import Ranked, Ranker


class Evaluation(NamedTuple):
    """Result of evaluating one scorer on one split.

    Attributes:
      summary: {'ndcg@100': {'mean', 'stderr', 'users'}, ...}; coverage has no
        standard error (None), being one number of all lists.
      per_user: {'ndcg@100': float64 [U], ...}, NaN for users left out.
      users: users with at least one held-out item.
      left_out: users with none.
      ranked: the lists themselves.
    """

    summary: dict[str, dict[str, Any]]
    per_user: dict[str, np.ndarray]
    users: int
    left_out: int
    ranked: Ranked


def evaluate(
    ranker: Ranker,
    params: Any,
    fold_in: Any,
    held_out: Any,
    *,
    names: Sequence[str],
    batch_size: int,
    item_share_I: np.ndarray,
) -> Evaluation:
    """Ranks the fold-in users and compares with what was held out.

    Args:
      ranker: ranks at least as deep as the metrics look.
      params: the scorer's parameters.
      fold_in: `data.interactions.Interactions`, what the model sees.
      held_out: Interactions of the same users, what it must find.
      names: metrics, e.g. ('ndcg@100', 'recall@20').
      batch_size: users a block.
      item_share_I: float [I], share of training users who have the item.
    """
    ranked = ranker(
        params, fold_in.indptr, fold_in.indices, batch_size=batch_size
    )
    return from_ranked(ranked, held_out, names=names, item_share_I=item_share_I)


def from_ranked(
    ranked: Ranked,
    held_out: Any,
    *,
    names: Sequence[str],
    item_share_I: np.ndarray,
) -> Evaluation:
    """Metrics of lists that are there already; arguments as in `evaluate`."""
    # Ranks that the lists do not have would count as misses.
    wanted = min(metrics.depth(names), len(item_share_I))
    if ranked.item_UK.shape[1] < wanted:
        raise ValueError(
            f"lists of {ranked.item_UK.shape[1]} items, and the metrics look "
            f"at {wanted}"
        )
    n_held_out_U = np.diff(held_out.indptr)
    hits_UK = metrics.hits(ranked.item_UK, held_out.indptr, held_out.indices)
    evaluated_U = n_held_out_U > 0
    per_user: dict[str, np.ndarray] = {}
    summary: dict[str, dict[str, Any]] = {}
    for name in names:
        metric = metrics.parse(name)
        if metric.kind == "coverage":
            value = metrics.coverage(
                ranked.item_UK[evaluated_U], len(item_share_I), metric.k
            )
            users = int(evaluated_U.sum())
            summary[name] = {"mean": value, "stderr": None, "users": users}
            continue
        if metric.kind == "popularity":
            values = metrics.mean_popularity(
                ranked.item_UK, item_share_I, metric.k
            )
            values = np.where(evaluated_U, values, np.nan)
        else:
            values = metrics.PER_USER[metric.kind](
                hits_UK, n_held_out_U, metric.k
            )
        per_user[name] = values
        summary[name] = mean_and_stderr(values)
    return Evaluation(
        summary,
        per_user,
        int(evaluated_U.sum()),
        int((~evaluated_U).sum()),
        ranked,
    )


def mean_and_stderr(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard error (n - 1) and count of the values that are numbers.

    Mean and standard error are None where they do not exist.
    """
    real = values[~np.isnan(values)]
    n = len(real)
    mean = float(real.mean()) if n else None
    stderr = float(real.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "users": n}


def by_history_length(
    values_U: np.ndarray, length_U: np.ndarray, buckets: int = 4
) -> list[dict[str, Any]]:
    """Mean of a metric for users with short and with long histories.

    Args:
      values_U: float [U], NaN for users left out.
      length_U: int [U], fold-in items of each user.
      buckets: at most so many, with about as many users each.

    Returns:
      [{'bucket': '5-12', 'mean', 'stderr', 'users'}, ...], shortest first.
    """
    real_U = ~np.isnan(values_U)
    values_U, length_U = values_U[real_U], length_U[real_U]
    if not len(values_U):
        return []
    shares = np.linspace(0, 1, buckets + 1)[1:]
    # Upper bounds, inclusive; equal ones (many users alike) are one bucket.
    upper = np.unique(np.quantile(length_U, shares, method="inverted_cdf"))
    bucket_U = np.searchsorted(upper, length_U)
    rows = []
    for b in range(len(upper)):
        inside = bucket_U == b
        if inside.any():
            low, high = length_U[inside].min(), length_U[inside].max()
            name = f"{low}" if low == high else f"{low}-{high}"
            rows.append({"bucket": name, **mean_and_stderr(values_U[inside])})
    return rows


def flat(summary: Mapping[str, Mapping[str, Any]], prefix: str) -> dict:
    """{'validation/ndcg@100': mean, 'validation/ndcg@100_stderr': ...}."""
    record: dict[str, Any] = {}
    for name, value in summary.items():
        record[f"{prefix}/{name}"] = value["mean"]
        if value["stderr"] is not None:
            record[f"{prefix}/{name}_stderr"] = value["stderr"]
    return record
