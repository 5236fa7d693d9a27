"""The exact top k against a stable sort, on one and on four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import from_sets, refuses

from vaecf.evaluation import ranking
from vaecf.evaluation.ranking import RankedLists, Ranker, Scorer, rank_local
from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib

MESHES = [(1, 1), (4, 1), (2, 2), (1, 4)]
N_USERS, N_ITEMS = 13, 300


def reference(score_UI, seen, k, *, allowed=None, exclude_seen=True):
    """Lists in float64, by one stable sort per user."""
    n_users = len(score_UI)
    item_UK = np.full((n_users, k), -1)
    score_UK = np.full((n_users, k), -np.inf)
    for u in range(n_users):
        score_I = score_UI[u].astype(np.float64)
        if exclude_seen:
            score_I[sorted(seen[u])] = -np.inf
        if allowed is not None:
            score_I[~allowed] = -np.inf
        best = np.argsort(-score_I, kind="stable")[:k]
        best = best[score_I[best] > -np.inf]
        item_UK[u, : len(best)] = best
        score_UK[u, : len(best)] = score_I[best]
    exact = score_UI.astype(np.float64)
    top_U = exact.max(axis=1)
    log_total_U = top_U + np.log(np.exp(exact - top_U[:, None]).sum(axis=1))
    return RankedLists(item_UK, score_UK, log_total_U)


def check(got, expected):
    np.testing.assert_array_equal(got.item_UK, expected.item_UK)
    np.testing.assert_array_equal(got.score_UK, expected.score_UK)
    np.testing.assert_allclose(
        got.log_total_U, expected.log_total_U, rtol=1e-6, atol=1e-6
    )
    assert got.item_UK.dtype == np.int32
    assert got.score_UK.dtype == got.log_total_U.dtype == np.float32


def table_scorer(score_UI, shapes=None):
    """A scorer and its table; padding items have the best scores."""
    n_items = score_UI.shape[1]
    padded = np.full(
        (len(score_UI), mesh_lib.padded_items(n_items)), 1e9, np.float32
    )
    padded[:, :n_items] = score_UI

    def apply(params, batch, user_B):
        if shapes is not None:
            shapes.append((user_B.shape[0], params["score"].shape[1]))
        return jnp.take(params["score"], user_B, axis=0, mode="clip")

    scorer = Scorer(apply, {"score": (None, "item")}, n_items)
    return scorer, {"score": padded}


@pytest.fixture(scope="module")
def setup():
    """Scores with few distinct values, so that most ranks are ties."""
    rng = np.random.default_rng(0)
    score_UI = rng.integers(-2, 3, (N_USERS, N_ITEMS)).astype(np.float32)
    score_UI[score_UI == 0] *= rng.choice([-1, 1], (score_UI == 0).sum())
    score_UI[0] = 0.5
    seen = [
        set(rng.choice(N_ITEMS, n, replace=False).tolist())
        for n in rng.integers(0, 40, N_USERS)
    ]
    seen[1] = set()
    seen[2] = set(range(N_ITEMS))
    seen[3] = set(range(N_ITEMS)) - {17, 5, 299}
    assert np.signbit(score_UI[score_UI == 0]).any()
    return score_UI, seen


def rank(ranker, params, seen, batch_size=16, **allowed):
    matrix = from_sets(seen, ranker.n_items)
    return ranker(
        params, matrix.indptr, matrix.indices, batch_size=batch_size, **allowed
    )


@pytest.mark.parametrize(
    ("k", "platform"), [(1, "cpu"), (150, "cpu"), (400, "cpu"), (5, "gpu")]
)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_stable_sort(
    setup, mesh, k, platform, monkeypatch
):
    monkeypatch.setattr(mesh_lib, "platform", lambda _: platform)
    score_UI, seen = setup
    shapes = []
    scorer, params = table_scorer(score_UI, shapes)
    ranker = Ranker(scorer, mesh_lib.make_mesh(*mesh), k)
    for sign in (1, -1):  # new parameters do not compile again
        signed = {"score": params["score"] * np.float32(sign)}
        got = rank(ranker, signed, seen, batch_size=8)
        check(got, reference(score_UI * sign, seen, k))
    # The shapes on one device: the meshes really differ.
    assert shapes == [(8 // mesh[0], 384 // mesh[1])]


@pytest.mark.parametrize("batch_size", [1, 5, 13, 1000])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_lists_do_not_change_with_the_batch_size(setup, mesh, batch_size):
    score_UI, seen = setup
    scorer, params = table_scorer(score_UI)
    ranker = Ranker(scorer, mesh_lib.make_mesh(*mesh), 10)
    got = rank(ranker, params, seen, batch_size)
    check(got, reference(score_UI, seen, 10))
    matrix = from_sets(seen, N_ITEMS)
    sizes = [
        len(block.item_UK)
        for block in ranker.blocks(
            params, matrix.indptr, matrix.indices, batch_size=batch_size
        )
    ]
    assert sum(sizes) == N_USERS
    multiple = -(-batch_size // mesh[0]) * mesh[0]
    assert max(sizes) == min(multiple, N_USERS)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4)])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_allowed_items(setup, mesh, exclude_seen):
    score_UI, seen = setup
    scorer, params = table_scorer(score_UI)
    ranker = Ranker(
        scorer, mesh_lib.make_mesh(*mesh), 20, exclude_seen=exclude_seen
    )
    allowed = np.zeros(N_ITEMS, bool)
    allowed[[0, 5, 17, 100, 101, 102, 250, 299]] = True
    for mask in (allowed, ~allowed, np.zeros(N_ITEMS, bool)):
        got = rank(ranker, params, seen, allowed_I=ranker.allow(mask))
        check(
            got,
            reference(
                score_UI, seen, 20, allowed=mask, exclude_seen=exclude_seen
            ),
        )


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_that_are_not_finite_are_not_ranked(setup, mesh):
    """Whatever the item: seen, excluded or ranked last."""
    score_UI, seen = setup
    scorer, params = table_scorer(score_UI)
    ranker = Ranker(scorer, mesh_lib.make_mesh(*mesh), 3)
    only_17 = ranker.allow(np.arange(N_ITEMS) == 17)
    for user, item, value in (
        *((0, 0, np.nan), (12, 299, np.inf), (7, 150, -np.inf)),
        *((2, 17, -np.nan), (5, 298, 1e30), (9, 3, -1e30)),
    ):
        bad = params["score"].copy()
        bad[user, item] = value
        for allowed_I in (None, only_17):
            with refuses(r"1 of .*not finite"):
                rank(ranker, {"score": bad}, seen, 8, allowed_I=allowed_I)
    large = score_UI * np.float32(1e19)
    got = rank(ranker, {"score": params["score"] * np.float32(1e19)}, seen)
    check(got, reference(large, seen, 3))


def test_no_users_and_batches_of_none(setup):
    scorer, params = table_scorer(setup[0])
    ranker = Ranker(scorer, mesh_lib.make_mesh(1, 1), 5)
    got = rank(ranker, params, [])
    assert [x.shape for x in got] == [(0, 5), (0, 5), (0,)]
    with refuses("batch_size=0 must be"):
        rank(ranker, params, setup[1], batch_size=0)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_a_program_serves_every_history_of_its_bucket(setup, mesh):
    score_UI = setup[0][:1]
    traces = []
    scorer, params = table_scorer(score_UI, traces)
    ranker = Ranker(scorer, mesh_lib.make_mesh(*mesh), 5)
    rng = np.random.default_rng(0)

    def ask(n, sign=1):
        seen = [set(rng.choice(N_ITEMS, n, replace=False).tolist())]
        signed = {"score": params["score"] * np.float32(sign)}
        got = rank(ranker, signed, seen, batch_size=1)
        check(got, reference(score_UI * sign, seen, 5))
        return len(ranker._programs)

    # 16, 32, 64, 128 and 256 slots, then the buckets of batches.
    buckets = ((0, 1, 15, 16), (17, 32), (64,), (65, 128), (129, 256), (257,))
    for n_programs, lengths in enumerate(buckets, start=1):
        for n in lengths:
            assert ask(n) == n_programs
    assert len(traces) == len(buckets)
    for n in (7, 30, 250):
        assert ask(n, sign=-1) == len(buckets)
    assert len(traces) == len(buckets)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (1, 4)])
def test_an_axis_of_one_device_has_no_collectives(setup, mesh):
    score_UI, seen = setup
    scorer, params = table_scorer(score_UI)
    axes = []

    def apply(params, batch, user_B):
        axes.append(mesh_lib.varying_axes(batch.item_N))
        return scorer.apply(params, batch, user_B)

    ranker = Ranker(scorer._replace(apply=apply), mesh_lib.make_mesh(*mesh), 5)
    rank(ranker, params, seen)
    assert axes == [("data",) if mesh[0] > 1 else ()]
    text = next(iter(ranker._programs.values())).as_text()
    assert ("all-gather" in text) == (mesh[1] > 1)
    assert "all-reduce" not in text


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_matrices_are_cast_once_and_forgotten_with_the_parameters(
    setup, mesh, monkeypatch
):
    casts = ranking._Casts()
    monkeypatch.setattr(ranking, "_casts", casts)
    score_UI, seen = setup
    base, table = table_scorer(score_UI)
    dtypes = []

    def apply(params, batch, user_B):
        dtypes.append([params[name].dtype.name for name in ("score", "bias")])
        score_BI = base.apply(params, batch, user_B)
        return score_BI.astype(jnp.float32) + params["bias"][None, :]

    scorer = base._replace(
        apply=apply,
        partition={**base.partition, "bias": ("item",)},
        casts=(jnp.bfloat16, jnp.float16),
    )
    mesh = mesh_lib.make_mesh(*mesh)
    params = {
        "score": table["score"] + np.float32(1 / 3),
        "bias": np.zeros(384, np.float32),
    }
    specs = mesh_lib.specs(params, scorer.partition)
    params = jax.device_put(params, mesh_lib.shardings(mesh, specs))
    rankers = [Ranker(scorer, mesh, k) for k in (5, 7)]
    # The first cast rounds to the 8 bits of bfloat16.
    rounded = (score_UI + np.float32(1 / 3)).astype(jnp.bfloat16)
    kept = []
    for ranker in (*rankers, *rankers):
        got = rank(ranker, params, seen, batch_size=4)
        check(got, reference(rounded.astype(np.float32), seen, ranker.k))
        kept.append(ranker.resident(params)[0])
        assert kept[-1]["score"] is kept[0]["score"]
        assert kept[-1]["bias"] is params["bias"]
    assert dtypes == [["float16", "float32"]] * 2
    assert len(casts.held) == 1
    later = jax.tree.map(lambda x: x * 1, params)
    rank(rankers[0], later, seen, batch_size=4)
    assert len(casts.held) == 2
    kept.clear()
    del params
    assert len(casts.held) == 1
    del later
    assert len(casts.held) == 0


def test_kept_parameters_are_not_cast(setup):
    score_UI, seen = setup
    score_UI = score_UI + np.float32(1 / 3)
    scorer, params = table_scorer(score_UI)
    scorer = scorer._replace(casts=(jnp.bfloat16,), kept=frozenset({"score"}))
    ranker = Ranker(scorer, mesh_lib.make_mesh(1, 1), 5)
    check(rank(ranker, params, seen), reference(score_UI, seen, 5))


VALUES = st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 1.0000001, 80.0])


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 3, 140]), st.booleans(), st.booleans())
def test_rank_local(data, k, exclude_seen, some_allowed):
    n_users, width = 3, 128
    n_items = data.draw(st.integers(1, 12))
    items = st.integers(0, n_items - 1)
    rows = st.lists(VALUES, min_size=n_items, max_size=n_items)
    score_UI = np.array(
        data.draw(st.lists(rows, min_size=n_users, max_size=n_users)),
        np.float32,
    )
    seen = data.draw(
        st.lists(st.sets(items), min_size=n_users, max_size=n_users)
    )
    matrix = from_sets(seen, n_items)
    batch = sparse_batch.assemble_on_host(
        matrix.indptr, matrix.indices, np.arange(n_users, dtype=np.int32), 256
    )
    padded = np.full((n_users, width), np.inf, np.float32)
    padded[:, :n_items] = score_UI
    allowed = padded_allowed = None
    if some_allowed:
        allowed = np.zeros(n_items, bool)
        allowed[sorted(data.draw(st.sets(items)))] = True
        padded_allowed = np.ones(width, bool)
        padded_allowed[:n_items] = allowed
    got = rank_local(
        jnp.asarray(padded),
        jax.tree.map(jnp.asarray, batch),
        None if padded_allowed is None else jnp.asarray(padded_allowed),
        k=k,
        n_items=n_items,
        exclude_seen=exclude_seen,
        platform=data.draw(st.sampled_from(["cpu", "gpu"])),
    )
    check(
        RankedLists(*map(np.asarray, got)),
        reference(
            score_UI, seen, k, allowed=allowed, exclude_seen=exclude_seen
        ),
    )
