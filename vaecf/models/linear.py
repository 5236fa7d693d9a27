"""Baselines linear in the history: popularity, EASE, ItemKNN, known oracle.

Each is a function (params, batch, user_B) -> scores of this shard's items,
and a fit on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models import bag_of_items
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import memory
from vaecf.parallel import mesh as mesh_lib

_MEND = "leave {} out of --baselines"
# Users up to whom an accelerator gathers the rows of their items.
_FEW = 8
_BLOCK = 2048  # rows or columns of a matrix of items worked on together

# Columns of these matrices are items, and are sharded as the model's are.
PARTITION: dict[str, tuple[str | None, ...]] = {
    "item_score": ("item",),
    "item_item": (None, "item"),
    "group_item": (None, "item"),
}


def popularity_scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    """The same scores for everyone, float32 [B, I]."""
    n_users = batch.count_B.shape[0]
    row_I = params["item_score"]
    return jnp.broadcast_to(row_I[None, :], (n_users, row_I.shape[0]))


def item_item_scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    """x · B, Steck 2019, equation 1; float32 [B, I].

    Also ItemKNN's, Deshpande and Karypis 2004, section 4.2: a sum over the
    history.
    """
    weights = params["item_item"]
    return bag_of_items.bag_of_items(
        weights,
        batch,
        lowering=lowering(batch),
        dtype=weights.dtype,
        precision=lax.Precision.HIGHEST,
    )


def lowering(batch: SparseBatch) -> str:
    """How the histories' rows of a matrix are best summed here.

    A product with all items' rows pays where matrix units are fast, and for
    more than a few users.
    """
    few = batch.count_B.shape[0] <= _FEW or jax.default_backend() == "cpu"
    return "gather" if few else "dense"


def oracle_scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
) -> jax.Array:
    """Generating probability of every item, float32 [B, I]."""
    # A padding user's row is one past the end: clip, its list is thrown away.
    mixture_BG = jnp.take(params["user_group"], user_B, axis=0, mode="clip")
    return lax.dot(
        mixture_BG, params["group_item"], precision=lax.Precision.HIGHEST
    )


def pad_items(array: np.ndarray) -> np.ndarray:
    """float32 copy with the last (item) axis padded with zeros.

    Finite, because a product with a zero must stay a number; ranking masks
    padding items whatever their scores.
    """
    n_items = array.shape[-1]
    shape = (*array.shape[:-1], mesh_lib.padded_items(n_items))
    padded = np.zeros(shape, np.float32)
    padded[..., :n_items] = array
    return padded


def fit_popularity(count_I: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of `popularity_scores`: the items' training counts."""
    return {"item_score": pad_items(count_I)}


def fit_oracle(
    user_group: np.ndarray, group_item: np.ndarray
) -> dict[str, np.ndarray]:
    """Parameters of `oracle_scores`."""
    return {
        "user_group": np.asarray(user_group, np.float32),
        "group_item": pad_items(group_item),
    }


def fit_ease(
    train: Any,
    l2: float,
    *,
    dropout: float = 0.0,
    user_exponent: float = 0.0,
    available_bytes: int | None = None,
    mend: str = _MEND.format("ease"),
) -> dict[str, np.ndarray]:
    """Closed-form EASE, Steck 2019, equations 8 and 9, and its kin.

    P = (XᵀWX + Λ)⁻¹, B = I - P · diagMat(1 ⊘ diag P), so B_ij = -P_ij / P_jj
    and B_jj = 0. Λ = λ I for EASE itself; dropout of the input at rate p adds
    p / (1 - p) · diagMat(diag XᵀWX) (Steck 2020, "Autoencoders that don't
    overfit towards the Identity", equations 4 and 5). W = diagMat(w) weighs
    the users, w_u = (n_u / mean n)^-κ: those of long histories count for less.

    With fewer users than items the inverse is that of a matrix users x users
    (the Woodbury identity).

    Args:
      train: Interactions (users x items).
      l2: λ, in squared interactions; above 0.
      dropout: p, in [0, 1); 0 is EASE.
      user_exponent: κ, at least 0; 0 weighs all users alike.
      available_bytes: memory to stay within; None asks the system.
      mend: what to do instead where it does not fit, for the error.

    Returns:
      Parameters of `item_item_scores`.

    Raises:
      VaecfError: the items x items matrix does not fit memory; shows the
        arithmetic.
    """
    if l2 <= 0:
        raise VaecfError(f"EASE's l2={l2} must be above 0")
    n_items = train.n_items
    available_bytes = _check_memory(mend, "EASE", n_items, available_bytes)
    # A square matrix is inverted in place; the padded float32 result and its
    # copy on the device come on top.
    size = min(train.n_users, n_items)
    double = 8 * size**2 + 8 * n_items**2
    dtype = np.float64 if double < available_bytes / 2 else np.float32
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
    for first, block in columns:
        j = np.arange(first, first + block.shape[1])
        weights[:, j] = block / -block[j, np.arange(len(j))]
        weights[j, j] = 0.0
    return {"item_item": weights}


def penalties(
    train: Any, l2: float, dropout: float, user_exponent: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights w [U] of users and Λ's diagonal [I], float64; see `fit_ease`."""
    mean = max(train.nnz / train.n_users, 1)
    weight_U = (np.maximum(train.counts, 1) / mean) ** -user_exponent
    count_I = np.bincount(
        train.indices,
        weights=np.repeat(weight_U, train.counts),
        minlength=train.n_items,
    )
    return weight_U, l2 + dropout / (1 - dropout) * count_I


def _inverse_by_items(
    matrix: Any, weight_U: np.ndarray, ridge_I: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(first column, columns [I, K]) of (XᵀWX + Λ)⁻¹, block by block."""
    gram = _product(matrix.T.tocsr().multiply(weight_U).tocsr(), matrix)
    gram[np.diag_indices_from(gram)] += ridge_I
    inverse = _invert(gram)
    for first in range(0, len(inverse), _BLOCK):
        yield first, inverse[:, first : first + _BLOCK]


def _inverse_by_users(
    matrix: Any, weight_U: np.ndarray, ridge_I: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The same as Λ⁻¹ - Λ⁻¹Xᵀ (W⁻¹ + XΛ⁻¹Xᵀ)⁻¹ XΛ⁻¹."""
    scaled = matrix.multiply(1 / ridge_I).tocsr()  # XΛ⁻¹
    kernel = _product(scaled, matrix.T.tocsr())
    kernel[np.diag_indices_from(kernel)] += 1 / weight_U
    inverse = _invert(kernel)
    items_first = scaled.T.tocsr()
    for first in range(0, matrix.shape[1], _BLOCK):
        rows = items_first[first : first + _BLOCK]
        columns = -(items_first @ np.ascontiguousarray((rows @ inverse).T))
        j = np.arange(first, first + rows.shape[0])
        columns[j, np.arange(len(j))] += 1 / ridge_I[j]
        yield first, columns


def _invert(square: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric positive definite matrix, in its place.

    Raises:
      VaecfError: it is singular.
    """
    from scipy.linalg import lapack  # heavy, and only this needs it

    factor, inverse = (
        (lapack.dpotrf, lapack.dpotri)
        if square.dtype == np.float64
        else (lapack.spotrf, lapack.spotri)
    )
    # LAPACK's lower triangle of the Fortran-ordered view: our upper one.
    lower, info = factor(square.T, lower=1, overwrite_a=1, clean=0)
    if info:
        raise VaecfError("EASE: the Gram matrix is singular; raise its l2")
    lower, _ = inverse(lower, lower=1, overwrite_c=1)
    upper = lower.T
    for first in range(0, len(upper), _BLOCK):
        last = first + _BLOCK
        upper[last:, first:last] = upper[first:last, last:].T
        corner = upper[first:last, first:last]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
    return upper


def fit_itemknn(
    train: Any,
    neighbours: int,
    shrinkage: float,
    *,
    available_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """Cosine similarity of items, of each item its nearest neighbours.

    s_ij = c_ij / (√(c_ii c_jj) + h) with c = XᵀX and s_ii = 0: the cosine of
    Deshpande and Karypis 2004, section 4.1, for 0/1 columns, with a shrinkage
    h in the denominator (Ferrari Dacrema et al. 2019, section 3.2), which
    takes from similarities that rest on few users. The score of item j sums
    s_ij over the items of the history that are among j's nearest.

    Args:
      train: Interactions (users x items).
      neighbours: nearest items kept of each, at least 1; of equally near ones
        those of the lower index.
      shrinkage: h, in interactions, at least 0.
      available_bytes: memory to stay within; None asks the system.

    Returns:
      Parameters of `item_item_scores`; column j has j's neighbours.

    Raises:
      VaecfError: a parameter is out of range, or the items x items matrix
        does not fit memory; shows the arithmetic.
    """
    if neighbours < 1:
        raise VaecfError(f"ItemKNN's neighbours={neighbours} must be above 0")
    if not shrinkage >= 0:
        raise VaecfError(f"ItemKNN's shrinkage={shrinkage} must not be below 0")
    n_items = train.n_items
    _check_memory(_MEND.format("itemknn"), "ItemKNN", n_items, available_bytes)
    matrix = train.to_scipy().astype(np.float32)
    gram = _product(matrix.T.tocsr(), matrix)  # counts: exact up to 2^24
    norm_I = np.sqrt(np.diag(gram))
    weights = np.zeros((n_items, mesh_lib.padded_items(n_items)), np.float32)
    for first in range(0, n_items, 1024):
        rows = slice(first, min(first + 1024, n_items))
        # An item without users is like nothing; 0 / 0 is avoided.
        scale = np.outer(norm_I[rows], norm_I) + np.float32(shrinkage)
        near = gram[rows] / np.maximum(scale, np.finfo(np.float32).tiny)
        near[np.arange(len(near)), np.arange(rows.start, rows.stop)] = 0
        weights[:, rows] = _largest(near, neighbours).T
    return {"item_item": weights}


def _largest(rows: np.ndarray, k: int) -> np.ndarray:
    """The rows with zeros but for their k largest, ties by index."""
    if k >= rows.shape[1]:
        return rows
    threshold = -np.partition(-rows, k - 1, axis=1)[:, k - 1 : k]
    above, equal = rows > threshold, rows == threshold
    room = k - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.where(kept, rows, 0)


def _check_memory(
    mend: str, title: str, n_items: int, available_bytes: int | None
) -> int:
    """Bytes to stay within.

    Raises:
      VaecfError: three float32 matrices of items x items (counts, result and
        its copy on the device) do not fit.
    """
    if available_bytes is None:
        available_bytes = memory.host_free_bytes()
    needed = 12 * n_items**2
    if needed > available_bytes:
        raise VaecfError(
            f"{title} on {n_items:,} items needs {n_items:,}^2 x 12 bytes = "
            f"{needed / 2**30:.1f} GiB and {available_bytes / 2**30:.1f} GiB "
            f"are free: {mend}, or raise --min_users_per_item when preparing"
        )
    return available_bytes


def _product(left: Any, right: Any) -> np.ndarray:
    """Of two sparse matrices, dense, built in blocks of rows."""
    dense = np.empty((left.shape[0], right.shape[1]), left.dtype)
    for first in range(0, len(dense), _BLOCK):
        dense[first : first + _BLOCK] = (
            left[first : first + _BLOCK] @ right
        ).toarray()
    return dense
