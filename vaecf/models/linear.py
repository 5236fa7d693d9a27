"""EASE: a linear regression of each item on all others, in closed form.

Shapes in names: B users of a batch, U training users, I items (the local
shard of them), K columns of a block. X is the binary matrix [U, I].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models import bag_of_items
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import blas, memory
from vaecf.parallel import mesh as mesh_lib

PARTITION: dict[str, tuple[str | None, ...]] = {"item_item": (None, "item")}

# Up to this many users an accelerator gathers rows, as a CPU does. For more,
# the product with all rows is faster.
_MAX_GATHERED_USERS = 8
_BLOCK = 2048  # rows or columns of a matrix that are computed at once
# Largest matrix that LAPACK inverts at once. The threaded Cholesky
# factorisation of OpenBLAS ends the process if a matrix is large: of 30,000
# rows in float32 with version 0.3.31 and two threads, of 22,660 rows in float64
# in OpenBLAS issue 2562. Others are inverted in blocks of `_SWEPT` rows.
_LAPACK_SIZE, _SWEPT = 16_384, 1024
# Up to this size (.2 s) a matrix is inverted in one thread: see `blas`.
_ONE_THREAD_SIZE = 2048


def scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None = None,
) -> jax.Array:
    """Returns x · B of this shard's items, float32 [B, I]."""
    weights = params["item_item"]
    return bag_of_items.bag_of_items(
        weights,
        batch,
        lowering=choose_lowering(batch, platform),
        dtype=weights.dtype,
        precision=lax.Precision.HIGHEST,
        platform=platform,
    )


def choose_lowering(batch: SparseBatch, platform: str | None) -> str:
    """Returns the faster lowering of `bag_of_items` for scoring a batch."""
    if mesh_lib.on_cpu(platform):
        return "gather"
    few = batch.count_B.shape[0] <= _MAX_GATHERED_USERS
    return "gather" if few else "dense"


def fit(
    train: Any,
    l2: float,
    *,
    dropout: float = 0.0,
    user_exponent: float = 0.0,
    advice: str = "leave out ease",
) -> dict[str, np.ndarray]:
    """Returns the item-item weights of EASE or of its regularised variants.

    P = (XᵀWX + Λ)⁻¹ and B = I - P · diagMat(1 ⊘ diag P), that is
    B_ij = -P_ij / P_jj and B_jj = 0: Steck 2019, equations 8 and 9. EASE has
    W = I and Λ = λ I. Dropout of the input at rate p adds
    p / (1 - p) · diagMat(diag XᵀWX) to Λ (Steck 2020, "Autoencoders that don't
    overfit towards the Identity", equations 4 and 5). W = diagMat(w) weights
    the users by w_u = (n_u / mean n)^-κ, so that users with long histories
    count for less.

    With fewer users than items, the Woodbury identity replaces the inverse by
    that of a users x users matrix.

    Args:
      l2: λ, in squared interactions, above 0.
      dropout: p, in [0, 1); 0 for EASE.
      user_exponent: κ, at least 0; 0 gives all users the same weight.
      advice: what to do if the fit needs more memory, for the error message.

    Returns:
      'item_item', float32 [I, padded I], the parameters of `scores`.

    Raises:
      VaecfError: `l2` is not positive, the matrix is singular, the weights are
        not finite, or the items x items matrix does not fit into memory.
    """
    if not l2 > 0:
        raise VaecfError(f"EASE: l2={l2} must be above 0")
    n_items = train.n_items
    free_bytes = check_memory("EASE", n_items, advice)
    # The inverse replaces the matrix in place. The padded float32 result and
    # its copy on the device need memory as well.
    size = min(train.n_users, n_items)
    double = 8 * size**2 + 8 * n_items**2
    dtype = np.float64 if double < free_bytes / 2 else np.float32
    matrix = train.to_scipy().astype(dtype)
    weight_U, ridge_I = (
        array.astype(dtype)
        for array in penalties(train, l2, dropout, user_exponent)
    )
    weights = np.zeros((n_items, mesh_lib.padded_items(n_items)), np.float32)
    if train.n_users < n_items:
        columns = _inverse_by_users(matrix, weight_U, ridge_I)
    else:
        columns = _inverse_by_items(matrix, weight_U, ridge_I)
    for first, block_IK in columns:
        j = np.arange(first, first + block_IK.shape[1])
        block_IK = block_IK / -block_IK[j, np.arange(len(j))]
        if not np.isfinite(block_IK).all():
            raise VaecfError("EASE: the weights are not finite; increase l2")
        weights[:, j] = block_IK
        weights[j, j] = 0.0
    return {"item_item": weights}


def penalties(
    train: Any, l2: float, dropout: float, user_exponent: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `fit`'s user weights w [U] and diagonal of Λ [I], float64.

    Raises:
      VaecfError: the numbers leave the range of float32.
    """
    mean = max(train.nnz / train.n_users, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        weight_U = (np.maximum(train.counts, 1) / mean) ** -user_exponent
        count_I = np.bincount(
            train.indices,
            weights=np.repeat(weight_U, train.counts),
            minlength=train.n_items,
        )
        ridge_I = l2 + dropout / (1 - dropout) * count_I
    for name, value, array in (
        ("user_exponent", user_exponent, weight_U),
        ("l2", l2, ridge_I),
    ):
        if not ((array > 1e-35) & (array < 1e20)).all():
            raise VaecfError(
                f"{name}={value:g} gives weights that float32 cannot hold: "
                "choose a moderate number"
            )
    return weight_U, ridge_I


def _inverse_by_items(
    matrix: Any, weight_U: np.ndarray, ridge_I: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first column, columns [I, K]) of (XᵀWX + Λ)⁻¹."""
    gram = dense_product(matrix.T.tocsr().multiply(weight_U).tocsr(), matrix)
    gram[np.diag_indices_from(gram)] += ridge_I
    inverse = _invert(gram)
    for first in range(0, len(inverse), _BLOCK):
        yield first, inverse[:, first : first + _BLOCK]


def _inverse_by_users(
    matrix: Any, weight_U: np.ndarray, ridge_I: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the same columns as Λ⁻¹ - Λ⁻¹Xᵀ (W⁻¹ + XΛ⁻¹Xᵀ)⁻¹ XΛ⁻¹."""
    scaled = matrix.multiply(1 / ridge_I).tocsr()  # XΛ⁻¹
    kernel = dense_product(scaled, matrix.T.tocsr())
    kernel[np.diag_indices_from(kernel)] += 1 / weight_U
    inverse = _invert(kernel)
    by_item = scaled.T.tocsr()
    for first in range(0, matrix.shape[1], _BLOCK):
        rows = by_item[first : first + _BLOCK]
        columns = -(by_item @ np.ascontiguousarray((rows @ inverse).T))
        j = np.arange(first, first + rows.shape[0])
        columns[j, np.arange(len(j))] += 1 / ridge_I[j]
        yield first, columns


def _invert(square: np.ndarray) -> np.ndarray:
    """Returns the inverse of a symmetric positive definite matrix.

    The matrix is overwritten. If it is large, LAPACK inverts the blocks on its
    diagonal. Each step eliminates the rows and columns of one block from all
    others, and negates the block's inverse (the sweep operator, Goodnight 1979,
    "A tutorial on the SWEEP operator"). Only the upper triangle of blocks is
    computed. The steps need memory for 3 n x `_SWEPT` numbers.
    """
    n, size = len(square), _SWEPT
    if n <= _LAPACK_SIZE:
        return _invert_block(square)
    for first in range(0, n, size):
        own = slice(first, first + size)
        pivot = _invert_block(square[own, own])
        rows = np.hstack([square[:first, own].T, square[own, first:]])
        solved = pivot @ rows
        for i in range(0, n, size):
            other = slice(i, i + size)
            if i != first:
                square[other, i:] -= rows[:, other].T @ solved[:, i:]
        square[:first, own] = solved[:, :first].T
        square[own, first:] = solved[:, first:]
        np.negative(pivot, out=square[own, own])
    for first in range(0, n, size):
        last = first + size
        corner, right = np.split(square[first:last, first:], [size], axis=1)
        corner[:] = -_mirror(corner)
        np.negative(right, out=right)
        square[last:, first:last] = right.T
    return square


def _invert_block(block: np.ndarray) -> np.ndarray:
    """Returns the inverse from the upper triangle; may overwrite the block."""
    from scipy.linalg import lapack  # slow to import, and used only here

    factor, inverse = (
        (lapack.dpotrf, lapack.dpotri)
        if block.dtype == np.float64
        else (lapack.spotrf, lapack.spotri)
    )
    # LAPACK's lower triangle of the Fortran-ordered view is our upper one.
    is_small = len(block) <= _ONE_THREAD_SIZE
    with blas.one_thread() if is_small else contextlib.nullcontext():
        lower, info = factor(block.T, lower=1, overwrite_a=1, clean=0)
        if info:
            raise VaecfError("EASE: the Gram matrix is singular; increase l2")
        lower, _ = inverse(lower, lower=1, overwrite_c=1)
    return _mirror(lower.T)


def _mirror(upper: np.ndarray) -> np.ndarray:
    return np.triu(upper) + np.triu(upper, 1).T


def check_memory(title: str, n_items: int, advice: str) -> int:
    """Returns the free bytes for a fit of items x items matrices.

    Raises:
      VaecfError: three float32 matrices do not fit: the Gram matrix, the
        result, and the copy of the result on the device.
    """
    return memory.require_free(
        12 * n_items**2,
        f"{title} on {n_items:,} items",
        f"{n_items:,}^2 x 12 bytes",
        f"{advice}, or prepare the dataset with a higher min_users_per_item",
    )


def dense_product(left: Any, right: Any) -> np.ndarray:
    """Returns the product of two sparse matrices, computed in row blocks."""
    dense = np.empty((left.shape[0], right.shape[1]), left.dtype)
    for first in range(0, len(dense), _BLOCK):
        rows = slice(first, first + _BLOCK)
        dense[rows] = (left[rows] @ right).toarray()
    return dense
