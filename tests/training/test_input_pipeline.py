"""Both pipelines give the same batches, and compile little."""

from __future__ import annotations

import concurrent.futures
import logging

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.models import sparse_batch
from vaecf.parallel import memory
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib

KINDS = {
    "resident": input_pipeline.ResidentPipeline,
    "streamed": input_pipeline.StreamedPipeline,
}


def train(feed, setup, epochs: int = 3, batch_size: int = 16):
    """(state, Totals of each stretch); the last step is partial."""
    state, sums = state_lib.init_state(setup, 7), []
    for epoch in range(epochs):
        order = input_pipeline.epoch_order(
            7, epoch, 60, batch_size, parts=setup.parts(batch_size)
        )
        ready = feed.prepare(order)
        assert ready.steps == len(order) >= 4
        for start, stop in ((0, 1), (1, 3), (3, ready.steps)):
            state, totals = feed.run(state, ready, start, stop)
            sums.append(totals)
    return state, sums


@pytest.mark.parametrize(
    ("mesh", "microbatch", "steps"),
    [
        *(((1, 1), 0, steps) for steps in (1, 3, 100)),
        ((2, 2), 0, 2),
        ((2, 2), 3, 1),
    ],
)
def test_resident_and_streamed_are_the_same(
    small, dataset, assert_close, mesh, microbatch, steps
):
    """In windows of so many steps, whatever stretches they are run in."""
    setup = state_lib.make_setup(
        small(train={"microbatch": microbatch}),
        dataset.n_items,
        mesh_lib.make_mesh(*mesh),
    )
    resident = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
    assert type(resident) is input_pipeline.ResidentPipeline
    of_a_step = 4 * 8 * dataset.train.counts.mean()
    streamed = input_pipeline.StreamedPipeline(
        setup, dataset.train, 7, window_bytes=int(of_a_step * (steps + 0.5))
    )
    order = input_pipeline.epoch_order(7, 0, 60, 8, parts=setup.parts(8))
    assert len(streamed.prepare(order).order) == min(steps, len(order))
    expected = train(resident, setup, batch_size=8)
    # Two programs: XLA may round the last bit of either another way.
    assert_close(
        expected, train(streamed, setup, batch_size=8), rtol=1e-5, atol=2e-7
    )
    totals = [t.users.tolist() for t in expected[1]]
    assert totals == [[8], [8] * 2, [8] * 4 + [4]] * 3
    fresh = state_lib.init_state(setup, 7).params["input_kernel"]
    moved = np.asarray(expected[0].params["input_kernel"] - fresh)
    assert np.abs(moved).max() > 0.05


def test_the_next_window_is_made_ahead(small, dataset, monkeypatch):
    """While one is used; and none twice, however a window is divided."""
    made, real = [], sparse_batch.window

    def window(indptr, indices, user_DU, n_items):
        made.append(user_DU.ravel().tolist())
        return real(indptr, indices, user_DU, n_items)

    monkeypatch.setattr(sparse_batch, "window", window)
    setup = state_lib.make_setup(
        small(), dataset.n_items, mesh_lib.make_mesh(1, 1)
    )
    feed = input_pipeline.StreamedPipeline(
        setup, dataset.train, 7, window_bytes=1
    )
    order = input_pipeline.epoch_order(7, 0, 60, 16)
    state, ready = state_lib.init_state(setup, 7), feed.prepare(order)
    for stop in range(1, 5):
        state, _ = feed.run(state, ready, stop - 1, stop)
        ready.window(stop - 1)
        concurrent.futures.wait(ready.window._made.values())
        assert made == order[: stop + 1].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("microbatch", [0, 2])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 1)])
def test_batches_are_those_of_the_host_bit_for_bit(
    small, dataset, assert_same, mesh, microbatch, kind
):
    setup = state_lib.make_setup(
        small(train={"microbatch": microbatch}),
        dataset.n_items,
        mesh_lib.make_mesh(*mesh),
    )
    parts = setup.parts(16)
    assert parts == (8 if microbatch else mesh[0])
    train = dataset.train
    on_device = jax.jit(step_lib.assemble, static_argnums=(0, 3, 4))
    order = input_pipeline.epoch_order(1, 0, 60, 16)
    epoch = input_pipeline.make_pipeline(kind, setup, train, 7).prepare(order)
    for step, users in enumerate(order):
        batch = on_device(
            setup,
            epoch.window(0),
            epoch.order[step],
            512 // parts,
            epoch.csr_spec,
        )
        host = sparse_batch.assemble_on_host(
            train.indptr, train.indices, users, 512 // parts, parts
        )
        assert_same(batch, host)
        assert batch.item_N.shape == (512,)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_whatever_the_order(small, kind, caplog):
    """Long histories in one batch need more slots; not all epochs have them."""
    rng = np.random.default_rng(0)
    n = np.full(60, 2)
    n[:6] = 90
    pairs = [(u, i) for u in range(60) for i in rng.permutation(120)[: n[u]]]
    users, items = np.array(pairs).T
    history, _ = Interactions.from_pairs(users, items, 60, 120)
    setup = state_lib.make_setup(small(), 120, mesh_lib.make_mesh(1, 1))
    feed = input_pipeline.make_pipeline(kind, setup, history, 7)
    state = state_lib.init_state(setup, 7)
    slots, needed, compiled = set(), set(), []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for epoch in range(6):
            order = input_pipeline.epoch_order(7, epoch, 60, 16)
            needed.add(sparse_batch.slots_for(np.append(n, 0)[order]))
            ready = feed.prepare(order)
            slots.add(ready.n_slots)
            for start, stop in ((0, 1), (1, 3), (3, 4)):
                caplog.clear()
                before = feed.compile_seconds
                state, _ = feed.run(state, ready, start, stop)
                compiled.append(
                    sum(
                        r.getMessage().startswith("Compiling")
                        and "step" in r.getMessage()
                        for r in caplog.records
                    )
                )
                assert (feed.compile_seconds > before) == bool(compiled[-1])
    assert needed == {256, 512}
    assert len(slots) == 1 and min(slots) >= 512
    assert sum(compiled) == 1
    assert state.step == 24


# --- Resident or streamed ---------------------------------------------------


class Train:
    def __init__(self, nnz: int) -> None:
        self.nnz = nnz


@pytest.mark.parametrize(
    ("nnz", "free", "kind", "why"),
    [
        (2**31 - 1, None, "resident", "not known"),
        (2**31, None, "streamed", "2**31"),
        (2**31, 2**50, "streamed", "2**31"),
        # A quarter of the free memory, four bytes per interaction.
        (999, 16_000, "resident", "0 MB"),
        (1000, 16_000, "streamed", "0 MB"),
    ],
)
def test_auto(monkeypatch, nnz, free, kind, why):
    monkeypatch.setattr(memory, "device_free_bytes", lambda: free)
    made, lines = [], []
    for cls in KINDS.values():
        monkeypatch.setattr(
            input_pipeline, cls.__name__, lambda *a, cls=cls: made.append(cls)
        )
    input_pipeline.make_pipeline("auto", None, Train(nnz), 0, log=lines.append)
    assert made == [KINDS[kind]]
    assert kind in lines[0] and why in lines[0]


@pytest.mark.parametrize("kind", KINDS)
def test_program_bytes_holds_the_state_and_more(small, dataset, kind):
    """Parameters and two moments, float32, and the batch's logits at least."""
    setup = state_lib.make_setup(
        small(), dataset.n_items, mesh_lib.make_mesh(1, 1)
    )
    feed = input_pipeline.make_pipeline(kind, setup, dataset.train, 7)
    assert feed.program_bytes() == 0
    state, _ = train(feed, setup, epochs=1)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held < feed.program_bytes() < 20 * held


# --- The order of the batches ------------------------------------------------

sizes = st.tuples(st.integers(1, 200), st.integers(1, 60))


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10_000), st.booleans())
def test_every_user_once(sizes, seed, epoch, drop_remainder):
    n_users, batch_size = sizes
    if drop_remainder and batch_size > n_users:
        return
    order = input_pipeline.epoch_order(
        seed, epoch, n_users, batch_size, drop_remainder=drop_remainder
    )
    steps = input_pipeline.steps_per_epoch(n_users, batch_size, drop_remainder)
    assert order.shape == (steps, batch_size) and order.dtype == np.int32
    flat = order.ravel()
    if drop_remainder:
        assert steps == n_users // batch_size
        assert len(set(flat)) == len(flat) and max(flat) < n_users
    else:
        assert steps == -(-n_users // batch_size)
        assert sorted(flat[:n_users]) == list(range(n_users))
        # Padding comes last, and there is no batch of nothing else.
        assert np.all(flat[n_users:] == n_users)
        assert len(flat) - n_users < batch_size


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10_000))
def test_seed_and_epoch_decide(sizes, seed, epoch):
    n_users, batch_size = sizes[0] + 50, sizes[1]

    def users(seed, epoch, batch_size=batch_size):
        order = input_pipeline.epoch_order(seed, epoch, n_users, batch_size)
        return list(order.ravel()[:n_users])

    first = users(seed, epoch)
    assert users(seed, epoch) == first
    # 50! orders: the same one twice means that it does not matter.
    assert users(seed + 1, epoch) != first
    assert users(seed, epoch + 1) != first
    # Neither (0, 1) against (1, 0) nor a larger batch is the same question.
    if seed != epoch:
        assert users(epoch, seed) != first
    assert users(seed, epoch, batch_size + 1) == first


def test_every_user_is_as_likely_to_come_first():
    first = [input_pipeline.epoch_order(3, e, 4, 4)[0, 0] for e in range(4000)]
    counts = np.bincount(first)
    # Binomial(4000, 1/4): five standard deviations are 137.
    assert np.all(np.abs(counts - 1000) < 137)


def test_drop_remainder_leaves_out_others_each_epoch():
    left_out = [
        frozenset(range(50))
        - set(
            input_pipeline.epoch_order(
                0, e, 50, 16, drop_remainder=True
            ).ravel()
        )
        for e in range(40)
    ]
    assert {len(users) for users in left_out} == {2}
    assert len(set(left_out)) > 30
    assert len(frozenset().union(*left_out)) > 30


def test_no_batch_left():
    with pytest.raises(VaecfError, match=r"batch_size=16.*15 training users"):
        input_pipeline.epoch_order(0, 0, 15, 16, drop_remainder=True)
    assert (
        input_pipeline.epoch_order(0, 0, 16, 16, drop_remainder=True).size == 16
    )
    assert input_pipeline.epoch_order(0, 0, 15, 16).shape == (1, 16)


@settings(deadline=None)
@given(sizes, st.integers(1, 8), st.booleans())
def test_shards_add_padding_behind_each_batch(sizes, shards, drop_remainder):
    n_users, batch_size = sizes
    if drop_remainder and batch_size > n_users:
        return
    how = {"drop_remainder": drop_remainder}
    plain = input_pipeline.epoch_order(1, 2, n_users, batch_size, **how)
    order = input_pipeline.epoch_order(
        1, 2, n_users, batch_size, **how, parts=shards
    )
    np.testing.assert_array_equal(order[:, :batch_size], plain)
    assert np.all(order[:, batch_size:] == n_users)
    assert order.shape[1] % shards == 0
    assert order.shape[1] - batch_size < shards
