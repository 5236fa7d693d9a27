"""Two feeds, one sequence of batches; and few compilations."""

from __future__ import annotations

import concurrent.futures
import logging

import jax
import numpy as np
import pytest

from vaecf.data.interactions import Interactions
from vaecf.models import sparse_batch
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


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_counts_real_users(small, kind):
    """Neither padding users nor those without items."""
    history, _ = Interactions.from_pairs(
        [0, 0, 2, 3, 4, 4, 4], [0, 1, 2, 3, 4, 5, 6], 6, 21
    )
    setup = state_lib.make_setup(small(), 21, mesh_lib.make_mesh(2, 1))
    feed = input_pipeline.make_pipeline(kind, setup, history, 0)
    order = np.array([[5, 4, 3, 2], [1, 0, 6, 6]], np.int32)
    epoch = feed.prepare(order)
    assert (epoch.users, epoch.steps) == (4, 2)


class Device:
    def __init__(self, stats, platform: str) -> None:
        self._stats, self.platform = stats, platform

    def memory_stats(self):
        return self._stats


class Train:
    def __init__(self, nnz: int) -> None:
        self.nnz = nnz


@pytest.mark.parametrize(
    ("nnz", "stats", "platform", "kind"),
    [
        (2**31 - 1, None, "gpu", "resident"),
        (2**31, None, "gpu", "streamed"),
        (2**31, {"bytes_limit": 2**50}, "gpu", "streamed"),
        # A quarter of what is free, four bytes an interaction.
        (
            999,
            {"bytes_limit": 20_000, "bytes_in_use": 4_000},
            "gpu",
            "resident",
        ),
        (
            1000,
            {"bytes_limit": 20_000, "bytes_in_use": 4_000},
            "gpu",
            "streamed",
        ),
        (1000, {"bytes_limit": 20_000}, "gpu", "resident"),
        (1000, {"bytes_in_use": 10}, "gpu", "resident"),
        # Of a host with 16 kB: a quarter is 4,096.
        (1023, None, "cpu", "resident"),
        (1024, None, "cpu", "streamed"),
        (1024, None, "gpu", "resident"),
    ],
)
def test_auto(monkeypatch, tmp_path, nnz, stats, platform, kind):
    (tmp_path / "meminfo").write_text(
        "MemTotal:  99 kB\nMemAvailable:  16 kB\nBuffers: 9 kB\n"
    )
    monkeypatch.setattr(input_pipeline, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(input_pipeline, "_CGROUP", tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats, platform)])
    made = []
    for cls in KINDS.values():
        monkeypatch.setattr(
            input_pipeline, cls.__name__, lambda *a, cls=cls: made.append(cls)
        )
    input_pipeline.make_pipeline("auto", None, Train(nnz), 0)
    assert made == [KINDS[kind]]
    assert input_pipeline.choose(Train(nnz))[0] == kind


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("max", 5, 16_384), (15_000, 6_000, 9_000), (5, 7, 0), (10**9, 0, 16_384)],
)
def test_a_container_has_what_its_limit_leaves(
    monkeypatch, tmp_path, limit, used, free
):
    (tmp_path / "meminfo").write_text("MemAvailable:  16 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(input_pipeline, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(input_pipeline, "_CGROUP", tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None, "cpu")])
    assert input_pipeline._free_bytes() == free


def test_the_choice_says_why(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemAvailable:  5000000 kB\n")
    monkeypatch.setattr(input_pipeline, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(input_pipeline, "_CGROUP", tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None, "cpu")])
    why = {n: input_pipeline.choose(Train(n))[1] for n in (10**7, 2**31)}
    assert why[10**7] == "40 MB, 5,120 MB are free"
    assert "2**31" in why[2**31]
    monkeypatch.setattr(input_pipeline, "_MEMINFO", tmp_path / "none")
    assert "not known" in input_pipeline.choose(Train(10**7))[1]


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
