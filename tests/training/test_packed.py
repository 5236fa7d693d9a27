"""The steps that are written for a GPU, on CPU devices."""

import jax
import numpy as np
import pytest

from vaecf.parallel import mesh as mesh_lib
from vaecf.training import packed
from vaecf.training import state as state_lib


@pytest.mark.parametrize(
    ("sections", "mesh"),
    [
        ({"precision": {"policy": "fp16"}}, (1, 1)),
        ({"model": {"name": "rec_vae"}, "mesh": {"zero": True}}, (2, 2)),
        (
            {
                "precision": {"policy": "bf16"},
                "mesh": {"zero": True, "reduce": "compute"},
            },
            (2, 2),
        ),
    ],
    ids=["mult_vae", "rec_vae", "zero"],
)
def test_steps_for_a_gpu_train_like_those_for_a_cpu(
    small, run_epochs, assert_close, assert_same, sections, mesh
):
    """All steps of an epoch, whose batches a GPU makes before them."""
    alternating = (1, 1) if "model" in sections else ()
    config = small(train={"alternating_epochs": alternating}, **sections)
    found = []
    for platform in ("cpu", "gpu"):
        setup = state_lib.make_setup(
            config, 33, mesh_lib.make_mesh(*mesh), platform
        )
        found.append(run_epochs(setup, config, [0]))
        start = state_lib.init_state(setup, config.seed)
        # Steps whose bounds the program does not know.
        assert_close(
            run_epochs(setup, config, [0], dispatches=2)[0],
            found[-1][0],
            rtol=1e-3,
            atol=1e-3,
        )
        packing = packed.packing(setup, start.params)
        changed = packing.pack_state(start)
        assert_same(packing.unpack_state(changed), start)
        arrays = [len(jax.tree.leaves(x)) for x in (start, changed)]
        assert (arrays[0] == arrays[1]) == (platform == "cpu")
    (state, metrics), (packed_state, packed_metrics) = found
    np.testing.assert_allclose(packed_metrics.loss, metrics.loss, rtol=1e-4)
    tolerance = 2e-3 if alternating == () else 1e-5
    assert_close(packed_state, state, rtol=tolerance, atol=tolerance)
