"""Baselines through the same ranking path: popularity, EASE, known truth.

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


def ease_scores(
    params: dict[str, jax.Array], batch: sparse.SparseBatch, user_B: jax.Array
) -> jax.Array:
    """x · B, Steck 2019, equation 1; float32 [B, I]."""
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
      Parameters of `ease_scores`.

    Raises:
      VaecfError: the items x items matrix does not fit memory; shows the
        arithmetic.
    """
    from scipy.linalg import lapack  # heavy, and only this needs it

    if l2 <= 0:
        raise VaecfError(f"EASE's l2={l2} must be above 0")
    n_items = train.n_items
    if available_bytes is None:
        available_bytes = _available_bytes()
    # The Gram matrix is inverted in place; the padded float32 result and its
    # copy on the device come on top.
    double = 8 * n_items**2 + 8 * n_items**2
    single = 4 * n_items**2 + 8 * n_items**2
    dtype = np.float64 if double < available_bytes / 2 else np.float32
    if dtype is np.float32 and single > available_bytes:
        raise VaecfError(
            f"EASE on {n_items:,} items needs {n_items:,}^2 x 12 bytes = "
            f"{single / 2**30:.1f} GiB and {available_bytes / 2**30:.1f} GiB "
            "are free: leave ease out of --baselines, or raise "
            "--min_users_per_item when preparing"
        )
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
