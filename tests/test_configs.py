"""The configs: valid, and equal to their papers and recipes."""

import importlib
import re

import pytest
from oracles import ROOT

from vaecf import config as config_lib
from vaecf.data import catalog
from vaecf.evaluation import metrics

FILES = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
NAMES = sorted(FILES - {"default"})


def module(name):
    return importlib.import_module(f"configs.{name}")


def made(name):
    return config_lib.from_mapping(module(name).get_config())


def has(name, **expected):
    """Checks settings, such as train__epochs=200 for train.epochs."""
    config = made(name)
    changes = {k.replace("__", "."): v for k, v in expected.items()}
    assert config_lib.replace(config, changes) == config


@pytest.mark.parametrize("name", sorted(FILES))
def test_config_is_valid(name):
    config = made(name)
    for metric in (*config.eval.metrics, config.eval.best_metric):
        metrics.parse(metric)
    # Two calls share nothing that one of them could change.
    first, second = module(name).get_config(), module(name).get_config()
    first.model.latent += 1
    assert second.model.latent == first.model.latent - 1


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_the_commands(name):
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


def test_the_recipe():
    """Defaults of the arguments of NVIDIA's main.py, and its architecture."""
    has(
        "ml20m", seed=0, model__name="mult_vae", model__hidden=(600,),
        model__latent=200, model__activation="tanh", model__dropout_rate=0.5,
        train__batch_size=24_576, train__epochs=400, train__warm_up_epochs=5,
        train__drop_remainder=True, eval__batch_size=10_000,
        eval__every_epochs=50, loss__anneal_cap=0.1,
        loss__total_anneal_steps=15_000, loss__weight_decay=0,
        optimizer__learning_rate=0.004, optimizer__beta1=0.9,
        optimizer__beta2=0.9, optimizer__epsilon=1e-8,
    )  # fmt: skip


@pytest.mark.parametrize("data", ["ml1m", "ml20m"])
def test_recvae(data):
    """Defaults of the authors' run.py; 50 rounds of three epochs and one."""
    has(
        f"{data}_recvae", model__name="rec_vae", model__hidden=(600,),
        model__latent=200, model__dropout_rate=0.5,
        train__alternating_epochs=(3, 1), train__epochs=200,
        train__batch_size=500, optimizer__learning_rate=5e-4, loss__gamma=0.005,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ml20m_paper", "netflix", "msd"])
def test_the_paper(name):
    """Liang et al. (2018), section 4.5, and the notebook with it."""
    has(
        name, model__name="mult_vae", model__hidden=(600,), model__latent=200,
        train__batch_size=500, train__epochs=200, train__drop_remainder=False,
        loss__anneal_cap=0.2, loss__total_anneal_steps=200_000,
        optimizer__learning_rate=1e-3, optimizer__beta1=0.9,
        optimizer__beta2=0.999,
        eval__metrics=("ndcg@100", "recall@20", "recall@50"),
        eval__best_metric="ndcg@100",
    )  # fmt: skip


def test_the_papers_dae():
    """I - 200 - I, and lambda = 0.01 / 500 of the notebook."""
    changes = {
        "model.name": "mult_dae",
        "model.hidden": (),
        "loss.weight_decay": 0.01 / 500,
    }
    paper = config_lib.replace(made("ml20m_paper"), changes)
    assert made("ml20m_dae") == paper
