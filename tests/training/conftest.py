"""Small runs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from vaecf import options as options_lib
from vaecf.data import synthetic
from vaecf.data.dataset import Dataset
from vaecf.options import Options
from vaecf.training import loop
from vaecf.training import step as step_lib

_SMALL: dict[str, Any] = {
    "seed": 7,
    "data": {"dir": "unused", "feed": "resident"},
    "model": {
        "name": "mult_vae",
        "hidden": (6,),
        "latent": 3,
        "activation": "tanh",
        "dropout_rate": 0.5,
        "input": "gather",
        "item_block": 0,
        "init": "random",
    },
    "linear": {"l2": 0.0, "dropout": 0.0, "user_exponent": 0.0, "rank": None},
    "loss": {
        "anneal_cap": 0.2,
        "total_anneal_steps": 20,
        "weight_decay": 0.0,
        "gamma": 0.0,
    },
    "optimizer": {
        "learning_rate": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
    },
    "train": {
        "epochs": 3,
        "alternate": (),
        "ema": 0.0,
        "batch_size": 16,
        "microbatch": 0,
        "drop_remainder": False,
        "warm_up_epochs": 1,
    },
    "eval": {
        "every_epochs": 1,
        "batch_size": 64,
        "metrics": ("ndcg@10", "recall@5"),
        "best_metric": "ndcg@10",
        "patience": None,
    },
    "precision": {
        "policy": "fp32",
        "initial_loss_scale": 2.0**15,
        "loss_scale_growth_interval": 2000,
        "max_skipped_in_a_row": 50,
    },
    "mesh": {
        "data": 1,
        "item": 1,
        "zero": False,
        "reduce": "fp32",
        "peer_timeout": 300.0,
    },
}


def _small(**sections: Any) -> Options:
    """A small run's options; small(train={"epochs": 5}) changes a key."""
    config = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in _SMALL.items()
    }
    for key, value in sections.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    return options_lib.from_config(config)


@pytest.fixture(scope="session")
def small() -> Callable[..., Options]:
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
def take() -> Callable[..., tuple[step_lib.TrainState, step_lib.Totals]]:
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
        options: Options,
        data: Dataset = dataset,
        **arguments: Any,
    ) -> loop.TrainResult:
        return loop.train(
            options, data, workdir, show_progress=False, **arguments
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
