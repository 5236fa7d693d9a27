"""SLIM on nearest neighbours: EASE's regression with few items as inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.errors import VaecfError
from vaecf.models import knn, linear, sparse_item_item
from vaecf.parallel import memory

PARTITION = sparse_item_item.PARTITION

scores = sparse_item_item.scores

# Up to this many items the Gram matrix is dense: 2.5 GB of float32.
_DENSE_ITEMS = 25_000
_ADVICE = "leave out slim, or prepare the dataset with fewer items"


def fit(train: Any, neighbours: int, l2: float) -> dict[str, np.ndarray]:
    """Returns the weights of regressions of each item on its neighbours.

    For each item j, with G = XᵀX and the set N of the items that are most
    similar to j by cosine,

      B_Nj = (G_NN + λ 1)⁻¹ G_Nj,

    and all other weights are 0. This is fsSLIM of Ning and Karypis 2011 ("SLIM:
    sparse linear methods for top-n recommender systems") without its L1
    penalty and its bound at 0, hence in closed form. With all items as
    neighbours it is EASE (`linear.fit`).

    Args:
      neighbours: size of N, at least 1; ties go to the lower item index.
      l2: λ, in squared interactions, above 0.

    Returns:
      The parameters of `scores`, see `sparse_item_item.pack`.

    Raises:
      VaecfError: a system is singular, or G does not fit into memory.
    """
    from scipy.linalg import lapack  # slow to import, and used only here

    gram = _gram(train)
    near = knn.most_similar(train, neighbours)
    for item, first in enumerate(near.indptr[:-1]):
        own = slice(first, near.indptr[item + 1])
        inputs = near.indices[own]
        if not len(inputs):
            continue
        # The item's own row comes last.
        both = np.append(inputs, item)
        if isinstance(gram, np.ndarray):
            block = gram[np.ix_(both, both)]
        else:
            block = gram[both][:, both].toarray()
        system = block[:-1, :-1] + np.float32(l2) * np.eye(
            len(inputs), dtype=np.float32
        )
        _, weights, info = lapack.sposv(system, block[-1, :-1])
        if info or not np.isfinite(weights).all():
            raise VaecfError(
                f"SLIM: a Gram matrix is singular; increase l2={l2:g}"
            )
        near.data[own] = weights
    return sparse_item_item.pack(near.T)


def _gram(train: Any) -> Any:
    """Returns XᵀX, float32, dense if that is small, else sparse.

    Raises:
      VaecfError: it does not fit into memory.
    """
    matrix, n_items = train.to_scipy(), train.n_items
    transposed = matrix.T.tocsr()
    if n_items <= _DENSE_ITEMS:
        memory.require_free(
            4 * n_items**2,
            f"SLIM on {n_items:,} items",
            f"{n_items:,}^2 x 4 bytes",
            _ADVICE,
        )
        return linear.dense_product(transposed, matrix)
    pairs = int(np.sum(np.square(train.counts, dtype=np.int64)))
    memory.require_free(
        8 * min(pairs, n_items**2),
        f"SLIM on {n_items:,} items",
        f"{pairs:,} pairs of items of a user x 8 bytes",
        _ADVICE,
    )
    return transposed @ matrix
