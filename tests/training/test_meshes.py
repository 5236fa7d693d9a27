"""The same run on 1, 6 and 8 devices."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vaecf.evaluation import scorers
from vaecf.evaluation.ranking import Ranker
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import first_state
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import LATEST, Checkpoints


def real(tree):
    axes = {
        "input_kernel": ("item", None),
        "output_kernel": (None, "item"),
        "output_bias": ("item",),
    }
    return mesh_lib.resize_items(jax.tree.map(np.asarray, tree), axes, 33)


@pytest.fixture(scope="module")
def alone(small, setup_of, run_epochs):
    setup = setup_of(small())
    return setup, *run_epochs(setup, small(), range(5))


@pytest.mark.parametrize(
    ("mesh", "kind", "zero"),
    [
        ((8, 1), "resident", False),
        ((1, 8), "resident", False),
        ((4, 2), "streamed", False),
        ((2, 3), "streamed", True),
        ((2, 4), "resident", True),
    ],
)
def test_twenty_steps_do_not_depend_on_the_mesh(
    small, setup_of, run_epochs, dataset, alone, mesh, kind, zero
):
    one, one_state, wanted = alone
    config = small(mesh={"zero": zero})
    many = setup_of(config, mesh)
    state, metrics = run_epochs(many, config, range(5), kind=kind)
    assert len(metrics.loss) == 20
    assert np.ptp(wanted.loss / wanted.users) > 1
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-5)
    kernel = state.params["input_kernel"]
    assert len(kernel.sharding.device_set) == mesh[0] * mesh[1]
    # Both states rank alike.
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


def test_initial_states_do_not_depend_on_the_mesh(
    small, setup_of, assert_close
):
    """The numbers drawn do not depend on the padding of the item shards.

    They are the same to the last bit in tests/real_settings. The shards of
    parameters and moments are those of the table of the mesh.
    """
    one = state_lib.init_state(setup_of(small()), 7)
    for mesh in ((2, 2), (2, 3), (1, 5), (1, 8)):
        setup = setup_of(small(), mesh)
        state = state_lib.init_state(setup, 7)
        assert_close(real(state), real(one), rtol=1e-6, atol=3e-8)
        rows = setup.whole.item_rows
        sharded = {
            "input_kernel": (rows // mesh[1], 6),
            "output_kernel": (6, rows // mesh[1]),
            "output_bias": (rows // mesh[1],),
        }
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            shape = sharded.get(getattr(path[-1], "key", None), x.shape)
            assert x.sharding.device_set == set(setup.mesh.devices.flat)
            assert {s.data.shape for s in x.addressable_shards} == {shape}
    other = state_lib.init_state(setup_of(small()), 8)
    for name in ("input_kernel", "output_kernel"):
        assert np.any(one.params[name] != other.params[name])


def test_zero_divides_moments_and_nothing_else(small, setup_of):
    config = small(mesh={"zero": True}, precision={"policy": "fp16"})
    state = state_lib.init_state(setup_of(config, (2, 2)), 7)
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
def test_gradients_are_summed_in_the_dtype_asked_for(
    small, setup_of, take, host_batch, reduce
):
    """bf16 has 8 bits: sums of two devices' shares show it."""
    config = small(precision={"policy": "bf16"}, mesh={"reduce": reduce})
    kernels = []
    for mesh in ((1, 1), (2, 1)):
        setup = setup_of(config, mesh, tx=optax.sgd(1.0))
        state = state_lib.init_state(setup, 7)
        batch = host_batch(range(16), parts=mesh[0])
        after, _ = take(setup, state, batch, state_lib.step_key(7))
        kernels.append(np.asarray(after.params["output_kernel"]))
    start = np.asarray(state.params["output_kernel"])
    error = np.abs(kernels[0] - kernels[1]).max()
    error /= np.abs(kernels[0] - start).max()
    assert error < 2.0**-6
    assert (error > 2.0**-11) == (reduce == "compute")


@pytest.mark.parametrize(
    ("first", "then", "zero"),
    [
        ((2, 3), (1, 1), True),
        ((1, 1), (2, 3), True),
        ((1, 5), (2, 3), False),
    ],
)
def test_a_checkpoint_moves_to_other_item_shards(
    small, setup_of, run_epochs, tmp_path, assert_close, first, then, zero
):
    """The padding differs; the following steps are the same."""
    config = small(mesh={"zero": zero})
    source, target = setup_of(config, first), setup_of(config, then)
    state, _ = run_epochs(source, config, [0])
    saved = Checkpoints(tmp_path)
    saved.save(LATEST, 4, state, {})
    back = first_state.restore_state(target, saved)
    saved.close()
    assert back.params["input_kernel"].shape[0] % then[1] == 0
    jax.tree.map(np.testing.assert_array_equal, real(back), real(state))
    assert not np.asarray(back.params["input_kernel"])[33:].any()
    found, metrics = run_epochs(target, config, [1, 2], state=back)
    wanted, expected = run_epochs(source, config, [1, 2], state=state)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    assert_close(real(found.params), real(wanted.params), rtol=1e-3, atol=1e-5)
    assert found.step == 12
