"""Generated interactions with planted taste groups.

The model, for user u, group g and item i::

  popularity      w_i           long-tailed, sums to 1
  affinity        a_gi          share of item i's audience in group g
  group           Phi_gi        = w_i a_gi / m_g,  m_g = sum_i w_i a_gi
  user            theta_ug      a mixture of at most three groups
  next item       p_ui          = sum_g theta_ug Phi_gi

A user's history is ``n_u`` items drawn from ``p_u`` one after the other
without replacement. As groups are picked with probability ``m_g``, the mean
of ``p_u`` over users is ``w``: popularity alone explains what it may, and the
rest is taste that a model can learn from the histories. The generator keeps
``theta`` and ``Phi``, so that the best possible ranking is known.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from vaecf.data.dataset import Dataset, make_dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.data.sampling import draw_histories
from vaecf.data.splits import hold_out
from vaecf.errors import VaecfError, did_you_mean

TEST_PROPORTION = 0.2  # of a held-out user's items, rounded down


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `make` generates; each field may be overridden by its name.

    Attributes:
      n_train_users: users to train on.
      n_held_out_users: validation users; as many again are test users.
      n_items: size of the catalogue.
      n_groups: taste groups.
      focus: in [0, 1); how much of an item's audience belongs to its own
        groups rather than to everybody.
      popularity: knots (rank, weight) of the popularity curve, interpolated
        linearly in the logarithms of both.
      lengths: knots (quantile, items) of the history length, rising.
      bend: within two knots at distance t in [0, 1] the logarithm of the
        length rises as t ** bend.
    """

    n_train_users: int
    n_held_out_users: int
    n_items: int
    n_groups: int
    focus: float
    popularity: tuple[tuple[float, float], ...]
    lengths: tuple[tuple[float, float], ...]
    bend: float = 1.0

    @property
    def n_users(self) -> int:
        """Training, validation and test users together."""
        return self.n_train_users + 2 * self.n_held_out_users


# Quantiles of the held-out items per user of MovieLens 20M under the split of
# Liang et al. (2018): 20,000 held-out users, of whom a fifth of the history,
# rounded down, is held out. Published as aggregate statistics only.
_ML20M_HELD_OUT_QUANTILES = (
    (0.0, 1), (0.01, 1), (0.05, 2), (0.1, 2), (0.25, 3), (0.5, 7), (0.75, 17),
    (0.9, 34), (0.95, 49), (0.99, 94), (0.999, 196), (1.0, 475),
)  # fmt: skip

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
    # A history of n items holds out n // 5, so that h held-out items stand
    # for 5 h to 5 h + 4 items; `bend` brings the total to 9,990,682. The
    # popularity knots were fitted by iteration so that the held-out items of
    # the generated users show the shares of the real ones.
    "ml-20m-shape": Recipe(
        n_train_users=116_677,
        n_held_out_users=10_000,
        n_items=20_108,
        n_groups=64,
        focus=0.66,
        popularity=(
            (1, 1.0), (5, 0.652), (18, 0.365), (55, 0.16), (180, 0.0674),
            (550, 0.0205), (1_450, 0.005), (3_200, 0.00105),
            (6_300, 0.000224), (12_000, 1.58e-5), (20_108, 4.73e-6),
        ),
        lengths=tuple(
            (quantile, 5.0 * held_out + 2 if quantile else 5.0)
            for quantile, held_out in _ML20M_HELD_OUT_QUANTILES
        ),
        bend=1.179,
    ),
}  # fmt: skip


class Oracle(NamedTuple):
    """What the generator knows.

    Attributes:
      user_group: float32 [n_users, n_groups], each user's mixture, in the
        order of the users table (train, validation, test); rows sum to 1.
      group_item: float32 [n_groups, n_items], each group's distribution
        over the items; rows sum to 1.
    """

    user_group: np.ndarray
    group_item: np.ndarray

    def scores(self, users: np.ndarray) -> np.ndarray:
        """True probabilities float32 [len(users), n_items] of the next item.

        `users` are rows of the users table. Ranking the items that a user
        does not have yet by these numbers is the best that anyone can do.
        """
        return np.asarray(self.user_group[users]) @ np.asarray(self.group_item)


def popularity(recipe: Recipe) -> np.ndarray:
    """Weights of the items by falling popularity: float64 [n_items], sum 1."""
    rank, weight = np.log(np.array(recipe.popularity).T)
    curve = np.exp(
        np.interp(np.log(np.arange(1, recipe.n_items + 1)), rank, weight)
    )
    return curve / curve.sum()


def history_lengths(recipe: Recipe, n_users: int) -> np.ndarray:
    """Items per user, int64 [n_users] ascending: the curve's own quantiles.

    Taking them at (k + 1/2) / n_users leaves no sampling error, so that the
    total is the same for every seed. No user gets more than half the items.
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
    """Gives every item its groups.

    An item belongs by 0.7 to one group and by 0.3 to another, both picked at
    random; `1 - focus` of it belongs to everybody.

    Returns:
      Distributions over items float64 [n_groups, n_items], and the groups'
      masses float64 [n_groups], so that masses @ distributions = weights.
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
    """Mixtures float32 [n_users, n_groups] of one to three groups each.

    Groups are picked with probability `mass`; how many and how much of each
    is random: 40 % of the users have one, 40 % two, 20 % three.
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
    """Generates a dataset with strong generalisation, oracle included.

    Users are independent draws of one law, so the first `n_train_users` of
    them are as good a random choice of training users as any, and `splits`
    is not asked for another. Every item is seen in training, so that the
    vocabulary is `n_items` for every seed: an item that no training user
    drew takes the place of a random draw.

    ``synthetic``: 4,000 + 400 + 400 users, 1,000 items, 30 items per user.

    ``ml-20m-shape``: MovieLens 20M under the paper's split: 116,677 + 10,000
    + 10,000 users, 20,108 items, 9,990,725 interactions (real: 9,990,682).
    Held-out part of seed 0 against the real one, share of the k most popular
    items::

      k           10    30   100   300  1000  2000  5000  8000
      generated .044  .106  .235  .436  .718  .861  .971  .994
      real      .044  .105  .234  .436  .719  .861  .971  .994

    Distinct items 9,661 (9,617), items per user mean 14.14 (14.11), median 7
    (7), 99th percentile 94 (94), maximum 470 (475). Heavy users flatten the
    shares, as nobody takes an item twice; the popularity knots allow for it.

    Args:
      name: ``synthetic`` or ``ml-20m-shape``.
      seed: of everything random; the same seed gives the same arrays.
      **overrides: fields of `Recipe`, such as ``n_train_users=500``.

    Returns:
      A `Dataset` of protocol ``vaecf`` with integer user ids, string item
      ids, and `oracle` (see `oracle_of`).

    Raises:
      VaecfError: unknown name or field, or sizes that do not fit.
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
    at = recipe.n_train_users
    train = _cover_items(histories.rows(slice(0, at)), rng)
    held_out = []
    for start in (at, at + recipe.n_held_out_users):
        users = slice(start, start + recipe.n_held_out_users)
        part = histories.rows(users)
        held_out.append(hold_out(part, TEST_PROPORTION, rng.random(part.nnz)))
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
        oracle=Oracle(user_group, group_item.astype(np.float32))._asdict(),
        oracle_facts={"generator": dataclasses.asdict(recipe), "seed": seed},
    )


def oracle_of(dataset: Dataset) -> Oracle | None:
    """What the generator knew of a dataset, or None if it is real."""
    if dataset.oracle is None:
        return None
    return Oracle(**dataset.oracle)


def _recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    if name not in RECIPES:
        raise VaecfError(
            f"cannot generate {name!r}; known are {', '.join(RECIPES)}"
        )
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for key in overrides:
        if key not in fields:
            raise VaecfError(
                f"{name} has no field {key!r}{did_you_mean(key, fields)} "
                f"(fields are {', '.join(fields)})"
            )
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    for key, least in (
        ("n_train_users", 1),
        ("n_held_out_users", 0),
        ("n_items", 20),
        ("n_groups", 1),
    ):
        value = getattr(recipe, key)
        if not isinstance(value, int) or value < least:
            raise VaecfError(
                f"{name}: {key} must be an integer of at least {least}, "
                f"got {value!r}"
            )
    if not 0 <= recipe.focus < 1:
        raise VaecfError(
            f"{name}: focus must be in [0, 1), got {recipe.focus!r}"
        )
    return recipe


def _permutation(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random(n), kind="stable")


def _cover_items(train: Interactions, rng: np.random.Generator) -> Interactions:
    """Replaces as many random draws as there are items that nobody drew."""
    unseen = np.flatnonzero(train.item_counts() == 0)
    if not len(unseen):
        return train
    # The first draw of every seen item is kept, so that it stays seen.
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
    keys = np.sort(user * train.n_items + indices)
    return Interactions(
        train.indptr, (keys % train.n_items).astype(np.int32), train.n_items
    )
