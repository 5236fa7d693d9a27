"""What can be ranked: a trained model, and the baselines beside it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from vaecf.evaluation.ranking import Scorer
from vaecf.models import linear, mult_vae, sparse


def _model_scores(
    model: mult_vae.MultDAE,
    params: Any,
    batch: sparse.SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    scores_BI: Any = model.apply({"params": params}, batch, method="scores")
    return scores_BI


def model(module: mult_vae.MultDAE, params: Any) -> Scorer:
    """A model's logits; `module` as an item shard sees it."""
    return Scorer(
        functools.partial(_model_scores, module),
        params,
        mult_vae.PARTITION,
        module.n_items,
    )


def popularity(train: Any) -> Scorer:
    """Items by their number of training users."""
    params = linear.fit_popularity(train.item_counts())
    return Scorer(
        linear.popularity_scores, params, linear.PARTITION, train.n_items
    )


def ease(train: Any, l2: float) -> Scorer:
    """EASE (Steck 2019), fitted here in closed form."""
    params = linear.fit_ease(train, l2)
    return Scorer(linear.ease_scores, params, linear.PARTITION, train.n_items)


def truth(user_group: np.ndarray, group_item: np.ndarray) -> Scorer:
    """The distribution that generated the users: the best any model can do.

    Args:
      user_group: float32 [U, G], mixture of each user of the split.
      group_item: float32 [G, I], item distribution of each group.
    """
    params = linear.fit_truth(user_group, group_item)
    return Scorer(
        linear.truth_scores, params, linear.PARTITION, group_item.shape[1]
    )
