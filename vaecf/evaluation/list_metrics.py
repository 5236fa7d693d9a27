"""Metrics of the recommended items themselves: NumPy, float64.

Novelty, diversity, concentration. Nothing but the training interactions
describes an item: two items are similar if the same training users have both.

Shapes in names: U users, K ranks, I items. A metric is a value per user, or
one value of all lists. Users without held-out items do not count.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from vaecf.data.interactions import Interactions

# Groups of items by popularity. The head is the most popular items that hold
# 20 % of the training interactions; the tail, or long tail, is all items but
# the most popular ones that hold 80 %.
POPULARITY_GROUPS = ("head", "mid", "tail")
_PERCENTS = (20, 80)
_BLOCK = 1 << 22  # similarities in memory at once


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What the training users tell about the items."""

    train: Interactions

    @functools.cached_property
    def count_I(self) -> np.ndarray:
        """Training users who have the item, int64 [I]."""
        return self.train.item_counts()

    @functools.cached_property
    def share_I(self) -> np.ndarray:
        """Share of the training users who have the item, float64 [I]."""
        return self.count_I / max(1, self.train.n_users)

    @functools.cached_property
    def popularity_group_I(self) -> np.ndarray:
        """Index in `POPULARITY_GROUPS` of each item, int64 [I].

        A part of the catalogue that holds so many % of the interactions is the
        shortest list of the most popular items that holds at least so many. Of
        equally popular items the one of the lower index comes first.
        """
        order = np.argsort(-self.count_I, kind="stable")
        held = 100 * np.cumsum(self.count_I[order])
        group_I = np.zeros(self.train.n_items, np.int64)
        for percent in _PERCENTS:
            n_inside = 1 + np.searchsorted(held, percent * self.train.nnz)
            group_I[order[n_inside:]] += 1
        return group_I

    @functools.cached_property
    def by_user(self) -> Any:
        """Training interactions as a SciPy CSR matrix, users x items."""
        return self.train.to_scipy()

    @functools.cached_property
    def by_item(self) -> Any:
        """Training interactions as a SciPy CSR matrix, items x users."""
        return self.by_user.T.tocsr()


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Ranked lists, and what their metrics depend on."""

    # int [U, K], item indices, best first; -1 after the end of a list. Lists
    # of users without held-out items are empty.
    ranked_UK: np.ndarray
    hits_UK: np.ndarray  # bool [U, K], whether the item is held out
    n_held_out_U: np.ndarray  # int [U], held-out items
    fold_in: Interactions  # histories of the same users
    items: Items

    def shown_items(self, k: int) -> np.ndarray:
        """Returns the first k items of all lists, without empty places."""
        shown_UK = self.ranked_UK[:, :k]
        return shown_UK[shown_UK >= 0]

    def mean(self, value_I: np.ndarray, k: int) -> np.ndarray:
        """Returns the mean of a value of the first k items, float64 [U].

        The mean of an empty list is NaN.
        """
        shown_UK = self.ranked_UK[:, :k]
        real_UK = shown_UK >= 0
        value_UK = np.where(real_UK, value_I[np.maximum(shown_UK, 0)], 0.0)
        return divide(value_UK.sum(axis=1), real_UK.sum(axis=1))


# --- One value of all lists -------------------------------------------------


def coverage(lists: Lists, k: int) -> np.ndarray:
    """Returns the share of all items that appear in any list, float64 [].

    Item space coverage of Shani and Gunawardana 2011, section 8.3.2.
    """
    n_shown = len(np.unique(lists.shown_items(k)))
    return np.array(n_shown / lists.items.train.n_items)


def gini(lists: Lists, k: int) -> np.ndarray:
    """Returns the Gini index of how often items are listed, float64 [].

    Σ_j (2j - I - 1) p_j / (I - 1), with p_1 ≤ … ≤ p_I the items' shares of all
    places in lists (Shani and Gunawardana 2011, section 8.3.2). It is 0 if all
    items of the catalogue are listed equally often, and 1 if a single item
    takes all places.
    """
    share_I = np.sort(_share_of_places(lists, k))
    n_items = len(share_I)
    weight_I = 2 * np.arange(1, n_items + 1) - n_items - 1
    return np.array(weight_I @ share_I / max(1, n_items - 1))


def entropy(lists: Lists, k: int) -> np.ndarray:
    """Returns the entropy of the listed items in bits, float64 [].

    -Σ_i p_i log2 p_i, with p_i the item's share of all places in lists (Shani
    and Gunawardana 2011, section 8.3.2, with the logarithm to base 2). It is
    0 if a single item takes all places, and log2 I if all items are listed
    equally often.
    """
    share_I = _share_of_places(lists, k)
    share_I = share_I[share_I != 0]
    return np.array(-(share_I @ np.log2(share_I)) + 0.0)


# --- A value per user -------------------------------------------------------


def user_coverage(lists: Lists, k: int) -> np.ndarray:
    """Returns 1 for users with a list of k items, else 0, float64 [U].

    The mean is the user space coverage of Shani and Gunawardana 2011, section
    8.3.2: the share of users for whom there are enough recommendations.
    """
    shown_UK = lists.ranked_UK[:, :k]
    is_full_U = (shown_UK >= 0).sum(axis=1) == k
    return np.where(lists.n_held_out_U > 0, is_full_U, np.nan)


def popularity(lists: Lists, k: int) -> np.ndarray:
    """Returns the mean share of the first k items, float64 [U].

    The share of an item is that of the training users who have the item.
    """
    return lists.mean(lists.items.share_I, k)


def novelty(lists: Lists, k: int) -> np.ndarray:
    """Returns the mean self-information of the first k items, bits, [U].

    -log2 of the share of the training users who have the item (Zhou et al.
    2010, "Solving the apparent diversity-accuracy dilemma of recommender
    systems"). An item that no training user has counts like one of a single
    user: its self-information would be infinite.
    """
    items = lists.items
    n_users = max(1, items.train.n_users)
    return lists.mean(-np.log2(np.maximum(items.count_I, 1) / n_users), k)


def long_tail(lists: Lists, k: int) -> np.ndarray:
    """Returns the share of the first k items in the long tail, float64 [U].

    The long tail is all items but the most popular ones that hold 80 % of the
    training interactions. The mean over users is the APLT of Abdollahpouri et
    al. 2019 ("Managing popularity bias in recommender systems with
    personalized re-ranking"), with the split of Elliot (Anelli et al. 2021).
    """
    tail = POPULARITY_GROUPS.index("tail")
    is_tail_I = lists.items.popularity_group_I == tail
    return lists.mean(is_tail_I.astype(np.float64), k)


def diversity(lists: Lists, k: int) -> np.ndarray:
    """Returns the diversity within the first k items, float64 [U].

    1 - Σ_{i≠j} cos(i, j) / (n (n - 1)) over the n items of the list: one minus
    the mean intra-list similarity (Ziegler et al. 2005, section 3.2). The
    cosine of two items is that of their columns in the training matrix, users
    of both / √(users of i · users of j), as in Zhang et al. 2012
    ("Auralist"); it is 0 for an item without users. NaN for lists of fewer
    than two items.
    """
    shown_UK = lists.ranked_UK[:, :k]
    real_UK = shown_UK >= 0
    length_U = real_UK.sum(axis=1)
    indptr = np.concatenate([[0], np.cumsum(length_U)])
    sum_UK = _cosine_sums(lists.items, shown_UK, indptr, shown_UK[real_UK])
    with_itself_UK = real_UK & (lists.items.count_I[shown_UK] > 0)
    sum_U = sum_UK.sum(axis=1) - with_itself_UK.sum(axis=1)
    return 1 - divide(sum_U, length_U * (length_U - 1))


def serendipity(lists: Lists, k: int) -> np.ndarray:
    """Returns hits weighted by their unexpectedness, over k, float64 [U].

    Σ_i hit_i (1 - mean_h cos(i, h)) / k over the first k items i, with h the
    items of the user's history: unexpected and useful, as in Ge et al. 2010,
    where unexpected is far from the history, by the cosine of Zhang et al.
    2012 ("Auralist", unserendipity), which `diversity` describes. At most the
    precision. NaN for users without a history.
    """
    fold_in = lists.fold_in
    # Only hits count, so the similarities of other items are not computed.
    hit_UK = np.where(lists.hits_UK, lists.ranked_UK, -1)[:, :k]
    cosine_UK = _cosine_sums(
        lists.items, hit_UK, fold_in.indptr, fold_in.indices
    )
    expected_U = divide(cosine_UK.sum(axis=1), fold_in.counts)
    value_U = ((hit_UK >= 0).sum(axis=1) - expected_U) / k
    return np.where(lists.n_held_out_U > 0, value_U, np.nan)


# --- Helpers ----------------------------------------------------------------


def _share_of_places(lists: Lists, k: int) -> np.ndarray:
    """Returns each item's share of the first k places, NaN without lists."""
    n_items = lists.items.train.n_items
    count_I = np.bincount(lists.shown_items(k), minlength=n_items)
    total = count_I.sum()
    return count_I / total if total else np.full(n_items, np.nan)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotient; NaN where the denominator is 0."""
    safe = np.where(denominator > 0, denominator, 1)
    return np.where(denominator > 0, numerator / safe, np.nan)


def _cosine_sums(
    items: Items, item_UK: np.ndarray, indptr: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Returns the sum of cosines of items with sets of items, float64 [U, K].

    Args:
      item_UK: int [U, K], items; the sum is 0 where the item is -1.
      indptr: int64 [U + 1], row pointers of each user's set.
      indices: int [items of all sets], their items.
    """
    import scipy.sparse

    sum_UK = np.zeros(item_UK.shape)
    user_E, rank_E = np.nonzero(item_UK >= 0)
    distinct, item_E = np.unique(item_UK[user_E, rank_E], return_inverse=True)
    others, column_N = np.unique(indices, return_inverse=True)
    shape = len(indptr) - 1, len(others)
    sets = scipy.sparse.csr_matrix(
        (np.ones(len(indices)), column_N, indptr), shape
    )
    other_users = items.by_user[:, others]
    scale_I = 1 / np.sqrt(np.maximum(items.count_I, 1))
    # Entries of one item after another, and where each item's entries begin.
    order = np.argsort(item_E, kind="stable")
    begin = np.searchsorted(item_E[order], np.arange(len(distinct) + 1))
    n_rows = max(1, _BLOCK // max(1, len(others)))
    for first in range(0, len(distinct), n_rows):
        rows = distinct[first : first + n_rows]
        cosine = (items.by_item[rows] @ other_users).toarray()
        cosine = cosine * scale_I[rows, None] * scale_I[others]
        for row, cosine_I in enumerate(cosine, first):
            entry = order[begin[row] : begin[row + 1]]
            user = user_E[entry]
            sum_UK[user, rank_E[entry]] = sets[user] @ cosine_I
    return sum_UK
