"""ItemKNN: the nearest neighbours of each item by cosine similarity."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.models import linear
from vaecf.parallel import mesh as mesh_lib

PARTITION = linear.PARTITION

# A user's score of item j is the sum of the similarities between j and the
# items in the history: Deshpande and Karypis 2004, section 4.2.
scores = linear.scores

_BLOCK = 1024  # items whose similarities are computed at once


def fit(train: Any, neighbours: int, shrinkage: float) -> dict[str, np.ndarray]:
    """Returns the similarities between each item and its nearest neighbours.

    s_ij = c_ij / (√(c_ii c_jj) + h) with c = XᵀX and s_ii = 0. For h = 0 this
    is the cosine of Deshpande and Karypis 2004, section 4.1. The shrinkage h
    (Ferrari Dacrema et al. 2019, section 3.2) lowers similarities that rest
    on few users.

    Args:
      neighbours: how many nearest items to keep for each item, at least 1.
        Ties go to the lower item index.
      shrinkage: h, in interactions, at least 0.

    Returns:
      'item_item', float32 [I, padded I], the parameters of `scores`. Column j
      holds the neighbours of item j.

    Raises:
      VaecfError: the items x items matrix does not fit into memory.
    """
    n_items = train.n_items
    linear.check_memory("ItemKNN", n_items, "leave out itemknn")
    matrix = train.to_scipy().astype(np.float32)
    # float32 holds counts exactly up to 2^24.
    gram = linear.dense_product(matrix.T.tocsr(), matrix)
    norm_I = np.sqrt(np.diag(gram))
    weights = np.zeros((n_items, mesh_lib.padded_items(n_items)), np.float32)
    for first in range(0, n_items, _BLOCK):
        rows = slice(first, min(first + _BLOCK, n_items))
        # The floor avoids 0 / 0 for items without users.
        scale = np.outer(norm_I[rows], norm_I) + np.float32(shrinkage)
        near = gram[rows] / np.maximum(scale, np.finfo(np.float32).tiny)
        near[np.arange(len(near)), np.arange(rows.start, rows.stop)] = 0
        weights[:, rows] = _keep_largest(near, neighbours).T
    return {"item_item": weights}


def _keep_largest(rows: np.ndarray, k: int) -> np.ndarray:
    """Sets all but the k largest of each row to 0; ties go to lower columns."""
    if k >= rows.shape[1]:
        return rows
    threshold = -np.partition(-rows, k - 1, axis=1)[:, k - 1 : k]
    above, equal = rows > threshold, rows == threshold
    room = k - above.sum(axis=1, keepdims=True)
    kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.where(kept, rows, 0)
