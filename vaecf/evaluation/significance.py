"""Paired comparison of per-user metrics. NumPy, float64.

Shapes in names: U users, C comparisons, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Paired(NamedTuple):
    """A model compared with a reference on the same users."""

    difference: float  # mean over users of value minus the reference's value
    stderr: float | None  # of the difference; None for a single user
    low: float  # 95 % percentile bootstrap interval of the mean
    high: float
    # Of the two-sided paired t-test; 1 for a single user, and for equal values.
    p: float
    p_holm: float  # p corrected for all comparisons (`holm`)


def paired(
    values: Mapping[str, np.ndarray],
    reference_U: np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Paired]:
    """Compares every model with the reference.

    All comparisons use the same bootstrap resamples.

    Args:
      values: float [U] of each model, without NaN.
      reference_U: float [U], of the same users in the same order.
      resamples, seed: of the bootstrap.
    """
    if not values:
        return {}
    difference_UC = np.stack([v - reference_U for v in values.values()], axis=1)
    low_C, high_C = bootstrap(difference_UC, resamples=resamples, seed=seed)
    stderrs, p_values = zip(*(_t_test(d) for d in difference_UC.T))
    p_holm = holm(np.array(p_values))
    return {
        name: Paired(
            float(difference_UC[:, c].mean()),
            stderrs[c],
            float(low_C[c]),
            float(high_C[c]),
            p_values[c],
            float(p_holm[c]),
        )
        for c, name in enumerate(values)
    }


def _t_test(difference_U: np.ndarray) -> tuple[float | None, float]:
    """Returns (standard error, two-sided p-value)."""
    from scipy import stats  # slow to import

    if len(difference_U) < 2:
        return None, 1.0
    stderr = float(stats.sem(difference_U))
    if stderr == 0:
        return stderr, 1.0 if difference_U[0] == 0 else 0.0
    return stderr, float(stats.ttest_1samp(difference_U, 0.0).pvalue)


def bootstrap(
    difference_UC: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns 95 % percentile intervals of the means over users (Efron 1979).

    The numbers are those of `scipy.stats.bootstrap`, which takes twice as long
    for 10,000 users.

    The result is (lower ends, upper ends), float64 [C].
    """
    n_users, n_comparisons = difference_UC.shape
    rng = np.random.default_rng(seed)
    mean_RC = np.empty((resamples, n_comparisons))
    # In blocks: the draws of 50,000 users at once would take 4 GB.
    size = max(1, 2**22 // n_users)
    for first in range(0, resamples, size):
        block = slice(first, min(first + size, resamples))
        shape = (block.stop - first, n_users)
        user_RU = rng.integers(0, n_users, shape)
        for c in range(n_comparisons):
            mean_RC[block, c] = difference_UC[:, c][user_RU].mean(axis=1)
    low_C, high_C = np.quantile(mean_RC, [0.025, 0.975], axis=0)
    return low_C, high_C


def holm(p_C: np.ndarray) -> np.ndarray:
    """Returns p-values that keep the family-wise error rate (Holm 1979).

    The k-th smallest of m p-values (k from 0) is multiplied by m - k. The
    results are at least the previous one and at most 1.
    """
    order = np.argsort(p_C, kind="stable")
    factor = len(p_C) - np.arange(len(p_C))
    result = np.empty(len(p_C))
    result[order] = np.minimum(np.maximum.accumulate(factor * p_C[order]), 1.0)
    return result
