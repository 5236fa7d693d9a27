"""The same run on 1, 6 and 8 devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vaecf.evaluation import scorers
from vaecf.evaluation.ranking import Ranker
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline, loop
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import LATEST, Checkpoints

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8), (2, 3)]
EPOCHS = 5  # of 4 steps


def setup_on(config, dataset, mesh=(1, 1)) -> state_lib.TrainSetup:
    return state_lib.make_setup(
        config, dataset.n_items, mesh_lib.make_mesh(*mesh)
    )


def run(setup, dataset, kind="resident", state=None):
    """(state, loss of each step) of `EPOCHS` epochs."""
    feed = input_pipeline.make_pipeline(kind, setup, dataset.train, 7)
    state = state or state_lib.init_state(setup, 7)
    losses = []
    for epoch in range(EPOCHS):
        order = input_pipeline.epoch_order(
            7, epoch, 60, 16, parts=setup.parts(16)
        )
        state, totals = feed.run(state, feed.prepare(order), 0, len(order))
        losses.extend(totals.loss / totals.users)
    return state, np.array(losses)


def real(tree, n_items):
    """Without the padding behind the items."""
    return mesh_lib.resize_items(
        jax.tree.map(np.asarray, tree),
        {
            "input_kernel": ("item", None),
            "output_kernel": (None, "item"),
            "output_bias": ("item",),
        },
        n_items,
    )


@pytest.fixture(scope="module")
def alone(small, dataset):
    setup = setup_on(small(), dataset)
    return setup, *run(setup, dataset)


@pytest.mark.parametrize(
    ("mesh", "feed", "zero"),
    [
        *((mesh, "resident", False) for mesh in MESHES),
        ((4, 2), "streamed", False),
        ((2, 3), "streamed", True),
        ((4, 2), "resident", True),
    ],
)
def test_twenty_steps_do_not_depend_on_the_mesh(
    small, dataset, alone, mesh, feed, zero
):
    one, one_state, one_losses = alone
    many = setup_on(small(mesh={"zero": zero}), dataset, mesh)
    state, losses = run(many, dataset, feed)
    assert len(losses) == 20 and np.ptp(one_losses) > 1
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    kernel = state.params["input_kernel"]
    assert len(kernel.sharding.device_set) == mesh[0] * mesh[1]
    # And what was learned ranks alike.
    held = dataset.test.fold_in
    lists = [
        Ranker(scorers.model(p.model), p.mesh, 10)(
            scorers.ModelParams(x.params),
            held.indptr,
            held.indices,
            batch_size=8,
        )
        for p, x in ((one, one_state), (many, state))
    ]
    np.testing.assert_array_equal(lists[0].item_UK, lists[1].item_UK)


def test_all_meshes_start_alike(small, dataset):
    """The numbers drawn do not depend on the padding of the item shards."""
    params = [
        real(state_lib.init_state(setup_on(small(), dataset, m), 7).params, 33)
        for m in ((1, 1), (2, 3), (1, 5), (1, 8))
    ]
    for other in params[1:]:
        jax.tree.map(np.testing.assert_array_equal, params[0], other)


def test_zero_divides_moments_and_nothing_else(small, dataset):
    config = small(mesh={"zero": True}, precision={"policy": "fp16"})
    setup = setup_on(config, dataset, (2, 2))
    state = state_lib.init_state(setup, 7)
    adam = state.opt_state.inner[0]
    for name, spec, zero_spec in (
        ("input_kernel", P("item", None), P(("item", "data"), None)),
        ("output_kernel", P(None, "item"), P(None, ("item", "data"))),
        ("output_bias", P("item"), P("item")),
        ("input_bias", P(), P()),
    ):
        assert state.params[name].sharding.spec == spec
        assert adam.mu[name].sharding.spec == zero_spec, name
        assert adam.nu[name].sharding.spec == zero_spec, name
    moment = adam.mu["input_kernel"]
    assert moment.addressable_shards[0].data.size == moment.size // 4


@pytest.mark.parametrize("reduce", ["fp32", "compute"])
def test_gradients_are_summed_in_the_dtype_asked_for(small, dataset, reduce):
    """bf16 has 8 bits: sums of two devices' shares show it."""
    config = small(
        precision={"policy": "bf16"}, mesh={"reduce": reduce, "data": 2}
    )
    gradients = []
    for mesh in ((1, 1), (2, 1)):
        setup = setup_on(config, dataset, mesh)
        tx = optax.sgd(1.0)
        setup = dataclasses.replace(setup, tx=tx)
        feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
        order = input_pipeline.epoch_order(7, 0, 60, 16)
        before = state_lib.init_state(setup, 7)
        start = jax.tree.map(np.asarray, before.params)
        after, _ = feed.run(before, feed.prepare(order), 0, 1)
        gradients.append(
            jax.tree.map(lambda a, b: a - np.asarray(b), start, after.params)
        )
    one, two = (g["output_kernel"] for g in gradients)
    error = np.abs(one - two).max() / np.abs(one).max()
    assert error < 2.0**-6
    assert (error > 2.0**-11) == (reduce == "compute")


@pytest.mark.parametrize(
    ("first", "then", "zero"),
    [
        ((2, 4), (2, 3), False),
        ((2, 3), (1, 1), True),
        ((1, 1), (2, 3), True),
        ((1, 5), (2, 3), False),
    ],
)
def test_a_checkpoint_moves_to_other_item_shards(
    small, dataset, tmp_path, assert_close, first, then, zero
):
    """Another padding; the following steps are the same."""
    config = small(mesh={"zero": zero})
    source = setup_on(config, dataset, first)
    state, _ = run(source, dataset)
    saved = Checkpoints(tmp_path)
    saved.save(LATEST, 20, state, {})
    target = setup_on(config, dataset, then)
    back = loop.restore_state(target, saved)
    saved.close()
    assert back.params["input_kernel"].shape[0] % then[1] == 0
    jax.tree.map(np.testing.assert_array_equal, real(back, 33), real(state, 33))
    assert not np.asarray(back.params["input_kernel"])[33:].any()
    on, losses = run(target, dataset, state=back)
    expected_on, expected = run(source, dataset, state=state)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(
        real(on.params, 33), real(expected_on.params, 33), rtol=1e-3, atol=1e-5
    )
    assert jnp.all(on.step == 40)
