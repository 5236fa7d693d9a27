"""Draws of many users' histories from a mixture model, in bounded memory.

Only `numpy.random.Generator.random` is used, here and in
`vaecf.data.synthetic`; every distribution is our own transform of it, because
NumPy may change its own ones between releases.
"""

from __future__ import annotations

import numpy as np

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError

_CHUNK = 500_000  # interactions drawn together; bounds the memory
_ROUNDS = 4  # of draws with replacement before single users are finished


def draw_histories(
    user_group: np.ndarray,
    group_item: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> Interactions:
    """Draws each user's items without replacement, in bounded memory.

    Items come one after the other from the user's mixture, and one that the
    user has already is thrown away: this is successive sampling without
    replacement, the law of a Gumbel top-k over ``log p_u``, at the price of
    the draws and not of users x items.

    Args:
      user_group: float [n_users, n_groups], rows sum to 1.
      group_item: float [n_groups, n_items], rows sum to 1.
      lengths: int64 [n_users], at most n_items.
      rng: only its `random` is used.

    Returns:
      `Interactions` with exactly `lengths` items per user.

    Raises:
      VaecfError: a user's mixture has fewer items than the user is to get.
    """
    group_cdf = _flat_cdf(group_item)
    n_items = group_item.shape[1]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.empty(indptr[-1], np.int32)
    start = 0
    while start < len(lengths):
        stop = int(np.searchsorted(indptr, indptr[start] + _CHUNK, "right")) - 1
        stop = min(max(stop, start + 1), len(lengths))
        keys = _draw_chunk(
            user_group[start:stop],
            group_item,
            group_cdf,
            lengths[start:stop],
            rng,
        )
        indices[indptr[start] : indptr[stop]] = keys % n_items
        start = stop
    return Interactions(indptr, indices, n_items)


def _flat_cdf(rows: np.ndarray) -> np.ndarray:
    """Row r's cumulative sums plus r, flattened: one sorted float64 array.

    `np.searchsorted(flat, r + u, "right")` draws from row r for u in [0, 1).
    """
    cdf = np.cumsum(rows, axis=1, dtype=np.float64)
    cdf /= cdf[:, -1:]
    return (cdf + np.arange(len(rows))[:, None]).ravel()


def _draw(
    flat: np.ndarray, row: np.ndarray, n_columns: int, rng: np.random.Generator
) -> np.ndarray:
    """A column for each of `row`, from the distributions of `_flat_cdf`."""
    at = np.searchsorted(flat, row + rng.random(len(row)), "right")
    # Rounding can carry row + u over the end of the row.
    return np.minimum(at - row * n_columns, n_columns - 1)


def _draw_chunk(
    user_group: np.ndarray,
    group_item: np.ndarray,
    group_cdf: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Keys user * n_items + item, ascending, `lengths` of them per user."""
    n_groups, n_items = group_item.shape
    user_cdf = _flat_cdf(user_group)
    keys = np.empty(0, np.int64)  # distinct, in the order drawn
    missing, factor = lengths, 1.25
    for _ in range(_ROUNDS):
        n_draws = np.where(
            missing > 0, np.ceil(missing * factor) + 2, 0
        ).astype(np.int64)
        user = np.repeat(np.arange(len(lengths)), n_draws)
        group = _draw(user_cdf, user, n_groups, rng)
        item = _draw(group_cdf, group, n_items, rng)
        keys = np.concatenate([keys, user * n_items + item])
        _, first = np.unique(keys, return_index=True)
        keys = keys[np.sort(first)]
        found = np.bincount(keys // n_items, minlength=len(lengths))
        missing = np.maximum(lengths - found, 0)
        factor *= 2
        if not missing.any():
            break
    # Keep each user's earliest draws: order by user, then by time.
    keys = keys[np.argsort(keys // n_items, kind="stable")]
    rank = np.arange(len(keys)) - np.repeat(np.cumsum(found) - found, found)
    keys = np.sort(keys[rank < np.repeat(lengths, found)])
    rest = [keys]
    for slow in np.flatnonzero(missing):
        base = slow * n_items
        low, high = np.searchsorted(keys, [base, base + n_items])
        items = _draw_rest(
            user_group[slow] @ group_item,
            keys[low:high] - base,
            int(missing[slow]),
            rng,
        )
        rest.append(base + items)
    return np.sort(np.concatenate(rest)) if len(rest) > 1 else keys


def _draw_rest(
    probability: np.ndarray,
    found: np.ndarray,
    n: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The next `n` items of a user who has `found`, by a Gumbel top-k.

    What is left after some draws without replacement is again such a draw
    from the items left, so that this may follow any number of rounds.
    """
    with np.errstate(divide="ignore"):  # log 0 = -inf: never drawn
        score = np.log(probability) - np.log(
            -np.log1p(-rng.random(len(probability)))
        )
    score[found] = -np.inf
    best = np.argsort(-score, kind="stable")[:n]
    if len(best) < n or score[best[-1]] == -np.inf:
        raise VaecfError(
            f"a user is to have {len(found) + n} items, but only "
            f"{np.count_nonzero(probability)} of {len(probability)} items "
            "have a probability above 0"
        )
    return best
