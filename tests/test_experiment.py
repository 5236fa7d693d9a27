"""The parts of a run that need no training."""

from __future__ import annotations

import pathlib

import numpy as np
import polars as pl
import pytest

from configs import default
from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data import synthetic
from vaecf.data.dataset import write_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import per_user
from vaecf.evaluation.evaluator import Evaluation


def made(**changes: object) -> config_lib.Config:
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config_lib.from_mapping(config)


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
        ({}, {"train": True, "baselines": ("esae",)}, "'esae' is unknown"),
        (
            {},
            {"train": True, "settings": {"ease": {"l2": float("nan")}}},
            "ease_l2=nan must be above 0",
        ),
        (
            {},
            {"train": True, "settings": {"ials": {"factors": 0}}},
            "ials_factors=0 must be above 0",
        ),
        (
            {},
            {"train": True, "settings": {"itemknn": {"shrinkage": -1.0}}},
            "itemknn_shrinkage=-1 must not be below 0",
        ),
        ({}, {"test": True}, "holds no trained model"),
        (
            {"eval.best_metric": "ndcg"},
            {"train": True},
            "'ndcg' is not a metric",
        ),
        (
            {"mesh.data": 5, "mesh.item": 2},
            {"train": True},
            "does not fit the 8",
        ),
        ({"precision.policy": "tf32"}, {"train": True}, "needs an NVIDIA GPU"),
        ({"data.dir": "nowhere"}, {"train": True}, "no dataset in nowhere"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: pathlib.Path, data, changes, actions, message
) -> None:
    wanted = made(**{"data.dir": str(data.path), **changes})
    with pytest.raises(VaecfError, match=message):
        experiment.run(wanted, tmp_path / "w", experiment.Actions(**actions))
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_per_user_file(tmp_path: pathlib.Path, data) -> None:
    """NaN stays for users with nothing held out; raw ids of the test users."""
    values = np.array([0.5, np.nan, 1.0, 0.25])
    evaluation = Evaluation({}, {"ndcg@10": values}, 3, 1, None)
    path = tmp_path / "users.parquet"
    both = [
        per_user.frame(name, evaluation, data) for name in ("mult_vae", "ease")
    ]
    per_user.write(path, both)
    frame = pl.read_parquet(path)
    assert frame["model"].to_list() == ["mult_vae"] * 4 + ["ease"] * 4
    frame = frame.filter(pl.col("model") == "ease")
    assert frame["user"].to_list() == [35, 36, 37, 38]
    np.testing.assert_array_equal(frame["ndcg@10"].to_numpy(), values)
    np.testing.assert_array_equal(
        frame["fold_in"], np.diff(data.test.fold_in.indptr)
    )
    assert {p.name for p in tmp_path.iterdir()} == {"data", "users.parquet"}
    read = per_user.read(path)
    assert list(read) == ["mult_vae", "ease"]
    assert read["ease"].equals(both[1], null_equal=True)
    path.write_text("no Parquet")
    assert per_user.read(path) == {}
    assert per_user.read(tmp_path / "nowhere.parquet") == {}
    per_user.write(tmp_path / "users.csv", both)
    text = (tmp_path / "users.csv").read_text().splitlines()
    assert text[0] == "model,user,fold_in,held_out,ndcg@10"
    assert len(text) == 9
    (tmp_path / "file").touch()
    with pytest.raises(VaecfError, match=r"cannot write .*u\.csv"):
        per_user.write(tmp_path / "file" / "u.csv", both)


def test_results_in_groups_for_the_report() -> None:
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
    grouped = experiment.for_report(results)
    assert grouped == {
        "train": {"seconds": 1.0},
        "validation": cell,
        "test": {**cell, "users_left_out": 2},
        "baselines": {"ease": both},
        "references": {"oracle": both},
    }
    assert "users_left_out" not in results["test"]
    assert experiment.for_report({}) == {"baselines": {}, "references": {}}


def test_environment_names_versions_and_devices() -> None:
    import jax

    found = experiment.environment()
    assert found["jax"] == jax.__version__
    assert found["device"].startswith("8 x ")


@pytest.mark.parametrize("shared", [True, False])
def test_processes_must_see_one_workdir(monkeypatch, tmp_path, shared) -> None:
    """The second of two: the first has written its token, or elsewhere."""
    monkeypatch.setattr(experiment.processes, "alone", lambda: False)
    monkeypatch.setattr(experiment.processes, "is_lead", lambda: False)
    monkeypatch.setattr(experiment, "_SHARED_SECONDS", 0.2)
    token = np.array([7, 8], np.uint32)
    monkeypatch.setattr(
        experiment.processes, "gather", lambda own: np.stack([token, token])
    )
    where = tmp_path if shared else tmp_path / "of_another_host"
    where.mkdir(exist_ok=True)
    (where / ".processes").write_bytes(token.tobytes())
    if shared:
        experiment._check_shared(tmp_path)
        return
    with pytest.raises(VaecfError, match="is another directory here than"):
        experiment._check_shared(tmp_path)
