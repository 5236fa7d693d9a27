"""Implicit ALS: a baseline fitted here, with users solved for at query time.

Shapes in names: B users, I items (the local shard of them), F factors, S users
of a block, T tiles of a block, L interactions of a tile (at most `_TILE`).

Hu, Koren and Volinsky 2008 minimise (equation 3) the squared error of all
pairs of users and items, with a higher weight for observed pairs. Rendle et
al. 2021 ("Revisiting the performance of iALS", section 2) write this as

  L = Σ_(u,i) observed (w_u·h_i - 1)² + α Σ_u Σ_i (w_u·h_i)²
      + λ (Σ_u (n_u + α |I|) |w_u|² + Σ_i (n_i + α |U|) |h_i|²),

where n is the number of interactions of a user or an item, and Rendle et al.'s
ν is 1. With the items held fixed, the minimum for a user is Hu et al.'s
equation 4 with these weights,

  (Σ_i of u h_i h_iᵀ + α HᵀH + λ (n_u + α |I|) 1) w_u = Σ_i of u h_i,

and the minimum for an item is the same with users and items exchanged
(equation 5).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

PARTITION: dict[str, tuple[str | None, ...]] = {"item_factor": ("item", None)}

# A matrix product sums the outer products of this many interactions of a user.
_TILE = 128
# Bounds of the memory for the F x F systems of a block of users, and for the
# outer products of the tiles that are summed at once.
_SYSTEM_BYTES, _TILE_BYTES = 2**26, 2**23


def scores(
    params: dict[str, jax.Array], batch: SparseBatch, user_B: jax.Array
) -> jax.Array:
    """Returns w_u · h_i, float32 [B, I], for users with any history."""
    factor_IF = params["item_factor"]
    user_BF = solve(factor_IF, params["unobserved"], params["ridge"], batch)
    return lax.dot(user_BF, factor_IF.T, precision=lax.Precision.HIGHEST)


def solve(
    factor_IF: jax.Array,
    unobserved_FF: jax.Array,
    ridge: jax.Array,
    batch: SparseBatch,
) -> jax.Array:
    """Returns each user's least-squares factors for fixed items.

    Args:
      factor_IF: float32 [I, F], H.
      unobserved_FF: float32 [F, F], α HᵀH over all items.
      ridge: float32 [2]: λ and α |I|.
      batch: the users' interactions, rows ascending.

    Returns:
      float32 [B, F], the same on every item shard; 0 for an empty history.
    """
    item_axis = mesh_lib.item_axis(factor_IF)
    n_users, n_factors = batch.count_B.shape[0], factor_IF.shape[1]
    size = max(1, min(n_users, _SYSTEM_BYTES // (4 * n_factors**2)))
    n_blocks = -(-n_users // size)
    l2, others = ridge

    def solve_block(first: jax.Array) -> jax.Array:
        user_S = first + jnp.arange(size, dtype=jnp.int32)
        real_S = user_S < n_users
        user_S = jnp.minimum(user_S, n_users - 1)
        gram_SFF, sum_SF = _sum_tiles(factor_IF, batch, user_S, item_axis)
        count_S = batch.count_B[user_S].astype(jnp.float32)
        ridge_S = l2 * (count_S + others)
        gram_SFF += unobserved_FF[None]
        gram_SFF += ridge_S[:, None, None] * jnp.eye(n_factors)[None]
        solved_SF = _solve_systems(gram_SFF, sum_SF)
        return jnp.where(real_S[:, None], solved_SF, 0.0)

    first = jnp.arange(n_blocks, dtype=jnp.int32) * size
    return lax.map(solve_block, first).reshape(-1, n_factors)[:n_users]


def _sum_tiles(
    factor_IF: jax.Array,
    batch: SparseBatch,
    user_S: jax.Array,
    item_axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (Σ h_i h_iᵀ [S, F, F], Σ h_i [S, F]) of consecutive users.

    The loop sums `step` tiles at a time.
    """
    (n_users,), (size,) = batch.count_B.shape, user_S.shape
    n_local, n_factors = factor_IF.shape
    offset = mesh_lib.item_offset(n_local, item_axis)
    start_B = jnp.cumsum(batch.count_B) - batch.count_B
    tiles_B = -(-batch.count_B // _TILE)
    end_B = jnp.cumsum(tiles_B)
    begin, end = end_B[user_S[0]] - tiles_B[user_S[0]], end_B[user_S[-1]]
    step = max(1, _TILE_BYTES // (4 * n_factors * max(n_factors, _TILE)))

    def add(c: jax.Array, sums: tuple) -> tuple:
        gram_SFF, sum_SF = sums
        tile_T = begin + c * step + jnp.arange(step, dtype=jnp.int32)
        user_T = jnp.searchsorted(end_B, tile_T, side="right")
        user_T = jnp.minimum(user_T, n_users - 1).astype(jnp.int32)
        within_T = tile_T - (end_B - tiles_B)[user_T]
        slot_TL = within_T[:, None] * _TILE + jnp.arange(_TILE)[None, :]
        real_TL = slot_TL < batch.count_B[user_T][:, None]
        slot_TL += start_B[user_T][:, None]
        item_TL = batch.item_N.at[slot_TL].get(mode="clip") - offset
        # Items of other shards add zeros here; the shards' sums add up below.
        real_TL &= (item_TL >= 0) & (item_TL < n_local)
        factor_TLF = factor_IF.at[item_TL].get(mode="clip")
        factor_TLF = jnp.where(real_TL[:, :, None], factor_TLF, 0.0)
        gram_TFF = jnp.einsum(
            "tlf,tlg->tfg",
            factor_TLF,
            factor_TLF,
            precision=lax.Precision.HIGHEST,
        )
        # Tiles of later users are out of bounds, and the scatters drop them.
        row_T = jnp.where(tile_T < end, user_T - user_S[0], size)
        return (
            gram_SFF.at[row_T].add(gram_TFF, mode="drop"),
            sum_SF.at[row_T].add(jnp.sum(factor_TLF, 1), mode="drop"),
        )

    zeros = (
        jnp.zeros((size, n_factors, n_factors), jnp.float32),
        jnp.zeros((size, n_factors), jnp.float32),
    )
    zeros = mesh_lib.vary(zeros, mesh_lib.varying_axes(factor_IF, *batch))
    sums = lax.fori_loop(0, -(-(end - begin) // step), add, zeros)
    return lax.psum(sums, item_axis) if item_axis else sums


def _solve_systems(system_SFF: jax.Array, right_SF: jax.Array) -> jax.Array:
    """Returns the solutions of positive definite systems, float32 [S, F]."""

    def solve_by_factor(system: jax.Array, right: jax.Array) -> jax.Array:
        lower = lax.linalg.cholesky(system, symmetrize_input=False)
        half = lax.linalg.triangular_solve(
            lower, right[..., None], left_side=True, lower=True
        )
        return lax.linalg.triangular_solve(
            lower, half, left_side=True, lower=True, transpose_a=True
        )[..., 0]

    if jax.default_backend() != "cpu":
        return solve_by_factor(system_SFF, right_SF)
    # On a CPU, a batched LAPACK call waits for threads of the pool in which it
    # runs itself, which deadlocks several devices of one CPU (jax 0.10).
    return lax.map(lambda x: solve_by_factor(*x), (system_SFF, right_SF))


@jax.jit
def _half_sweep(
    factor_IF: jax.Array, weights: jax.Array, batch: SparseBatch
) -> jax.Array:
    """Returns the factors of one side from those of the other.

    `weights`, float32 [3], are α, λ, and α times the other side's size.
    """
    unobserved_FF = _unobserved(factor_IF, weights[0])
    return solve(factor_IF, unobserved_FF, weights[1:], batch)


@jax.jit
def _unobserved(factor_IF: jax.Array, alpha: jax.Array) -> jax.Array:
    gram_FF = lax.dot(factor_IF.T, factor_IF, precision=lax.Precision.HIGHEST)
    return alpha * gram_FF


def fit(
    train: Any,
    *,
    factors: int,
    l2: float,
    alpha: float,
    iterations: int,
) -> dict[str, np.ndarray]:
    """Returns item factors, fitted on one device by alternating sweeps.

    Args:
      factors, l2: F, at least 1, and λ, above 0.
      alpha: α, the weight of all pairs, to which observed pairs add 1; above
        0. Hu et al.'s α is its reciprocal.
      iterations: sweeps over users and then items, at least 1.

    The initial item factors are normal with standard deviation .1 / √F, as in
    Rendle et al.'s code, and the same in every fit.

    Returns:
      The parameters of `scores`: 'item_factor' [padded I, F], 'unobserved'
      [F, F] and 'ridge' [2], float32.

    Raises:
      VaecfError: the factors are not finite.
    """
    n_users, n_items = train.n_users, train.n_items
    rng = np.random.default_rng(0)
    item_IF = jnp.asarray(
        rng.normal(0, 0.1 / factors**0.5, (n_items, factors)), jnp.float32
    )
    transposed = train.to_scipy().T.tocsr()
    of_users = _batch(train.indptr, train.indices)
    of_items = _batch(transposed.indptr, transposed.indices)
    to_users = jnp.asarray([alpha, l2, alpha * n_items], jnp.float32)
    to_items = jnp.asarray([alpha, l2, alpha * n_users], jnp.float32)
    for _ in range(iterations):
        user_UF = _half_sweep(item_IF, to_users, of_users)
        item_IF = _half_sweep(user_UF, to_items, of_items)
    if not jnp.isfinite(item_IF).all():
        raise VaecfError(f"iALS: the factors are not finite; increase l2={l2}")
    padding = mesh_lib.padded_items(n_items) - n_items
    return {
        "item_factor": np.pad(np.asarray(item_IF), ((0, padding), (0, 0))),
        "unobserved": np.asarray(_unobserved(item_IF, to_users[0])),
        "ridge": np.asarray(to_users[1:]),
    }


def _batch(indptr: np.ndarray, indices: np.ndarray) -> SparseBatch:
    """Returns all rows of a CSR matrix as one batch on the device."""
    counts = np.diff(indptr).astype(np.int32)
    row_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    batch = SparseBatch(indices.astype(np.int32), row_N, counts)
    return jax.tree.map(jnp.asarray, batch)
