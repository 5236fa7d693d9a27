"""Splits users for strong generalisation: held-out users are never trained on.

Splits of known users are in `known_users`.

``paper`` and ``recipe`` reproduce published splits draw for draw, so that
numbers can be compared. ``vaecf`` is for all other data.

In all of them the item vocabulary is the items of the training users, and
other items of held-out users are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vaecf.data.id_table import is_integer
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.data.readers import Ratings
from vaecf.errors import VaecfError, short

PAPER_SEED = 98765
PROTOCOLS = ("paper", "recipe", "vaecf")
# Users with fewer items are folded in whole (Liang et al. 2018, notebook).
_PAPER_MIN_ITEMS = 5


class Split(NamedTuple):
    """A split of `Ratings`."""

    train: Interactions
    validation: HeldOut
    test: HeldOut
    item_codes: np.ndarray  # int32 [n_items], the vocabulary in the ratings
    user_codes: np.ndarray  # int32, users of train, validation and test
    # `held_out_users_without_items`, which are in no matrix (0 for vaecf), and
    # `interactions_outside_vocabulary`; `known_users` has others.
    counts: dict[str, int]
    duplicates: int  # rows that repeat a pair of their matrix
    constants: Mapping[str, Any] = {}  # of the protocol, for the manifest


def paper(
    ratings: Ratings,
    held_out_users: int,
    *,
    seed: int = PAPER_SEED,
    test_proportion: float = 0.2,
    reseed: bool = True,
) -> Split:
    """Splits as the notebook of Liang et al. (2018) does, draw for draw.

    NumPy's legacy generator is seeded before the permutation of the users and
    again before each of the two fold-in splits. Users are permuted and grouped
    in ascending order of their raw ids; the item vocabulary is in order of
    first appearance in the training users' rows.

    Repeated pairs count as rows wherever the notebook counts rows, so a pair
    may be folded in and held out; the matrices are binary.

    Args:
      ratings: filtered rows in file order.
      held_out_users: validation users; as many again are test users.
      test_proportion: share of a user's items to hold out; 0.2 in the paper.
      reseed: False draws everything from one stream, as in `recipe`.

    Raises:
      VaecfError: no training user would remain, or a value is out of range.
    """
    import polars as pl

    present = _present_users(
        ratings, held_out_users, held_out_users, seed, test_proportion
    )
    rng = np.random.RandomState(seed)
    # Codes ascend with the raw ids, like the groups of a pandas groupby.
    users = present[rng.permutation(len(present))].astype(np.int32)
    n_train = len(users) - 2 * held_out_users
    row = inverse(users, len(ratings.user_ids))[ratings.user]
    in_train = row < n_train
    items = pl.Series(ratings.item[in_train])
    vocabulary = items.unique(maintain_order=True).to_numpy()
    n_items = len(vocabulary)
    new_index = inverse(vocabulary, len(ratings.item_ids))
    item = new_index[ratings.item]
    train, duplicates = Interactions.from_pairs(
        row[in_train], item[in_train], n_train, n_items
    )
    user_codes = [users[:n_train]]
    parts = []
    lost_rows = lost_users = 0
    for start in (n_train, n_train + held_out_users):
        in_block = (row >= start) & (row < start + held_out_users)
        chosen = np.flatnonzero(in_block & (item >= 0))
        lost_rows += int(in_block.sum()) - len(chosen)
        if reseed:
            rng = np.random.RandomState(seed)
        # By user in ascending order of raw id, file order within a user.
        chosen = chosen[np.argsort(ratings.user[chosen], kind="stable")]
        is_held = _draw_held_out(ratings.user[chosen], rng, test_proportion)
        # The originals number the rows of these matrices from the first user
        # with a row to the last one.
        rows = row[chosen]
        low, high = start, start
        if len(rows):
            low, high = int(rows.min()), int(rows.max()) + 1
        lost_users += held_out_users - (high - low)
        pair = []
        for part in (~is_held, is_held):
            matrix, repeated = Interactions.from_pairs(
                rows[part] - low, item[chosen[part]], high - low, n_items
            )
            pair.append(matrix)
            duplicates += repeated
        parts.append(HeldOut(*pair))
        user_codes.append(users[low:high])
    return Split(
        train,
        parts[0],
        parts[1],
        vocabulary,
        np.concatenate(user_codes),
        {
            "held_out_users_without_items": lost_users,
            "interactions_outside_vocabulary": lost_rows,
        },
        duplicates,
    )


# Splits as NVIDIA's recipe does: all draws come from one stream.
recipe = functools.partial(paper, seed=0, reseed=False)


def vaecf(
    ratings: Ratings,
    validation_users: int,
    test_users: int | None = None,
    *,
    seed: int = 0,
    test_proportion: float = 0.2,
    keep_all_items: bool = False,
) -> Split:
    """Splits with PCG64, vectorised, independent of the order of the rows.

    The vocabulary is in ascending order of raw ids. Repeated pairs count once.
    See `n_held_out` for the number of held-out items.

    Args:
      test_users: number of test users; None means `validation_users`.
      keep_all_items: keep the items that no training user has.

    Raises:
      VaecfError: see `paper`.
    """
    if test_users is None:
        test_users = validation_users
    present = _present_users(
        ratings, validation_users, test_users, seed, test_proportion
    )
    rng = np.random.Generator(np.random.PCG64(seed))
    users = present[rng.permutation(len(present))]
    return in_order(
        ratings,
        users,
        validation_users,
        test_users,
        rng,
        test_proportion=test_proportion,
        keep_all_items=keep_all_items,
    )


def in_order(
    ratings: Ratings,
    users: np.ndarray,
    validation_users: int,
    test_users: int,
    rng: np.random.Generator,
    *,
    test_proportion: float,
    keep_all_items: bool = False,
) -> Split:
    """Splits users whose order is given, as `vaecf` does.

    Args:
      users: codes of all users with rows: training, validation, test users.
      rng: draws the held-out items.
    """
    n_train = len(users) - validation_users - test_users
    place = inverse(users, len(ratings.user_ids))
    everything, duplicates = Interactions.from_pairs(
        place[ratings.user], ratings.item, len(users), len(ratings.item_ids)
    )
    train = everything.rows(slice(0, n_train))
    seen = train.item_counts() > 0
    vocabulary = np.arange(everything.n_items, dtype=np.int32)
    if not keep_all_items:
        vocabulary = vocabulary[seen]
    n_items = len(vocabulary)
    new_index = inverse(vocabulary, len(seen))
    rest = everything.rows(slice(n_train, len(users)))
    moved = new_index[rest.indices]
    known = _select(Interactions(rest.indptr, moved, n_items), moved >= 0)
    # One draw for both splits, in the order of the users table.
    n_held_U = n_held_out(known.counts, test_proportion)
    held = hold_out(known, n_held_U, rng.random(known.nnz))
    blocks = slice(0, validation_users), slice(validation_users, None)
    validation, test = (
        HeldOut(held.fold_in.rows(block), held.held_out.rows(block))
        for block in blocks
    )
    return Split(
        Interactions(train.indptr, new_index[train.indices], n_items),
        validation,
        test,
        vocabulary,
        users.astype(np.int32),
        {
            "held_out_users_without_items": 0,
            "interactions_outside_vocabulary": rest.nnz - known.nnz,
        },
        duplicates,
    )


def hold_out(
    histories: Interactions, n_held_U: np.ndarray, keys: np.ndarray
) -> HeldOut:
    """Splits each user's items into folded-in and held-out ones.

    As many items as `n_held_U` says are held out, those with the user's lowest
    `keys`, random floats ``[nnz]``.
    """
    counts = histories.counts
    row = np.repeat(np.arange(histories.n_users), counts)
    is_held = np.empty(histories.nnz, bool)
    rank = np.arange(histories.nnz) - histories.indptr[row]
    is_held[np.lexsort((keys, row))] = rank < n_held_U[row]
    return HeldOut(_select(histories, ~is_held), _select(histories, is_held))


def n_held_out(n_U: np.ndarray, proportion: float) -> np.ndarray:
    """Returns how many of each user's n items are held out.

    These are ``floor(proportion * n)``, but at least one and at most n - 1 if
    n >= 2. A single item is folded in.
    """
    # The small addend makes 0.2 * 15 equal 3 instead of 2.9999...
    wanted_U = np.floor(proportion * n_U + 1e-9).astype(np.int64)
    return np.clip(wanted_U, np.minimum(n_U // 2, 1), np.maximum(n_U - 1, 0))


def is_strong(protocol: str) -> bool:
    """Returns whether a dataset's protocol is one of `PROTOCOLS`, or a fold.

    Then the validation users are not trained on, and their held-out items were
    drawn at random.
    """
    return protocol.split(",")[0] in PROTOCOLS


def default_held_out_users(n_users: int) -> int:
    """Returns a tenth of the users, at least 1, at most 10,000 as in ML-20M."""
    return max(1, min(10_000, int(n_users * 0.1)))


def check_settings(seed: int, test_proportion: float) -> None:
    """Raises if NumPy's generators or the splits do not accept a value."""
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise VaecfError(
            f"seed={short(seed)} must be a whole number in [0, 2^32)"
        )
    if not 0 < test_proportion < 1:
        raise VaecfError(
            f"fold_in_proportion={1 - test_proportion:g} must be above 0 and "
            "below 1"
        )


def _select(matrix: Interactions, keep: np.ndarray) -> Interactions:
    """Keeps the entries of a boolean mask ``[nnz]``."""
    before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return Interactions(
        before[matrix.indptr], matrix.indices[keep], matrix.n_items
    )


def inverse(chosen: np.ndarray, n: int) -> np.ndarray:
    """Returns each code's position in `chosen`, int32 ``[n]``; -1 if none."""
    place = np.full(n, -1, np.int32)
    place[chosen] = np.arange(len(chosen), dtype=np.int32)
    return place


def _present_users(
    ratings: Ratings,
    validation: int,
    test: int,
    seed: int,
    test_proportion: float,
) -> np.ndarray:
    """Checks the settings; returns the codes of the users with rows."""
    check_settings(seed, test_proportion)
    present = np.flatnonzero(np.bincount(ratings.user))
    n_users = len(present)
    if validation < 0 or test < 0:
        raise VaecfError(
            f"held_out_users={min(validation, test)} must not be negative"
        )
    if n_users <= validation + test:
        fix = f"held_out_users to at most {max(n_users - 1, 0) // 2:,}"
        if validation != test:
            fix = "one of these numbers"
        raise VaecfError(
            f"{n_users:,} users remain, too few for {validation:,} validation "
            f"and {test:,} test users besides training users; lower {fix}"
        )
    return present


def _draw_held_out(
    user: np.ndarray, rng: np.random.RandomState, proportion: float
) -> np.ndarray:
    """Draws the held-out rows, bool ``[n]``, of grouped users ``[n]``.

    As in the originals, `rng` makes one ``choice`` for each user with 5 rows
    or more, and the number of held-out rows is rounded down.
    """
    held = np.zeros(len(user), bool)
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    sizes = np.diff(starts, append=len(user))
    draws = (proportion * sizes).astype(np.int64)
    chosen = [
        start + rng.choice(size, size=draw, replace=False)
        for start, size, draw in zip(
            starts.tolist(), sizes.tolist(), draws.tolist(), strict=True
        )
        if size >= _PAPER_MIN_ITEMS
    ]
    if chosen:
        held[np.concatenate(chosen).astype(np.int64)] = True
    return held
