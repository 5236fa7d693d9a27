"""ItemKNN against brute force."""

import numpy as np
import pytest
from oracles import interactions, random_dense

from vaecf.models import knn, sparse_item_item


def fitted(x, *settings):
    params = knn.fit(interactions(x), *settings)
    return sparse_item_item.unpack(params).toarray()


def brute_force(x, k, shrinkage):
    """Item by item: the k most similar others, ties to the lower index."""
    n = x.shape[1]
    similarity = np.zeros((n, n))
    for j in range(n):
        for i in range(n):
            scale = np.sqrt(x[:, i].sum() * x[:, j].sum()) + shrinkage
            if i != j and scale > 0:
                similarity[i, j] = x[:, i] @ x[:, j] / scale
    weights = np.zeros((n, n))
    for j in range(n):
        near = sorted(range(n), key=lambda i: (-similarity[i, j], i))[:k]
        weights[near, j] = similarity[near, j]
    return weights


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("shrinkage", [0.0, 7.5])
@pytest.mark.parametrize("k", [1, 4, 19, 20, 50])
def test_itemknn_against_brute_force(k, shrinkage, block, monkeypatch):
    monkeypatch.setattr(sparse_item_item, "_BLOCK", block)
    x = random_dense(60, 20)
    x[:, 19] = 0
    weights = fitted(x, k, shrinkage)
    assert weights.dtype == np.float32 and weights.shape == (20, 20)
    np.testing.assert_allclose(weights, brute_force(x, k, shrinkage), rtol=1e-6)


def test_itemknn_breaks_ties_by_item_index():
    """All of four items that everyone has are equally near."""
    weights = fitted(np.ones((3, 4)), 2, 0.0)
    near = [np.flatnonzero(column).tolist() for column in weights.T]
    assert near == [[1, 2], [0, 2], [0, 1], [0, 1]]
