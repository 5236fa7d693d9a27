"""A blend: an autoencoder and a linear branch that rank together.

The branch has one or more experts, each a model in closed form. All estimate
which items come next. Their product of experts (Hinton 2002) trusts all of
them, and divides out what they share, the popularity of the items:

  score_ui = logit_ui + Σ_e g_e (log(ε_e + max(0, s_e(x_u)_i)) - ρ log p_i)

s_e(x_u) are the scores of expert e for the history x_u, and p_i is the share of
the training users who have item i. Validation users choose the gains g_e and
the share ρ of the prior p that is divided out (`evaluation.blend_tuning`). With
all g_e = 0 the autoencoder ranks alone.

The branch enters the scores but not the loss. An autoencoder that is trained
with the branch beside it leaves to the branch what it should learn itself. We
measured this on MovieLens-1M, also with branch scores of each training user
that were fitted to the other users only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.models import (
    graph_filter,
    ials,
    linear,
    low_rank,
    slim,
    sparse_item_item,
)
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

_PSEUDO_USERS = 5.0  # added to the users of each item: p_i > 0
# Prefix of SLIM's arrays. The graph filter's have the same names without it.
SLIM = "slim_"

PARTITION = {
    **linear.PARTITION,
    **low_rank.PARTITION,
    **graph_filter.PARTITION,
    **ials.PARTITION,
    **{f"{SLIM}{key}": axes for key, axes in slim.PARTITION.items()},
    "log_share": ("item",),
}
# Arrays of the branch, none of which is cast to half precision.
ARRAYS = frozenset(PARTITION) | {
    *("first_tile", f"{SLIM}first_tile", "mean_score", "unobserved", "ridge"),
}

FULL_RANK_ITEMS, RANK = 25_000, 512  # of `rank=None`, see `effective_rank`

# Settings of the other experts, chosen on Yelp2018 with all and with half of
# its training interactions, and on MovieLens: latest-small, 100K and 1M.
_LOW_RANK, _NEIGHBOURS = 256, 512
# Implicit ALS: factors up to `FULL_RANK_ITEMS` items and beyond, sweeps, α |I|,
# and the ridge of a user of mean history length, as a share of this length.
_FACTORS, _SWEEPS, _UNOBSERVED, _RIDGE = (128, 256), 10, 800.0, 0.08
# EASE's factors take this share of l2 beyond `FULL_RANK_ITEMS` items, where the
# low rank regularises as well. The full matrix needs all of it, and so do
# factors on MovieLens.
_FACTORS_L2 = 1 / 3
# SLIM: neighbours of an item, and l2.
_SLIM_NEIGHBOURS, _SLIM_L2 = 100, 30.0

# ε of the experts; that of the graph filter is this share of its mean score.
_FLOORS = {"ease": 0.003, "graph": 0.1, "ials": 0.01, "slim": 0.03}

# The weights of the branch: the gain of each expert, by name, the prior ρ, and
# the graph filter's α.
GAINS = {
    **{"ease": "gain", "graph": "graph_gain"},
    **{"ials": "ials_gain", "slim": "slim_gain"},
}
WEIGHTS = (*GAINS.values(), "prior", "low_pass")


def default_experts(n_items: int) -> tuple[str, ...]:
    """Returns the experts of a branch whose config names none.

    EASE and implicit ALS, as long as a full items x items matrix is
    affordable, else all. EASE is then of low rank, and each of the four adds
    to the others. The graph filter gains nothing beside the full matrix on
    MovieLens (latest-small, 100K, 1M).
    """
    return ("ease", "ials") if n_items <= FULL_RANK_ITEMS else tuple(GAINS)


def default_weights(experts: tuple[str, ...]) -> dict[str, float]:
    """Returns the weights used before validation users choose them."""
    gains = {"ease": 1.4, "ials": 0.5}
    if "slim" in experts:
        gains = {"ease": 2.8, "graph": 2.8, "ials": 4.0, "slim": 1.4}
    elif "graph" in experts:
        gains = {"ease": 2.8, "graph": 2.8, "ials": 2.0}
    start = {GAINS[name]: gains[name] for name in experts}
    return dict.fromkeys(WEIGHTS, 0.0) | start | {"prior": 0.2, "low_pass": 0.3}


def experts_of(branch: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the experts whose arrays are in the branch."""
    keys = {
        "ease": ("item_item", "input_factors"),
        "graph": ("neighbour",),
        "ials": ("item_factor",),
        "slim": (f"{SLIM}neighbour",),
    }
    return tuple(
        name for name in GAINS if any(key in branch for key in keys[name])
    )


def weights_of(branch: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the weights that the branch's experts have."""
    experts = experts_of(branch)
    gains = tuple(GAINS[name] for name in experts)
    return (*gains, "prior", *(("low_pass",) if "graph" in experts else ()))


def kept_weights(
    weights: Mapping[str, Any], branch: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the weights of another branch for a branch, by its names.

    An expert that the other branch lacks has a gain of 0, because the weights
    were chosen without it.
    """
    return {name: weights.get(name, 0.0) for name in weights_of(branch)}


def effective_rank(rank: int | None, n_items: int) -> int:
    """Returns the rank of the factors; 0 for the full matrix.

    None means the full matrix up to `FULL_RANK_ITEMS` items, and factors of
    rank `RANK` beyond.
    """
    if rank is None:
        return 0 if n_items <= FULL_RANK_ITEMS else RANK
    return min(rank, n_items)


def fit(
    train: Any,
    *,
    l2: float,
    dropout: float,
    user_exponent: float,
    rank: int | None = 0,
    experts: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Returns the arrays of the linear branch: those of its experts, and log p.

    Float arrays are float32. Those that `PARTITION` shards are padded along
    these axes. `rank` as in `effective_rank`, and `experts` of `GAINS` as in
    `default_experts`; all other arguments as in `linear.fit`.

    Raises:
      VaecfError: the branch does not fit into memory.
    """
    n_items = train.n_items
    experts = experts or default_experts(n_items)
    arrays: dict[str, np.ndarray] = {}
    if "ease" in experts:
        settings = {"dropout": dropout, "user_exponent": user_exponent}
        k = effective_rank(rank, n_items)
        advice = f"linear.rank below {k:,}" if k else f"linear.rank={RANK}"
        advice = f"set {advice}, or linear.l2=0 for no branch"
        if k:
            share = _FACTORS_L2 if n_items > FULL_RANK_ITEMS else 1.0
            arrays |= low_rank.fit(
                train, share * l2, k, advice=advice, **settings
            )
        else:
            arrays |= linear.fit(train, l2, advice=advice, **settings)
    if "graph" in experts:
        arrays |= graph_filter.fit(
            train,
            low_pass=default_weights(experts)["low_pass"],
            rank=_LOW_RANK,
            neighbours=_NEIGHBOURS,
            advice="set linear.experts without graph",
        )
    if "ials" in experts:
        length = train.nnz / train.n_users
        arrays |= ials.fit(
            train,
            factors=_FACTORS[n_items > FULL_RANK_ITEMS],
            l2=_RIDGE * length / (_UNOBSERVED + length),
            alpha=_UNOBSERVED / n_items,
            iterations=_SWEEPS,
        )
    if "slim" in experts:
        weights = slim.fit(
            *(train, _SLIM_NEIGHBOURS, _SLIM_L2),
            advice="set linear.experts without slim",
        )
        arrays |= {f"{SLIM}{key}": array for key, array in weights.items()}
    count_I = train.item_counts() + _PSEUDO_USERS
    share_I = np.log(count_I / (train.n_users + _PSEUDO_USERS))
    return {**arrays, "log_share": mesh_lib.pad_items(share_I)}


def scores(
    model_BI: jax.Array,
    branch: dict[str, Any],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None = None,
) -> jax.Array:
    """Returns the blend's scores of this shard's items, float32 [B, I].

    `model_BI` are the logits of the autoencoder. `branch` holds the arrays of
    `fit` and the scalars `WEIGHTS`. `platform` as in `bag_of_items`.
    """
    total_BI = jnp.zeros_like(model_BI)
    for name in experts_of(branch):
        log_BI = jnp.log(_expert(name, branch, batch, user_B, platform))
        log_BI -= branch["prior"] * branch["log_share"][None, :]
        total_BI += branch[GAINS[name]] * log_BI
    # Without a history the branch knows nothing, not even the popularity that
    # would be divided out.
    known_B1 = batch.count_B[:, None] > 0
    return model_BI + jnp.where(known_B1, total_BI, 0.0)


def _expert(
    name: str,
    branch: dict[str, Any],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None,
) -> jax.Array:
    """Returns ε + max(0, s), the numbers whose logarithm an expert adds."""
    scored = branch, batch, user_B, platform
    if name == "graph":
        score_BI = graph_filter.scores(*scored)
    elif name == "ials":
        score_BI = ials.scores(*scored)
    elif name == "slim":
        keys = (*sparse_item_item.PARTITION, "first_tile")
        own = {key: branch[f"{SLIM}{key}"] for key in keys}
        score_BI = slim.scores(own, batch, user_B)
    elif "item_item" in branch:
        score_BI = linear.scores(*scored)
    else:
        score_BI = low_rank.scores(branch, batch, platform)
    return jnp.maximum(score_BI, 0.0) + floor(name, branch)


def floor(name: str, branch: Mapping[str, Any]) -> Any:
    """Returns ε of an expert of the branch, by its name."""
    if name == "graph":
        mean = branch["mean_score"]
        return _FLOORS[name] * (mean[0] + branch["low_pass"] * mean[1])
    return _FLOORS[name]
