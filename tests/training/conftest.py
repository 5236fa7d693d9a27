"""Small runs."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from oracles import generated

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline, loop
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib

_SMALL = config_lib.replace(
    Config(),
    {
        "seed": 7,
        "data.feed": "resident",
        "model.hidden": (6,),
        "model.latent": 3,
        "model.input": "gather",
        "loss.total_anneal_steps": 20,
        "optimizer.learning_rate": 0.01,
        "train.epochs": 3,
        "train.batch_size": 16,
        "eval.batch_size": 64,
        "eval.metrics": ("ndcg@10", "recall@5"),
        "eval.best_metric": "ndcg@10",
        "linear.dropout": 0.0,
        "linear.user_exponent": 0.0,
        "mesh.data": 1,
    },
)


@pytest.fixture(scope="session")
def small():
    """A small run's config; small(train={"epochs": 5}) changes a key."""
    return lambda **sections: config_lib.replace(
        _SMALL, config_lib.flatten(sections)
    )


@pytest.fixture(scope="session")
def dataset():
    """60 training users (4 batches of 16, the last of 12) and 33 items."""
    return generated(60, 16, 33, 3)


@pytest.fixture(scope="session")
def setup_of():
    """setup_of(config, mesh=(1, 1), n_items=33, tx=...)"""

    def make(config, mesh=(1, 1), n_items=33, **changes):
        setup = state_lib.make_setup(config, n_items, mesh_lib.make_mesh(*mesh))
        return dataclasses.replace(setup, **changes)

    return make


@pytest.fixture(scope="session")
def take():
    """take(setup, state, batch, key of the run) → (state, metrics)"""

    def step(setup, state, batch, key):
        keys = step_lib.step_keys(setup, key, state.step)
        return step_lib.train_step(setup, state, batch, keys)

    return jax.jit(step, static_argnums=0)


@pytest.fixture(scope="session")
def run_epochs(dataset):
    """run_epochs(setup, config, [0, 1]) → (state, metrics of every step)."""

    def run(
        setup, config, epochs, *, state=None, kind="resident", dispatches=1
    ):
        seed, size = config.seed, config.train.batch_size
        pipeline = input_pipeline.make_pipeline(
            kind, setup, dataset.train, seed
        )
        state = state or state_lib.init_state(setup, seed)
        taken = []
        for epoch in epochs:
            phase = setup.model.phase(epoch, config.train)
            state = state_lib.begin_phase(setup, state, phase)
            order = input_pipeline.epoch_order(
                seed, epoch, 60, size, parts=setup.parts(size)
            )
            ready = pipeline.prepare(order, setup.in_phase(phase))
            stops = np.linspace(0, len(order), dispatches + 1, dtype=int)
            for start, stop in itertools.pairwise(stops.tolist()):
                state, metrics = pipeline.run(state, ready, start, stop)
                taken.append(metrics)
        return state, jax.tree.map(lambda *x: np.concatenate(x), *taken)

    return run


@pytest.fixture(scope="session")
def train(dataset):
    def run(workdir, config, data=dataset, **arguments):
        return loop.train(
            config, data, workdir, show_progress=False, **arguments
        )

    return run


@pytest.fixture(scope="session")
def host_batch(dataset):
    """host_batch(users, slots=512, parts=1) of the small dataset."""

    def batch(users, slots=512, parts=1):
        users, data = np.asarray(users, np.int32), dataset.train
        return sparse_batch.assemble_on_host(
            data.indptr, data.indices, users, slots, parts
        )

    return batch


def _assert_trees(compare, a, b, **how):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        compare(
            np.asarray(x),
            np.asarray(y),
            err_msg=jax.tree_util.keystr(path),
            **how,
        )


@pytest.fixture(scope="session")
def assert_same():
    """Two trees are equal bit for bit."""
    return lambda a, b: _assert_trees(
        np.testing.assert_array_equal, a, b, strict=True
    )


@pytest.fixture(scope="session")
def assert_close():
    """Two trees are close, by default within 1e-5."""

    def check(a, b, rtol=1e-05, atol=1e-06):
        _assert_trees(np.testing.assert_allclose, a, b, rtol=rtol, atol=atol)

    return check
