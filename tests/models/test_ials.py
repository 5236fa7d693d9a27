"""Implicit ALS against loops over dense float64 normal equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import ranking
from vaecf.models import ials, sparse_batch
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS, FACTORS = 30, 40, 5
L2, ALPHA, NU = 0.05, 0.2, 0.7
KNOWN = {"factors": FACTORS, "l2": L2, "alpha": ALPHA}


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (rng.random((USERS, ITEMS)) < 0.3).astype(float)
    x[:, ITEMS - 1] = 0  # an item without users
    x[3] = 0  # a user without items
    x[4] = 1
    x[4, ITEMS - 1] = 0
    return x


@pytest.fixture(autouse=True, scope="module")
def _small_pieces():
    """Histories of several tiles, several blocks of users and of tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ials, "_TILE", 8)
        patch.setattr(ials, "_SYSTEM_BYTES", 7 * 4 * FACTORS**2)
        patch.setattr(ials, "_TILE_BYTES", 3 * 4 * FACTORS * 8)
        ials._half_sweep.clear_cache()  # programs of the true sizes
        yield
        ials._half_sweep.clear_cache()


def interactions(x: np.ndarray) -> Interactions:
    user, item = np.nonzero(x)
    return Interactions.from_pairs(user, item, *x.shape)[0]


def ridge(count: np.ndarray, others: int, nu: float) -> np.ndarray:
    return L2 * (count + ALPHA * others) ** nu


def solved(x: np.ndarray, h: np.ndarray, nu: float = 1.0) -> np.ndarray:
    """Hu et al. 2008, equation 4, a user at a time: weights 1 + α and α."""
    w = np.zeros((len(x), h.shape[1]))
    for u, row in enumerate(x):
        weight = np.diag(row + ALPHA)
        system = h.T @ weight @ h
        system += ridge(row.sum(), x.shape[1], nu) * np.eye(h.shape[1])
        w[u] = np.linalg.solve(system, h.T @ row)
    return w


def objective(x: np.ndarray, w: np.ndarray, h: np.ndarray, nu: float) -> float:
    """Rendle et al. 2021, section 2, over the dense matrix."""
    score = w @ h.T
    loss = (x * (score - 1) ** 2).sum() + ALPHA * (score**2).sum()
    loss += (ridge(x.sum(1), x.shape[1], nu) * (w**2).sum(1)).sum()
    return loss + (ridge(x.sum(0), x.shape[0], nu) * (h**2).sum(1)).sum()


def first_items(seed: int = 0) -> np.ndarray:
    scale = 0.1 / FACTORS**0.5
    return np.random.default_rng(seed).normal(0, scale, (ITEMS, FACTORS))


@pytest.mark.parametrize("nu", [1.0, NU, 0.0])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_sweeps_are_those_of_a_loop(x, sweeps, nu):
    h = first_items()
    for _ in range(sweeps):
        h = solved(x.T, solved(x, h, nu), nu)
    params = ials.fit(interactions(x), **KNOWN, iterations=sweeps, nu=nu)
    got = params["item_factor"]
    assert got.dtype == np.float32 and got.shape == (128, FACTORS)
    np.testing.assert_allclose(got[:ITEMS], h, rtol=2e-3, atol=2e-5)
    assert not got[ITEMS:].any() and not got[ITEMS - 1].any()
    np.testing.assert_allclose(
        params["unobserved"], ALPHA * h.T @ h, rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize("nu", [1.0, NU])
def test_every_half_sweep_lowers_the_objective(x, nu):
    """And its gradient there is zero: the half's minimum, not just lower."""
    w, h = np.zeros((USERS, FACTORS)), first_items()
    of_users, of_items = (
        ials._batch(t.indptr, t.indices)
        for t in (interactions(x), interactions(x.T))
    )
    losses = [objective(x, w, h, nu)]
    for _ in range(4):
        weights = jnp.array([ALPHA, L2, ALPHA * ITEMS, nu], jnp.float32)
        w = np.asarray(ials._half_sweep(jnp.float32(h), weights, of_users))
        losses.append(objective(x, w, h, nu))
        weights = jnp.array([ALPHA, L2, ALPHA * USERS, nu], jnp.float32)
        h = np.asarray(ials._half_sweep(jnp.float32(w), weights, of_items))
        losses.append(objective(x, w, h, nu))
    assert (np.diff(losses) < 0).all(), losses
    score = w @ h.T
    slope = (x * (score - 1) + ALPHA * score).T @ w
    slope += ridge(x.sum(0), USERS, nu)[:, None] * h
    np.testing.assert_allclose(slope, 0, atol=2e-4)


SCORER = ranking.Scorer(ials.scores, ials.PARTITION, ITEMS)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4), (4, 1)])
def test_a_new_users_scores_are_of_his_own_least_squares(x, shape):
    params = ials.fit(interactions(x), **KNOWN, iterations=2)
    h = params["item_factor"][:ITEMS].astype(float)
    expected = solved(x, h) @ h.T
    mesh = mesh_lib.make_mesh(*shape)
    user_B = np.array([4, 0, 29, 3, 7, 20, 11, USERS], np.int32)
    train = interactions(x)
    batch = sparse_batch.assemble_on_host(
        train.indptr, train.indices, user_B, x.size, shape[0]
    )
    on_mesh = jax.shard_map(
        ials.scores,
        mesh=mesh,
        in_specs=(
            mesh_lib.specs(params, ials.PARTITION),
            P("data"),
            P("data"),
        ),
        out_specs=P("data", "item"),
    )
    got = np.asarray(jax.jit(on_mesh)(params, batch, user_B))
    assert got.shape == (8, 128) and np.isfinite(got).all()
    np.testing.assert_allclose(
        got[:-1, :ITEMS], expected[user_B[:-1]], rtol=1e-3, atol=1e-5
    )
    assert not got[:, ITEMS:].any() and not got[-1].any()


@pytest.mark.parametrize("shape", [(2, 2), (1, 8), (8, 1)])
def test_the_same_lists_on_every_mesh(x, shape):
    train = interactions(x)
    params = ials.fit(train, **KNOWN, iterations=2)
    one, several = (
        ranking.Ranker(SCORER, mesh_lib.make_mesh(*mesh), 10)(
            params, train.indptr, train.indices, batch_size=16
        )
        for mesh in ((1, 1), shape)
    )
    np.testing.assert_array_equal(one.item_UK, several.item_UK)
    np.testing.assert_allclose(one.score_UK, several.score_UK, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2": 0.0}, "l2=0.0 must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan must be above 0"),
        ({"factors": 0}, "factors=0 must be at least 1"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"l2": 1e-30, "alpha": 1e-30}, "not finite; increase l2=1e-30"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, changes, message):
    with pytest.raises(VaecfError, match=message):
        ials.fit(interactions(x), **(KNOWN | {"iterations": 3} | changes))
