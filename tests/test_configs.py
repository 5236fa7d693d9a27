"""The configs: valid, and what their papers and recipes say."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

from vaecf import config as config_lib
from vaecf.data import catalog
from vaecf.evaluation import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = (
    *(
        "synthetic",
        "ml100k",
        "ml1m",
        "ml1m_dae",
        "ml1m_recvae",
        "yelp2018",
        "blend",
    ),
    *("ml20m", "ml20m_paper", "ml20m_dae", "ml20m_recvae"),
    *("netflix", "netflix_dae", "netflix_recvae"),
    *("msd", "msd_dae", "msd_recvae"),
)


def module(name: str):
    return importlib.import_module(f"configs.{name}")


def made(name: str) -> config_lib.Config:
    return config_lib.from_mapping(module(name).get_config())


def test_there_are_these() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {*NAMES, "default", "__init__"}


@pytest.mark.parametrize("name", ("default", *NAMES))
def test_it_is_valid(name: str) -> None:
    config = made(name)
    for metric in (*config.eval.metrics, config.eval.best_metric):
        metrics.parse(metric)
    # Two calls share nothing that one of them could change.
    first, second = module(name).get_config(), module(name).get_config()
    first.model.latent += 1
    assert second.model.latent == first.model.latent - 1


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_is_the_way_to_run_it(name: str) -> None:
    text = module(name).__doc__ or ""
    commands = re.sub(r"\\\n\s+", "", text)
    (prepare,) = re.findall(r"experiments/prepare_dataset\.py (.*)", commands)
    (main,) = re.findall(r"experiments/main\.py (.*)", commands)
    (output,) = re.findall(r"--output=(\S+)", prepare)
    where = re.findall(r"--config\.data\.dir=(\S+)", main)
    assert (where or [made(name).data.dir]) == [output]
    assert f"--config=configs/{name}.py" in main.split()
    assert {"--train", "--test"} < set(main.split())
    (dataset,) = re.findall(r"--dataset=(\S+)", prepare)
    assert dataset in catalog.CATALOG


def test_the_recipe() -> None:
    """Defaults of the arguments of NVIDIA's main.py, and its architecture."""
    o = made("ml20m")
    assert (o.train.batch_size, o.train.epochs) == (24_576, 400)
    assert o.train.warm_up_epochs == 5
    assert (o.eval.batch_size, o.eval.every_epochs) == (10_000, 50)
    assert (o.loss.anneal_cap, o.loss.total_anneal_steps) == (0.1, 15_000)
    assert o.loss.weight_decay == 0
    assert o.optimizer.learning_rate == 0.004
    assert (o.optimizer.beta1, o.optimizer.beta2) == (0.9, 0.9)
    assert o.optimizer.epsilon == 1e-8
    assert (o.model.name, o.model.hidden, o.model.latent) == (
        "mult_vae",
        (600,),
        200,
    )
    assert (o.model.activation, o.model.dropout_rate) == ("tanh", 0.5)
    assert o.train.drop_remainder
    assert o.seed == 0


@pytest.mark.parametrize(
    ("name", "gamma"),
    [
        ("ml1m_recvae", 0.005),
        ("ml20m_recvae", 0.005),
        ("netflix_recvae", 0.0035),
        ("msd_recvae", 0.01),
    ],
)
def test_recvae(name: str, gamma: float) -> None:
    """Defaults of the authors' run.py; 50 rounds of three epochs and one."""
    o = made(name)
    assert (o.model.name, o.model.hidden, o.model.latent) == (
        "rec_vae",
        (600,),
        200,
    )
    assert (o.train.alternating_epochs, o.train.epochs) == ((3, 1), 200)
    assert (o.train.batch_size, o.optimizer.learning_rate) == (500, 5e-4)
    assert (o.loss.gamma, o.model.dropout_rate) == (gamma, 0.5)


@pytest.mark.parametrize("name", ["ml20m_paper", "netflix", "msd"])
def test_the_paper(name: str) -> None:
    """Liang et al. (2018), section 4.5, and the notebook with it."""
    o = made(name)
    assert (o.model.name, o.model.hidden, o.model.latent) == (
        "mult_vae",
        (600,),
        200,
    )
    assert (o.train.batch_size, o.train.epochs) == (500, 200)
    assert (o.loss.anneal_cap, o.loss.total_anneal_steps) == (0.2, 200_000)
    assert o.optimizer.learning_rate == 1e-3
    assert (o.optimizer.beta1, o.optimizer.beta2) == (0.9, 0.999)
    assert not o.train.drop_remainder
    assert o.eval.metrics == ("ndcg@100", "recall@20", "recall@50")
    assert o.eval.best_metric == "ndcg@100"


def test_the_papers_dae() -> None:
    """I - 200 - I, lambda = 0.01 / 500 of the notebook."""
    o = made("ml20m_dae")
    assert (o.model.name, o.model.hidden, o.model.latent) == (
        "mult_dae",
        (),
        200,
    )
    assert o.loss.weight_decay == pytest.approx(0.01 / 500)
    same = {"model.name", "model.hidden", "loss.weight_decay"}
    paper = config_lib.flatten(made("ml20m_paper").to_dict())
    ours = config_lib.flatten(o.to_dict())
    assert {key for key in ours if ours[key] != paper[key]} == same
