"""An autoencoder and a linear item-item path that rank together.

Both say which items come next; a product of experts (Hinton 2002) takes both at
their word, and divides out what they both count, how popular an item is:

  score_ui = logit_ui + g · log(ε + max(0, x_u · B)_i) - ρ g · log p_i

with the item-item weights B (`linear.fit_ease`), the share p_i of the training
users who have the item, and two weights that validation users choose
(`serving.blending`): the gain g of the linear branch and the share ρ of the prior
that is divided out of it. g = 0 leaves the autoencoder alone.

Scores and not a loss: trained with such a path beside it, an autoencoder leaves
to the path what it should learn itself. Measured on MovieLens-1M, also with the
path's scores of a training user taken from the others alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.models import linear, low_rank
from vaecf.models.sparse_batch import SparseBatch

# What a score of the linear branch is at least: of 0 there is no logarithm.
_EPSILON = 0.003
# Users added to every item's when its logarithm is taken.
_PSEUDO_USERS = 5.0

PARTITION = linear.PARTITION | low_rank.PARTITION | {"log_share": ("item",)}

# Items up to which the item-item matrix is a whole one, and the rank beyond.
WHOLE_ITEMS, RANK = 25_000, 512

# Before validation users choose, and where there are none.
GAIN, PRIOR = 1.4, 0.3


def rank_of(rank: int | None, n_items: int) -> int:
    """The rank of a path by what is asked for; 0 for a whole matrix."""
    if rank is None:
        return 0 if n_items <= WHOLE_ITEMS else RANK
    return min(rank, n_items)


def shapes(rank: int | None, n_items: int) -> dict[str, tuple[int, ...]]:
    """Arrays of a path without padding, by name."""
    k = rank_of(rank, n_items)
    share = {"log_share": (n_items,)}
    if not k:
        return {"item_item": (n_items, n_items), **share}
    return {
        "input_factors": (n_items, k),
        "output_factors": (k, n_items),
        "own_weight": (n_items,),
        **share,
    }


def fit(
    train: Any,
    *,
    l2: float,
    dropout: float,
    user_exponent: float,
    rank: int | None = 0,
) -> dict[str, np.ndarray]:
    """The linear branch, float32: a matrix or its factors, and shares of users.

    Args:
      train: Interactions (users x items).
      l2: as of `linear.fit_ease`.
      dropout: as of `linear.fit_ease`.
      user_exponent: as of `linear.fit_ease`.
      rank: of the factors; 0 for a whole matrix; None for a whole one up to
        `WHOLE_ITEMS` items and factors of `RANK` beyond.

    Returns:
      The arrays of `shapes`, with the axes that `PARTITION` shards padded.

    Raises:
      VaecfError: it does not fit memory; shows the arithmetic.
    """
    if k := rank_of(rank, train.n_items):
        fitted = low_rank.fit(
            train,
            l2,
            k,
            dropout=dropout,
            user_exponent=user_exponent,
            mend=f"set linear.rank below {k:,}, or linear.l2=0 for no path",
        )
    else:
        fitted = linear.fit_ease(
            train,
            l2,
            dropout=dropout,
            user_exponent=user_exponent,
            mend=f"set linear.rank={RANK}, or linear.l2=0 for no path",
        )
    count_I = train.item_counts() + _PSEUDO_USERS
    share_I = np.log(count_I / (train.n_users + _PSEUDO_USERS))
    return {**fitted, "log_share": linear.pad_items(share_I)}


def scores(
    model_BI: jax.Array,
    path: dict[str, Any],
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    """Scores of this shard's items, float32 [B, I].

    Args:
      model_BI: logits of the autoencoder; -inf for padding.
      path: of `fit`, with scalars 'gain' and 'prior'.
      batch: the users' histories.
      user_B: as of every scorer.
    """
    linear_BI = path_scores(path, batch, user_B)
    log_BI = jnp.log(jnp.maximum(linear_BI, 0.0) + _EPSILON)
    log_BI -= path["prior"] * path["log_share"][None, :]
    # Of a user without a history the path knows nothing, and what it does not
    # count must not be divided out.
    known_B1 = batch.count_B[:, None] > 0
    return model_BI + jnp.where(known_B1, path["gain"] * log_BI, 0.0)


def path_scores(
    path: dict[str, Any], batch: SparseBatch, user_B: jax.Array
) -> jax.Array:
    """x · B of this shard's items, float32 [B, I], of a matrix or factors."""
    if "item_item" in path:
        return linear.item_item_scores(path, batch, user_B)
    return low_rank.scores(path, batch)
