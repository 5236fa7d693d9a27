"""Splits interactions of users who are all known: weak generalisation.

The test users are training users; a model sees their whole history before the
test and has to find what is held out. Every protocol says which interactions
are the test (and, for ``given``, the validation); the rest is the same for all:

- Training, validation and test never share a pair, and every user keeps an
  interaction in training.
- The vocabulary is the items known before the test. Test interactions of other
  items, and of users without a history, are dropped and counted.
- Where the data give no validation, interactions of some users are taken out
  of their training interactions. These users stay in training with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vaecf.data import values
from vaecf.data.id_table import is_integer
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.data.readers import Ratings
from vaecf.data.splits import (
    Split,
    check_settings,
    default_held_out_users,
    inverse,
    n_held_out,
)
from vaecf.errors import VaecfError, short

PROTOCOLS = ("weak", "leave_last", "temporal", "given")
# The column that a protocol needs besides users and items.
COLUMNS = {"leave_last": "time", "temporal": "time", "given": "split"}
TEST_SHARE, TEST_ITEMS = 0.2, 1  # defaults
_TRAIN, _VALIDATION, _TEST, _DROPPED = range(4)


def count_pairs(ratings: Ratings, repeated: int) -> dict[str, int]:
    """Counts the (user, item) pairs in several parts; {} without parts.

    `repeated` is the number of rows that repeat a pair.

    `collapse_duplicates` keeps such a pair in the earliest part, so that
    nothing is held out that the user's history holds.
    """
    if ratings.part is None:
        return {}
    several = 0
    if repeated:
        n_items, n_parts = len(ratings.item_ids), len(values.PARTS)
        pair = ratings.user.astype(np.int64) * n_items + ratings.item
        in_part = np.unique(pair * n_parts + ratings.part)
        _, parts = np.unique(in_part // n_parts, return_counts=True)
        several = int((parts > 1).sum())
    return {"pairs_in_several_parts": several}


def split(
    ratings: Ratings,
    protocol: str,
    held_out_users: int | None = None,
    *,
    seed: int = 0,
    test_proportion: float = 0.2,
    test_share: float | None = None,
    test_items: int | None = None,
    test_time: Any = None,
) -> Split:
    """Splits under one of `PROTOCOLS`, whatever the order of the rows is.

    Ties in time are broken at random.

    Args:
      ratings: one row for every pair, with the column that the protocol needs.
      held_out_users: number of validation users; None means a tenth of the
        users, at most 10,000, and for ``leave_last`` all users. Only users with
        two training interactions or more can be validation users.
      test_proportion: share of the training interactions of a validation user
        to take out (see `splits.n_held_out`): at random, or for ``temporal``
        the last ones. ``leave_last`` takes out the last `test_items`.
      test_share: ``weak``: share of every user's interactions, as above.
        ``temporal`` without `test_time`: share of all interactions; those of
        one moment stay together, so that it may be less.
      test_items: ``leave_last``: number of every user's last interactions. A
        user of n interactions keeps at least one.
      test_time: ``temporal``: the test is all interactions from this time on.

    Raises:
      VaecfError: a value is out of range, or no test remains.
    """
    check_settings(seed, test_proportion)
    ratings = ratings.where(np.lexsort((ratings.item, ratings.user)))
    rng = np.random.Generator(np.random.PCG64(seed))
    # A user's interactions with the highest keys are taken; the last key
    # counts most.
    keys = [rng.random(ratings.n)]
    if protocol in ("leave_last", "temporal") and ratings.time is not None:
        keys.append(ratings.time)
    part = np.full(ratings.n, _TRAIN, np.int8)
    constants: dict[str, Any] = {}
    n_U = np.bincount(ratings.user)
    if protocol == "weak":
        constants["test_share"] = share = _share(test_share)
        part[_take(ratings.user, keys, n_held_out(n_U, share))] = _TEST
    elif protocol == "leave_last":
        constants["test_items"] = n = _number(test_items)
        part[_take(ratings.user, keys, np.minimum(n, n_U - 1))] = _TEST
    elif protocol == "temporal":
        first = _test_time(keys[-1], test_share, test_time)
        is_date = isinstance(first, np.datetime64)
        constants["test_time"] = str(first) if is_date else first
        part[keys[-1] >= first] = _TEST
    elif ratings.part is not None:
        part = ratings.part.copy()
    counts = _drop_unknown(ratings, part)
    if not (part == _VALIDATION).any():
        among = np.flatnonzero(part == _TRAIN)
        user, keys = ratings.user[among], [key[among] for key in keys]
        n_U = np.bincount(user, minlength=len(n_U))
        if protocol == "leave_last":
            wanted_U = np.minimum(constants["test_items"], n_U - 1)
        else:
            constants["test_proportion"] = test_proportion
            wanted_U = n_held_out(n_U, test_proportion)
        usual = None if protocol == "leave_last" else _usual_number(n_U)
        chosen = _choose(n_U, held_out_users, usual, rng)
        constants["validation_users"] = len(chosen)
        is_chosen_U = np.isin(np.arange(len(n_U)), chosen)
        taken = _take(user, keys, np.where(is_chosen_U, wanted_U, 0))
        part[among[taken]] = _VALIDATION
    elif held_out_users is not None:
        raise VaecfError(
            f"held_out_users={held_out_users} has no effect: the data say what "
            "is for validation; leave it out"
        )
    return _build(ratings, part, counts, constants)


def _take(
    user_N: np.ndarray, keys: Sequence[np.ndarray], wanted_U: np.ndarray
) -> np.ndarray:
    """Returns the positions of each user's entries with the highest keys."""
    order = np.lexsort((*keys, user_N))
    user_N = user_N[order]
    ends_U = np.cumsum(np.bincount(user_N, minlength=len(wanted_U)))
    from_end_N = ends_U[user_N] - np.arange(len(user_N))  # the last has 1
    return order[from_end_N <= wanted_U[user_N]]


def _share(value: float | None) -> float:
    share = TEST_SHARE if value is None else value
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise VaecfError(
            f"test_share={short(share)} must be above 0 and below 1"
        )
    return share


def _number(value: int | None) -> int:
    number = TEST_ITEMS if value is None else value
    if not is_integer(number) or number < 1:
        raise VaecfError(
            f"test_items={short(number)} must be a whole number from 1"
        )
    return int(number)


def _test_time(time_N: np.ndarray, share: float | None, given: Any) -> Any:
    """Returns the time from which on all is test."""
    if given is None:
        ascending = np.sort(time_N)
        n_test = int(_share(share) * len(ascending) + 1e-9)
        first = len(ascending) - n_test
        # Those of the first moment that do not all fit into the share.
        cut = np.searchsorted(ascending, ascending[first - 1], "right")
        if not n_test or cut == len(ascending):
            raise VaecfError(
                "no test remains: too many interactions have the last time, "
                f"{ascending[-1]}; raise test_share={_share(share)}, or give "
                "test_time"
            )
        return ascending[cut]
    time = values.parse_time(given)
    if (time.dtype.kind == "M") != (time_N.dtype.kind == "M"):
        kind = "a date"
        if time.dtype.kind == "M":
            seconds = time.astype("datetime64[s]").astype(int)
            kind = f"a number, such as {seconds} if they are Unix seconds"
        raise VaecfError(
            f"test_time={short(given)}: the times of the data are "
            f"{time_N.min()} to {time_N.max()}; give {kind}"
        )
    if not time_N.min() < time <= time_N.max():
        raise VaecfError(
            f"test_time={short(given)} leaves nothing for the training or the "
            f"test: the times are {time_N.min()} to {time_N.max()}"
        )
    return time


def _drop_unknown(ratings: Ratings, part: np.ndarray) -> dict[str, int]:
    """Changes `part` to what the contract of this module allows.

    Returns:
      Counts of what was changed, for the manifest.
    """
    user, item = ratings.user, ratings.item
    is_test = part == _TEST
    if not is_test.any():
        raise VaecfError(
            "no interaction is for the test; say which are, with split_column "
            "or test_ratings, or give more interactions"
        )
    in_train_U = np.bincount(user, part == _TRAIN) > 0
    alone = (part == _VALIDATION) & ~in_train_U[user]
    part[alone] = _TRAIN
    known_U = np.bincount(user, ~is_test) > 0
    known_I = np.bincount(item, ~is_test) > 0
    without_history = is_test & ~known_U[user]
    unknown_item = is_test & known_U[user] & ~known_I[item]
    part[without_history | unknown_item] = _DROPPED
    if not (part == _TEST).any():
        raise VaecfError(
            "no test remains: no user of the test has training interactions "
            "besides, or their items have none; users of the test must be "
            "known"
        )
    return {
        "validation_moved_to_train": int(alone.sum()),
        "test_users_without_history": len(np.unique(user[without_history])),
        "interactions_without_history": int(without_history.sum()),
        "interactions_outside_vocabulary": int(unknown_item.sum()),
    }


def _usual_number(n_U: np.ndarray) -> int:
    return default_held_out_users(int(np.count_nonzero(n_U)))


def _choose(
    n_U: np.ndarray,
    number: int | None,
    usual: int | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Chooses validation users; `usual` is the default number, None for all."""
    able = np.flatnonzero(n_U >= 2)
    if number is None:
        number = len(able) if usual is None else min(usual, len(able))
    if number > len(able):
        raise VaecfError(
            f"held_out_users={number} must be at most {len(able):,}, the users "
            "with two training interactions or more"
        )
    return rng.choice(able, number, replace=False)


def _build(
    ratings: Ratings,
    part: np.ndarray,
    counts: dict[str, int],
    constants: dict[str, Any],
) -> Split:
    """Makes the matrices; the entries are sorted by user and item."""
    is_known = (part == _TRAIN) | (part == _VALIDATION)
    users = np.flatnonzero(np.bincount(ratings.user[is_known])).astype(np.int32)
    items = np.flatnonzero(np.bincount(ratings.item[is_known])).astype(np.int32)
    row = inverse(users, len(ratings.user_ids))[ratings.user]
    column = inverse(items, len(ratings.item_ids))[ratings.item]

    def matrix(mask: np.ndarray) -> Interactions:
        n_U = np.bincount(row[mask], minlength=len(users))
        indptr = np.concatenate([[0], np.cumsum(n_U)]).astype(np.int64)
        return Interactions(indptr, column[mask], len(items))

    def held_out(before: Interactions, mask: np.ndarray) -> HeldOut:
        held = matrix(mask)
        chosen = np.flatnonzero(held.counts)
        user_codes.append(users[chosen])
        return HeldOut(before.rows(chosen), held.rows(chosen))

    user_codes = [users]
    train = matrix(part == _TRAIN)
    validation = held_out(train, part == _VALIDATION)
    test = held_out(matrix(is_known), part == _TEST)
    counts = {
        "users": len(users),
        "interactions": int((part != _DROPPED).sum()),
        "interactions_before_test": int(is_known.sum()),
        "users_without_test": len(users) - test.fold_in.n_users,
        **counts,
    }
    codes = np.concatenate(user_codes)
    return Split(train, validation, test, items, codes, counts, 0, constants)
