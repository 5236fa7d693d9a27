"""Implicit ALS as a baseline: fitted here, new users folded in by a query.

Shapes in names: B users, I items (the local shard of them), F factors, T tiles
of up to `_TILE` interactions of one user.

Hu, Koren and Volinsky 2008 minimise (equation 3) the squared error of every
user and item, the observed ones weighing more; Rendle et al. 2021 ("Revisiting
the performance of iALS", section 2) write the same as

  L = Σ_(u,i) observed (w_u·h_i - 1)² + α Σ_u Σ_i (w_u·h_i)²
      + λ (Σ_u (n_u + α |I|)^ν |w_u|² + Σ_i (n_i + α |U|)^ν |h_i|²),

with n the interactions of a user or an item: the regularisation grows with
them, and with what is not observed. The items held fixed, a user's minimum is
Hu et al.'s equation 4 in these weights,

  (Σ_i of u h_i h_iᵀ + α HᵀH + λ (n_u + α |I|)^ν 1) w_u = Σ_i of u h_i,

and an item's is the same with the sides exchanged (equation 5).
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

# Interactions of a user whose outer products are one matrix product.
_TILE = 128
# Bytes of the users' F x F systems that are there at once, and of the tiles'.
_SYSTEM_BYTES, _TILE_BYTES = 2**26, 2**23


def scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
    *,
    item_axis: str | None = mesh_lib.ITEM,
) -> jax.Array:
    """w_u · h_i of folded-in users, float32 [B, I].

    Args:
      params: of `fit`.
      batch: the users' histories.
      user_B: not used.
      item_axis: mesh axis of the items, if they vary over it.
    """
    factor_IF = params["item_factor"]
    if item_axis not in mesh_lib.varying_axes(factor_IF):
        item_axis = None  # all items are here
    user_BF = solve(
        factor_IF,
        params["unobserved"],
        params["ridge"],
        batch,
        item_axis=item_axis,
    )
    return lax.dot(user_BF, factor_IF.T, precision=lax.Precision.HIGHEST)


def solve(
    factor_IF: jax.Array,
    unobserved_FF: jax.Array,
    ridge: jax.Array,
    batch: SparseBatch,
    *,
    item_axis: str | None = None,
) -> jax.Array:
    """Each user's least-squares factors, the items' held fixed.

    Args:
      factor_IF: float32 [I, F], H.
      unobserved_FF: float32 [F, F], α HᵀH over all items.
      ridge: float32 [3]: λ, α |I| and ν.
      batch: the users' interactions, rows ascending.
      item_axis: mesh axis of the items, None when they are not sharded.

    Returns:
      float32 [B, F], the same on every item shard; 0 for an empty history.
    """
    n_users, n_factors = batch.count_B.shape[0], factor_IF.shape[1]
    axes = mesh_lib.varying_axes(factor_IF, *batch)
    offset = mesh_lib.item_offset(factor_IF.shape[0], item_axis)
    start_B = jnp.cumsum(batch.count_B) - batch.count_B
    tiles_B = -(-batch.count_B // _TILE)
    last_B = jnp.cumsum(tiles_B)
    system = 4 * n_factors**2
    size = max(1, min(n_users, _SYSTEM_BYTES // system))
    step = max(1, _TILE_BYTES // max(system, 4 * n_factors * _TILE))
    n_blocks = -(-n_users // size)

    def block(first: jax.Array) -> jax.Array:
        """Factors of `size` users from `first` on; those past the end are 0."""
        user_S = first + jnp.arange(size, dtype=jnp.int32)
        real_S = user_S < n_users
        user_S = jnp.minimum(user_S, n_users - 1)
        begin = last_B[user_S[0]] - tiles_B[user_S[0]]
        end = last_B[user_S[-1]]

        def add(c: jax.Array, sums: tuple) -> tuple:
            gram_SFF, sum_SF = sums
            tile_T = begin + c * step + jnp.arange(step, dtype=jnp.int32)
            user_T = jnp.searchsorted(last_B, tile_T, side="right")
            user_T = jnp.minimum(user_T, n_users - 1).astype(jnp.int32)
            within_T = tile_T - (last_B - tiles_B)[user_T]
            slot_TL = within_T[:, None] * _TILE + jnp.arange(_TILE)[None, :]
            real_TL = (slot_TL < batch.count_B[user_T][:, None]) & (
                tile_T < end
            )[:, None]
            item_TL = batch.item_N.at[start_B[user_T][:, None] + slot_TL].get(
                mode="clip"
            )
            item_TL = item_TL - offset
            real_TL &= (item_TL >= 0) & (item_TL < factor_IF.shape[0])
            factor_TLF = factor_IF.at[item_TL].get(mode="clip")
            factor_TLF = jnp.where(real_TL[:, :, None], factor_TLF, 0.0)
            gram_TFF = jnp.einsum(
                "tlf,tlg->tfg",
                factor_TLF,
                factor_TLF,
                precision=lax.Precision.HIGHEST,
            )
            row_T = jnp.where(tile_T < end, user_T - first, size)
            return (
                gram_SFF.at[row_T].add(gram_TFF, mode="drop"),
                sum_SF.at[row_T].add(jnp.sum(factor_TLF, 1), mode="drop"),
            )

        zeros = (
            jnp.zeros((size, n_factors, n_factors), jnp.float32),
            jnp.zeros((size, n_factors), jnp.float32),
        )
        gram_SFF, sum_SF = lax.fori_loop(
            0, -(-(end - begin) // step), add, mesh_lib.vary(zeros, axes)
        )
        if item_axis:
            gram_SFF, sum_SF = lax.psum((gram_SFF, sum_SF), item_axis)
        l2, others, nu = ridge
        count_S = batch.count_B[user_S].astype(jnp.float32)
        ridge_S = l2 * (count_S + others) ** nu
        gram_SFF += unobserved_FF[None]
        gram_SFF += ridge_S[:, None, None] * jnp.eye(n_factors)[None]
        solved_SF = _solve_systems(gram_SFF, sum_SF)
        return jnp.where(real_S[:, None], solved_SF, 0.0)

    first = jnp.arange(n_blocks, dtype=jnp.int32) * size
    return lax.map(block, first).reshape(-1, n_factors)[:n_users]


def _solve_systems(system_SFF: jax.Array, right_SF: jax.Array) -> jax.Array:
    """Solutions of positive definite systems, float32 [S, F]."""

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
    # A CPU's batched LAPACK calls wait for threads of a pool that they are run
    # by: several devices of one CPU then wait for ever (jax 0.10).
    return lax.map(lambda x: solve_by_factor(*x), (system_SFF, right_SF))


@jax.jit
def _half_sweep(
    factor_IF: jax.Array, weights: jax.Array, batch: SparseBatch
) -> jax.Array:
    """One side's factors from the other's; weights [4]: α, λ, α |I|, ν."""
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
    nu: float = 1.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Alternates between users and items, on one device.

    Args:
      train: Interactions (users x items).
      factors: F, at least 1.
      l2: λ, above 0.
      alpha: α, the weight of every user and item beside the observed ones;
        above 0. Hu et al.'s α is its reciprocal.
      iterations: sweeps over users and then items, at least 1.
      nu: ν; 1 by Rendle et al. 2021, 0 regularises everyone alike.
      seed: of the items' first factors, normal with standard deviation
        .1 / √F as in Rendle et al.'s code.

    Returns:
      Parameters of `scores`.

    Raises:
      VaecfError: a parameter is out of range, or the factors are not numbers.
    """
    for name, value in (("factors", factors), ("iterations", iterations)):
        if value < 1:
            raise VaecfError(f"iALS' {name}={value} must be at least 1")
    for name, weight in (("l2", l2), ("alpha", alpha)):
        if not weight > 0:
            raise VaecfError(f"iALS' {name}={weight} must be above 0")
    n_users, n_items = train.n_users, train.n_items
    rng = np.random.default_rng(seed)
    item_IF = jnp.asarray(
        rng.normal(0, 0.1 / factors**0.5, (n_items, factors)), jnp.float32
    )
    transposed = train.to_scipy().T.tocsr()
    of_users = _batch(train.indptr, train.indices)
    of_items = _batch(transposed.indptr, transposed.indices)
    to_users = jnp.asarray([alpha, l2, alpha * n_items, nu], jnp.float32)
    to_items = jnp.asarray([alpha, l2, alpha * n_users, nu], jnp.float32)
    for _ in range(iterations):
        user_UF = _half_sweep(item_IF, to_users, of_users)
        item_IF = _half_sweep(user_UF, to_items, of_items)
    if not jnp.isfinite(item_IF).all():
        raise VaecfError(f"iALS: factors that are no numbers; increase l2={l2}")
    rows = mesh_lib.padded_items(n_items)
    return {
        "item_factor": np.pad(
            np.asarray(item_IF), ((0, rows - n_items), (0, 0))
        ),
        "unobserved": np.asarray(_unobserved(item_IF, to_users[0])),
        "ridge": np.asarray(to_users[1:]),
    }


def _batch(indptr: np.ndarray, indices: np.ndarray) -> SparseBatch:
    """A whole CSR as one batch on the device."""
    counts = np.diff(indptr).astype(np.int32)
    row_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return jax.tree.map(
        jnp.asarray,
        SparseBatch(indices.astype(np.int32), row_N, counts),
    )
