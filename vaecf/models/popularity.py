"""Scores that do not depend on the history: popularity, and an oracle.

Shapes in names: B users of a batch, U users of a split, I items (the local
shard of them), G groups of the generator.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

PARTITION: dict[str, tuple[str | None, ...]] = {
    "item_score": ("item",),
    "group_item": (None, "item"),
}


def fit(train: Any) -> dict[str, np.ndarray]:
    """Returns the parameters of `scores`: how many users have each item."""
    return {"item_score": mesh_lib.pad_items(train.item_counts())}


def scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None = None,
) -> jax.Array:
    """Returns the same scores for every user, float32 [B, I]."""
    n_users = batch.count_B.shape[0]
    row_I = params["item_score"]
    return jnp.broadcast_to(row_I[None, :], (n_users, row_I.shape[0]))


def oracle_scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None = None,
) -> jax.Array:
    """Returns the items' probabilities under the generator, float32 [B, I].

    No model can rank generated data better. Of `params`, float32, 'user_group'
    [U, G] is the mixture of groups that generated each user, and 'group_item'
    [G, I] each group's distribution over the items.
    """
    # A padding user's index is out of bounds. Clipping gives that user finite
    # scores, which nobody reads.
    mixture_BG = jnp.take(params["user_group"], user_B, axis=0, mode="clip")
    return lax.dot(
        mixture_BG, params["group_item"], precision=lax.Precision.HIGHEST
    )
