"""ItemKNN: the nearest neighbours of each item by cosine similarity."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.models import sparse_item_item

PARTITION = sparse_item_item.PARTITION

# A user's score of item j is the sum of the similarities between j and the
# items in the history: Deshpande and Karypis 2004, section 4.2.
scores = sparse_item_item.scores

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
      The parameters of `scores`, see `sparse_item_item.pack`. An item of the
      history adds to the scores of the items whose neighbour it is.
    """
    import scipy.sparse  # slow to import

    n_items = train.n_items
    matrix = train.to_scipy()
    transposed = matrix.T.tocsr()
    norm_I = np.sqrt(train.item_counts()).astype(np.float32)
    nearest = []
    for first in range(0, n_items, _BLOCK):
        # float32 holds counts exactly up to 2^24.
        near = (transposed[first : first + _BLOCK] @ matrix).tocoo()
        item = first + near.row
        scale = norm_I[item] * norm_I[near.col] + np.float32(shrinkage)
        near.data /= scale
        near.data[near.col == item] = 0
        near = near.tocsr()
        near.eliminate_zeros()
        near.sort_indices()
        nearest.append(sparse_item_item.largest(near, neighbours))
    return sparse_item_item.pack(scipy.sparse.vstack(nearest).T)
