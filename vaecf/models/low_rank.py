"""The item-item regression of `linear.fit` at low rank, in closed form.

Memory, files and queries take items x rank numbers instead of items x items,
and the time of a fit grows with the number of interactions.

Shapes in names: B users of a batch, U training users, I items (the local
shard of them), K factors.
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

# The search for singular vectors iterates this often, with this many
# directions more than it returns. The vectors need not be exact: doubling
# either number changes the NDCG@100 of the linear branch by .001 in either
# direction on MovieLens-1M and Yelp2018.
_OVERSAMPLING = 32
# LAPACK factorises matrices of this size in float64: see `linear._LAPACK_SIZE`.
_LARGEST_RANK = 8192
_POWER_ITERATIONS = 6

PARTITION: dict[str, tuple[str | None, ...]] = {
    "input_factors": ("item", None),
    "output_factors": (None, "item"),
    "self_weight": ("item",),
}


def fit(
    train: Any,
    l2: float,
    rank: int,
    *,
    dropout: float = 0.0,
    user_exponent: float = 0.0,
    advice: str = "choose a lower rank",
) -> dict[str, np.ndarray]:
    """Returns factors of the item-item weights B of `linear.fit`.

    With A = W^½ X Λ^-½ (`linear.fit` defines X, W and Λ), the weights are
    B_ij = -P_ij / P_jj and B_jj = 0, where P = Λ^-½ (I + AᵀA)⁻¹ Λ^-½. Here
    AᵀA is replaced by V S² Vᵀ + D, as in factor analysis: S holds the K
    largest singular values of A, V their right singular vectors, and D is the
    diagonal of the remainder. By the Woodbury identity the inverse is then
    E - F Fᵀ with E = (I + D)⁻¹, F = E V S C and C Cᵀ = (I + S Vᵀ E V S)⁻¹, so
    that off the diagonal

      B_ij = F_i · F_j √Λ_j / (√Λ_i (E_j - |F_j|²)).

    At full rank this equals `linear.fit`. Subspace iteration finds V (Halko,
    Martinsson and Tropp 2011, algorithm 4.4). Its random start is the same in
    every fit.

    The rank K is reduced to the number of items if above. All other arguments
    are those of `linear.fit`.

    Returns:
      The parameters of `scores`, float32, with zeros in the padding:
      'input_factors' [padded I, K], 'output_factors' [K, padded I] and
      'self_weight' [padded I].

    Raises:
      VaecfError: an argument is out of range, λ is too small for float32, or
        the factors do not fit into memory.
    """
    if not l2 > 0:
        raise VaecfError(f"the linear branch: l2={l2} must be above 0")
    if rank < 1:
        raise VaecfError(f"the linear branch: rank={rank} must be at least 1")
    rank = min(rank, train.n_items)
    if rank > _LARGEST_RANK:
        raise VaecfError(
            f"the linear branch: rank={rank} must be at most {_LARGEST_RANK}; "
            "0 is the full matrix"
        )
    check_memory(train, rank, advice)
    too_small = VaecfError(
        f"the linear branch: l2={l2:g} is too small for float32; increase it"
    )
    scaled, root_I = _scaled(train, l2, dropout, user_exponent)
    try:
        inner_I, factor_IK = _invert(scaled, rank)
    except np.linalg.LinAlgError:
        raise too_small from None
    length_I = np.square(factor_IK).sum(axis=1, dtype=np.float64)
    diagonal_I = inner_I - length_I
    if not (diagonal_I >= 1e-3 * inner_I).all():
        raise too_small
    padded = np.zeros((mesh_lib.padded_items(train.n_items), rank), np.float32)
    padded[: train.n_items] = factor_IK / root_I[:, None].astype(np.float32)
    return {
        "input_factors": padded,
        "output_factors": mesh_lib.pad_items(
            factor_IK.T * (root_I / diagonal_I).astype(np.float32)
        ),
        "self_weight": mesh_lib.pad_items(length_I / diagonal_I),
    }


def scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    platform: str | None = None,
) -> jax.Array:
    """Returns x · B of this shard's items, float32 [B, I].

    The product of the factors has a diagonal, but B has none. 'self_weight'
    holds that diagonal: what an item of the history adds to its own score.
    """
    rows_IK, columns_KI = params["input_factors"], params["output_factors"]
    score_BI = product(rows_IK, columns_KI, batch, platform)
    self_I = params["self_weight"]
    n_local = self_I.shape[0]
    axis = mesh_lib.item_axis(rows_IK)
    item_N = batch.item_N - mesh_lib.item_offset(n_local, axis)
    # Items of other shards get the row of padding slots, which drops them.
    is_local = (item_N >= 0) & (item_N < n_local)
    row_N = jnp.where(is_local, batch.row_N, score_BI.shape[0])
    self_N = jnp.take(self_I, item_N, mode="clip")
    return score_BI.at[row_N, item_N].add(-self_N, mode="drop")


def product(
    rows_IK: jax.Array,
    columns_KI: jax.Array,
    batch: SparseBatch,
    platform: str | None = None,
) -> jax.Array:
    """Returns x · rows · columns of this shard's items, float32 [B, I]."""
    code_BK = bag_of_items.bag_of_items(
        rows_IK,
        batch,
        lowering=linear.choose_lowering(batch, platform),
        dtype=rows_IK.dtype,
        precision=lax.Precision.HIGHEST,
        item_axis=mesh_lib.item_axis(rows_IK),
        platform=platform,
    )
    return lax.dot(
        code_BK.astype(columns_KI.dtype),
        columns_KI,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def item_vectors(
    train: Any,
    rank: int,
    *,
    l2: float,
    dropout: float,
    user_exponent: float,
    advice: str,
) -> np.ndarray:
    """Returns the items' positions in the largest directions of `fit`.

    These are the right singular vectors of A, each scaled by s / √(1 + s²):
    float32 [I, rank], with zeros in the columns beyond the number of items.
    The inner products of the positions are the part of AᵀA (I + AᵀA)⁻¹ that
    lies in these directions. Arguments and errors as in `fit`.
    """
    check_memory(train, rank, advice)
    kept = min(rank, train.n_items)
    scaled, _ = _scaled(train, l2, dropout, user_exponent)
    square_K, vector_IK = largest_vectors(scaled, kept)
    vectors = np.zeros((train.n_items, rank), np.float32)
    scale_K = np.sqrt(square_K / (1 + square_K)).astype(np.float32)
    vectors[:, :kept] = vector_IK * scale_K
    return vectors


def _scaled(train: Any, *penalties: float) -> tuple[Any, np.ndarray]:
    """Returns (A = W^½ X Λ^-½, float32 scipy.sparse [U, I]; Λ^½ [I])."""
    weight_U, ridge_I = linear.penalties(train, *penalties)
    root_I = np.sqrt(ridge_I)
    matrix = train.to_scipy().astype(np.float32)
    matrix.data = np.repeat(np.sqrt(weight_U), train.counts).astype(np.float32)
    matrix.data /= root_I.astype(np.float32)[matrix.indices]
    return matrix, root_I


def _invert(scaled: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E float64 [I], F float32 [I, K]); `fit` defines both.

    No array of items x rank is float64.
    """
    square_K, vector_IK = largest_vectors(scaled, rank)
    total_I = np.bincount(
        scaled.indices,
        weights=np.square(scaled.data, dtype=np.float64),
        minlength=scaled.shape[1],
    )
    rest_I = total_I - np.square(vector_IK) @ square_K.astype(np.float32)
    inner_I = 1 / (1 + np.maximum(rest_I, 0))
    vector_IK *= np.sqrt(square_K).astype(np.float32)
    weighted_IK = vector_IK * inner_I[:, None].astype(np.float32)
    core_KK = np.eye(rank) + weighted_IK.T @ vector_IK
    del vector_IK
    root_KK = np.linalg.inv(np.linalg.cholesky(core_KK)).T  # C
    return inner_I, weighted_IK @ root_KK.astype(np.float32)


def largest_vectors(matrix: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest squared singular values and their right vectors.

    Args:
      matrix: scipy.sparse [U, I], float32.
      rank: K, at most I.

    Returns:
      (float64 [K], descending; float32 [I, K]), by subspace iteration from a
      start that is the same in every call.
    """
    from scipy.linalg import qr  # slow to import; NumPy's qr needs float64

    rng = np.random.default_rng(0)
    n_items = matrix.shape[1]
    shape = n_items, min(rank + _OVERSAMPLING, n_items)
    basis = rng.standard_normal(shape, dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis = matrix.T @ (matrix @ basis)
        basis, _ = qr(
            basis, mode="economic", overwrite_a=True, check_finite=False
        )
    image = matrix @ basis
    square, rotation = np.linalg.eigh((image.T @ image).astype(np.float64))
    square, rotation = square[::-1][:rank], rotation[:, ::-1][:, :rank]
    return np.maximum(square, 0), basis @ rotation.astype(np.float32)


def check_memory(train: Any, rank: int, advice: str) -> None:
    """Raises VaecfError if `largest_vectors` needs more memory than is free."""
    n_users, n_items, nnz = train.n_users, train.n_items, train.nnz
    width = min(rank + _OVERSAMPLING, n_items)
    # Five float32 arrays of items x rank, two of users x rank, and the
    # interactions.
    memory.require_free(
        (20 * n_items + 8 * n_users) * width + 16 * nnz,
        f"a factorisation of rank {rank:,}",
        f"({n_items:,} items x 20 + {n_users:,} users x 8) x {width:,} + "
        f"{nnz:,} interactions x 16 bytes",
        advice,
    )
