"""Members of a population, compared with separate runs."""

import jax
import numpy as np
import pytest
from oracles import refuses

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.data import dataset as dataset_lib
from vaecf.reporting.writers import read_records
from vaecf.training import loop
from vaecf.tuning import population

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


def trained(configs, dataset, folder, **options):
    """Trains members in folder/0, folder/1, ... and returns their results."""
    directories = [folder / str(m) for m in range(len(configs))]
    for directory, config in zip(directories, configs):
        with workdir_lib.locked(directory):
            workdir_lib.check_or_create(directory, config, dataset)

    def train(m, shared):
        return loop.train(
            configs[m],
            dataset,
            directories[m],
            show_progress=False,
            shared=shared,
            **options,
        )

    return population.train_members(configs, directories, dataset, train)


@pytest.mark.parametrize(
    "model",
    ["fp16", pytest.param("rec_vae", marks=pytest.mark.slow)],
)
def test_members_equal_separate_runs(model, small, dataset, tmp_path):
    config = config_lib.replace(small, MODELS[model])
    configs = [config, config_lib.replace(config, OTHER)]
    runs = trained(configs, dataset, tmp_path)
    rtol = 2e-3 if model == "fp16" else 2e-5
    # The programs of a separate RecVAE take long to compile.
    for m in (0, 1) if model == "fp16" else (1,):
        own, run = configs[m], runs[m]
        alone = loop.train(
            own, dataset, tmp_path / f"alone {m}", show_progress=False
        )
        expected = without_times(
            read_records(tmp_path / f"alone {m}" / "metrics.jsonl")
        )
        records = without_times(
            read_records(tmp_path / str(m) / "metrics.jsonl")
        )
        assert len(records) == len(expected) == 2 * config.train.epochs
        for ours, theirs in zip(records, expected):
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=rtol, abs=1e-6)
        assert run.progress.best == pytest.approx(alone.progress.best, rel=rtol)
        assert run.progress.best_epoch == alone.progress.best_epoch
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-2, atol=1e-3 if model == "fp16" else 1e-4
            ),
            run.params,
            alone.params,
        )
    compiled = [run.summary["compile_seconds"] > 0.05 for run in runs]
    assert any(compiled)  # one member compiles for all, the others may wait
    values = [run.progress.best for run in runs]
    assert values[0] != values[1]


def test_an_error_stops_the_other_members(small, dataset, tmp_path):
    """A diverged member is the caller's business; a defect stops all."""
    config = config_lib.replace(small, {"train.epochs": 5000})
    configs = [config_lib.replace(config, {"seed": s}) for s in (1, 2, 3)]
    started, steps = [], []

    def train(m, shared):
        started.append(m)
        if m == 0:
            raise TypeError("a defect")
        try:
            loop.train(
                configs[m],
                dataset,
                tmp_path / str(m),
                show_progress=False,
                shared=shared,
            )
        finally:
            steps.append(m)

    directories = [tmp_path / str(m) for m in range(3)]
    with pytest.raises(TypeError, match="a defect"):
        population.train_members(configs, directories, dataset, train)
    assert sorted(steps) == sorted(m for m in started if m)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"model.latent": 5}], "model.latent changes the program"),
        ([{}, {"optimizer.beta1": 0.8}], "optimizer.beta1 changes"),
        ([{"mesh.data": 2}] * 2, "one device: set num_pr"),
        ([], "needs at least one member"),
    ],
)
def test_runs_that_are_not_a_population(small, changes, message):
    with refuses(message):
        population.check([config_lib.replace(small, c) for c in changes])
