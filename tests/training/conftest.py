"""Small runs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.data import synthetic
from vaecf.data.dataset import Dataset
from vaecf.training import loop
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


def _small(**sections: Any) -> Config:
    """A small run's config; small(train={"epochs": 5}) changes a key."""
    return config_lib.replace(_SMALL, config_lib.flatten(sections))


@pytest.fixture(scope="session")
def small() -> Callable[..., Config]:
    return _small


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """60 training users (4 batches of 16, the last of 12) and 33 items."""
    return synthetic.make(
        "synthetic",
        n_train_users=60,
        n_held_out_users=16,
        n_items=33,
        n_groups=3,
    )


@pytest.fixture(scope="session")
def take() -> Callable[..., tuple[state_lib.TrainState, step_lib.StepMetrics]]:
    """`train_step`, compiled quickly rather than well."""
    return jax.jit(
        step_lib.train_step,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},
    )


@pytest.fixture(scope="session")
def train(dataset: Dataset) -> Callable[..., loop.TrainResult]:
    """train(workdir, options) on the small dataset."""

    def run(
        workdir: pathlib.Path,
        config: Config,
        data: Dataset = dataset,
        **arguments: Any,
    ) -> loop.TrainResult:
        return loop.train(
            config, data, workdir, show_progress=False, **arguments
        )

    return run


def _assert_trees(compare: Callable[..., None], a: Any, b: Any, **how: Any):
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
def assert_same() -> Callable[[Any, Any], None]:
    """Two trees are equal bit for bit."""
    return lambda a, b: _assert_trees(
        np.testing.assert_array_equal, a, b, strict=True
    )


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Two trees are close, by default within 1e-5."""

    def check(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
        _assert_trees(np.testing.assert_allclose, a, b, rtol=rtol, atol=atol)

    return check


@pytest.fixture(scope="session")
def without_validation(dataset: Dataset) -> Dataset:
    """The dataset with nothing held out of the validation users."""
    held = dataset.validation
    empty = dataclasses.replace(
        held.held_out,
        indptr=np.zeros_like(held.held_out.indptr),
        indices=held.held_out.indices[:0],
    )
    return dataclasses.replace(
        dataset, validation=held._replace(held_out=empty)
    )
