"""What a run refuses; tests/experiments/test_main.py checks whole runs."""

import pytest

from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data import synthetic
from vaecf.data.dataset import write_dataset
from vaecf.errors import VaecfError


@pytest.fixture
def data(tmp_path):
    size = {"n_train_users": 30, "n_held_out_users": 4, "n_items": 20}
    small = synthetic.make("synthetic", n_groups=2, **size)
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
    tmp_path, data, changes, actions, message
):
    changes = {"data.dir": str(data.path), **changes}
    config = config_lib.replace(config_lib.Config(), changes)
    wanted = experiment.Actions(**{"train": True, **actions})
    with pytest.raises(VaecfError, match=message):
        experiment.run(config, tmp_path / "w", wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
