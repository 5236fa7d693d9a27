"""Strong generalisation: held-out users are never trained on.

Three ways to the same kind of split. ``paper`` and ``recipe`` reproduce what
others did, draw for draw, so that numbers compare; ``vaecf`` is the one to
use where there is nothing to reproduce.

In all of them the item vocabulary is what training users have touched, and a
held-out user's other items are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vaecf.data.interactions import HeldOut, Interactions
from vaecf.data.readers import Ratings
from vaecf.errors import VaecfError

PAPER_SEED = 98765
PROTOCOLS = ("paper", "recipe", "vaecf")
# Users with fewer items are folded in whole (Liang et al. 2018, notebook).
_LIANG_LEAST_ITEMS = 5


class Split(NamedTuple):
    """A split of ``Ratings``.

    Attributes:
      train: training users x vocabulary.
      validation: held-out users for choosing.
      test: held-out users for reporting.
      item_codes: int32 ``[n_items]``, the vocabulary as codes of the ratings.
      user_codes: int32, users as codes: train, validation, test.
      held_out_users_without_items: held-out users who are in no matrix since
        they have nothing in the vocabulary (``paper`` and ``recipe`` only).
      left_out_interactions: held-out users' rows outside the vocabulary.
      duplicates: rows that repeat a pair of their matrix.
    """

    train: Interactions
    validation: HeldOut
    test: HeldOut
    item_codes: np.ndarray
    user_codes: np.ndarray
    held_out_users_without_items: int
    left_out_interactions: int
    duplicates: int


def paper(
    ratings: Ratings,
    held_out_users: int,
    *,
    seed: int = PAPER_SEED,
    test_proportion: float = 0.2,
) -> Split:
    """The split of Liang et al. (2018), as their notebook draws it.

    NumPy's legacy generator, seeded before the permutation of the users and
    again before each of the two fold-in splits. Users are permuted and
    grouped in ascending order of their raw ids; the item vocabulary is in
    order of first appearance in the training users' rows.

    Repeated pairs count as rows wherever the notebook counts rows, so a pair
    may be folded in and held out; the matrices are binary.

    Args:
      ratings: filtered rows in file order.
      held_out_users: validation users; as many again are test users.
      seed: 98765 in the paper.
      test_proportion: of a user's items, held out; 0.2 in the paper.

    Raises:
      VaecfError: if no training user would be left.
    """
    return _liang(ratings, held_out_users, seed, test_proportion, reseed=True)


def recipe(
    ratings: Ratings,
    held_out_users: int,
    *,
    seed: int = 0,
    test_proportion: float = 0.2,
) -> Split:
    """NVIDIA's split: the paper's, but seeded once, at the start.

    The permutation, the validation users' draws and the test users' draws
    come from one stream of NumPy's legacy generator.

    Args and errors: see ``paper``.
    """
    return _liang(ratings, held_out_users, seed, test_proportion, reseed=False)


def vaecf(
    ratings: Ratings,
    validation_users: int,
    test_users: int | None = None,
    *,
    seed: int = 0,
    test_proportion: float = 0.2,
) -> Split:
    """Our split: PCG64, vectorised, independent of the order of the rows.

    Of a user with ``n`` items, ``floor(test_proportion * n)`` are held out,
    but at least one and at most ``n - 1`` if ``n >= 2``; a user with one item
    is folded in. The vocabulary is in ascending order of raw ids. Repeated
    pairs count once.

    Args:
      ratings: filtered rows.
      validation_users: how many.
      test_users: how many; None means as many.
      seed: of everything drawn.
      test_proportion: in (0, 1).

    Raises:
      VaecfError: if no training user would be left, or the proportion is out
        of range.
    """
    if test_users is None:
        test_users = validation_users
    _check_proportion(test_proportion)
    check_seed(seed)
    present = np.flatnonzero(
        np.bincount(ratings.user, minlength=len(ratings.user_ids))
    )
    _check_users(len(present), validation_users, test_users)
    rng = np.random.Generator(np.random.PCG64(seed))
    users = present[rng.permutation(len(present))]
    n_train = len(users) - validation_users - test_users
    place = np.full(len(ratings.user_ids), -1, np.int32)
    place[users] = np.arange(len(users), dtype=np.int32)
    everything, duplicates = Interactions.from_pairs(
        place[ratings.user], ratings.item, len(users), len(ratings.item_ids)
    )
    train = everything.rows(slice(0, n_train))
    vocabulary = np.flatnonzero(train.item_counts()).astype(np.int32)
    new_index = np.full(everything.n_items, -1, np.int32)
    new_index[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    held_out = _restrict(
        everything.rows(slice(n_train, len(users))), new_index, len(vocabulary)
    )
    kept = held_out.nnz
    # One random key per interaction; the lowest of each user are held out.
    # One draw for both splits, in the order of the users table.
    keys = rng.random(kept)
    row = np.repeat(np.arange(held_out.n_users), held_out.counts)
    order = np.lexsort((keys, row))
    rank = np.empty(kept, np.int64)
    rank[order] = np.arange(kept) - held_out.indptr[row]
    n_held = _held_out_counts(held_out.counts, test_proportion)
    is_held = rank < n_held[row]
    parts = []
    for users_of in (
        slice(0, validation_users),
        slice(validation_users, validation_users + test_users),
    ):
        block = held_out.rows(users_of)
        begin = int(held_out.indptr[users_of.start])
        mask = is_held[begin : begin + block.nnz]
        parts.append(HeldOut(_masked(block, ~mask), _masked(block, mask)))
    return Split(
        Interactions(train.indptr, new_index[train.indices], len(vocabulary)),
        parts[0],
        parts[1],
        vocabulary,
        users.astype(np.int32),
        0,
        everything.nnz - train.nnz - kept,
        duplicates,
    )


def _held_out_counts(counts: np.ndarray, proportion: float) -> np.ndarray:
    """How many of each user's items to hold out, int64 ``[n_users]``."""
    # The tiny addend lets 0.2 * 15 be 3 and not 2.9999...
    wanted = np.floor(proportion * counts + 1e-9).astype(np.int64)
    return np.clip(
        wanted, np.minimum(counts // 2, 1), np.maximum(counts - 1, 0)
    )


def _restrict(
    matrix: Interactions, new_index: np.ndarray, n_items: int
) -> Interactions:
    """Leaves out items whose new index is -1; the order stays ascending."""
    moved = new_index[matrix.indices]
    known = moved >= 0
    return _masked(
        Interactions(matrix.indptr, np.where(known, moved, 0), n_items), known
    )


def _masked(matrix: Interactions, keep: np.ndarray) -> Interactions:
    """The entries of a boolean mask ``[nnz]``, users as they are."""
    before = np.zeros(matrix.nnz + 1, np.int64)
    np.cumsum(keep, out=before[1:])
    return Interactions(
        before[matrix.indptr], matrix.indices[keep], matrix.n_items
    )


def _liang(
    ratings: Ratings,
    held_out_users: int,
    seed: int,
    test_proportion: float,
    *,
    reseed: bool,
) -> Split:
    """What the paper's notebook and the recipe's script have in common."""
    _check_proportion(test_proportion)
    check_seed(seed)
    n_codes = len(ratings.user_ids)
    present = np.flatnonzero(np.bincount(ratings.user, minlength=n_codes))
    _check_users(len(present), held_out_users, held_out_users)
    rng = np.random.RandomState(seed)
    # Codes ascend with the raw ids, as the groups of a groupby do.
    users = present[rng.permutation(len(present))].astype(np.int32)
    n_train = len(users) - 2 * held_out_users
    place = np.full(n_codes, -1, np.int32)
    place[users] = np.arange(len(users), dtype=np.int32)
    row = place[ratings.user]
    in_train = row < n_train
    vocabulary = _first_appearances(
        ratings.item[in_train], len(ratings.item_ids)
    )
    new_index = np.full(len(ratings.item_ids), -1, np.int32)
    new_index[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    train, duplicates = Interactions.from_pairs(
        row[in_train],
        new_index[ratings.item[in_train]],
        n_train,
        len(vocabulary),
    )
    known = new_index[ratings.item] >= 0
    user_codes = [users[:n_train]]
    parts = []
    lost_rows = lost_users = 0
    for start in (n_train, n_train + held_out_users):
        in_block = (row >= start) & (row < start + held_out_users)
        chosen = np.flatnonzero(in_block & known)
        lost_rows += int(in_block.sum()) - len(chosen)
        if reseed:
            rng = np.random.RandomState(seed)
        # By user in ascending order of raw id, file order within a user.
        chosen = chosen[np.argsort(ratings.user[chosen], kind="stable")]
        is_held = _draw_held_out(ratings.user[chosen], rng, test_proportion)
        # The originals number the rows of these matrices from the first user
        # who has a row to the last one who has.
        rows, items = row[chosen], new_index[ratings.item[chosen]]
        low, high = start, start
        if len(rows):
            low, high = int(rows.min()), int(rows.max()) + 1
        lost_users += held_out_users - (high - low)
        pair = [
            Interactions.from_pairs(
                rows[part] - low, items[part], high - low, len(vocabulary)
            )
            for part in (~is_held, is_held)
        ]
        duplicates += pair[0][1] + pair[1][1]
        parts.append(HeldOut(pair[0][0], pair[1][0]))
        user_codes.append(users[low:high])
    return Split(
        train,
        parts[0],
        parts[1],
        vocabulary,
        np.concatenate(user_codes),
        lost_users,
        lost_rows,
        duplicates,
    )


def _draw_held_out(
    user: np.ndarray, rng: np.random.RandomState, proportion: float
) -> np.ndarray:
    """Draws the held-out rows of grouped users, as the originals draw them.

    Args:
      user: int32 ``[n]``, equal values next to each other.
      rng: advanced by one ``choice`` for each user with 5 rows or more.
      proportion: of a user's rows, rounded down.

    Returns:
      bool ``[n]``.
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
        if size >= _LIANG_LEAST_ITEMS
    ]
    if chosen:
        held[np.concatenate(chosen).astype(np.int64)] = True
    return held


def _first_appearances(items: np.ndarray, n_items: int) -> np.ndarray:
    """Distinct items in order of first appearance, int32."""
    first = np.full(n_items, len(items), np.int64)
    # Written backwards, so that the first of equal items is written last.
    first[items[::-1]] = np.arange(len(items) - 1, -1, -1)
    seen = np.flatnonzero(first < len(items))
    return seen[np.argsort(first[seen])].astype(np.int32)


def check_seed(seed: int) -> None:
    """Refuses a seed that NumPy's generators do not take alike."""
    if not 0 <= seed < 2**32:
        raise VaecfError(f"--seed={seed} must be in [0, 2^32)")


def _check_proportion(test_proportion: float) -> None:
    if not 0 < test_proportion < 1:
        raise VaecfError(
            f"--fold_in_proportion={1 - test_proportion:g} must be above 0 "
            "and below 1"
        )


def _check_users(n_users: int, validation: int, test: int) -> None:
    """Leaves at least one training user, or says what would."""
    if validation < 0 or test < 0:
        raise VaecfError(
            f"--held_out_users={min(validation, test)} must not be negative"
        )
    if n_users <= validation + test:
        raise VaecfError(
            f"{n_users:,} users remain, too few for {validation:,} validation "
            f"and {test:,} test users besides training users; lower "
            f"--held_out_users to at most {max(n_users - 1, 0) // 2:,}"
        )
