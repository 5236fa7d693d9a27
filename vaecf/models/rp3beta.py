"""RP3beta: random walks of three steps, with less weight on popular items."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.models import sparse_item_item

PARTITION = sparse_item_item.PARTITION

scores = sparse_item_item.scores


def fit(
    train: Any, neighbours: int, alpha: float, beta: float
) -> dict[str, np.ndarray]:
    """Returns the weights of walks from an item over a user to another item.

    w_ij = Σ_u p_iu^α p_uj^α / n_j^β with p_iu = x_ui / n_i, p_uj = x_uj / n_u
    and w_ii = 0, where n is the number of interactions: Paudel et al. 2017,
    "Updatable, accurate, diverse, and scalable recommendations for interactive
    applications". The first step, from the user to an
    item of the history, has the same probability for every item.

    Args:
      neighbours: how many weights to keep for each item j, at least 1. Ties go
        to the lower item index. (With the largest weights of each item i
        instead, NDCG@100 on MovieLens-1M is .359 instead of .386.)
      alpha: α, at least 0. Above 1 favours items and users with few
        interactions; 0 counts walks.
      beta: β, at least 0; 0 does not correct for popularity.

    Returns:
      The parameters of `scores`, see `sparse_item_item.pack`.
    """
    from_users = train.to_scipy()
    from_items = from_users.T.tocsr()
    n_U = np.maximum(train.counts, 1).astype(np.float32)
    n_I = np.maximum(train.item_counts(), 1).astype(np.float32)
    # The walks in reverse, from item j to item i.
    from_items.data = (n_U**-alpha)[from_items.indices]
    from_items.data *= np.repeat(n_I**-beta, np.diff(from_items.indptr))
    from_users.data = (n_I**-alpha)[from_users.indices]
    near = sparse_item_item.nearest(from_items, from_users, neighbours)
    return sparse_item_item.pack(near.T)
