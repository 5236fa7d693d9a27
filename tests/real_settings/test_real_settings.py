"""Runs compiled as users' runs are, with XLA's optimisations.

The other tests switch these optimisations off to compile faster (see
tests/conftest.py). This folder is collected only without that switch:

    XLA_FLAGS= python -m pytest tests/real_settings
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from oracles import generated, ndcg, ranked, recall, recorded

import vaecf
from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data.dataset import write_dataset
from vaecf.models import mult_vae
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import state as state_lib

SMALL = {
    "model.hidden": (32,),
    "model.latent": 16,
    "loss.total_anneal_steps": 50,
    "optimizer.learning_rate": 0.01,
    "train.batch_size": 64,
    "train.epochs": 6,
    "eval.every_epochs": 2,
    "eval.batch_size": 32,
    "eval.metrics": ("ndcg@100", "recall@5"),
    "mesh.data": 1,
}
MODELS = {
    "mult_vae": {},
    "rec_vae+linear": {
        "model.name": "rec_vae",
        "model.init": "spectral",
        "loss.gamma": 0.005,
        "train.alternating_epochs": (2, 1),
        "linear.l2": 20.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: pathlib.Path
    results: dict[str, Any]

    @property
    def losses(self):
        return [*recorded(self.workdir, "train/loss").values()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data"
    return write_dataset(path, generated(300, 40, 80, 4))


def train(data, workdir, changes):
    config = config_lib.replace(
        config_lib.Config(), {"data.dir": str(data.path), **SMALL, **changes}
    )
    actions = experiment.Actions(train=True, test=True)
    results = experiment.run(config, workdir, actions, log=lambda line: None)
    return Run(workdir, results)


@pytest.fixture(
    scope="module",
    # With `pytest -n 2 --dist loadgroup`, each worker trains one model.
    params=[
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in MODELS
    ],
)
def trained(request, data, tmp_path_factory):
    """(name of the model, its run on one device)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, train(data, folder / "run", MODELS[request.param])


def test_training_learns(trained, data):
    _, run = trained
    assert len(run.losses) == 6 and np.isfinite(run.losses).all()
    fold_in, held_out = data.test
    counts_I = data.train.item_counts()
    recalls = [
        recall(ranked(counts_I, fold_in.row(u)), set(held_out.row(u)), 5)
        for u in range(fold_in.n_users)
    ]
    assert run.results["test"]["recall@5"]["mean"] > np.mean(recalls) + 0.05


def test_resuming_gives_the_same_numbers(trained, data, tmp_path):
    """Bit for bit, when interrupted within a phase of RecVAE."""
    name, run = trained
    for epochs in (4, 6):
        changes = {**MODELS[name], "train.epochs": epochs}
        again = train(data, tmp_path, changes)
    assert again.losses == run.losses
    for split in ("validation", "test"):
        assert again.results[split] == run.results[split]


def test_metrics_are_those_of_the_recommendations(trained, data):
    _, run = trained
    fold_in, held_out = data.test
    ids = data.items.ids
    histories = [[ids[i] for i in fold_in.row(u)] for u in range(40)]
    model = vaecf.Recommender.load(run.workdir)
    frame = model.recommend(histories, k=data.n_items)
    ndcgs, recalls = [], []
    for u in range(40):
        items = frame.loc[frame["user"] == u, "item"].tolist()
        assert len(items) == data.n_items - len(histories[u])
        assert not set(items) & set(histories[u])
        wanted = {ids[i] for i in held_out.row(u)}
        ndcgs.append(ndcg(items, wanted, 100))
        recalls.append(recall(items, wanted, 5))
    for metric, values in (("ndcg@100", ndcgs), ("recall@5", recalls)):
        mean = run.results["test"][metric]["mean"]
        assert mean == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.xdist_group("mult_vae")
def test_a_mesh_starts_with_the_same_parameters():
    """Bit for bit, although each item shard of a mesh has padding items."""
    first = {}
    config = config_lib.replace(config_lib.Config(), SMALL)
    for mesh in ((1, 1), (2, 3)):
        setup = state_lib.make_setup(config, 80, mesh_lib.make_mesh(*mesh))
        params = state_lib.scoring_params(setup, state_lib.init_state(setup, 7))
        params = mesh_lib.resize_items(
            jax.device_get(params), mult_vae.PARTITION, 80
        )
        for place, x in jax.tree_util.tree_leaves_with_path(params):
            np.testing.assert_array_equal(x, first.setdefault(place, x))


# RecVAE on meshes is in tests/training/test_alternating.py.
@pytest.mark.parametrize(
    "trained",
    [pytest.param("mult_vae", marks=pytest.mark.xdist_group("mult_vae"))],
    indirect=True,
)
def test_a_mesh_gives_the_same_numbers(trained, data, tmp_path):
    """Eight devices, four along the users and two along the items."""
    name, run = trained
    mesh = {"mesh.data": 4, "mesh.item": 2, "mesh.zero": True}
    sharded = train(data, tmp_path, {**MODELS[name], **mesh})
    assert sharded.results["train"]["devices"] == 8
    np.testing.assert_allclose(sharded.losses, run.losses, rtol=1e-4)
    for metric, cell in run.results["test"].items():
        mean = sharded.results["test"][metric]["mean"]
        assert mean == pytest.approx(cell["mean"], abs=0.02)
