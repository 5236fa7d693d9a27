"""The factors of the regression, against `linear.fit` and float64 NumPy."""

import functools
import tracemalloc

import numpy as np
import pytest
from oracles import interactions, item_item, refuses

from vaecf.data.interactions import Interactions
from vaecf.models import linear, low_rank

fit = functools.partial(low_rank.fit, advice="try this")


def groups(users, items, n=4):
    """Users who mostly have items of one of n groups."""
    rng = np.random.default_rng(users)
    user, item = np.arange(users) % n, np.arange(items) % n
    share = np.where(user[:, None] == item[None, :], 0.6, 0.04)
    return (rng.random((users, items)) < share).astype(float)


@pytest.mark.parametrize("shape", [(90, 20), (15, 40)])
@pytest.mark.parametrize("dropout", [0.0, 0.6])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_full_rank_equals_ease(shape, dropout, exponent):
    train = interactions(groups(*shape))
    how = {"dropout": dropout, "user_exponent": exponent}
    expected = linear.fit(train, 3.0, **how)["item_item"]
    for rank in (shape[1], 1000):
        params = fit(train, 3.0, rank, **how)
        assert params["output_factors"].shape == (shape[1], 128)
        np.testing.assert_allclose(
            item_item(params, shape[1]),
            expected[:, : shape[1]],
            rtol=2e-3,
            atol=2e-5,
        )


@pytest.mark.parametrize("shape", [(300, 120), (100, 180)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_low_rank_equals_its_definition(shape, dropout):
    """Inverts the whole matrix in float64, with NumPy's singular vectors."""
    x = groups(*shape)
    params = fit(interactions(x), 5.0, 4, dropout=dropout, user_exponent=0.5)
    n = x.sum(axis=1)
    weight = (n / n.mean()) ** -0.5
    penalty = 5.0 + dropout / (1 - dropout) * (weight @ x)
    a = np.sqrt(weight)[:, None] * x / np.sqrt(penalty)
    _, s, v = np.linalg.svd(a, full_matrices=False)
    kept = (v[:4].T * s[:4] ** 2) @ v[:4]
    rest = np.diag(np.diag(a.T @ a - kept))
    p = np.linalg.inv(np.eye(shape[1]) + kept + rest)
    p /= np.sqrt(np.outer(penalty, penalty))
    expected = -p / np.diag(p)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(
        item_item(params, shape[1]), expected, rtol=1e-3, atol=1e-5
    )


def test_fits_are_repeatable_and_padding_is_zero():
    train = interactions(groups(60, 130))
    first, second = (fit(train, 5.0, 7) for _ in range(2))
    for name, array in first.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, second[name], err_msg=name)
        (axis,) = np.flatnonzero(low_rank.PARTITION[name])
        assert array.shape[axis] == 256
        assert not np.take(array, range(130, 256), axis=axis).any()


def test_items_and_users_without_interactions():
    x = groups(40, 30)
    x[:, 7] = x[5] = 0
    params = fit(interactions(x), 5.0, 3, dropout=0.5, user_exponent=0.5)
    b = item_item(params, 30)
    for row in (b[7], b[:, 7]):
        np.testing.assert_allclose(row, 0, atol=1e-9)
    assert np.isfinite(b).all() and b.any()


def test_memory_check(free_bytes):
    train = interactions(groups(60, 130))
    needed = (20 * 130 + 8 * 60) * 39 + 16 * train.nnz
    free_bytes(needed)
    fit(train, 5.0, 7)
    free_bytes(needed - 1)
    with refuses(r"60 users x 8.*are free: try this"):
        fit(train, 5.0, 7)


def test_memory_equals_the_arithmetic():
    """tracemalloc counts the arrays of NumPy and SciPy."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 150, 1000), rng.integers(0, 2000, 1000)
    train, _ = Interactions.from_pairs(user, item, 150, 2000)
    fit(train, 5.0, 2)  # modules are loaded
    needed = (20 * 2000 + 8 * 150) * 82 + 16 * train.nnz
    tracemalloc.start()
    try:
        fit(train, 5.0, 50, dropout=0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The peak is 50 % to 100 % of it, by the version of SciPy.
    assert 0.45 * needed < peak < 1.05 * needed


def test_a_ridge_too_small_for_float32():
    """Rounding would lose the weights, which `linear.fit` keeps in float64."""
    train = interactions(groups(5000, 40))
    with refuses(r"l2=0\.001 is too small for float32"):
        fit(train, 0.001, 40)
    fit(train, 0.001, 40, dropout=0.5)


def test_arguments_out_of_range():
    train = interactions(groups(9, 8))
    with refuses(r"l2=0\.0 must be above 0"):
        fit(train, 0.0, 4)
    with refuses("rank=0 must be at least 1"):
        fit(train, 1.0, 0)
