"""Flags of main.py: the recipe's, paths, and what --help shows."""

import re
import shutil
import sys

import pytest
from absl import flags
from oracles import ROOT, process

import vaecf
from configs import ml20m
from vaecf import config as config_lib
from vaecf.data import dataset
from vaecf.data.dataset import open_dataset

RECIPE = {
    "epochs": ("train.epochs", 7),
    "batch_size_train": ("train.batch_size", 64),
    "batch_size_validation": ("eval.batch_size", 32),
    "validation_step": ("eval.every_epochs", 3),
    "warm_up_epochs": ("train.warm_up_epochs", 2),
    "total_anneal_steps": ("loss.total_anneal_steps", 100),
    "anneal_cap": ("loss.anneal_cap", 0.3),
    "lam": ("loss.weight_decay", 0.01),
    "lr": ("optimizer.learning_rate", 0.001),
    "beta1": ("optimizer.beta1", 0.8),
    "beta2": ("optimizer.beta2", 0.95),
    "activation": ("model.activation", "relu"),
    "seed": ("seed", 5),
    "data_dir": ("data.dir", "/data"),
}


@pytest.fixture
def config_of(parsed):
    def config_of(*arguments):
        with parsed("main", "--train", "--workdir=w", *arguments) as module:
            return module.main_flags.parse(flags.FLAGS)[0]

    return config_of


@pytest.mark.parametrize("name", RECIPE)
def test_a_flag_of_the_recipe_sets_its_key(config_of, name):
    key, value = RECIPE[name]
    base = config_lib.from_mapping(ml20m.get_config())
    made = config_of(f"--{name}={value}")
    assert made == config_lib.replace(base, {key: value}) != base


def test_defaults_and_flags_beside_the_config(config_of):
    assert config_of() == config_lib.from_mapping(ml20m.get_config())
    config = f"--config={ROOT}/configs/ml1m.py"
    made = config_of(config, "--epochs", "3", "--amp")
    assert (made.train.epochs, made.train.batch_size) == (3, 250)
    assert made.precision.policy == "amp"
    assert config_of("--use_tf_amp").precision.policy == "amp"


def test_data_of_the_recipe(config_of, oracle_dir, tmp_path, monkeypatch):
    """/data if it holds a dataset and no flag says otherwise."""
    place = tmp_path / "data" / "ml-20m" / "preprocessed"
    monkeypatch.setattr(dataset, "RECIPE_DATA_DIR", str(tmp_path / "data"))
    assert config_of().data.dir == "data/ml-20m"
    place.mkdir(parents=True)
    assert config_of().data.dir == "data/ml-20m"
    # Ratings that are not prepared: the message then names this folder.
    (tmp_path / "data" / "ml-20m" / "extracted").mkdir()
    assert config_of().data.dir == str(tmp_path / "data")
    shutil.copytree(oracle_dir, place, dirs_exist_ok=True)
    assert config_of().data.dir == str(tmp_path / "data")
    for flag in ("--data_dir=d", "--config.data.dir=d"):
        assert config_of(flag).data.dir == "d"
    config = f"--config={ROOT}/configs/ml1m.py"
    assert config_of(config).data.dir == "data/ml-1m"


def test_none_for_an_optional_setting(config_of):
    config = f"--config={ROOT}/configs/blend.py"
    assert config_of(config).eval.patience == 3
    for words in (("=None",), ("", "None")):
        flag, *rest = (f"--config.eval.patience{words[0]}", *words[1:])
        assert config_of(config, flag, *rest).eval.patience is None
        assert config_of(flag, *rest).eval.patience is None
    assert config_of("--config.linear.rank", "5").linear.rank == 5


def test_a_home_directory_and_characters_of_patterns(
    trained, oracle_dir, tmp_path, succeeds, monkeypatch
):
    """~ is expanded once; [, * and ? stand for themselves."""
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / "lr[1] *?~"
    shutil.copytree(trained.workdir, home / "run")
    paths = ("log_path=l.json", "results_dir=r", "per_user=u.parquet")
    flags = [f"--{p.replace('=', f'=~/{home.name}/')}" for p in paths]
    again = ("--test", f"--workdir=~/{home.name}/run", "--baselines=ease")
    more = (*trained.training, "--epochs=4", f"--workdir=~/{home.name}/run")
    for words in ((*again, *flags), more):
        succeeds("main", *words)
    made = {path.name for path in home.iterdir()}
    assert made == {"run", "l.json", "r", "u.parquet"}
    model = vaecf.Recommender.load(f"~/{home.name}/run")
    copy = model.save(f"~/{home.name}/[copy]")
    assert copy == home / "[copy]"
    lists = [
        m.recommend([["item-03"]], k=3)["item"].tolist()
        for m in (model, vaecf.Recommender.load(copy))
    ]
    assert lists[0] == lists[1]
    data = shutil.copytree(oracle_dir, home / "data [x]")
    assert open_dataset(f"~/{home.name}/data [x]").path == data


# --- The process ------------------------------------------------------------


def test_help_and_a_mistake(tmp_path):
    main = (sys.executable, ROOT / "experiments" / "main.py")
    done = process(*main, "-h", cwd=tmp_path)
    shown = done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    for flag, default in (("lr", "0.004"), ("epochs", "400"), ("beta2", "0.9")):
        [about] = re.findall(rf"^  --{flag}: ((?:.|\n(?!  -))*)", shown, re.M)
        about = " ".join(about.split())
        assert f"default without --config: {default})" in about
    wanted = (*RECIPE, "config", "workdir", "train", "test", "ease_l2", "xla")
    for name in (*wanted, "top_results", "log_path", "coordinator_address"):
        assert re.search(rf"^  --(\[no\])?{name}\b", shown, re.M), name
    done = process(*main, "--train", "--config.model.latnet=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --config.model.latnet: the config has no key 'latnet'; did "
        "you mean latent?\n"
    )
    assert not list(tmp_path.iterdir())
