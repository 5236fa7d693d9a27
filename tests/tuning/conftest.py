"""A sweep small enough to wait for."""

import pytest
from oracles import generated, recorded

from configs import synthetic as config_file
from vaecf import config as config_lib
from vaecf.data import dataset
from vaecf.reporting import sweep_page
from vaecf.tuning.study import SweepPlan, open_study

SPACE = {
    "optimizer.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "model.dropout_rate": {"low": 0, "high": 0.6},
    "model.latent": {"low": 2, "high": 8, "step": 2},
    "model.hidden": {"choices": [(), (8,)]},
}


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """The page of a sweep takes a second, and has tests of its own."""
    monkeypatch.setattr(sweep_page, "write_sweep", lambda *_, **__: None)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    made = generated(60, 16, 33, 3)
    path = tmp_path_factory.mktemp("tuning") / "data"
    dataset.write_dataset(path, made)
    return path


@pytest.fixture(scope="session")
def base(data_dir):
    config = config_file.get_config()
    config.data.dir = str(data_dir)
    config.data.feed = "resident"
    config.model.hidden, config.model.latent = (), 4
    config.train.batch_size, config.train.epochs = 16, 4
    config.eval.every_epochs = 1
    config.eval.metrics = ("recall@5",)
    config.eval.best_metric = "ndcg@10"
    config.mesh.data = 1
    return config_lib.from_mapping(config)


@pytest.fixture
def plan(base, tmp_path):
    """plan(trials=2): a sweep in a folder of its own, 'sweep'."""

    def make(**changes):
        folder = tmp_path / "sweep"
        settings = {
            "base": base,
            "space": SPACE,
            "workdir": folder,
            "storage": str(folder / "study.journal"),
        }
        return SweepPlan(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def opened():
    def of(plan):
        made = dataset.find_dataset(plan.base.data.dir)
        return open_study(plan, made.manifest_hash)

    return of


@pytest.fixture(scope="session")
def curve():
    """Validations of a folder by epoch, as the run wrote them."""
    return lambda folder: recorded(folder, "validation/ndcg@10")
