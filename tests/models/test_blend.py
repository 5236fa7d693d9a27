"""A model and a linear branch together, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import (
    batch_of,
    dense,
    graph_terms,
    interactions,
    item_item,
    random_dense,
    slim,
)

from vaecf.models import blend, low_rank
from vaecf.parallel import mesh as mesh_lib

ITEMS = 150  # 256 with padding
LOW_RANK = low_rank.PARTITION
USERS = np.arange(5, dtype=np.int32)
HISTORIES = [[0, 4, 149], [3], [], [1, 2, 5, 6, 7], [130, 140]]


TRAIN = interactions(random_dense(80, ITEMS, 0.1))
BATCH = jax.tree.map(jnp.asarray, batch_of(HISTORIES, 16))


WEIGHTS = {
    **{"gain": 1.7, "prior": 0.2},
    **{"graph_gain": 0.9, "low_pass": 0.4, "ials_gain": 1.3, "slim_gain": 0.6},
}
EXPERTS = {
    "whole": (0, ("ease",)),
    "low rank": (6, ("ease",)),
    "all": (0, ("ease", "graph", "ials", "slim")),
    "sparse": (0, ("graph", "ials")),
}


@pytest.fixture(scope="module", params=EXPERTS.values(), ids=EXPERTS.keys())
def branch(request):
    rank, experts = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "_LOW_RANK", 9)
        patch.setattr(blend, "_NEIGHBOURS", 11)
        patch.setattr(blend, "_FACTORS", (7, 9))
        patch.setattr(blend, "_UNOBSERVED", 20.0)
        patch.setattr(blend, "_SLIM_NEIGHBOURS", 7)
        fitted = blend.fit(
            *(TRAIN,),
            **{"l2": 4.0, "dropout": 0.5, "user_exponent": 0.5},
            **{"rank": rank, "experts": experts},
        )
    weights = {name: np.float32(x) for name, x in WEIGHTS.items()}
    branch = fitted | weights
    assert blend.experts_of(branch) == experts
    return jax.tree.map(jnp.asarray, branch)


@pytest.mark.parametrize(
    ("rank", "n_items", "expected"),
    [
        *((None, 25_000, 0), (None, 25_001, 512), (0, 10**6, 0)),
        *((64, 100, 64), (64, 9, 9)),
    ],
)
def test_effective_rank(rank, n_items, expected):
    assert blend.effective_rank(rank, n_items) == expected


def test_experts_and_weights_by_default():
    assert blend.default_experts(25_000) == ("ease", "ials")
    assert blend.default_experts(25_001) == ("ease", "graph", "ials", "slim")
    for n_items in (9, 10**6):
        experts = blend.default_experts(n_items)
        assert blend.default_weights(experts).keys() == set(blend.WEIGHTS)


def test_factors_of_large_catalogues_take_a_third_of_l2(monkeypatch):
    settings = {"dropout": 0.5, "user_exponent": 0.5}
    alone = {"rank": 6, "experts": ("ease",), **settings}
    for large, l2 in ((10**6, 12.0), (ITEMS - 1, 4.0)):
        monkeypatch.setattr(blend, "FULL_RANK_ITEMS", large)
        expected = low_rank.fit(TRAIN, l2, 6, **settings)
        fitted = blend.fit(TRAIN, l2=12.0, **alone)
        for name, array in expected.items():
            np.testing.assert_array_equal(fitted[name], array)


def solved(x, branch):
    """Scores of implicit ALS by the normal equations."""
    h = branch["item_factor"][:ITEMS].astype(float)
    alpha = 20 / ITEMS
    systems = np.einsum("ui,if,ig->ufg", x + alpha, h, h)
    length = TRAIN.nnz / TRAIN.n_users
    ridge = 0.08 * length / (20 + length) * (x.sum(1) + alpha * ITEMS)
    systems += ridge[:, None, None] * np.eye(h.shape[1])
    return np.linalg.solve(systems, (x @ h)[..., None])[..., 0] @ h.T


def expected(branch, logits):
    x = dense(HISTORIES, ITEMS)
    experts = []
    ease = {k: v for k, v in branch.items() if k in ("item_item", *LOW_RANK)}
    if ease:
        experts.append((1.7, x @ item_item(ease, ITEMS), 0.003))
    if "neighbour" in branch:
        near, _ = graph_terms(TRAIN.to_scipy().toarray(), 9, 11)
        low = branch["low_input"][:ITEMS] @ branch["low_output"][:, :ITEMS]
        everyone = TRAIN.to_scipy() @ (near + 0.4 * low)
        experts.append((0.9, x @ (near + 0.4 * low), 0.1 * everyone.mean()))
    if "item_factor" in branch:
        experts.append((1.3, solved(x, branch), 0.01))
    if "slim_weight" in branch:
        weights = slim(TRAIN.to_scipy().toarray(), 7, 30.0)
        experts.append((0.6, x @ weights, 0.03))
    share = (TRAIN.item_counts() + 5) / (TRAIN.n_users + 5)
    branch_UI = sum(
        gain * (np.log(np.maximum(score, 0) + floor) - 0.2 * np.log(share))
        for gain, score, floor in experts
    )
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
    alone = branch | dict.fromkeys(blend.GAINS.values(), np.float32(0))
    scores = blend.scores(logits, alone, BATCH, USERS)
    np.testing.assert_array_equal(scores, logits)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_over_item_shards(branch, logits, platform):
    """With the lowering of a CPU and of an accelerator."""
    whole = blend.scores(logits, branch, BATCH, USERS)
    sharded = jax.shard_map(
        functools.partial(blend.scores, platform=platform),
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


def test_weights_kept_for_a_branch_with_other_experts():
    """A new expert has a gain of 0; an expert that is gone has none."""
    branch = {"input_factors": 0, "item_factor": 0, "prior": 1, "gain": 3}
    kept = blend.kept_weights({"gain": 2, "graph_gain": 5, "prior": 7}, branch)
    assert kept == {"gain": 2, "ials_gain": 0, "prior": 7}
