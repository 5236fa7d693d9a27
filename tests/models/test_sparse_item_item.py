"""The sparse item-item scores against dense products."""

import jax
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from oracles import batch_of, dense, histories, random_histories

from vaecf.models import sparse_item_item

ITEMS = 16


def random_weights(seed, n_items=ITEMS, share=0.4):
    """Rows of different lengths: one full, one empty; few distinct values."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(-3, 4, (n_items, n_items)) / 4.0
    weights *= rng.random((n_items, n_items)) < share
    weights[2] = 0
    weights[5] = 1.5
    return weights


@pytest.fixture(scope="module", params=[(16, 2**9), (3, 2), (2, 5)])
def packed(request):
    """Weights as the parameters of compiled scores, for sizes of a chunk."""
    with pytest.MonkeyPatch.context() as patch:
        tile, tiles = request.param
        patch.setattr(sparse_item_item, "_TILE", tile)
        patch.setattr(sparse_item_item, "_LEAST_TILES", 1)
        patch.setattr(sparse_item_item, "_MOST_TILES", tiles)
        weights = random_weights(0)
        params = sparse_item_item.pack(scipy.sparse.csr_matrix(weights))
        unpacked = sparse_item_item.unpack(params).toarray()
        np.testing.assert_array_equal(unpacked, weights)
        args = params, batch_of(random_histories(0), padding=1), None
        scores = jax.jit(sparse_item_item.scores).lower(*args).compile()
        jax.clear_caches()
    return weights, params, scores


@settings(deadline=None)
@given(users=histories)
def test_scores_equal_a_dense_product(packed, users):
    weights, params, scores = packed
    score = np.asarray(scores(params, batch_of(users, padding=1), None))
    assert score.dtype == np.float32 and score.shape == (7, 128)
    # Sums of quarters are exact.
    np.testing.assert_array_equal(score[:-1, :ITEMS], dense(users) @ weights)
    assert not score[-1].any() and not score[:, ITEMS:].any()


def test_no_weights_at_all():
    params = sparse_item_item.pack(scipy.sparse.csr_matrix((ITEMS, ITEMS)))
    batch = batch_of(random_histories(0))
    score = jax.jit(sparse_item_item.scores)(params, batch, None)
    assert score.shape == (6, 128) and not np.asarray(score).any()
    assert sparse_item_item.unpack(params).nnz == 0


@pytest.mark.parametrize("k", [0, 1, 3, 20])
def test_the_largest_of_each_row(k):
    weights = random_weights(3)
    expected = np.zeros_like(weights)
    for row, values in enumerate(weights):
        columns = sorted(range(ITEMS), key=lambda j: (-abs(values[j]), j))[:k]
        expected[row, columns] = values[columns]
    csr = scipy.sparse.csr_matrix(weights)
    got = sparse_item_item.unpack(sparse_item_item.pack(csr, k)).toarray()
    np.testing.assert_array_equal(got, expected)


def test_a_popular_item_does_not_widen_the_table():
    """One item is the neighbour of all; every other item has one of its own."""
    n = 1000
    weights = scipy.sparse.eye(n, k=1, format="lil")
    weights[7] = 1
    params = sparse_item_item.pack(weights)
    assert params["weight"].shape == (1024, 16 * 2)
    score = jax.jit(sparse_item_item.scores)(params, batch_of([[7], [8]]), None)
    assert np.asarray(score)[0, :n].all()
    assert np.flatnonzero(np.asarray(score)[1]).tolist() == [9]
