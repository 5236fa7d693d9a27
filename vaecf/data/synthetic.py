"""Generates interactions with planted taste groups.

The model, for user u, group g and item i::

  popularity      w_i           long-tailed, sums to 1
  affinity        a_gi          share of item i's audience in group g
  group           Phi_gi        = w_i a_gi / m_g,  m_g = sum_i w_i a_gi
  user            theta_ug      a mixture of at most three groups
  next item       p_ui          = sum_g theta_ug Phi_gi

A user's history is ``n_u`` items drawn from ``p_u`` successively without
replacement. Groups are picked with probability ``m_g``, so the mean of ``p_u``
over users is ``w``: popularity explains a part, and the rest is taste that a
model can learn. The generator keeps ``theta`` and ``Phi`` as the dataset's
oracle, so that the best possible ranking is known.

Only `numpy.random.Generator.random` is used; all distributions are our own
transforms of it, because NumPy may change its own between releases.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vaecf.data import splits
from vaecf.data.dataset import Dataset, make_dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError

TEST_PROPORTION = 0.2  # of a held-out user's items, rounded down
_CHUNK = 500_000  # interactions drawn together; bounds the memory
_ROUNDS = 4  # of draws with replacement before single users are completed


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and distributions of generated data."""

    n_train_users: int
    n_held_out_users: int  # for validation, and as many for test
    n_items: int
    n_groups: int
    # In [0, 1): the share of an item's audience that belongs to its own groups
    # rather than to all.
    focus: float
    # Knots (rank, weight), interpolated linearly in the logarithms of both.
    popularity: tuple[tuple[float, float], ...]
    # Knots (quantile, items) of the history length, rising. Between two knots,
    # at distance t in [0, 1], the logarithm rises as t ** bend.
    lengths: tuple[tuple[float, float], ...]
    bend: float = 1.0

    @property
    def n_users(self) -> int:
        """Training, validation and test users."""
        return self.n_train_users + 2 * self.n_held_out_users


RECIPES = {
    "synthetic": Recipe(
        n_train_users=4_000,
        n_held_out_users=400,
        n_items=1_000,
        n_groups=20,
        focus=0.9,
        # (rank + 10) ** -0.8, a Zipf curve with a flattened head.
        popularity=tuple(
            (float(rank), (rank + 10) ** -0.8)
            for rank in (1, 3, 10, 30, 100, 300, 1_000)
        ),
        # A log-logistic tail: median 21, mean 30, at most 300 items.
        lengths=(
            (0.0, 5), (0.05, 8.7), (0.1, 10.3), (0.25, 14.2), (0.5, 21),
            (0.75, 32.7), (0.9, 53), (0.95, 75), (0.99, 164), (1.0, 300),
        ),
    ),
    "ml-20m-shape": Recipe(
        n_train_users=116_677,
        n_held_out_users=10_000,
        n_items=20_108,
        n_groups=64,
        focus=0.66,
        # Fitted so that the held-out items of the generated users show the
        # shares of the real ones.
        popularity=(
            (1, 1.0), (5, 0.652), (18, 0.365), (55, 0.16), (180, 0.0674),
            (550, 0.0205), (1_450, 0.005), (3_200, 0.00105),
            (6_300, 0.000224), (12_000, 1.58e-5), (20_108, 4.73e-6),
        ),
        # From the published quantiles of the held-out items per user under the
        # split of Liang et al. (2018): 1, 1, 2, 2, 3, 7, 17, 34, 49, 94, 196,
        # 475. Of n items n // 5 are held out, so h stands for 5 h + 2 items.
        lengths=(
            (0.0, 5.0), (0.01, 7.0), (0.05, 12.0), (0.1, 12.0), (0.25, 17.0),
            (0.5, 37.0), (0.75, 87.0), (0.9, 172.0), (0.95, 247.0),
            (0.99, 472.0), (0.999, 982.0), (1.0, 2377.0),
        ),
        bend=1.179,  # makes the total 9,990,725; the real one is 9,990,682
    ),
}  # fmt: skip


def popularity(recipe: Recipe) -> np.ndarray:
    """Returns item weights, float64 [n_items], falling, with sum 1."""
    rank, weight = np.log(np.array(recipe.popularity).T)
    curve = np.exp(
        np.interp(np.log(np.arange(1, recipe.n_items + 1)), rank, weight)
    )
    return curve / curve.sum()


def history_lengths(recipe: Recipe, n_users: int) -> np.ndarray:
    """Returns items per user, int64 [n_users] ascending.

    These are the curve's quantiles at (k + 1/2) / n_users, so that the total
    is the same for every seed. No user gets more than half of the items.
    """
    quantile, length = np.array(recipe.lengths).T
    at = (np.arange(n_users) + 0.5) / n_users
    position = np.interp(at, quantile, np.arange(len(quantile)))
    knot = np.minimum(position.astype(np.int64), len(quantile) - 2)
    step = np.log(length[knot + 1] / length[knot])
    drawn = length[knot] * np.exp(step * (position - knot) ** recipe.bend)
    return np.minimum(np.floor(drawn + 0.5), recipe.n_items // 2).astype(
        np.int64
    )


def plant_groups(
    weights: np.ndarray, recipe: Recipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Assigns each item to groups: 0.7 to one, 0.3 to another, at random.

    Returns:
      Distributions over items float64 [n_groups, n_items], and the groups'
      masses float64 [n_groups]; masses @ distributions = weights.
    """
    n_items, n_groups = len(weights), recipe.n_groups
    affinity = np.full((n_groups, n_items), (1 - recipe.focus) / n_groups)
    for share in (0.7, 0.3):
        group = np.floor(rng.random(n_items) * n_groups).astype(np.int64)
        affinity[group, np.arange(n_items)] += recipe.focus * share
    joint = affinity * weights
    mass = joint.sum(axis=1)
    return joint / mass[:, None], mass


def draw_mixtures(
    mass: np.ndarray, n_users: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws mixtures, float32 [n_users, n_groups], with exponential shares.

    40 % of the users have one group, 40 % two, 20 % three, picked with
    probability `mass`.
    """
    n_picks = 1 + np.searchsorted([0.4, 0.8], rng.random(n_users), "right")
    share = -np.log1p(-rng.random((n_users, 3)))  # exponential variates
    share[np.arange(3) >= n_picks[:, None]] = 0.0
    share /= share.sum(axis=1, keepdims=True)
    group = np.searchsorted(np.cumsum(mass), rng.random((n_users, 3)), "right")
    group = np.minimum(group, len(mass) - 1)
    mixture = np.zeros((n_users, len(mass)), np.float32)
    np.add.at(mixture, (np.arange(n_users)[:, None], group), share)
    return mixture / mixture.sum(axis=1, keepdims=True)


def make(name: str, seed: int = 0, **overrides: Any) -> Dataset:
    """Generates a dataset split for strong generalisation, with its oracle.

    The first `n_train_users` of the independent draws are the training users.
    An item that no training user drew replaces a random draw.

    ``synthetic`` has 30 items per user. ``ml-20m-shape`` has the sizes, the
    history lengths and the popularity of MovieLens 20M under the paper's
    split: the k most popular items have the same share of the held-out items
    to .001, for k from 10 to 8,000.

    `overrides` are fields of `Recipe`, such as ``n_train_users=500``. The same
    seed gives the same arrays.

    Returns:
      A dataset of protocol ``vaecf`` with the oracle ``user_group`` (theta,
      float32 [n_users, n_groups], in the order of the users table) and
      ``group_item`` (Phi, float32 [n_groups, n_items]). ``user_group[u] @
      group_item`` is the best ranking of user u.

    Raises:
      VaecfError: unknown name, or sizes that do not fit.
    """
    recipe = _recipe(name, overrides)
    rng = np.random.Generator(np.random.PCG64(seed))
    # Popularity must not show in the item numbers.
    weights = popularity(recipe)[_permutation(recipe.n_items, rng)]
    group_item, mass = plant_groups(weights, recipe, rng)
    user_group = draw_mixtures(mass, recipe.n_users, rng)
    lengths = history_lengths(recipe, recipe.n_users)
    lengths = lengths[_permutation(recipe.n_users, rng)]
    histories = draw_histories(user_group, group_item, lengths, rng)
    n_train, n_held_out = recipe.n_train_users, recipe.n_held_out_users
    train = _cover_items(histories.rows(slice(0, n_train)), rng)
    held_out = []
    for start in (n_train, n_train + n_held_out):
        part = histories.rows(slice(start, start + n_held_out))
        n_held_U = splits.n_held_out(part.counts, TEST_PROPORTION)
        held_out.append(splits.hold_out(part, n_held_U, rng.random(part.nnz)))
    width = len(str(recipe.n_items))
    items = [f"item-{i:0{width}d}" for i in range(1, recipe.n_items + 1)]
    return make_dataset(
        name=name,
        protocol="vaecf",
        train=train,
        validation=held_out[0],
        test=held_out[1],
        items=IdTable(items),
        users=IdTable(np.arange(recipe.n_users, dtype=np.int64) + 1),
        constants={
            "seed": seed,
            "held_out_users": recipe.n_held_out_users,
            "test_proportion": TEST_PROPORTION,
            "min_rating": None,
            "min_items_per_user": int(lengths.min()),
            "min_users_per_item": 0,
        },
        oracle={
            "user_group": user_group,
            "group_item": group_item.astype(np.float32),
        },
        oracle_facts={"generator": dataclasses.asdict(recipe), "seed": seed},
    )


def _recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    if name not in RECIPES:
        raise VaecfError(
            f"cannot generate {name!r}; known are {', '.join(RECIPES)}"
        )
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    least = {"n_train_users": 1, "n_held_out_users": 0, "n_items": 20}
    for key, minimum in {**least, "n_groups": 1}.items():
        if getattr(recipe, key) < minimum:
            raise VaecfError(
                f"{name}: {key} must be at least {minimum}, got "
                f"{getattr(recipe, key)!r}"
            )
    if not 0 <= recipe.focus < 1:
        raise VaecfError(f"{name}: focus={recipe.focus!r} must be in [0, 1)")
    return recipe


def _permutation(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random(n), kind="stable")


def _cover_items(train: Interactions, rng: np.random.Generator) -> Interactions:
    """Overwrites random spare interactions with the items nobody drew."""
    unseen = np.flatnonzero(train.item_counts() == 0)
    if not len(unseen):
        return train
    # Keep the first draw of every seen item, so that it stays seen.
    spare = np.ones(train.nnz, bool)
    spare[np.unique(train.indices, return_index=True)[1]] = False
    positions = np.flatnonzero(spare)
    if len(positions) < len(unseen):
        raise VaecfError(
            f"{train.nnz} training interactions cannot show "
            f"{train.n_items} items; raise n_train_users or lower n_items"
        )
    chosen = positions[_permutation(len(positions), rng)[: len(unseen)]]
    indices = train.indices.copy()
    indices[chosen] = unseen
    user = np.repeat(np.arange(train.n_users), train.counts)
    covered, _ = Interactions.from_pairs(
        user, indices, train.n_users, train.n_items
    )
    return covered


# --- Drawing without replacement ---------------------------------------------


def draw_histories(
    user_group: np.ndarray,
    group_item: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> Interactions:
    """Draws each user's items without replacement, in bounded memory.

    Items are drawn from the user's mixture, and repeated ones are discarded.
    This is successive sampling without replacement, the distribution of a
    Gumbel top-k over ``log p_u``, without users x items work.

    Args:
      user_group: float [n_users, n_groups], rows sum to 1.
      group_item: float [n_groups, n_items], rows sum to 1.
      lengths: items per user, int64 [n_users], at most n_items.

    Raises:
      VaecfError: a user's mixture has fewer items than the user's length.
    """
    group_cdf = _flat_cdf(group_item)
    n_items = group_item.shape[1]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.empty(indptr[-1], np.int32)
    start = 0
    while start < len(lengths):
        stop = int(np.searchsorted(indptr, indptr[start] + _CHUNK, "right")) - 1
        stop = min(max(stop, start + 1), len(lengths))
        users = slice(start, stop)
        keys = _draw_chunk(
            user_group[users], group_item, group_cdf, lengths[users], rng
        )
        indices[indptr[start] : indptr[stop]] = keys % n_items
        start = stop
    return Interactions(indptr, indices, n_items)


def _flat_cdf(rows: np.ndarray) -> np.ndarray:
    """Returns row r's cumulative sums plus r: one sorted float64 array.

    `np.searchsorted(flat, r + u, "right")` draws from row r for u in [0, 1).
    """
    cdf = np.cumsum(rows, axis=1, dtype=np.float64)
    cdf /= cdf[:, -1:]
    return (cdf + np.arange(len(rows))[:, None]).ravel()


def _draw(
    flat: np.ndarray, row: np.ndarray, n_columns: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws a column for each of `row` from the distributions `flat`."""
    at = np.searchsorted(flat, row + rng.random(len(row)), "right")
    # Rounding can carry row + u beyond the end of the row.
    return np.minimum(at - row * n_columns, n_columns - 1)


def _draw_chunk(
    user_group: np.ndarray,
    group_item: np.ndarray,
    group_cdf: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns ascending keys user * n_items + item, `lengths` per user."""
    n_groups, n_items = group_item.shape
    user_cdf = _flat_cdf(user_group)
    keys = np.empty(0, np.int64)  # distinct, in the order drawn
    missing = lengths
    for round_ in range(_ROUNDS):
        n_draws = np.ceil(missing * 1.25 * 2**round_) + 2 * (missing > 0)
        user = np.repeat(np.arange(len(lengths)), n_draws.astype(np.int64))
        group = _draw(user_cdf, user, n_groups, rng)
        item = _draw(group_cdf, group, n_items, rng)
        keys = np.concatenate([keys, user * n_items + item])
        _, first = np.unique(keys, return_index=True)
        keys = keys[np.sort(first)]
        found = np.bincount(keys // n_items, minlength=len(lengths))
        missing = np.maximum(lengths - found, 0)
        if not missing.any():
            break
    # Keep each user's earliest draws: order by user, then by time.
    keys = keys[np.argsort(keys // n_items, kind="stable")]
    rank = np.arange(len(keys)) - np.repeat(np.cumsum(found) - found, found)
    keys = np.sort(keys[rank < np.repeat(lengths, found)])
    rest = [keys]
    for slow in np.flatnonzero(missing).tolist():
        seen = keys[keys // n_items == slow] % n_items
        probability = user_group[slow] @ group_item
        more = _draw_rest(probability, seen, int(missing[slow]), rng)
        rest.append(slow * n_items + more)
    return np.sort(np.concatenate(rest)) if len(rest) > 1 else keys


def _draw_rest(
    probability: np.ndarray, seen: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the next `n` items after those `seen`, by a Gumbel top-k.

    After some draws without replacement, the rest is again such a draw from
    the remaining items, so this may follow any number of rounds.
    """
    with np.errstate(divide="ignore"):  # log 0 = -inf: never drawn
        gumbel = -np.log(-np.log1p(-rng.random(len(probability))))
        score = np.log(probability) + gumbel
    score[seen] = -np.inf
    best = np.argsort(-score, kind="stable")[:n]
    if len(best) < n or score[best[-1]] == -np.inf:
        raise VaecfError(
            f"a user needs {len(seen) + n} items, but only "
            f"{np.count_nonzero(probability)} of {len(probability)} items "
            "have a probability above 0"
        )
    return best
