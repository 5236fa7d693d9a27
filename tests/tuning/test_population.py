"""Members of a population, compared with separate runs."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from vaecf import config as config_lib
from vaecf.data import dataset as dataset_lib
from vaecf.errors import VaecfError
from vaecf.reporting.writers import read_records
from vaecf.serving.trained_model import load
from vaecf.training import loop
from vaecf.tuning import population
from vaecf.tuning import space as space_lib

MODELS = {
    # With everything that a run may have beside its parameters.
    "mult_vae": {"train.ema": 0.5, "linear.l2": 5.0},
    "rec_vae": {
        "model.name": "rec_vae",
        "model.init": "spectral",
        "loss.gamma": 0.01,
        "train.alternating_epochs": (2, 1),
    },
    "fp16": {
        "precision.policy": "fp16",
        "precision.initial_loss_scale": 2.0**24,
    },
}
# All settings that may differ, including values that a separate run leaves
# out of its program.
OTHER = {
    "seed": 8,
    "model.dropout_rate": 0.0,
    "loss.anneal_cap": 0.1,
    "loss.total_anneal_steps": 0,
    "loss.weight_decay": 1e-3,
    "loss.gamma": 0.02,
    "optimizer.learning_rate": 0.02,
}
assert set(OTHER) == set(population.VARIED)


@pytest.fixture(scope="module")
def dataset(data_dir):
    return dataset_lib.find_dataset(str(data_dir))


@pytest.fixture(scope="module")
def small(base):
    return config_lib.replace(
        base, {"model.hidden": (6,), "loss.total_anneal_steps": 20}
    )


def without_times(records):
    ignored = ("seconds", "_second", "time")
    return [
        {k: v for k, v in record.items() if not k.endswith(ignored)}
        for record in records
        if not any(k.startswith("final/") for k in record)
    ]


@pytest.mark.parametrize(
    ("model", "stacked"),
    [
        ("mult_vae", False),
        ("mult_vae", True),
        ("fp16", True),
        pytest.param("rec_vae", True, marks=pytest.mark.slow),
    ],
)
def test_members_equal_separate_runs(model, stacked, small, dataset, tmp_path):
    config = config_lib.replace(small, MODELS[model])
    configs = [config, config_lib.replace(config, OTHER)]
    directories = [tmp_path / f"member {m}" for m in range(2)]
    for directory in directories:
        directory.mkdir()
    results = population.train_runs(
        configs, directories, dataset, stacked=stacked, show_progress=False
    )
    for own, directory, result in zip(configs, directories, results):
        alone = tmp_path / f"alone {directory.name}"
        run = loop.train(own, dataset, alone, show_progress=False)
        expected = without_times(read_records(alone / "metrics.jsonl"))
        records = without_times(read_records(directory / "metrics.jsonl"))
        assert len(records) == len(expected) == 2 * config.train.epochs
        for ours, theirs in zip(records, expected):
            assert ours.keys() == theirs.keys()
            tolerance = 2e-3 if model == "fp16" else 2e-5
            assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-6)
        assert result.progress.best == pytest.approx(
            run.progress.best, rel=1e-4
        )
        assert result.progress.best_epoch == run.progress.best_epoch
        assert result.progress.timed_users == run.progress.timed_users
        if result.progress.best_epoch == own.train.epochs:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(
                    a, np.asarray(b), rtol=1e-2, atol=1e-3
                ),
                result.params,
                run.params,
            )
        model_ = load(directory)
        assert model_.position["epoch"] == run.progress.best_epoch
        for path in (directory, alone):
            assert (path / "linear").exists() == bool(config.linear.l2)
    assert results[0].records != results[1].records


def test_members_fail_and_stop_without_the_others(small, dataset, tmp_path):
    """Stacked, so that the remaining members are another program."""
    changes = {"train.epochs": 4, "eval.patience": 2, "seed": 7}
    config = config_lib.replace(small, changes)
    configs = [
        config_lib.replace(config, {"optimizer.learning_rate": rate})
        for rate in (1e-12, 1e30, 0.01, 0.02)
    ]
    asked = []

    def on_validation(m, record):
        asked.append((m, record["epoch"]))
        return m != 3

    idle, lost, sound, stopped = population.train_members(
        configs, dataset, stacked=True, on_validation=on_validation
    )
    assert lost.error is not None and lost.error.startswith("the loss is nan")
    assert lost.params is None and not lost.summary
    # Nothing is learned: no gain after the first validation.
    assert (idle.error, idle.progress.epoch, idle.progress.best_epoch) == (
        *(None, 3, 1),
    )
    assert (stopped.stopped, stopped.progress.epoch) == (True, 1)
    alone = loop.train(configs[2], dataset, tmp_path, show_progress=False)
    assert sound.progress.best == pytest.approx(alone.progress.best)
    assert sound.progress.epoch == alone.progress.epoch
    assert [e for m, e in asked if m == 0] == [1, 2, 3]
    assert [e for m, e in asked if m == 3] == [1]


def test_without_validation_users_the_last_epoch_is_the_best(small, dataset):
    held = dataset.validation
    nothing = dataclasses.replace(
        held.held_out,
        indptr=held.held_out.indptr * 0,
        indices=held.held_out.indices[:0],
    )
    empty = dataclasses.replace(
        dataset, validation=held._replace(held_out=nothing)
    )
    (result,) = population.train_members([small], empty)
    assert result.progress.best is None and result.params is not None
    assert result.best_progress["epoch"] == small.train.epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"model.latent": 5}], "model.latent changes the program"),
        ([{}, {"optimizer.beta1": 0.8}], "optimizer.beta1 changes"),
        ([{"mesh.data": 2}] * 2, "on one device, and the mesh has 2"),
        ([{"data.feed": "streamed"}], "config.data.feed='streamed'"),
        ([{"train.epochs": 0}], "config.train.epochs=0 must be"),
        ([], "needs at least one member"),
    ],
)
def test_runs_that_are_not_a_population(small, changes, message):
    with pytest.raises(VaecfError, match=message):
        population.check([config_lib.replace(small, c) for c in changes])


def test_a_grid_has_every_combination(base):
    members = space_lib.grid(
        ["seed=3,4", "optimizer.learning_rate=1e-3,1"], base
    )
    assert [*members] == [
        "seed=3,learning_rate=0.001",
        "seed=3,learning_rate=1.0",
        "seed=4,learning_rate=0.001",
        "seed=4,learning_rate=1.0",
    ]
    last = members["seed=4,learning_rate=1.0"]
    assert (last.seed, last.optimizer.learning_rate) == (4, 1.0)
    assert (last.train, last.loss) == (base.train, base.loss)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "members is empty"),
        (["sed=1"], "config.sed is not a known key; did you mean seed"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["seed=1,2,1"], "seed=1 is there twice"),
        (["seed=1.5"], "config.seed=1.5"),
        (["loss.gamma=1,x"], "'loss.gamma=1,x' must be a setting"),
        (["seed"], "'seed' must be a setting and its values"),
        (
            ["model.dropout_rate=1"],
            r"config.model.dropout_rate=1\.0 must be in",
        ),
    ],
)
def test_grids_that_are_refused(flags, message, base):
    with pytest.raises(VaecfError, match=message) as caught:
        space_lib.grid(flags, base)
    assert "\n" not in str(caught.value)
