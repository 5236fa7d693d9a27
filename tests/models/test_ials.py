"""Implicit ALS against loops over dense float64 normal equations."""

from concurrent import futures

import numpy as np
import pytest
from oracles import interactions, random_dense, refuses

from vaecf.models import ials

USERS, ITEMS, FACTORS = 30, 40, 5
L2, ALPHA = 0.05, 0.2
KNOWN = {"factors": FACTORS, "l2": L2, "alpha": ALPHA}


@pytest.fixture(scope="module")
def x():
    x = random_dense(USERS, ITEMS)
    x[:, ITEMS - 1] = 0  # an item without users
    x[3] = 0  # a user without items
    x[4] = 1
    x[4, ITEMS - 1] = 0
    return x


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Cuts users and items into several blocks."""
    monkeypatch.setattr(ials, "_FIT_BYTES", 40 * 4 * FACTORS)


def ridge(count, others):
    return L2 * (count + ALPHA * others)


def solved(x, h):
    """Hu et al. 2008, equation 4, a user at a time: weights 1 + α and α."""
    w = np.zeros((len(x), h.shape[1]))
    for u, row in enumerate(x):
        weight = np.diag(row + ALPHA)
        system = h.T @ weight @ h
        system += ridge(row.sum(), x.shape[1]) * np.eye(h.shape[1])
        w[u] = np.linalg.solve(system, h.T @ row)
    return w


def objective(x, w, h):
    """Rendle et al. 2021, section 2, over the dense matrix."""
    score = w @ h.T
    loss = (x * (score - 1) ** 2).sum() + ALPHA * (score**2).sum()
    loss += (ridge(x.sum(1), x.shape[1]) * (w**2).sum(1)).sum()
    return loss + (ridge(x.sum(0), x.shape[0]) * (h**2).sum(1)).sum()


def first_items():
    scale = 0.1 / FACTORS**0.5
    return np.random.default_rng(0).normal(0, scale, (ITEMS, FACTORS))


@pytest.mark.parametrize("sweeps", [1, 3])
def test_sweeps_equal_a_loop(x, sweeps, monkeypatch):
    """As many steps as factors solve exactly, but for rounding."""
    monkeypatch.setattr(ials, "_STEPS", 2 * FACTORS)
    h = first_items()
    for _ in range(sweeps):
        h = solved(x.T, solved(x, h))
    params = ials.fit(interactions(x), **KNOWN, iterations=sweeps)
    got = params["item_factor"]
    assert got.dtype == np.float32 and got.shape == (128, FACTORS)
    # A rotation of the factors changes no score.
    assert close(got[:ITEMS] @ got[:ITEMS].T, h @ h.T)
    assert not got[ITEMS:].any() and not got[ITEMS - 1].any()
    assert close(np.diag(params["unobserved"]), ALPHA * got.T @ got)
    assert close(params["ridge"], [L2, ALPHA * ITEMS])


def close(got, expected):
    return np.allclose(got, expected, rtol=2e-3, atol=2e-5)


def test_every_half_sweep_lowers_the_objective(x, monkeypatch):
    """With enough steps it reaches a minimum, where the gradient is zero."""
    w = np.zeros((USERS, FACTORS), np.float32)
    h = first_items().astype(np.float32)
    losses = [objective(x, w, h)]
    of_users = interactions(x).to_scipy()
    of_items = of_users.T.tocsr()
    with futures.ThreadPoolExecutor(2) as threads:
        for sweep in range(4):
            h, w = ials._half_sweep(threads, L2, ALPHA, h, w, of_users)
            losses.append(objective(x, w, h))
            if sweep == 3:
                monkeypatch.setattr(ials, "_STEPS", 2 * FACTORS)
            w, h = ials._half_sweep(threads, L2, ALPHA, w, h, of_items)
            losses.append(objective(x, w, h))
    assert (np.diff(losses) < 0).all(), losses
    score = w @ h.T
    slope = (x * (score - 1) + ALPHA * score).T @ w
    slope += ridge(x.sum(0), USERS)[:, None] * h
    np.testing.assert_allclose(slope, 0, atol=2e-4)


def test_factors_that_overflow(x):
    tiny = {"l2": 1e-30, "alpha": 1e-30}
    with refuses("not finite; increase l2=1e-30"):
        ials.fit(interactions(x), **(KNOWN | tiny), iterations=3)
