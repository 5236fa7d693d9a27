"""SLIM on nearest neighbours against loops, and against EASE."""

import numpy as np
import oracles
import pytest
from oracles import ease, interactions, random_dense, refuses

from vaecf.models import slim, sparse_item_item

ITEMS = 20


@pytest.fixture(scope="module")
def x():
    x = random_dense(60, ITEMS)
    x[:, ITEMS - 1] = 0
    return x


def fitted(x, neighbours, l2):
    params = slim.fit(interactions(x), neighbours=neighbours, l2=l2)
    return sparse_item_item.unpack(params).toarray()


@pytest.mark.parametrize("dense_items", [0, 25_000])
def test_regressions_on_the_nearest_neighbours(x, dense_items, monkeypatch):
    monkeypatch.setattr(slim, "_DENSE_ITEMS", dense_items)
    expected = oracles.slim(x, 5, 9.0)
    np.testing.assert_allclose(fitted(x, 5, 9.0), expected, atol=1e-5)


def test_all_items_as_neighbours_are_ease():
    x = random_dense(60, ITEMS, share=0.6)  # all pairs have a user
    expected = ease(x, 9.0)
    np.testing.assert_allclose(fitted(x, ITEMS, 9.0), expected, atol=1e-5)


def test_errors(x, free_bytes, monkeypatch):
    twins = np.zeros((6, 3))
    twins[:4] = 1
    with refuses("SLIM.*singular.*l2=1e-30"):
        fitted(twins, 2, 1e-30)
    free_bytes(1000)
    for dense_items in (0, 25_000):
        monkeypatch.setattr(slim, "_DENSE_ITEMS", dense_items)
        with refuses("SLIM on 20 items needs"):
            fitted(x, 5, 9.0)
