"""ItemKNN: the nearest neighbours of each item by cosine similarity."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.models import sparse_item_item

PARTITION = sparse_item_item.PARTITION

# A user's score of item j is the sum of the similarities between j and the
# items in the history: Deshpande and Karypis 2004, section 4.2.
scores = sparse_item_item.scores


def fit(train: Any, neighbours: int, shrinkage: float) -> dict[str, np.ndarray]:
    """Returns the similarities between each item and its nearest neighbours.

    Args:
      neighbours: how many nearest items to keep for each item, at least 1.
      shrinkage: see `most_similar`.

    Returns:
      The parameters of `scores`, see `sparse_item_item.pack`. An item of the
      history adds to the scores of the items whose neighbour it is.
    """
    similar = most_similar(train, neighbours, shrinkage)
    return sparse_item_item.pack(similar.T)


def most_similar(train: Any, neighbours: int, shrinkage: float = 0.0) -> Any:
    """Returns a CSR matrix with the nearest neighbours of item i in row i.

    s_ij = c_ij / (√(c_ii c_jj) + h) with c = XᵀX and s_ii = 0. For h = 0 this
    is the cosine of Deshpande and Karypis 2004, section 4.1. The shrinkage h
    (Ferrari Dacrema et al. 2019, section 3.2) lowers similarities that rest
    on few users.

    Args:
      neighbours: how many to keep, at least 1. Ties go to the lower index.
      shrinkage: h, in interactions, at least 0.
    """
    norm_I = np.sqrt(train.item_counts()).astype(np.float32)

    def scale(value: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return value / (norm_I[i] * norm_I[j] + np.float32(shrinkage))

    matrix = train.to_scipy()  # float32 holds counts exactly up to 2^24
    return sparse_item_item.nearest(matrix.T.tocsr(), matrix, neighbours, scale)
