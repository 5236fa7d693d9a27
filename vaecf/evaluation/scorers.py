"""Scorers: of an autoencoder and its blend, and of models fitted in one go."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vaecf.evaluation.ranking import Scorer
from vaecf.models import blend, mult_vae, registry
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib


class ModelParams(NamedTuple):
    """Parameters of the scorer `model`."""

    model: Any  # parameters of the autoencoder, float32
    # Linear branch of a blend (`training.linear_branch.load`); None ranks with
    # the autoencoder alone.
    linear: Any = None


def model(module: mult_vae.MultDAE) -> Scorer:
    """Returns the scorer of an autoencoder, or of its blend.

    Its parameters are `ModelParams`; the module is that of one item shard. In
    half precision the matrices of the autoencoder are rounded once per set of
    parameters, not in every query.
    """
    dtype = jnp.dtype(module.dtype)
    casts: tuple[Any, ...] = () if dtype.itemsize != 2 else (dtype,)
    if dtype == jnp.float16 and mesh_lib.on_cpu(module.platform):
        # XLA's CPU backend has no float16 product and would convert the
        # matrices in every query: use the rounded values as float32.
        module = module.clone(dtype=jnp.float32)
        casts = (dtype, jnp.dtype(jnp.float32))
    return Scorer(
        functools.partial(_scores, module),
        mult_vae.PARTITION | blend.PARTITION,
        module.n_items,
        casts,
        blend.ARRAYS,
    )


def fitted(name: str, n_items: int, platform: str | None = None) -> Scorer:
    """Returns the scorer of a model of `registry.FITTED`, by its name.

    Its parameters are those that the model's `fit` returns. `platform` is that
    of the devices that compute (`mesh.platform_of`); None: JAX's default.
    """
    model = registry.FITTED[name]
    scores = functools.partial(model.scores, platform=platform)
    return Scorer(scores, model.PARTITION, n_items)


def _scores(
    module: mult_vae.MultDAE,
    params: ModelParams,
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    model_BI = _model_scores(module, params.model, batch)
    if params.linear is None:
        return model_BI
    return blend.scores(model_BI, params.linear, batch, user_B, module.platform)


def _model_scores(
    module: mult_vae.MultDAE, params: Any, batch: SparseBatch
) -> jax.Array:
    if mesh_lib.ITEM not in mesh_lib.varying_axes(*jax.tree.leaves(params)):
        # This device has all items, so there is no axis to sum over.
        module = module.clone(item_axis=None)
    n_users = batch.count_B.shape[0]
    half = jnp.dtype(module.dtype).itemsize == 2
    if n_users == 1 and half and mesh_lib.on_cpu(module.platform):
        # For a single row, XLA's CPU product converts the whole matrix first.
        # That costs ten times the product of two rows, which does not.
        batch = SparseBatch(
            batch.item_N,
            jnp.where(batch.row_N < 1, batch.row_N, 2),
            jnp.pad(batch.count_B, (0, 1)),
        )
    scores_BI: Any = module.apply({"params": params}, batch, method="scores")
    return scores_BI[:n_users]
