"""EASE against direct float64 derivations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense, ease, interactions, random_dense, refuses
from scipy.linalg import lapack

from vaecf.data.interactions import Interactions
from vaecf.models import linear

USERS, ITEMS = 60, 20


@pytest.fixture(scope="module")
def x():
    x = random_dense(USERS, ITEMS)
    x[:, ITEMS - 1] = 0  # an item without users is a column of the matrix too
    return x


def ridge(x, l2, dropout, exponent):
    """A weighted ridge regression of each item on all others, float64."""
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


@pytest.mark.parametrize(
    ("l2", "users", "block"),
    [*((l2, 60, 2048) for l2 in (0.1, 5.0, 500.0)), (5, 13, 8), (5, 60, 8)],
)
def test_ease_equals_the_closed_form(x, l2, users, block, monkeypatch):
    """Inverted by items and by users, also over several blocks of items."""
    monkeypatch.setattr(linear, "_BLOCK", block)
    weights = linear.fit(interactions(x[:users]), l2)["item_item"]
    assert weights.dtype == np.float32 and weights.shape == (ITEMS, 128)
    np.testing.assert_allclose(
        weights[:, :ITEMS], ease(x[:users], l2), rtol=1e-5, atol=1e-7
    )
    assert not np.diag(weights).any() and not weights[:, ITEMS:].any()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sets(st.integers(0, 6)).map(sorted), min_size=1, max_size=12),
    st.sampled_from([0.5, 20.0]),
)
def test_ease_minimises_its_loss(users, l2):
    """Off the diagonal the gradient is zero."""
    x = dense(users, 7)
    b = linear.fit(interactions(x), l2)["item_item"][:, :7]
    gradient = x.T @ (x @ b - x) + l2 * b
    np.fill_diagonal(gradient, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert not np.diag(b).any()


@pytest.mark.parametrize("users", [USERS, ITEMS - 7])
@pytest.mark.parametrize("dropout", [0.0, 0.6])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize(
    ("free", "rtol", "atol"), [(2**30, 1e-5, 1e-7), (12_000, 1e-3, 1e-5)]
)
def test_ease_with_dropout_and_weighted_users(
    x, users, dropout, exponent, free, rtol, atol, free_bytes
):
    free_bytes(free)
    x = x[:users]
    weights = linear.fit(
        interactions(x), 3.0, dropout=dropout, user_exponent=exponent
    )["item_item"]
    expected = ridge(x, 3.0, dropout, exponent)
    np.testing.assert_allclose(
        weights[:, :ITEMS], expected, rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("users", [USERS, ITEMS - 7])
@pytest.mark.parametrize(
    ("free", "rtol", "atol"), [(2**30, 1e-5, 1e-7), (12_000, 1e-3, 1e-5)]
)
@pytest.mark.parametrize("size", [1, 5, 7, 19])
def test_lapack_gets_small_matrices(
    x, size, users, free, rtol, atol, free_bytes, monkeypatch
):
    """Threaded OpenBLAS ends the process in spotrf of 30,000 rows."""
    calls: list[tuple[int, int]] = []
    for name in ("spotrf", "dpotrf", "spotri", "dpotri"):
        function = getattr(lapack, name)

        def counted(a, *args, function=function, **kwargs):
            calls.append(a.shape)
            return function(a, *args, **kwargs)

        monkeypatch.setattr(lapack, name, counted)
    monkeypatch.setattr(linear, "_LAPACK_SIZE", size)
    monkeypatch.setattr(linear, "_SWEPT", size)
    free_bytes(free)
    x = x[:users]
    weights = linear.fit(interactions(x), 3.0)["item_item"]
    np.testing.assert_allclose(
        weights[:, :ITEMS], ease(x, 3.0), rtol=rtol, atol=atol
    )
    n = min(users, ITEMS)
    assert max(calls) <= (size, size)
    assert len(calls) == 2 * -(-n // size)


def test_ease_uses_float32_when_memory_is_scarce(x, free_bytes):
    """20 items: 16 · 20² bytes doubled for float64, 12 · 20² for float32."""

    def fit(free):
        free_bytes(free)
        return linear.fit(interactions(x), 0.01)["item_item"]

    plenty = fit(2**30)
    np.testing.assert_array_equal(fit(12_801), plenty)
    for free in (12_800, 4_800):
        scarce = fit(free)
        assert not np.array_equal(scarce, plenty)
        np.testing.assert_allclose(scarce, plenty, rtol=1e-3, atol=1e-4)
    with refuses(r"20\^2 x 12 bytes"):
        fit(4_799)


def test_errors(x, free_bytes):
    train, _ = Interactions.from_pairs([0, 1], [7, 49_999], 2, 50_000)
    free_bytes(2**30)
    with refuses(r"27.9 GiB and 1.0 GiB are free: buy"):
        linear.fit(train, 500.0, advice="buy more")
    for l2 in (0, -1.0):
        with refuses(f"l2={l2} must be above 0"):
            linear.fit(interactions(x), l2)
    train = interactions(x)
    for value in (1e4, 1e300):
        with refuses(r"user_exponent=.*float32"):
            linear.fit(train, 1.0, user_exponent=value)
    for l2 in (1e-40, 1e25, np.inf):
        with refuses(r"l2=.*float32"):
            linear.fit(train, l2)
    with refuses("l2=nan must be above 0"):
        linear.fit(train, np.nan)
    # In float64, 3 + 1e-30 is 3.
    with refuses("singular; increase l2"):
        linear.fit(interactions(np.ones((3, 2))), 1e-30)
