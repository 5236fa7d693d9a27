"""Both pipelines give the same batches."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.config import TrainConfig
from vaecf.data.interactions import Interactions
from vaecf.models import sparse_batch
from vaecf.parallel import memory
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.epochs import Epochs

KINDS = ("resident", "streamed")


def train(feed, setup, epochs=3, batch_size=16):
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
        ((1, 1), 0, 3),
        ((2, 2), 0, 100),
        ((2, 2), 3, 1),
    ],
)
def test_resident_and_streamed_are_the_same(
    small, setup_of, dataset, assert_close, mesh, microbatch, steps
):
    """In windows of a number of steps, however the steps are divided."""
    setup = setup_of(small(train={"microbatch": microbatch}), mesh)
    resident = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
    of_a_step = 4 * 8 * dataset.train.counts.mean()
    streamed = input_pipeline.InputPipeline(
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


def test_the_next_window_is_made_ahead(small, setup_of, dataset, monkeypatch):
    """While one is used; and none twice, however a window is divided."""
    made, real = [], sparse_batch.window

    def window(indptr, indices, user_DU, n_items):
        made.append(user_DU.ravel().tolist())
        return real(indptr, indices, user_DU, n_items)

    monkeypatch.setattr(sparse_batch, "window", window)
    setup = setup_of(small())
    feed = input_pipeline.InputPipeline(setup, dataset.train, 7, window_bytes=1)
    order = input_pipeline.epoch_order(7, 0, 60, 16)
    state, ready = state_lib.init_state(setup, 7), feed.prepare(order)
    for stop in range(1, 5):
        state, _ = feed.run(state, ready, stop - 1, stop)
        ready.window(stop - 1)
        feed._thread.submit(lambda: None).result()  # after all windows so far
        assert made == order[: stop + 1].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mesh", "microbatch", "parts"),
    [((1, 1), 0, 1), ((2, 2), 0, 2), ((4, 1), 2, 8)],
)
def test_batches_are_those_of_the_host_bit_for_bit(
    small, setup_of, dataset, host_batch, assert_same,
    mesh, microbatch, parts, kind,
):  # fmt: skip
    setup = setup_of(small(train={"microbatch": microbatch}), mesh)
    assert setup.parts(16) == parts
    on_device = jax.jit(step_lib.assemble, static_argnums=(0, 3, 4))
    order = input_pipeline.epoch_order(1, 0, 60, 16)
    epoch = input_pipeline.make_pipeline(kind, setup, dataset.train, 7).prepare(
        order
    )
    csr, slots = epoch.window(0), 512 // parts
    for step, users in enumerate(order):
        batch = on_device(setup, csr, epoch.order[step], slots, epoch.csr_spec)
        assert_same(batch, host_batch(users, slots, parts))
        assert batch.item_N.shape == (512,)


def test_a_dispatch_of_many_steps_is_single_steps(
    small, setup_of, dataset, take, host_batch, assert_same, assert_close
):
    setup = setup_of(small())
    order = input_pipeline.epoch_order(3, 0, 60, 16)
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 3)
    epoch = feed.prepare(order)
    state = state_lib.init_state(setup, 3)
    together, totals = feed.run(jax.tree.map(jnp.copy, state), epoch, 0, 4)
    one_by_one, parts = jax.tree.map(jnp.copy, state), []
    for step, users in enumerate(order):
        batch = host_batch(users, epoch.n_slots)
        state, alone = take(setup, state, batch, state_lib.step_key(3))
        one_by_one, part = feed.run(one_by_one, epoch, step, step + 1)
        assert_close([x[0] for x in part], list(alone))
        parts.append(part)
    # The same program gives the same bits, another program close numbers.
    assert_same(together, one_by_one)
    assert_close(together, state)
    np.testing.assert_array_equal(totals, np.concatenate(parts, axis=1))
    assert together.step == 4
    assert totals.users.tolist() == [16, 16, 16, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_donated_and_its_memory_counted(
    small, setup_of, dataset, kind
):
    setup = setup_of(small())
    feed = input_pipeline.make_pipeline(kind, setup, dataset.train, 0)
    epoch = feed.prepare(input_pipeline.epoch_order(0, 0, 60, 16))
    state = state_lib.init_state(setup, 0)
    assert feed.program_bytes() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, _ = feed.run(state, epoch, 0, 2)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))
    # Parameters, two moments, and at least the batch's logits.
    held = sum(x.nbytes for x in jax.tree.leaves(after))
    assert held < feed.program_bytes() < 20 * held


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
    monkeypatch.setattr(
        input_pipeline, "InputPipeline", lambda *a: made.append(a[3])
    )
    train = types.SimpleNamespace(nnz=nnz)
    input_pipeline.make_pipeline("auto", None, train, 0, log=lines.append)
    assert (made[0] is None) == (kind == "resident")
    assert kind in lines[0] and why in lines[0]


@settings(deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 60), st.integers(0, 2**32 - 1),
    st.integers(0, 10_000), st.booleans(), st.integers(1, 8),
)  # fmt: skip
def test_the_users_of_an_epoch(
    n_users, batch_size, seed, epoch, drop_remainder, parts
):
    """A permutation by the seed and the epoch alone, then padding users."""
    if drop_remainder and batch_size > n_users:
        return
    order = input_pipeline.epoch_order(
        *(seed, epoch, n_users, batch_size),
        drop_remainder=drop_remainder,
        parts=parts,
    )
    whole, rest = divmod(n_users, batch_size)
    steps = whole + (rest > 0 and not drop_remainder)
    users = np.random.Generator(np.random.PCG64([seed, epoch]))
    padded = [*users.permutation(n_users), *[n_users] * batch_size]
    expected = np.reshape(padded[: steps * batch_size], (steps, batch_size))
    np.testing.assert_array_equal(order[:, :batch_size], expected)
    # Parts add padding after each batch.
    assert np.all(order[:, batch_size:] == n_users)
    assert order.shape[1] == -(-batch_size // parts) * parts
    assert order.dtype == np.int32


def test_batches_of_a_config(small, setup_of, dataset):
    def order(**train):
        steps, order_of = input_pipeline.batch_order(
            small(train=train), setup_of(small(train=train)), dataset.train
        )
        assert len(order_of(0)) == steps
        return order_of(0)

    assert order(drop_remainder=True).shape == (3, 16)
    # A batch larger than all users is a batch of all users.
    for drop in (False, True):
        np.testing.assert_array_equal(
            order(batch_size=10**9, drop_remainder=drop), order(batch_size=60)
        )
    with refuses(r"batch_size=16.*15 training users"):
        input_pipeline.epoch_order(0, 0, 15, 16, drop_remainder=True)
    nobody = Interactions(np.zeros(1, np.int64), np.zeros(0, np.int32), 33)
    with refuses("no training users"):
        input_pipeline.batch_order(small(), setup_of(small()), nobody)


def test_next_epoch_is_prepared_while_the_device_works(
    small, setup_of, dataset
):
    setup, made, log = setup_of(small()), [], []
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 0)

    def order_of(n):
        made.append(n)
        return input_pipeline.epoch_order(0, n, 60, 16)

    epochs = Epochs(feed, setup, TrainConfig(epochs=7), order_of)
    state = state_lib.init_state(setup, 0)
    for n in (5, 6):  # as a resumed run, in two dispatches
        epoch = epochs.take(n)
        log.append(list(made))
        for start in (0, 2):
            state, _ = feed.run(
                state, epoch, start, start + 2, epochs.prepare_next
            )
            log.append(list(made))
        order = input_pipeline.epoch_order(0, n, 60, 16)
        np.testing.assert_array_equal(epoch.order, order)
    assert log == [[5], *[[5, 6]] * 5]


def test_epochs_that_a_gpu_takes_in_one_dispatch(small):
    """Few steps, and few operations of about 700 parameters."""
    mesh = mesh_lib.make_mesh(1, 1)
    setup = state_lib.make_setup(small(), 33, mesh, "gpu")
    is_short = input_pipeline.is_short
    assert is_short(setup, 7500, 500) and not is_short(setup, 7501, 1)
    assert not is_short(setup, 10, 10**9)
    assert not is_short(state_lib.make_setup(small(), 33, mesh, "cpu"), 1, 1)


def test_compilers_know_the_options_for_a_gpu():
    """A compiler for CPUs parses the same options."""
    program = jax.jit(lambda x: x + 1).lower(jnp.float32(1))
    options = input_pipeline.GPU_OPTIONS
    assert program.compile(compiler_options=options)(jnp.float32(1)) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="compile option"):
        program.compile(compiler_options={"xla_gpu_unknown": "1"})
