"""The scores of every baseline on every mesh, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import graph_terms, interactions, item_item, random_dense

from vaecf.models import (
    graph_filter,
    ials,
    knn,
    linear,
    low_rank,
    popularity,
    rp3beta,
    slim,
    sparse_batch,
)
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS = 60, 20


@pytest.fixture(scope="module")
def x():
    x = random_dense(USERS, ITEMS)
    x[7] = 0
    return x


RNG = np.random.default_rng(2)
MIXTURE = RNG.dirichlet(np.ones(3), size=USERS)
GROUP_ITEM = RNG.dirichlet(np.ones(ITEMS), size=3)


# The scores and the fit of every baseline.
BASELINES = {
    "popularity": (popularity.scores, popularity.fit),
    "oracle": (
        popularity.oracle_scores,
        lambda train: {
            "user_group": MIXTURE,
            "group_item": mesh_lib.pad_items(GROUP_ITEM),
        },
    ),
    "ease": (linear.scores, lambda train: linear.fit(train, 5.0)),
    "itemknn": (knn.scores, lambda train: knn.fit(train, 4, 1.0)),
    "slim": (slim.scores, lambda train: slim.fit(train, 4, 1.0)),
    "rp3beta": (rp3beta.scores, lambda train: rp3beta.fit(train, 4, 1.0, 0.5)),
    "low_rank": (
        lambda params, batch, user_B, platform: low_rank.scores(
            params, batch, platform
        ),
        lambda train: low_rank.fit(train, 5.0, 4),
    ),
    "ials": (
        ials.scores,
        lambda train: ials.fit(
            train, factors=5, l2=0.05, alpha=0.2, iterations=2
        ),
    ),
    "graph": (
        graph_filter.scores,
        lambda train: graph_filter.fit(
            train, low_pass=0.7, rank=6, neighbours=5
        ),
    ),
}
PARTITION = popularity.PARTITION | linear.PARTITION
PARTITION |= low_rank.PARTITION | ials.PARTITION | graph_filter.PARTITION


def expected_scores(name, x, params):
    """[USERS, ITEMS], float64."""
    if name == "popularity":
        return np.tile(x.sum(0), (USERS, 1))
    if name == "oracle":
        return MIXTURE @ GROUP_ITEM
    if name == "ials":
        h = params["item_factor"][:ITEMS].astype(float)
        systems = np.einsum("ui,if,ig->ufg", x + 0.2, h, h)
        count = x.sum(1) + 0.2 * ITEMS
        systems += 0.05 * count[:, None, None] * np.eye(5)
        return np.linalg.solve(systems, (x @ h)[..., None])[..., 0] @ h.T
    if name == "graph":
        near, low = graph_terms(x, 6, 5)
        return x @ (near + 0.7 * low)
    return x @ item_item(params, ITEMS)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize(
    ("name", "platform"),
    [
        *((name, "cpu") for name in BASELINES),
        # An accelerator multiplies where a CPU gathers.
        *((name, "gpu") for name in ("ease", "low_rank", "graph")),
    ],
)
def test_scores(x, name, platform, shape, monkeypatch):
    monkeypatch.setattr(linear, "_MAX_GATHERED_USERS", 0)
    train = interactions(x)
    scores, fit = BASELINES[name]
    params = fit(train)
    mesh, specs = mesh_lib.make_mesh(*shape), mesh_lib.specs(params, PARTITION)
    for key, spec in specs.items():
        sharded = {n for n, axis in zip(params[key].shape, spec) if axis}
        assert sharded == {n for n in params[key].shape if n == 128}, key
    # The last one is a padding user, whose scores must be finite.
    user_B = np.array([5, 0, 59, 7, 7, 20, 33, USERS], np.int32)
    batch = sparse_batch.assemble_on_host(
        train.indptr, train.indices, user_B, x.size, shape[0]
    )
    on_mesh = jax.shard_map(
        functools.partial(scores, platform=platform),
        mesh=mesh,
        in_specs=(specs, P("data"), P("data")),
        out_specs=P("data", "item"),
    )
    got = jax.jit(on_mesh)(params, batch, user_B)
    assert got.dtype == jnp.float32 and got.shape == (8, 128)
    assert len(got.sharding.device_set) == mesh.size
    got, expected = np.asarray(got), expected_scores(name, x, params)
    np.testing.assert_allclose(
        got[:-1, :ITEMS], expected[user_B[:-1]], rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(got).all() and not got[:, ITEMS:].any()
