"""A model and a linear branch together, against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vaecf.data.interactions import Interactions
from vaecf.models import blend, sparse_batch
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

ITEMS = 150  # 256 with padding
USERS = np.arange(5, dtype=np.int32)
HISTORIES = [[0, 4, 149], [3], [], [1, 2, 5, 6, 7], [130, 140]]


@pytest.fixture(scope="module")
def train() -> Interactions:
    rng = np.random.default_rng(0)
    user, item = np.nonzero(rng.random((80, ITEMS)) < 0.1)
    return Interactions.from_pairs(user, item, 80, ITEMS)[0]


@pytest.fixture(scope="module", params=[0, 6], ids=["whole", "low rank"])
def branch(train, request):
    fitted = blend.fit(
        train, l2=4.0, dropout=0.5, user_exponent=0.5, rank=request.param
    )
    return {**fitted, "gain": np.float32(1.7), "prior": np.float32(0.2)}


def batch(users: int = len(HISTORIES)) -> SparseBatch:
    indptr = np.cumsum([0, *map(len, HISTORIES)])
    items = np.array([i for h in HISTORIES for i in h], np.int32)
    return jax.tree.map(
        jnp.asarray,
        sparse_batch.assemble_on_host(indptr, items, np.arange(users), 16),
    )


def item_item(branch) -> np.ndarray:
    """The whole matrix, float64 [I, I]."""
    if "item_item" in branch:
        return branch["item_item"][:, :ITEMS].astype(float)
    rows = branch["input_factors"][:ITEMS].astype(float)
    matrix = rows @ branch["output_factors"][:, :ITEMS]
    np.fill_diagonal(matrix, 0)
    return matrix


@pytest.mark.parametrize(
    ("rank", "n_items", "expected"),
    [
        *((None, 25_000, 0), (None, 25_001, 512), (0, 10**6, 0)),
        *((64, 100, 64), (64, 9, 9)),
    ],
)
def test_effective_rank(rank, n_items, expected):
    assert blend.effective_rank(rank, n_items) == expected


def test_shapes_equal_those_of_a_fit(branch):
    shapes = blend.shapes(0 if "item_item" in branch else 6, ITEMS)
    assert shapes.keys() == branch.keys() - {"gain", "prior"}
    for name, shape in shapes.items():
        padded = zip(blend.PARTITION[name], shape)
        assert branch[name].shape == tuple(
            256 if axis else size for axis, size in padded
        )


def expected(train, branch, logits):
    """The module's formula in float64."""
    x = np.zeros((len(HISTORIES), ITEMS))
    for u, history in enumerate(HISTORIES):
        x[u, history] = 1
    linear = np.maximum(x @ item_item(branch), 0)
    share = (train.item_counts() + 5) / (train.n_users + 5)
    branch_UI = 1.7 * (np.log(linear + 0.003) - 0.2 * np.log(share))
    # Without a history, the model ranks alone.
    return logits + np.where(x.any(axis=1, keepdims=True), branch_UI, 0)


@pytest.fixture(scope="module")
def logits():
    wide = np.random.default_rng(1).normal(size=(len(HISTORIES), 256))
    wide[:, ITEMS:] = -np.inf
    return wide.astype(np.float32)


def test_the_formula(train, branch, logits):
    scores = np.asarray(
        blend.scores(jnp.asarray(logits), branch, batch(), USERS)
    )
    np.testing.assert_allclose(
        scores[:, :ITEMS],
        expected(train, branch, logits[:, :ITEMS]),
        rtol=1e-5,
        atol=1e-4,
    )
    assert np.isneginf(scores[:, ITEMS:]).all()


def test_without_gain_the_model_ranks_alone(branch, logits):
    alone = branch | {"gain": np.float32(0)}
    scores = blend.scores(jnp.asarray(logits), alone, batch(), USERS)
    np.testing.assert_array_equal(scores, logits)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_over_item_shards(branch, logits, backend, monkeypatch):
    """With the lowering of a CPU and of an accelerator."""
    whole = blend.scores(jnp.asarray(logits), branch, batch(), USERS)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = mesh_lib.make_mesh(data=1, item=2)
    score = jax.shard_map(
        blend.scores,
        mesh=mesh,
        in_specs=(
            P(None, "item"),
            mesh_lib.specs(branch, blend.PARTITION),
            P(),
            P(),
        ),
        out_specs=P(None, "item"),
    )
    sharded = functools.partial(jax.jit(score), jnp.asarray(logits), branch)
    np.testing.assert_allclose(
        sharded(batch(), USERS), whole, rtol=1e-5, atol=1e-5
    )
