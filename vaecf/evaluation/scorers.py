"""What can be ranked: a trained model, and the baselines beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.evaluation.ranking import Scorer
from vaecf.models import blend as blend_lib
from vaecf.models import ials as ials_lib
from vaecf.models import linear, mult_vae
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib


def _model_scores(
    model: mult_vae.MultDAE,
    params: Any,
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    if mesh_lib.ITEM not in mesh_lib.varying_axes(*jax.tree.leaves(params)):
        # All items are here: there is no axis to sum over.
        model = model.clone(item_axis=None)
    n_users = batch.count_B.shape[0]
    if n_users == 1 and jnp.dtype(model.dtype).itemsize == 2 and _on_cpu():
        # XLA's CPU product of a single row converts the whole matrix first,
        # at ten times the cost of the product of two rows, which does not.
        batch = SparseBatch(
            batch.item_N,
            jnp.where(batch.row_N < 1, batch.row_N, 2),
            jnp.pad(batch.count_B, (0, 1)),
        )
    scores_BI: Any = model.apply({"params": params}, batch, method="scores")
    return scores_BI[:n_users]


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _on_this_device(
    module: mult_vae.MultDAE,
) -> tuple[mult_vae.MultDAE, tuple[Any, ...]]:
    """(the module as it computes here, casts of the parameters before)."""
    dtype = jnp.dtype(module.dtype)
    if dtype.itemsize != 2:
        return module, ()
    if dtype == jnp.float16 and _on_cpu():
        # XLA's CPU has no product of float16: it would convert the matrices
        # in every query. Rounded, they go as float32.
        return module.clone(dtype=jnp.float32), (dtype, jnp.dtype(jnp.float32))
    return module, (dtype,)


def model(module: mult_vae.MultDAE, params: Any) -> Scorer:
    """A model's logits.

    Args:
      module: as an item shard sees it.
      params: parameters, float32. In half precision the matrices are rounded
        once, not in every query.
    """
    module, casts = _on_this_device(module)
    return Scorer(
        functools.partial(_model_scores, module),
        params,
        mult_vae.PARTITION,
        module.n_items,
        casts,
    )


def _blend_scores(
    module: mult_vae.MultDAE,
    params: Any,
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    model_BI = _model_scores(module, params["model"], batch, user_B)
    return blend_lib.scores(model_BI, params["linear"], batch, user_B)


def blend(module: mult_vae.MultDAE, params: Any) -> Scorer:
    """A model and a linear branch beside it.

    Args:
      module: as `model`'s.
      params: {'model': the model's parameters, 'linear': `blend.scores`'
        path}.
    """
    module, casts = _on_this_device(module)
    return Scorer(
        functools.partial(_blend_scores, module),
        params,
        mult_vae.PARTITION | blend_lib.PARTITION,
        module.n_items,
        casts,
        frozenset(blend_lib.PARTITION),
    )


def ranked(
    module: mult_vae.MultDAE, params: Any, path: Mapping[str, Any] | None
) -> Scorer:
    """What ranks: the model, or its blend with a linear branch."""
    params = ranked_params(params, path)
    return model(module, params) if path is None else blend(module, params)


def ranked_params(params: Any, path: Mapping[str, Any] | None) -> Any:
    """The parameters of what ranks."""
    return params if path is None else {"model": params, "linear": path}


def popularity(train: Any) -> Scorer:
    """Items by their number of training users."""
    params = linear.fit_popularity(train.item_counts())
    return Scorer(
        linear.popularity_scores, params, linear.PARTITION, train.n_items
    )


def item_item(weights: np.ndarray) -> Scorer:
    """Sums of the rows of a history's items, float32 [I, padded I]."""
    return Scorer(
        linear.item_item_scores,
        {"item_item": weights},
        linear.PARTITION,
        weights.shape[0],
    )


def linear_path(path: Mapping[str, Any], n_items: int) -> Scorer:
    """The linear branch of a blend (`models.blend.fit`) alone."""
    names = path.keys() - {"gain", "prior"}
    params = {name: path[name] for name in sorted(names)}
    return Scorer(blend_lib.path_scores, params, blend_lib.PARTITION, n_items)


def ease(train: Any, l2: float) -> Scorer:
    """EASE (Steck 2019), fitted here in closed form."""
    return item_item(linear.fit_ease(train, l2)["item_item"])


def itemknn(train: Any, neighbours: int, shrinkage: float) -> Scorer:
    """Sums of the history's cosine similarities (`linear.fit_itemknn`)."""
    params = linear.fit_itemknn(train, neighbours, shrinkage)
    return item_item(params["item_item"])


def ials(
    train: Any, factors: int, l2: float, alpha: float, iterations: int
) -> Scorer:
    """Implicit ALS, whose users are solved for in the query."""
    params = ials_lib.fit(
        train, factors=factors, l2=l2, alpha=alpha, iterations=iterations
    )
    return Scorer(ials_lib.scores, params, ials_lib.PARTITION, train.n_items)


def oracle(user_group: np.ndarray, group_item: np.ndarray) -> Scorer:
    """The distribution that generated the users: the best any model can do.

    Args:
      user_group: float32 [U, G], mixture of each user of the split.
      group_item: float32 [G, I], item distribution of each group.
    """
    params = linear.fit_oracle(user_group, group_item)
    return Scorer(
        linear.oracle_scores, params, linear.PARTITION, group_item.shape[1]
    )
