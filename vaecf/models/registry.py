"""Creates the model that a config describes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vaecf.config import ModelConfig
from vaecf.errors import VaecfError
from vaecf.models import (
    ials,
    knn,
    linear,
    mult_vae,
    popularity,
    rec_vae,
    rp3beta,
    slim,
)
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

MODELS: dict[str, type[mult_vae.MultDAE]] = {
    "mult_vae": mult_vae.MultVAE,
    "mult_dae": mult_vae.MultDAE,
    "rec_vae": rec_vae.RecVAE,
}
# Modules of the models that are fitted in one go, `vaecf.config.FITTED`. Each
# has `fit(train interactions, **settings)`, `scores` and `PARTITION`.
FITTED: dict[str, Any] = {
    "popularity": popularity,
    "itemknn": knn,
    "rp3beta": rp3beta,
    "slim": slim,
    "ials": ials,
    "ease": linear,
}


def make_model(
    config: ModelConfig,
    policy: Any,
    n_items: int,
    item_shards: int = 1,
    platform: str | None = None,
) -> mult_vae.MultDAE:
    """Returns the module over all items, padded for shards but not sharded.

    `policy` is a `vaecf.training.precision.Policy`. `platform` is that of the
    devices that compute (`mesh.platform_of`); None takes JAX's default.

    Raises:
      VaecfError: the model is not trained in epochs.
    """
    if config.name in FITTED:
        raise VaecfError(
            f"config.model.name={config.name}: only {', '.join(MODELS)} are "
            "trained in epochs and have layers; use one of them"
        )
    # A catalogue that needs item blocks is too large for a dense array of users
    # x items.
    blocks = config.input == "auto" and config.item_block
    lowering = "gather" if blocks else config.input
    return MODELS[config.name](
        n_items=n_items,
        item_rows=mesh_lib.padded_items(n_items, item_shards),
        hidden=config.hidden,
        latent=config.latent,
        activation=config.activation,
        dropout_rate=config.dropout_rate,
        input_lowering=lowering,
        item_block=config.item_block,
        dtype=policy.dtype,
        precision=policy.precision,
        platform=platform,
    )


def shard_model(model: mult_vae.MultDAE, mesh: Mesh) -> mult_vae.MultDAE:
    """Returns the module of one item shard, for use inside `jax.shard_map`."""
    if not mesh_lib.axis(mesh, mesh_lib.ITEM):
        return model
    return model.clone(
        item_rows=model.item_rows // mesh.shape[mesh_lib.ITEM],
        item_axis=mesh_lib.ITEM,
    )


def init_params(model: mult_vae.MultDAE, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters of a module over all items, float32."""
    empty = SparseBatch(*(jnp.zeros((1,), jnp.int32) for _ in range(3)))
    return model.init(key, empty)["params"]


@functools.lru_cache(maxsize=16)
def abstract_params(model: mult_vae.MultDAE) -> dict[str, Any]:
    """Returns shape and dtype of the parameters of a module."""
    init = functools.partial(init_params, model)
    return jax.eval_shape(init, jax.random.key(0))


def scoring_params(model: mult_vae.MultDAE, params: Any) -> dict[str, Any]:
    """Returns the parameters without those that only training needs."""
    return {k: v for k, v in params.items() if k not in model.TRAINING_ONLY}
