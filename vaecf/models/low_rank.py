"""The item-item regression of `linear.fit_ease` at low rank, in closed form.

Items x rank numbers instead of items x items, in memory, on disk and in a
query, and a fit whose time grows with the interactions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models import bag_of_items, linear
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import memory
from vaecf.parallel import mesh as mesh_lib

# Directions beside those asked for, and turns, of the search for singular
# vectors. They need not be exact: on MovieLens-1M and Yelp2018 twice as many
# of either change the path's NDCG@100 by .001, up or down.
_OVERSAMPLING = 32
_TURNS = 6

PARTITION: dict[str, tuple[str | None, ...]] = {
    "input_factors": ("item", None),
    "output_factors": (None, "item"),
    "own_weight": ("item",),
}


def fit(
    train: Any,
    l2: float,
    rank: int,
    *,
    dropout: float = 0.0,
    user_exponent: float = 0.0,
    available_bytes: int | None = None,
    mend: str,
) -> dict[str, np.ndarray]:
    """Factors of the item-item weights B of `linear.fit_ease`.

    With A = W^½ X Λ^-½ those are B_ij = -P_ij / P_jj and B_jj = 0, where
    P = Λ^-½ (I + AᵀA)⁻¹ Λ^-½ (`fit_ease` has X, W and Λ). Here AᵀA is
    V S² Vᵀ + D: the largest singular values S of A with their right vectors V,
    and of all others the diagonal D, as in factor analysis. By the Woodbury
    identity the inverse is then E - F Fᵀ with E = (I + D)⁻¹, F = E V S C and
    C Cᵀ = (I + S Vᵀ E V S)⁻¹, so that off the diagonal

      B_ij = F_i · F_j √Λ_j / (√Λ_i (E_j - |F_j|²)).

    At full rank it is `fit_ease`. V is found by subspace iteration from random
    directions (Halko, Martinsson and Tropp 2011, algorithm 4.4), which are the
    same in every fit.

    Args:
      train: Interactions (users x items).
      l2: λ, as of `fit_ease`; above 0.
      rank: K, at least 1; at most the items count.
      dropout: as of `fit_ease`.
      user_exponent: as of `fit_ease`.
      available_bytes: memory to stay within; None asks the system.
      mend: what to do instead where it does not fit, for the error.

    Returns:
      Parameters of `scores`: 'input_factors' [padded I, K], 'output_factors'
      [K, padded I] and 'own_weight' [padded I], float32; zero in the padding.

    Raises:
      VaecfError: an argument out of range; λ so small that float32 loses the
        weights; or the factors do not fit memory, with the arithmetic.
    """
    if l2 <= 0:
        raise VaecfError(f"the linear branch's l2={l2} must be above 0")
    if rank < 1:
        raise VaecfError(f"the linear branch's rank={rank} must be at least 1")
    n_items = train.n_items
    rank = min(rank, n_items)
    _check_memory(train, rank, mend, available_bytes)
    weight_U, ridge_I = linear.penalties(train, l2, dropout, user_exponent)
    root_I = np.sqrt(ridge_I)
    scaled = _scaled(train, weight_U, root_I)
    square_K, vector_IK = _largest(scaled, rank)
    total_I = np.bincount(
        scaled.indices,
        weights=np.square(scaled.data, dtype=np.float64),
        minlength=n_items,
    )
    # Nothing of items x rank is a float64.
    rest_I = total_I - np.square(vector_IK) @ square_K.astype(np.float32)
    inner_I = 1 / (1 + np.maximum(rest_I, 0))
    vector_IK *= np.sqrt(square_K).astype(np.float32)
    weighed_IK = vector_IK * inner_I[:, None].astype(np.float32)
    core = np.eye(rank) + weighed_IK.T @ vector_IK
    del vector_IK
    # C of C Cᵀ = core⁻¹.
    root = np.linalg.inv(np.linalg.cholesky(core)).T
    factor_IK = weighed_IK @ root.astype(np.float32)
    del weighed_IK
    length_I = np.square(factor_IK).sum(axis=1, dtype=np.float64)
    diagonal_I = inner_I - length_I
    if (diagonal_I < 1e-3 * inner_I).any():
        raise VaecfError(
            f"the linear branch's l2={l2:g} is too small for float32: raise it"
        )
    rows = mesh_lib.padded_items(n_items)
    padded = np.zeros((rows, rank), np.float32)
    padded[:n_items] = factor_IK / root_I[:, None].astype(np.float32)
    return {
        "input_factors": padded,
        "output_factors": linear.pad_items(
            factor_IK.T * (root_I / diagonal_I).astype(np.float32)
        ),
        "own_weight": linear.pad_items(length_I / diagonal_I),
    }


def scores(params: dict[str, jax.Array], batch: SparseBatch) -> jax.Array:
    """x · B of this shard's items, float32 [B, I].

    The factors' product has a diagonal and B has none: what an item of the
    history adds to itself is taken away again.
    """
    rows_IK, columns_KI = params["input_factors"], params["output_factors"]
    is_sharded = mesh_lib.ITEM in mesh_lib.varying_axes(rows_IK, columns_KI)
    axis = mesh_lib.ITEM if is_sharded else None
    code_BK = bag_of_items.bag_of_items(
        rows_IK,
        batch,
        lowering=linear.lowering(batch),
        dtype=rows_IK.dtype,
        precision=lax.Precision.HIGHEST,
        item_axis=axis,
    )
    score_BI = lax.dot(
        code_BK.astype(columns_KI.dtype),
        columns_KI,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    own_I = params["own_weight"]
    n_local = own_I.shape[0]
    item_N = batch.item_N - mesh_lib.item_offset(n_local, axis)
    # Items of other shards go where padding goes: out of bounds.
    is_here = (item_N >= 0) & (item_N < n_local)
    row_N = jnp.where(is_here, batch.row_N, score_BI.shape[0])
    own_N = jnp.take(own_I, item_N, mode="clip")
    return score_BI.at[row_N, item_N].add(-own_N, mode="drop")


def item_vectors(
    train: Any,
    rank: int,
    *,
    l2: float,
    dropout: float,
    user_exponent: float,
    mend: str,
) -> np.ndarray:
    """Where the items lie in the largest directions of `fit`, float32 [I, K].

    The right singular vectors of A, each times s / √(1 + s²): their inner
    products are what AᵀA (I + AᵀA)⁻¹ has of these directions. Columns beyond
    the items' number are zero. Arguments and errors as of `fit`.
    """
    _check_memory(train, rank, mend, None)
    weight_U, ridge_I = linear.penalties(train, l2, dropout, user_exponent)
    kept = min(rank, train.n_items)
    scaled = _scaled(train, weight_U, np.sqrt(ridge_I))
    square_K, vector_IK = _largest(scaled, kept)
    made = np.zeros((train.n_items, rank), np.float32)
    scale_K = np.sqrt(square_K / (1 + square_K)).astype(np.float32)
    made[:, :kept] = vector_IK * scale_K
    return made


def _scaled(train: Any, weight_U: np.ndarray, root_I: np.ndarray) -> Any:
    """A = W^½ X Λ^-½, float32, scipy.sparse [U, I]."""
    matrix = train.to_scipy().astype(np.float32)
    matrix.data = np.repeat(np.sqrt(weight_U), train.counts).astype(np.float32)
    matrix.data /= root_I.astype(np.float32)[matrix.indices]
    return matrix


def _width(rank: int, n_items: int) -> int:
    """Directions searched to find `rank` of them."""
    return min(rank + _OVERSAMPLING, n_items)


def _largest(matrix: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares of the largest singular values [K] and right vectors [I, K]."""
    from scipy.linalg import qr  # heavy; NumPy's would go through float64

    rng = np.random.default_rng(0)
    shape = (matrix.shape[1], _width(rank, matrix.shape[1]))
    basis = rng.standard_normal(shape, dtype=np.float32)
    for _ in range(_TURNS):
        basis = matrix.T @ (matrix @ basis)
        basis, _ = qr(
            basis, mode="economic", overwrite_a=True, check_finite=False
        )
    image = matrix @ basis
    square, rotation = np.linalg.eigh((image.T @ image).astype(np.float64))
    square, rotation = square[::-1][:rank], rotation[:, ::-1][:, :rank]
    return np.maximum(square, 0), basis @ rotation.astype(np.float32)


def _check_memory(
    train: Any, rank: int, mend: str, available_bytes: int | None
) -> None:
    """Refuses what does not fit.

    Raises:
      VaecfError: five float32 arrays of items x rank (and two of users x rank,
        and the interactions) do not fit.
    """
    if available_bytes is None:
        available_bytes = memory.host_free_bytes()
    n_users, n_items, nnz = train.n_users, train.n_items, train.nnz
    width = _width(rank, n_items)
    needed = (20 * n_items + 8 * n_users) * width + 16 * nnz
    if needed > available_bytes:
        raise VaecfError(
            f"the {rank:,} largest directions of the interactions need "
            f"({n_items:,} items x 20 + {n_users:,} users x 8) x {width:,} + "
            f"{nnz:,} interactions x 16 bytes = {needed / 2**30:.1f} GiB and "
            f"{available_bytes / 2**30:.1f} GiB are free: {mend}"
        )
