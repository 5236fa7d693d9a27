"""SLIM on nearest neighbours: EASE's regression with few items as inputs."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np

from vaecf.errors import VaecfError
from vaecf.models import knn, linear, sparse_item_item
from vaecf.parallel import blas, memory, workers

PARTITION = sparse_item_item.PARTITION

scores = sparse_item_item.scores

# Up to this many items the Gram matrix is dense: 2.5 GB of float32.
_DENSE_ITEMS = 25_000
_ADVICE = "leave out slim, or prepare the dataset with fewer items"


def fit(
    train: Any, neighbours: int, l2: float, *, advice: str = _ADVICE
) -> dict[str, np.ndarray]:
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
      advice: what to do if the fit needs more memory, for the error message.

    Returns:
      The parameters of `scores`, see `sparse_item_item.pack`.

    Raises:
      VaecfError: a system is singular, or G or the weights do not fit into
        memory.
    """
    from scipy.linalg import lapack  # slow to import, and used only here

    gram = _gram(train, neighbours, advice)
    near = knn.most_similar(train, neighbours)

    def solve(item: int) -> None:
        own = slice(near.indptr[item], near.indptr[item + 1])
        inputs = near.indices[own]
        if not len(inputs):
            return
        # The item's own row comes last.
        block = gram(np.append(inputs, item))
        system = block[:-1, :-1] + np.float32(l2) * np.eye(
            len(inputs), dtype=np.float32
        )
        _, weights, info = lapack.sposv(system, block[-1, :-1])
        if info or not np.isfinite(weights).all():
            raise VaecfError(
                f"SLIM: a Gram matrix is singular; increase l2={l2:g}"
            )
        near.data[own] = weights

    with (
        blas.one_thread(),
        futures.ThreadPoolExecutor(len(workers.cores())) as threads,
    ):
        collections.deque(threads.map(solve, range(train.n_items)), maxlen=0)
    return sparse_item_item.pack(near.T)


def _gram(
    train: Any, neighbours: int, advice: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function of items that returns G of these items, float32.

    G is dense if that is small. Else it is not kept, because it can be as
    large as items x items: each call multiplies the columns of X.

    Raises:
      VaecfError: G, or the weights, do not fit into memory.
    """
    matrix, n_items = train.to_scipy(), train.n_items
    by_item = matrix.T.tocsr()
    if n_items > _DENSE_ITEMS:
        memory.require_free(
            40 * n_items * min(neighbours, n_items),
            f"SLIM on {n_items:,} items",
            f"{n_items:,} items x {neighbours:,} x 40 bytes",
            advice,
        )

        def product(items: np.ndarray) -> np.ndarray:
            rows = by_item[items]
            return (rows @ rows.T).toarray()

        return product
    memory.require_free(
        4 * n_items**2,
        f"SLIM on {n_items:,} items",
        f"{n_items:,}^2 x 4 bytes",
        advice,
    )
    gram = linear.dense_product(by_item, matrix)
    return lambda items: gram[np.ix_(items, items)]
