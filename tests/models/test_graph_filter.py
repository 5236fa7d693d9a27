"""The graph filter's terms against dense NumPy; test_scores.py has its scores."""

import numpy as np
import pytest
from oracles import graph_terms, interactions, random_dense, refuses

from vaecf.models import graph_filter, sparse_item_item

USERS, ITEMS = 70, 30


@pytest.fixture(scope="module")
def x():
    x = random_dense(USERS, ITEMS, 0.2)
    x[3] = 0  # a user without items
    x[:, 4] = 0  # an item without users
    return x


@pytest.mark.parametrize(("rank", "neighbours"), [(4, 7), (99, 99)])
def test_terms(x, rank, neighbours, monkeypatch):
    monkeypatch.setattr(graph_filter, "_BLOCK", 8)
    params = graph_filter.fit(
        interactions(x), low_pass=0.25, rank=rank, neighbours=neighbours
    )
    near, low = graph_terms(x, rank, neighbours)
    got = sparse_item_item.unpack(params).toarray()
    np.testing.assert_allclose(got, near, rtol=1e-4, atol=1e-6)
    got = params["low_input"][:ITEMS] @ params["low_output"][:, :ITEMS]
    np.testing.assert_allclose(got, low, rtol=1e-3, atol=1e-4)
    means = [(x @ term).mean() for term in (near, low)]
    np.testing.assert_allclose(params["mean_score"], means, rtol=1e-4)
    assert params["low_pass"] == np.float32(0.25)


def test_a_fit_that_needs_more_memory(x, free_bytes):
    free_bytes(1000)
    with refuses("smaller"):
        graph_filter.fit(interactions(x), advice="choose something smaller")
