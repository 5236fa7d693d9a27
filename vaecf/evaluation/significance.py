"""Paired comparison of per-user metrics. NumPy, float64.

Shapes in names: U users, C comparisons, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Paired(NamedTuple):
    """A system against a reference, over the same users.

    Attributes:
      difference: mean over users of value - reference's value.
      stderr: its paired standard error; None for a single user.
      low, high: 95 % interval of the mean by the paired percentile bootstrap.
      p: of the two-sided paired t-test.
      p_holm: the same, corrected for all comparisons made together.
    """

    difference: float
    stderr: float | None
    low: float
    high: float
    p: float
    p_holm: float


def paired(
    values: Mapping[str, np.ndarray],
    reference_U: np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Paired]:
    """Every system against the reference.

    Args:
      values: float [U] of each, numbers only.
      reference_U: float [U], of the same users in the same order.
      resamples: of the bootstrap.
      seed: of the bootstrap; all comparisons are resampled alike.

    Returns:
      Name to `Paired`, in the order of `values`.
    """
    if not values:
        return {}
    difference_UC = (
        np.stack(list(values.values()), axis=1) - reference_U[:, None]
    )
    low_C, high_C = bootstrap(difference_UC, resamples=resamples, seed=seed)
    results = [t_test(d) for d in difference_UC.T]
    p_holm = holm(np.array([p for _, _, p in results]))
    return {
        name: Paired(
            mean, stderr, float(low_C[c]), float(high_C[c]), p, float(p_holm[c])
        )
        for c, (name, (mean, stderr, p)) in enumerate(zip(values, results))
    }


def t_test(difference_U: np.ndarray) -> tuple[float, float | None, float]:
    """(mean, standard error, two-sided p) of paired differences.

    p is 1 where nothing can be said: one user, or no difference at all.
    """
    from scipy import special  # only comparisons need it

    n = len(difference_U)
    mean = float(difference_U.mean())
    if n < 2:
        return mean, None, 1.0
    stderr = float(difference_U.std(ddof=1) / math.sqrt(n))
    if stderr == 0:
        return mean, stderr, 1.0 if mean == 0 else 0.0
    return mean, stderr, 2 * float(special.stdtr(n - 1, -abs(mean) / stderr))


def bootstrap(
    difference_UC: np.ndarray,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over users (Efron 1979).

    Args:
      difference_UC: float [U, C].
      resamples: draws of U users with replacement.
      seed: of PCG64.
      level: probability inside.

    Returns:
      (low, high), float64 [C].
    """
    n_users, n_comparisons = difference_UC.shape
    rng = np.random.default_rng(seed)
    mean_RC = np.empty((resamples, n_comparisons))
    # Blocks of draws: 10,000 of 50,000 users are 4 GB in one piece.
    size = max(1, 2**22 // n_users)
    for first in range(0, resamples, size):
        shape = (min(size, resamples - first), n_users)
        user_RU = rng.integers(0, n_users, shape)
        for c in range(n_comparisons):
            drawn = difference_UC[:, c][user_RU]
            mean_RC[first : first + size, c] = drawn.mean(axis=1)
    outside = (1 - level) / 2
    low_C, high_C = np.quantile(mean_RC, [outside, 1 - outside], axis=0)
    return low_C, high_C


def holm(p_C: np.ndarray) -> np.ndarray:
    """Adjusted p-values of Holm 1979: the family-wise error is kept.

    The k-th smallest of m (from 0) is multiplied by m - k, is at least the
    one before it, and at most 1.
    """
    order = np.argsort(p_C, kind="stable")
    factor = len(p_C) - np.arange(len(p_C))
    adjusted = np.minimum(np.maximum.accumulate(factor * p_C[order]), 1.0)
    result = np.empty(len(p_C))
    result[order] = adjusted
    return result
