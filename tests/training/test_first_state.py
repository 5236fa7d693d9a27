"""A run that starts from the parameters of an earlier one."""

import jax
import numpy as np

from vaecf.parallel import mesh as mesh_lib
from vaecf.training import first_state
from vaecf.training import state as state_lib


def test_a_continued_state(small):
    config = small(
        model={"name": "rec_vae", "hidden": (6,)},
        train={"alternating_epochs": (3, 1), "ema": 0.5},
    )
    setup = state_lib.make_setup(config, 20, mesh_lib.make_mesh(1, 1))
    earlier = state_lib.init_state(setup, 7)
    params = state_lib.scoring_params(setup, earlier)
    state = first_state.continued(
        config, setup, first_state.Start(params, epoch=12), steps=5
    )
    assert int(state.step) == 60
    # What training alone needs: the earlier encoder is the current one.
    expected = {**params, "prior": params["posterior"]}
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.average, params)
    buffers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    for x in jax.tree.leaves((state.params, state.average)):
        assert x.unsafe_buffer_pointer() not in buffers
        buffers.add(x.unsafe_buffer_pointer())
