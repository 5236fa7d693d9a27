"""The moving average of the parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline, loop
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints

DECAY = 0.3  # met after three epochs: (1 + 3) / (10 + 3) is above it


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiles many programs of a few steps with few optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def options_of(small, name: str, **train):
    turns = {"alternating_epochs": (2, 1)} if name == "rec_vae" else {}
    return small(
        model={"name": name},
        train={**turns, "ema": DECAY, "epochs": 4, **train},
    )


def by_hand(setup, config, train) -> dict[str, np.ndarray]:
    """Trains epoch by epoch and averages the parameters in NumPy."""
    feed = input_pipeline.make_pipeline("resident", setup, train, config.seed)
    state = state_lib.init_state(setup, config.seed)

    def ends():
        return {
            jax.tree_util.keystr(path): np.asarray(x, np.float64)
            for path, x in jax.tree_util.tree_leaves_with_path(state.params)
            if "prior" not in jax.tree_util.keystr(path)
        }

    average = ends()
    for epoch in range(config.train.epochs):
        phase = setup.model.phase(epoch, config.train)
        state = state_lib.begin_phase(setup, state, phase)
        order = input_pipeline.epoch_order(
            config.seed, epoch, train.n_users, config.train.batch_size
        )
        turn = setup.in_phase(phase)
        state, _ = feed.run(state, feed.prepare(order, turn), 0, len(order))
        kept = min(DECAY, (1 + epoch) / (10 + epoch))
        now = ends()
        average = {k: kept * average[k] + (1 - kept) * now[k] for k in now}
    return average


def test_what_ranks_is_the_average(small, dataset, train, tmp_path):
    """Over both phases of RecVAE, without its prior."""
    name = "rec_vae"
    config = options_of(small, name)
    result = train(tmp_path, config)
    plain = state_lib.make_setup(
        options_of(small, name, ema=0.0), 33, mesh_lib.make_mesh(-1, 1)
    )
    expected = by_hand(plain, config, dataset.train)
    leaves = jax.tree_util.tree_leaves_with_path(result.params)
    assert {jax.tree_util.keystr(p) for p, _ in leaves} == set(expected)
    for path, value in leaves:
        np.testing.assert_allclose(
            value,
            expected[jax.tree_util.keystr(path)],
            rtol=1e-4,
            atol=1e-5,
        )


def test_resumed_after_an_epoch(small, train, tmp_path, assert_same):
    whole = train(tmp_path / "whole", options_of(small, "mult_vae"))
    train(tmp_path / "parts", options_of(small, "mult_vae", epochs=2))
    parts = train(tmp_path / "parts", options_of(small, "mult_vae"))
    assert_same(parts.params, whole.params)
    trees = []
    for name in ("whole", "parts"):
        saved = Checkpoints(tmp_path / name / "checkpoints")
        trees.append(loop.restore_state(whole.setup, saved))
        assert saved.step(BEST) is not None and saved.step(LATEST) == 16
        saved.close()
    assert_same(*trees)
    assert not np.array_equal(
        trees[0].average["output_kernel"], trees[0].params["output_kernel"]
    )


def test_sharded_as_the_parameters_are(small):
    mesh = mesh_lib.make_mesh(2, 2)
    setup = state_lib.make_setup(options_of(small, "mult_vae"), 33, mesh)
    places = state_lib.state_shardings(setup)
    assert places.average == places.params
    plain = options_of(small, "mult_vae", ema=0.0)
    state = state_lib.init_state(state_lib.make_setup(plain, 33, mesh), 7)
    assert state.average is None
    assert state_lib.update_average(state, 0.5, 3) is state
