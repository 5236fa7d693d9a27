"""A model and a linear branch together, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import batch_of, dense, interactions, item_item, random_dense

from vaecf.models import blend
from vaecf.parallel import mesh as mesh_lib

ITEMS = 150  # 256 with padding
USERS = np.arange(5, dtype=np.int32)
HISTORIES = [[0, 4, 149], [3], [], [1, 2, 5, 6, 7], [130, 140]]


TRAIN = interactions(random_dense(80, ITEMS, 0.1))
BATCH = batch_of(HISTORIES, 16)


@pytest.fixture(scope="module", params=[0, 6], ids=["whole", "low rank"])
def branch(request):
    fitted = blend.fit(
        TRAIN, l2=4.0, dropout=0.5, user_exponent=0.5, rank=request.param
    )
    return {**fitted, "gain": np.float32(1.7), "prior": np.float32(0.2)}


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


def expected(branch, logits):
    x = dense(HISTORIES, ITEMS)
    linear = np.maximum(x @ item_item(branch, ITEMS), 0)
    share = (TRAIN.item_counts() + 5) / (TRAIN.n_users + 5)
    branch_UI = 1.7 * (np.log(linear + 0.003) - 0.2 * np.log(share))
    # Without a history, the model ranks alone.
    return logits + np.where(x.any(axis=1, keepdims=True), branch_UI, 0)


@pytest.fixture(scope="module")
def logits():
    wide = np.random.default_rng(1).normal(size=(len(HISTORIES), 256))
    wide[:, ITEMS:] = -np.inf
    return jnp.asarray(wide, jnp.float32)


def test_the_formula(branch, logits):
    scores = blend.scores(logits, branch, BATCH, USERS)
    np.testing.assert_allclose(
        scores[:, :ITEMS],
        expected(branch, logits[:, :ITEMS]),
        rtol=1e-5,
        atol=1e-4,
    )
    assert np.isneginf(scores[:, ITEMS:]).all()
    alone = branch | {"gain": np.float32(0)}
    scores = blend.scores(logits, alone, BATCH, USERS)
    np.testing.assert_array_equal(scores, logits)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_over_item_shards(branch, logits, backend, monkeypatch):
    """With the lowering of a CPU and of an accelerator."""
    whole = blend.scores(logits, branch, BATCH, USERS)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sharded = jax.shard_map(
        blend.scores,
        mesh=mesh_lib.make_mesh(data=1, item=2),
        in_specs=(
            P(None, "item"),
            mesh_lib.specs(branch, blend.PARTITION),
            P(),
            P(),
        ),
        out_specs=P(None, "item"),
    )
    got = jax.jit(sharded)(logits, branch, BATCH, USERS)
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)
