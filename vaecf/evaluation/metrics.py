"""Ranking metrics per user, from ranked item indices. NumPy, float64.

Shapes in names: U users, K ranks. Relevance is binary. A user with nothing
held out has no value (NaN): callers leave such users out and say how many
they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vaecf.errors import VaecfError


def hits(
    ranked_UK: np.ndarray, indptr: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Which ranked items are held out for the user.

    Args:
      ranked_UK: int [U, K], item indices, best first; -1 where a list ended.
      indptr: int64 [U + 1], held-out items of each user.
      indices: int32 [held-out interactions], ascending within a user.

    Returns:
      bool [U, K].
    """
    n_users, depth = ranked_UK.shape
    if len(indptr) != n_users + 1:
        raise ValueError(
            f"{n_users} ranked lists but {len(indptr) - 1} users held out"
        )
    if depth == 0 or len(indices) == 0:
        return np.zeros((n_users, depth), bool)
    # One key a (user, item) pair makes membership one sorted search, with no
    # users x items array. int64: 2^31 pairs are soon passed.
    width = int(max(ranked_UK.max(initial=0), np.max(indices))) + 1
    user_of = np.repeat(np.arange(n_users, dtype=np.int64), np.diff(indptr))
    held_keys = user_of * width + indices
    rows = np.arange(n_users, dtype=np.int64)[:, None]
    keys = np.where(ranked_UK >= 0, rows * width + ranked_UK, -1)
    position = np.searchsorted(held_keys, keys)
    found = held_keys[np.minimum(position, len(held_keys) - 1)] == keys
    return found & (ranked_UK >= 0)


def ndcg(hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k = DCG@k / IDCG over min(k, n), Liang et al. 2018, section 4.2.

    DCG@k = sum over ranks r = 1..k of hit_r / log2(r + 1); the ideal list has
    all n held-out items first.

    Returns:
      float64 [U]; NaN for users with nothing held out.
    """
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    dcg_U = hits_UK[:, :k] @ discount_K[: hits_UK.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discount_K)])
    return _divide(dcg_U, ideal[np.minimum(n_held_out_U, k)])


def recall(hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int) -> np.ndarray:
    """Calibrated Recall@k: hits over min(k, n), Liang et al. 2018, section 4.2.

    Returns:
      float64 [U]; NaN for users with nothing held out.
    """
    return _divide(hits_UK[:, :k].sum(axis=1), np.minimum(n_held_out_U, k))


def precision(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Precision@k: hits over k."""
    share_U = hits_UK[:, :k].sum(axis=1) / k
    return np.where(n_held_out_U > 0, share_U, np.nan)


def hit_rate(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """HitRate@k: 1 if any of the first k is held out, else 0."""
    any_U = hits_UK[:, :k].any(axis=1).astype(np.float64)
    return np.where(n_held_out_U > 0, any_U, np.nan)


def reciprocal_rank(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """MRR@k's term: 1 / rank of the first hit within k, 0 without one."""
    top_UK = hits_UK[:, :k]
    if top_UK.shape[1] == 0:
        first_U = np.zeros(len(hits_UK))
    else:
        rank_U = top_UK.argmax(axis=1) + 1
        first_U = np.where(top_UK.any(axis=1), 1.0 / rank_U, 0.0)
    return np.where(n_held_out_U > 0, first_U, np.nan)


def average_precision(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """MAP@k's term: mean over min(k, n) of the precision at each hit's rank."""
    top_UK = hits_UK[:, :k].astype(np.float64)
    rank_K = np.arange(1, top_UK.shape[1] + 1)
    precision_UK = np.cumsum(top_UK, axis=1) / rank_K
    total_U = (precision_UK * top_UK).sum(axis=1)
    return _divide(total_U, np.minimum(n_held_out_U, k))


def coverage(ranked_UK: np.ndarray, n_items: int, k: int) -> float:
    """Share of the catalogue that appears in at least one list of length k."""
    shown = ranked_UK[:, :k]
    return len(np.unique(shown[shown >= 0])) / n_items


def mean_popularity(
    ranked_UK: np.ndarray, share_I: np.ndarray, k: int
) -> np.ndarray:
    """Mean popularity of each user's first k recommendations.

    Args:
      ranked_UK: int [U, K]; -1 where a list ended.
      share_I: float [I], share of training users who have the item.
      k: list length.

    Returns:
      float64 [U]; NaN for an empty list.
    """
    shown = ranked_UK[:, :k]
    real = shown >= 0
    total_U = np.where(real, share_I[np.maximum(shown, 0)], 0.0).sum(axis=1)
    return _divide(total_U, real.sum(axis=1))


PerUser = Callable[[np.ndarray, np.ndarray, int], np.ndarray]

PER_USER: dict[str, PerUser] = {
    "ndcg": ndcg,
    "recall": recall,
    "precision": precision,
    "hit_rate": hit_rate,
    "mrr": reciprocal_rank,
    "map": average_precision,
}

# Of the lists, whatever was held out.
OF_LISTS = ("coverage", "popularity")


class Metric(NamedTuple):
    """A metric and its cut-off, e.g. ndcg@100."""

    kind: str
    k: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.k}"


def parse(name: str) -> Metric:
    """Metric of a name such as 'ndcg@100'.

    Raises:
      VaecfError: not `<metric>@<k>` with a known metric and k >= 1.
    """
    kind, at, k = name.partition("@")
    known = (*PER_USER, *OF_LISTS)
    if not at or not k.isdecimal() or int(k) < 1 or kind not in known:
        raise VaecfError(
            f"config.eval.metrics: {name!r} is not a metric: write "
            f"<metric>@<k> with one of {', '.join(known)}, e.g. ndcg@100"
        )
    return Metric(kind, int(k))


def depth(names: Sequence[str]) -> int:
    """Longest list that the metrics look at."""
    return max(parse(name).k for name in names)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient; NaN where the denominator is 0."""
    safe = np.where(denominator > 0, denominator, 1)
    return np.where(denominator > 0, numerator / safe, np.nan)
