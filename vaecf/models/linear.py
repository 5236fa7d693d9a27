"""Baselines linear in the history: popularity, EASE, ItemKNN, known truth.

Each is a function (params, batch, user_B) -> scores of this shard's items,
and a fit on the host.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models import sharding, sparse

# Columns of these matrices are items, and are sharded as the model's are.
PARTITION: dict[str, tuple[str | None, ...]] = {
    "item_score": ("item",),
    "item_item": (None, "item"),
    "group_item": (None, "item"),
}


def popularity_scores(
    params: dict[str, jax.Array], batch: sparse.SparseBatch, user_B: jax.Array
) -> jax.Array:
    """The same scores for everyone, float32 [B, I]."""
    n_users = batch.count_B.shape[0]
    row_I = params["item_score"]
    return jnp.broadcast_to(row_I[None, :], (n_users, row_I.shape[0]))


def item_item_scores(
    params: dict[str, jax.Array], batch: sparse.SparseBatch, user_B: jax.Array
) -> jax.Array:
    """x · B, Steck 2019, equation 1; float32 [B, I].

    Also ItemKNN's, Deshpande and Karypis 2004, section 4.2: a sum over the
    history.
    """
    return sparse.bag_of_items(
        params["item_item"],
        batch,
        lowering="dense",
        precision=lax.Precision.HIGHEST,
    )


def truth_scores(
    params: dict[str, jax.Array], batch: sparse.SparseBatch, user_B: jax.Array
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
    shape = (*array.shape[:-1], sharding.padded_items(n_items))
    padded = np.zeros(shape, np.float32)
    padded[..., :n_items] = array
    return padded


def fit_popularity(count_I: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of `popularity_scores`: the items' training counts."""
    return {"item_score": pad_items(count_I)}


def fit_truth(
    user_group: np.ndarray, group_item: np.ndarray
) -> dict[str, np.ndarray]:
    """Parameters of `truth_scores`."""
    return {
        "user_group": np.asarray(user_group, np.float32),
        "group_item": pad_items(group_item),
    }


def fit_ease(
    train: Any, l2: float, *, available_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Closed-form EASE, Steck 2019, equations 8 and 9.

    P = (XᵀX + λ I)⁻¹, B = I - P · diagMat(1 ⊘ diag P), so B_ij = -P_ij / P_jj
    and B_jj = 0.

    Args:
      train: Interactions (users x items).
      l2: λ, in squared interactions; above 0.
      available_bytes: memory to stay within; None asks the system.

    Returns:
      Parameters of `item_item_scores`.

    Raises:
      VaecfError: the items x items matrix does not fit memory; shows the
        arithmetic.
    """
    from scipy.linalg import lapack  # heavy, and only this needs it

    if l2 <= 0:
        raise VaecfError(f"EASE's l2={l2} must be above 0")
    n_items = train.n_items
    # The Gram matrix is inverted in place; the padded float32 result and its
    # copy on the device come on top.
    double = 8 * n_items**2 + 8 * n_items**2
    available_bytes = _check_memory("ease", "EASE", n_items, available_bytes)
    dtype = np.float64 if double < available_bytes / 2 else np.float32
    gram = _gram(train, dtype)
    gram[np.diag_indices(n_items)] += dtype(l2)
    factor, inverse = (
        (lapack.dpotrf, lapack.dpotri)
        if dtype is np.float64
        else (lapack.spotrf, lapack.spotri)
    )
    # LAPACK's lower triangle of the Fortran-ordered view.
    upper, info = factor(gram.T, lower=1, overwrite_a=1, clean=0)
    if info:
        raise VaecfError(f"EASE: the Gram matrix is singular; raise l2={l2}")
    inv, _ = inverse(upper, lower=1, overwrite_c=1)
    weights = np.zeros((n_items, sharding.padded_items(n_items)), np.float32)
    diagonal = np.diag(inv).copy()
    for j in range(n_items):
        # Column j of the symmetric inverse from its lower triangle.
        column = np.concatenate([inv[j, :j], inv[j:, j]])
        weights[:, j] = -column / diagonal[j]
    weights[np.arange(n_items), np.arange(n_items)] = 0.0
    return {"item_item": weights}


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
    _check_memory("itemknn", "ItemKNN", n_items, available_bytes)
    gram = _gram(train, np.float32)  # counts: exact up to 2^24
    norm_I = np.sqrt(np.diag(gram))
    weights = np.zeros((n_items, sharding.padded_items(n_items)), np.float32)
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
    name: str, title: str, n_items: int, available_bytes: int | None
) -> int:
    """Bytes to stay within.

    Raises:
      VaecfError: three float32 matrices of items x items (counts, result and
        its copy on the device) do not fit.
    """
    if available_bytes is None:
        available_bytes = _available_bytes()
    needed = 12 * n_items**2
    if needed > available_bytes:
        raise VaecfError(
            f"{title} on {n_items:,} items needs {n_items:,}^2 x 12 bytes = "
            f"{needed / 2**30:.1f} GiB and {available_bytes / 2**30:.1f} GiB "
            f"are free: leave {name} out of --baselines, or raise "
            "--min_users_per_item when preparing"
        )
    return available_bytes


def _gram(train: Any, dtype: type) -> np.ndarray:
    """XᵀX, dense, built in blocks of rows."""
    matrix = train.to_scipy().astype(dtype)
    transposed = matrix.T.tocsr()
    gram = np.empty((train.n_items, train.n_items), dtype)
    for first in range(0, train.n_items, 2048):
        block = transposed[first : first + 2048]
        gram[first : first + 2048] = (block @ matrix).toarray()
    return gram


def _available_bytes() -> int:
    """Free and reclaimable memory of this machine."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass  # not Linux: all of the physical memory is the best guess
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
