"""A blend: an autoencoder and a linear item-item branch that rank together.

Both estimate which items come next. Their product of experts (Hinton 2002)
trusts both, and divides out what both contain, the popularity of the items:

  score_ui = logit_ui + g · log(ε + max(0, x_u · B)_i) - ρ g · log p_i

B holds the item-item weights (`linear.fit` or `low_rank.fit`), and p_i is the
share of the training users who have item i. Validation users choose the gain g
of the linear branch and the share ρ of the prior p that is divided out
(`evaluation.blend_tuning`). With g = 0 the autoencoder ranks alone.

The branch enters the scores but not the loss. An autoencoder that is trained
with the branch beside it leaves to the branch what it should learn itself. We
measured this on MovieLens-1M, also with branch scores of each training user
that were fitted to the other users only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.models import linear, low_rank
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

_EPSILON = 0.003  # ε, which keeps the logarithm finite
_PSEUDO_USERS = 5.0  # added to the users of each item: p_i > 0

PARTITION = linear.PARTITION | low_rank.PARTITION | {"log_share": ("item",)}

FULL_RANK_ITEMS, RANK = 25_000, 512  # of `rank=None`, see `effective_rank`

# Used before validation users choose g and ρ, or if there are none.
GAIN, PRIOR = 1.4, 0.3


def effective_rank(rank: int | None, n_items: int) -> int:
    """Returns the rank of the factors; 0 for the full matrix.

    None means the full matrix up to `FULL_RANK_ITEMS` items, and factors of
    rank `RANK` beyond.
    """
    if rank is None:
        return 0 if n_items <= FULL_RANK_ITEMS else RANK
    return min(rank, n_items)


def shapes(rank: int | None, n_items: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a branch's arrays without padding, by name."""
    k = effective_rank(rank, n_items)
    share = {"log_share": (n_items,)}
    if not k:
        return {"item_item": (n_items, n_items), **share}
    return {
        "input_factors": (n_items, k),
        "output_factors": (k, n_items),
        "self_weight": (n_items,),
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
    """Returns the arrays of the linear branch: B or its factors, and log p.

    The arrays are float32 and have the shapes of `shapes`, with padding along
    the axes that `PARTITION` shards. `rank` as in `effective_rank`; all other
    arguments as in `linear.fit`.

    Raises:
      VaecfError: the branch does not fit into memory.
    """
    settings = {"dropout": dropout, "user_exponent": user_exponent}
    k = effective_rank(rank, train.n_items)
    advice = f"linear.rank below {k:,}" if k else f"linear.rank={RANK}"
    advice = f"set {advice}, or linear.l2=0 for no branch"
    if k:
        fitted = low_rank.fit(train, l2, k, advice=advice, **settings)
    else:
        fitted = linear.fit(train, l2, advice=advice, **settings)
    count_I = train.item_counts() + _PSEUDO_USERS
    share_I = np.log(count_I / (train.n_users + _PSEUDO_USERS))
    return {**fitted, "log_share": mesh_lib.pad_items(share_I)}


def scores(
    model_BI: jax.Array,
    branch: dict[str, Any],
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    """Returns the blend's scores of this shard's items, float32 [B, I].

    `model_BI` are the logits of the autoencoder, -inf for padding. `branch`
    holds the arrays of `fit` and the scalars 'gain' (g) and 'prior' (ρ).
    """
    linear_BI = branch_scores(branch, batch, user_B)
    log_BI = jnp.log(jnp.maximum(linear_BI, 0.0) + _EPSILON)
    log_BI -= branch["prior"] * branch["log_share"][None, :]
    # Without a history the branch knows nothing, not even the popularity that
    # would be divided out.
    known_B1 = batch.count_B[:, None] > 0
    return model_BI + jnp.where(known_B1, branch["gain"] * log_BI, 0.0)


def branch_scores(
    branch: dict[str, Any], batch: SparseBatch, user_B: jax.Array
) -> jax.Array:
    """Returns x · B of this shard's items, float32 [B, I]."""
    if "item_item" in branch:
        return linear.scores(branch, batch, user_B)
    return low_rank.scores(branch, batch)
