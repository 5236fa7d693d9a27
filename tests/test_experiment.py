"""What a run refuses, and the views of its results.

tests/experiments/test_main.py checks whole runs.
"""

from __future__ import annotations

import pathlib

import jax
import pytest

from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data import synthetic
from vaecf.data.dataset import write_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines
from vaecf.reporting import report


@pytest.fixture
def data(tmp_path: pathlib.Path):
    small = synthetic.make(
        "synthetic",
        n_train_users=30,
        n_held_out_users=4,
        n_items=20,
        n_groups=2,
    )
    return write_dataset(tmp_path / "data", small)


@pytest.mark.parametrize(
    ("changes", "actions", "message"),
    [
        ({}, {"baselines": ("esae",)}, "'esae' is unknown"),
        ({}, {"settings": {"ease": {"l2": float("nan")}}}, "ease_l2=nan must"),
        ({}, {"settings": {"ials": {"factors": 0}}}, "ials_factors=0 must"),
        ({}, {"train": False}, "holds no trained model"),
        ({"eval.best_metric": "ndcg"}, {}, "'ndcg' is not a metric"),
        ({"mesh.data": 5, "mesh.item": 2}, {}, "does not fit the 8"),
        ({"precision.policy": "tf32"}, {}, "needs an NVIDIA GPU"),
        ({"data.dir": "nowhere"}, {}, "no dataset in nowhere"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: pathlib.Path, data, changes, actions, message
) -> None:
    changes = {"data.dir": str(data.path), **changes}
    config = config_lib.replace(config_lib.Config(), changes)
    wanted = experiment.Actions(**{"train": True, **actions})
    with pytest.raises(VaecfError, match=message):
        experiment.run(config, tmp_path / "w", wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_grouped_results() -> None:
    cell = {"ndcg@100": {"mean": 0.5, "stderr": 0.1, "users": 9}}
    both = {"test": cell, "validation": cell}
    results = {
        "train": {"seconds": 1.0},
        "inference": {"batch_1_mean_latency": 1.0},
        **both,
        "users_left_out": 2,
        "ease": both,
        "oracle": both,
    }
    assert baselines.grouped(results) == {
        "train": {"seconds": 1.0},
        "validation": cell,
        "test": cell,
        "users_left_out": 2,
        "baselines": {"ease": both},
        "references": {"oracle": both},
    }
    assert baselines.grouped({}) == {"baselines": {}, "references": {}}


def test_environment() -> None:
    found = report.environment(jax.devices())
    assert found["jax"] == jax.__version__
    assert found["device"].startswith("8 x ")
