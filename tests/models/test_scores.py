"""The scores of every baseline on every mesh, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import interactions, random_dense

from vaecf.models import ials, knn, linear, low_rank, popularity, sparse_batch
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS = 60, 20


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    x = random_dense(USERS, ITEMS)
    x[7] = 0
    return x


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """iALS sums several tiles per user, and solves several blocks of users."""
    monkeypatch.setattr(ials, "_TILE", 4)
    monkeypatch.setattr(ials, "_SYSTEM_BYTES", 3 * 4 * 5**2)
    monkeypatch.setattr(ials, "_TILE_BYTES", 2 * 4 * 5**2)


def low_rank_scores(params, batch, user_B):
    return low_rank.scores(params, batch)


def made(name: str, x: np.ndarray, train):
    """(module's scores, PARTITION, parameters, expected [USERS, ITEMS])."""
    if name == "popularity":
        expected = np.tile(x.sum(0), (USERS, 1))
        params = popularity.fit(train)
        return popularity.scores, popularity.PARTITION, params, expected
    if name == "oracle":
        rng = np.random.default_rng(2)
        mixture = rng.dirichlet(np.ones(3), size=USERS)
        group_item = rng.dirichlet(np.ones(ITEMS), size=3)
        params = popularity.fit_oracle(mixture, group_item)
        expected = mixture @ group_item
        return popularity.oracle_scores, popularity.PARTITION, params, expected
    if name == "low_rank":
        params = low_rank.fit(train, 5.0, 4)
        b = params["input_factors"][:ITEMS].astype(float)
        b = b @ params["output_factors"][:, :ITEMS]
        np.fill_diagonal(b, 0)
        return low_rank_scores, low_rank.PARTITION, params, x @ b
    if name == "ials":
        params = ials.fit(train, factors=5, l2=0.05, alpha=0.2, iterations=2)
        h = params["item_factor"][:ITEMS].astype(float)
        systems = np.einsum("ui,if,ig->ufg", x + 0.2, h, h)
        count = x.sum(1) + 0.2 * ITEMS
        systems += 0.05 * count[:, None, None] * np.eye(5)
        expected = np.linalg.solve(systems, (x @ h)[..., None])[..., 0] @ h.T
        return ials.scores, ials.PARTITION, params, expected
    module, settings = {"ease": (linear, (5.0,)), "itemknn": (knn, (4, 1.0))}[
        name
    ]
    params = module.fit(train, *settings)
    expected = x @ params["item_item"][:, :ITEMS].astype(float)
    return module.scores, module.PARTITION, params, expected


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(
            (name, "cpu")
            for name in ("popularity", "oracle", "itemknn", "ials")
        ),
        # An accelerator multiplies where a CPU gathers.
        *((name, b) for name in ("ease", "low_rank") for b in ("cpu", "gpu")),
    ],
)
def test_scores(x, name, backend, shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(linear, "_MAX_GATHERED_USERS", 0)
    train = interactions(x)
    scores, partition, params, expected = made(name, x, train)
    mesh = mesh_lib.make_mesh(*shape)
    # The last one is a padding user, whose scores must be finite.
    user_B = np.array([5, 0, 59, 7, 7, 20, 33, USERS], np.int32)
    batch = sparse_batch.assemble_on_host(
        train.indptr, train.indices, user_B, x.size, shape[0]
    )
    on_mesh = jax.shard_map(
        scores,
        mesh=mesh,
        in_specs=(mesh_lib.specs(params, partition), P("data"), P("data")),
        out_specs=P("data", "item"),
    )
    got = jax.jit(on_mesh)(params, batch, user_B)
    assert got.dtype == jnp.float32 and got.shape == (8, 128)
    assert len(got.sharding.device_set) == mesh.size
    got = np.asarray(got)
    np.testing.assert_allclose(
        got[:-1, :ITEMS], expected[user_B[:-1]], rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(got).all() and not got[:, ITEMS:].any()


def test_the_item_axis_of_every_parameter_is_sharded(x):
    for name in ("popularity", "oracle", "ease", "low_rank", "ials"):
        _, partition, params, _ = made(name, x, interactions(x))
        for key, spec in mesh_lib.specs(params, partition).items():
            sharded = {n for n, axis in zip(params[key].shape, spec) if axis}
            padded = {n for n in params[key].shape if n == 128}
            assert sharded == padded, key
