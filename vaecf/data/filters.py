"""Leaving out items that few people touched and people who touched few."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vaecf.data.readers import Ratings
from vaecf.errors import VaecfError


class FilterReport(NamedTuple):
    """What the filters left out.

    Attributes:
      rounds: passes over the data.
      dropped_items: items left out by ``min_users_per_item``.
      dropped_users: users left out, for whatever reason.
      dropped_interactions: rows left out.
      users: users that remain.
      items: items that remain.
      interactions: rows that remain.
    """

    rounds: int
    dropped_items: int
    dropped_users: int
    dropped_interactions: int
    users: int
    items: int
    interactions: int


def filter_ratings(
    ratings: Ratings,
    *,
    min_items_per_user: int = 0,
    min_users_per_item: int = 0,
    iterate: bool = False,
) -> tuple[Ratings, FilterReport]:
    """Drops rare items, then users with few of the items that remain.

    The order is that of Liang et al. (2018): after one pass some items may
    again have fewer than ``min_users_per_item`` users.

    Args:
      ratings: rows count as they stand, repeated pairs each.
      min_items_per_user: rows that a user needs.
      min_users_per_item: rows that an item needs.
      iterate: repeat until both hold (a core of the bipartite graph).

    Raises:
      VaecfError: if nothing remains; says how far one was from it.
    """
    n_users, n_items = len(ratings.user_ids), len(ratings.item_ids)
    before = ratings
    rounds = 0
    while True:
        start = ratings.n
        rounds += 1
        if min_users_per_item > 0:
            per_item = np.bincount(ratings.item, minlength=n_items)
            ratings = _keep(ratings, ratings.item, per_item, min_users_per_item)
        if min_items_per_user > 0:
            per_user = np.bincount(ratings.user, minlength=n_users)
            ratings = _keep(ratings, ratings.user, per_user, min_items_per_user)
        if not iterate or ratings.n == start:
            break
    users = _distinct(ratings.user, n_users)
    items = _distinct(ratings.item, n_items)
    report = FilterReport(
        rounds,
        _distinct(before.item, n_items) - items,
        _distinct(before.user, n_users) - users,
        before.n - ratings.n,
        users,
        items,
        ratings.n,
    )
    if not ratings.n:
        raise VaecfError(
            _nothing_left(before, min_items_per_user, min_users_per_item)
        )
    return ratings, report


def _keep(
    ratings: Ratings, codes: np.ndarray, counts: np.ndarray, least: int
) -> Ratings:
    """Rows whose code occurs often enough; no copy if all do."""
    enough = counts >= least
    if (enough | (counts == 0)).all():
        return ratings
    return ratings.where(enough[codes])


def _distinct(codes: np.ndarray, n_codes: int) -> int:
    """How many different codes there are."""
    seen = np.zeros(n_codes, bool)
    seen[codes] = True
    return int(seen.sum())


def _nothing_left(
    ratings: Ratings, min_items_per_user: int, min_users_per_item: int
) -> str:
    """Why everything was left out, and what to lower."""
    most_items = int(np.bincount(ratings.user).max(initial=0))
    most_users = int(np.bincount(ratings.item).max(initial=0))
    n_users = _distinct(ratings.user, len(ratings.user_ids))
    if most_users < min_users_per_item:
        why = (
            f"no item has {min_users_per_item} users (the most is "
            f"{most_users}); lower --min_users_per_item"
        )
    elif most_items < min_items_per_user:
        why = (
            f"no user has {min_items_per_user} items (the most is "
            f"{most_items}); lower --min_items_per_user"
        )
    else:
        why = (
            f"no user has {min_items_per_user} items that "
            f"{min_users_per_item} users have; lower --min_items_per_user "
            "or --min_users_per_item"
        )
    return (
        f"the filters leave none of {n_users:,} users and {ratings.n:,} "
        f"interactions: {why}"
    )
