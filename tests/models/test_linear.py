"""Baselines against direct float64 derivations."""

from __future__ import annotations

import builtins
import functools
import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.models import linear, sparse_batch
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS = 60, 20
GIB = 2**30


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (rng.random((USERS, ITEMS)) < 0.3).astype(float)
    x[:, ITEMS - 1] = 0  # nobody has it: still a column of the Gram matrix
    return x


def interactions(x: np.ndarray) -> Interactions:
    user, item = np.nonzero(x)
    return Interactions.from_pairs(user, item, *x.shape)[0]


def batch_of(x: np.ndarray, user_B: np.ndarray, shards: int = 1):
    train = interactions(x)
    return sparse_batch.assemble_on_host(
        train.indptr, train.indices, user_B, x.size, shards
    )


def ease(x: np.ndarray, l2: float) -> np.ndarray:
    """Steck 2019, equations 8 and 9, float64."""
    p = np.linalg.inv(x.T @ x + l2 * np.eye(x.shape[1]))
    return (np.eye(x.shape[1]) - p / np.diag(p)) * (1 - np.eye(x.shape[1]))


# --- EASE --------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.1, 5.0, 500.0])
def test_ease_equals_the_closed_form(x, l2):
    weights = linear.fit_ease(interactions(x), l2)["item_item"]
    assert weights.dtype == np.float32
    assert weights.shape == (ITEMS, 128)
    np.testing.assert_allclose(
        weights[:, :ITEMS], ease(x, l2), rtol=1e-5, atol=1e-7
    )
    assert not np.diag(weights).any()
    assert not weights[:, ITEMS:].any()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sets(st.integers(0, 6)).map(sorted), min_size=1, max_size=12),
    st.sampled_from([0.5, 20.0]),
)
def test_ease_minimises_its_loss(users, l2):
    """No zero-diagonal B does better: the gradient is zero off the diagonal."""
    x = np.zeros((len(users), 7))
    for u, items in enumerate(users):
        x[u, items] = 1
    b = linear.fit_ease(interactions(x), l2)["item_item"][:, :7]
    gradient = x.T @ (x @ b - x) + l2 * b
    np.fill_diagonal(gradient, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert not np.diag(b).any()


def ridge(x, l2: float, dropout: float, exponent: float) -> np.ndarray:
    """A weighted ridge regression of every item on all others, float64."""
    n = np.maximum(x.sum(axis=1), 1)
    weight = (n / max(x.sum(axis=1).mean(), 1)) ** -exponent
    gram = x.T @ (weight[:, None] * x)
    penalty = l2 + dropout / (1 - dropout) * np.diag(gram)
    b = np.zeros_like(gram)
    for j in range(len(gram)):
        others = np.delete(np.arange(len(gram)), j)
        system = gram[np.ix_(others, others)] + np.diag(penalty[others])
        b[others, j] = np.linalg.solve(system, gram[others, j])
    return b


@pytest.mark.parametrize("users", [USERS, ITEMS - 7])
@pytest.mark.parametrize("dropout", [0.0, 0.6])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("available", [None, 12_000])
def test_ease_with_dropout_and_weighted_users(
    x, users, dropout, exponent, available
):
    """By items and by users, in float64 and in float32."""
    x = x[:users]
    weights = linear.fit_ease(
        interactions(x),
        3.0,
        dropout=dropout,
        user_exponent=exponent,
        available_bytes=available,
    )["item_item"]
    expected = ridge(x, 3.0, dropout, exponent)
    np.testing.assert_allclose(
        weights[:, :ITEMS],
        expected,
        rtol=1e-5 if available is None else 1e-3,
        atol=1e-7 if available is None else 1e-5,
    )
    assert not np.diag(weights).any()
    assert not weights[:, ITEMS:].any()


@pytest.mark.parametrize("users", [40, 2200])
def test_ease_over_several_blocks_of_items(users):
    rng = np.random.default_rng(1)
    x = (rng.random((users, 2100)) < 0.05).astype(float)
    weights = linear.fit_ease(interactions(x), 50.0)["item_item"]
    np.testing.assert_allclose(
        weights[:, :2100], ease(x, 50.0), rtol=1e-4, atol=1e-7
    )


def test_ease_in_float32_when_memory_is_scarce(x):
    """20 items: 16 · 20² bytes doubled for float64, 12 · 20² for float32."""
    train, l2 = interactions(x), 0.01
    fit = functools.partial(linear.fit_ease, train, l2)
    plenty = fit()["item_item"]
    np.testing.assert_array_equal(
        fit(available_bytes=12_801)["item_item"], plenty
    )
    for available in (12_800, 4_800):
        scarce = fit(available_bytes=available)["item_item"]
        assert not np.array_equal(scarce, plenty)
        np.testing.assert_allclose(scarce, plenty, rtol=1e-3, atol=1e-4)
        assert not np.diag(scarce).any()
    with pytest.raises(VaecfError, match=r"20\^2 x 12 bytes"):
        fit(available_bytes=4_799)


def test_ease_that_does_not_fit_shows_the_arithmetic():
    train, _ = Interactions.from_pairs([0, 1], [7, 49_999], 2, 50_000)
    with pytest.raises(VaecfError) as caught:
        linear.fit_ease(train, 500.0, available_bytes=GIB)
    assert (
        "EASE on 50,000 items needs 50,000^2 x 12 bytes = 27.9 GiB and "
        "1.0 GiB are free"
    ) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("l2", [0, -1.0])
def test_ease_without_regularisation_is_refused(x, l2):
    with pytest.raises(VaecfError, match=f"l2={l2} must be above 0"):
        linear.fit_ease(interactions(x), l2)


def test_ease_of_a_singular_matrix_is_an_error_in_words():
    """3 + 1e-30 is 3."""
    train = interactions(np.ones((3, 2)))
    with pytest.raises(VaecfError, match="singular; raise its l2"):
        linear.fit_ease(train, 1e-30)


def test_available_memory(monkeypatch):
    monkeypatch.setattr(
        builtins,
        "open",
        lambda *_: io.StringIO("MemFree: 7 kB\nMemAvailable:   1000 kB\n"),
    )
    assert linear.available_memory() == 1_024_000

    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", missing)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 3}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert linear.available_memory() == 12_288


# --- scores ------------------------------------------------------------------


def cases(x):
    """(scores, parameters, expected of users 0 .. USERS-1)."""
    rng = np.random.default_rng(2)
    mixture = rng.dirichlet(np.ones(3), size=USERS)
    group_item = rng.dirichlet(np.ones(ITEMS), size=3)
    count = x.sum(0).astype(np.int64)
    return {
        "popularity": (
            linear.popularity_scores,
            linear.fit_popularity(count),
            np.tile(count, (USERS, 1)),
        ),
        "ease": (
            linear.item_item_scores,
            linear.fit_ease(interactions(x), 5.0),
            x @ ease(x, 5.0),
        ),
        "oracle": (
            linear.oracle_scores,
            linear.fit_oracle(mixture, group_item),
            mixture @ group_item,
        ),
    }


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("name", ["popularity", "ease", "oracle"])
def test_scores(x, name, shape):
    scores, params, expected = cases(x)[name]
    mesh = mesh_lib.make_mesh(*shape)
    # The last is the padding user: his scores are numbers, and nobody's.
    user_B = np.array([5, 0, 59, 7, 7, 20, 33, USERS], np.int32)
    on_mesh = jax.shard_map(
        scores,
        mesh=mesh,
        in_specs=(
            mesh_lib.specs(params, linear.PARTITION),
            P("data"),
            P("data"),
        ),
        out_specs=P("data", "item"),
    )
    got = jax.jit(on_mesh)(params, batch_of(x, user_B, shape[0]), user_B)
    assert got.dtype == jnp.float32 and got.shape == (8, 128)
    assert len(got.sharding.device_set) == mesh.size
    got = np.asarray(got)
    np.testing.assert_allclose(
        got[:-1, :ITEMS], expected[user_B[:-1]], rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(got).all() and not got[:, ITEMS:].any()


def test_the_item_axis_of_every_parameter_is_sharded(x):
    expected = {
        "item_score": P("item"),
        "item_item": P(None, "item"),
        "group_item": P(None, "item"),
        "user_group": P(),
    }
    for _, params, _ in cases(x).values():
        specs = mesh_lib.specs(params, linear.PARTITION)
        assert specs == {name: expected[name] for name in params}


def test_padding_is_zero_and_a_copy():
    array = np.arange(1, 7).reshape(2, 3)
    padded = linear.pad_items(array)
    assert padded.dtype == np.float32 and padded.shape == (2, 128)
    np.testing.assert_array_equal(padded[:, :3], array)
    assert not padded[:, 3:].any()
    whole = np.ones(128, np.float32)
    assert not np.shares_memory(linear.pad_items(whole), whole)


# --- ItemKNN -----------------------------------------------------------------


def itemknn(x: np.ndarray, k: int, shrinkage: float) -> np.ndarray:
    """Item by item: the k most similar others, the lower index first."""
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


@pytest.mark.parametrize("shrinkage", [0.0, 7.5])
@pytest.mark.parametrize("k", [1, 4, 19, 20, 50])
def test_itemknn_against_brute_force(x, k, shrinkage):
    weights = linear.fit_itemknn(interactions(x), k, shrinkage)["item_item"]
    assert weights.dtype == np.float32 and weights.shape == (ITEMS, 128)
    np.testing.assert_allclose(
        weights[:, :ITEMS], itemknn(x, k, shrinkage), rtol=1e-6
    )
    assert not weights[:, ITEMS:].any()


def test_itemknn_keeps_the_first_of_equally_near_items():
    """Four items that everyone has are all alike."""
    weights = linear.fit_itemknn(interactions(np.ones((3, 4))), 2, 0.0)
    expected = np.zeros((4, 4))
    for j, kept in enumerate([(1, 2), (0, 2), (0, 1), (0, 1)]):
        expected[kept, j] = 1
    np.testing.assert_allclose(weights["item_item"][:, :4], expected, rtol=1e-6)


def test_itemknn_that_cannot_be_is_refused(x):
    train, _ = Interactions.from_pairs([0, 1], [7, 49_999], 2, 50_000)
    with pytest.raises(VaecfError) as caught:
        linear.fit_itemknn(train, 10, 0.0, available_bytes=GIB)
    assert "ItemKNN on 50,000 items needs 50,000^2 x 12 bytes" in str(
        caught.value
    )
    assert "leave itemknn out of --baselines" in str(caught.value)
    with pytest.raises(VaecfError, match="neighbours=0 must be above 0"):
        linear.fit_itemknn(interactions(x), 0, 0.0)
    with pytest.raises(VaecfError, match="shrinkage=nan must not be below 0"):
        linear.fit_itemknn(interactions(x), 1, float("nan"))
