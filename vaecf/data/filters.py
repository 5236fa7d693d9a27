"""Drops rare items and users with few items."""

from __future__ import annotations

import numpy as np

from vaecf.data.readers import Ratings
from vaecf.errors import VaecfError


def filter_ratings(
    ratings: Ratings,
    *,
    min_items_per_user: int = 0,
    min_users_per_item: int = 0,
    iterate: bool = False,
) -> tuple[Ratings, dict[str, int]]:
    """Drops rare items, then users with few of the remaining items.

    This is the order of Liang et al. (2018). After one pass some items may
    again have fewer than `min_users_per_item` users.

    Args:
      ratings: rows to filter; repeated pairs count as rows.
      iterate: repeat until both hold (a core of the bipartite graph).

    Returns:
      The remaining rows, and counts under the names of the manifest.

    Raises:
      VaecfError: nothing remains; names the threshold to lower.
    """
    n_users, n_items = len(ratings.user_ids), len(ratings.item_ids)
    before = ratings
    rounds = 0
    while True:
        start = ratings.n
        rounds += 1
        per_item = np.bincount(ratings.item, minlength=n_items)
        ratings = _keep(ratings, ratings.item, per_item, min_users_per_item)
        per_user = np.bincount(ratings.user, minlength=n_users)
        ratings = _keep(ratings, ratings.user, per_user, min_items_per_user)
        if not iterate or ratings.n == start:
            break
    if not ratings.n:
        most_items = int(np.max(np.bincount(before.user), initial=0))
        most_users = int(np.max(np.bincount(before.item), initial=0))
        raise VaecfError(
            f"the filters drop all of {_distinct(before.user):,} users and "
            f"{before.n:,} interactions (a user has at most {most_items} "
            f"items, an item at most {most_users} users); lower "
            f"min_items_per_user={min_items_per_user} or "
            f"min_users_per_item={min_users_per_item}"
        )
    users, items = _distinct(ratings.user), _distinct(ratings.item)
    return ratings, {
        "filter_rounds": rounds,
        "dropped_items": _distinct(before.item) - items,
        "dropped_users": _distinct(before.user) - users,
        "dropped_interactions": before.n - ratings.n,
        "users_after_filters": users,
        "items_after_filters": items,
        "interactions_after_filters": ratings.n,
    }


def _keep(
    ratings: Ratings, codes: np.ndarray, counts: np.ndarray, least: int
) -> Ratings:
    """Keeps rows whose code occurs often enough; copies nothing if all do."""
    enough = counts >= least
    if (enough | (counts == 0)).all():
        return ratings
    return ratings.where(enough[codes])


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes)))
