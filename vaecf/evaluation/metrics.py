"""Names of metrics, and metrics of hits. NumPy, float64.

Shapes in names: U users, K ranks. Relevance is binary. `n_held_out_U` is the
number n of held-out items. The metrics of hits are NaN for users without
held-out items: callers leave these users out of the mean and report their
number.

To add a metric, add its function to `HIT_METRICS` or `LIST_METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vaecf.errors import VaecfError, did_you_mean
from vaecf.evaluation import list_metrics
from vaecf.evaluation.list_metrics import divide

_TABLE = 1 << 20  # bytes of the table in `hits`


def hits(
    ranked_UK: np.ndarray, indptr: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Returns which ranked items are held out for the user, bool [U, K].

    Args:
      ranked_UK: int [U, K], item indices, best first; -1 after the end of a
        list.
      indptr: int64 [U + 1], row pointers of the held-out items.
      indices: int32 [held-out interactions], ascending within a user.

    Raises:
      ValueError: the numbers of users differ.
    """
    n_users, depth = ranked_UK.shape
    if len(indptr) != n_users + 1:
        raise ValueError(
            f"{n_users} ranked lists for {len(indptr) - 1} held-out users"
        )
    if depth == 0 or len(indices) == 0:
        return np.zeros((n_users, depth), bool)
    # Marks the held-out items of a few users at a time in a table of users x
    # items that fits into a processor's cache: several times as fast as a
    # sorted search. The last column stays False; -1 refers to that of the row
    # before.
    width = int(max(ranked_UK.max(initial=0), np.max(indices))) + 2
    size = max(1, _TABLE // width)
    table = np.zeros(size * width, bool)
    start_U = np.arange(n_users) % size * width
    held_out_N = np.repeat(start_U, np.diff(indptr)) + indices
    found_UK = np.empty((n_users, depth), bool)
    for first in range(0, n_users, size):
        block = slice(first, first + size)
        place_BK = ranked_UK[block] + start_U[block, None]
        own_N = held_out_N[indptr[first] : indptr[first + len(place_BK)]]
        table[own_N] = True
        # Other modes than 'raise' write to `out` without a copy.
        np.take(table, place_BK, out=found_UK[block], mode="wrap")
        table[own_N] = False
    return found_UK


def ndcg(hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int) -> np.ndarray:
    """Returns NDCG@k of each user, float64 [U] (Liang et al. 2018, sec. 4.2).

    DCG@k sums hit_r / log2(r + 1) over the ranks r = 1..k. NDCG@k divides it by
    the DCG@k of a list that ranks all n held-out items first. LightGCN's NDCG
    is the same.
    """
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    dcg_U = hits_UK[:, :k] @ discount_K[: hits_UK.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discount_K)])
    return divide(dcg_U, ideal[np.minimum(n_held_out_U, k)])


def recall(hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int) -> np.ndarray:
    """Returns hits / min(k, n), float64 [U] (Liang et al. 2018, sec. 4.2).

    The calibrated form of recall: a perfect list has recall 1.
    """
    return divide(hits_UK[:, :k].sum(axis=1), np.minimum(n_held_out_U, k))


def plain_recall(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Returns hits / n, float64 [U], at most k / n.

    The Recall@k of LightGCN (He et al. 2020) and of the papers that compare
    with it.
    """
    return divide(hits_UK[:, :k].sum(axis=1), n_held_out_U)


def precision(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Returns hits / k, float64 [U]."""
    share_U = hits_UK[:, :k].sum(axis=1) / k
    return np.where(n_held_out_U > 0, share_U, np.nan)


def hit_rate(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Returns 1 for users with a hit among the first k, else 0, float64 [U]."""
    any_U = hits_UK[:, :k].any(axis=1)
    return np.where(n_held_out_U > 0, any_U, np.nan)


def reciprocal_rank(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Returns 1 / rank of the first hit, 0 without a hit, float64 [U]."""
    top_UK = hits_UK[:, :k]
    inverse_K = 1.0 / np.arange(1, top_UK.shape[1] + 1)
    first_U = (top_UK * inverse_K).max(axis=1, initial=0.0)
    return np.where(n_held_out_U > 0, first_U, np.nan)


def average_precision(
    hits_UK: np.ndarray, n_held_out_U: np.ndarray, k: int
) -> np.ndarray:
    """Returns the average precision (the term of MAP@k), float64 [U].

    It sums the precision at the rank of each hit and divides by min(k, n).
    """
    top_UK = hits_UK[:, :k].astype(np.float64)
    rank_K = np.arange(1, top_UK.shape[1] + 1)
    precision_UK = np.cumsum(top_UK, axis=1) / rank_K
    total_U = (precision_UK * top_UK).sum(axis=1)
    return divide(total_U, np.minimum(n_held_out_U, k))


# (hits_UK, n_held_out_U, k) -> a value per user
HIT_METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "ndcg": ndcg,
    "recall": recall,
    "calibrated_recall": recall,
    "plain_recall": plain_recall,
    "precision": precision,
    "hit_rate": hit_rate,
    "mrr": reciprocal_rank,
    "map": average_precision,
}
# (lists, k) -> a value per user, or one value of all lists
LIST_METRICS: dict[str, Callable[[list_metrics.Lists, int], np.ndarray]] = {
    "coverage": list_metrics.coverage,
    "user_coverage": list_metrics.user_coverage,
    "gini": list_metrics.gini,
    "entropy": list_metrics.entropy,
    "popularity": list_metrics.popularity,
    "novelty": list_metrics.novelty,
    "long_tail": list_metrics.long_tail,
    "diversity": list_metrics.diversity,
    "serendipity": list_metrics.serendipity,
}
METRICS = (*HIT_METRICS, *LIST_METRICS)  # with a cut-off
# Needs the scores of all items (`vaecf.evaluation.auc`), and has no cut-off.
AUC = "auc"


def parse(name: str, where: str = "config.eval.metrics") -> tuple[str, int]:
    """Returns the metric and the cut-off of a name: ('ndcg', 100).

    The cut-off of AUC is 1, the shortest list that can be ranked. `where` names
    the setting in the message.

    Raises:
      VaecfError: the name is neither 'auc' nor `<metric>@<k>` with another
        known metric and k >= 1.
    """
    if name == AUC:
        return name, 1
    kind, _, k = name.partition("@")
    is_cutoff = k.isdecimal() and int(k) >= 1
    if kind not in METRICS or not is_cutoff:
        close = [AUC, *(f"{m}@{k if is_cutoff else 100}" for m in METRICS)]
        raise VaecfError(
            f"{where}: {name!r} is not a metric: use {AUC}, or "
            f"<metric>@<k>, such as ndcg@100, with one of "
            f"{', '.join(METRICS)}{did_you_mean(name, close)}"
        )
    return kind, int(k)


def depth(names: Sequence[str]) -> int:
    """Returns the length of the lists that the metrics need."""
    return max(parse(name)[1] for name in names)
