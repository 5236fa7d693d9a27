"""Search spaces: checks, and the values that reach the config."""

import importlib
import json
import pathlib

import optuna
import pytest

from vaecf import config as config_lib
from vaecf.errors import VaecfError
from vaecf.tuning import space as space_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
LR = "optimizer.learning_rate"

BAD = {
    "unknown key": (
        {"optimizer.learning_rat": {"low": 0.1, "high": 1.0}},
        r"'optimizer.learning_rat' is not a known key; did you mean optimizer",
    ),
    "section": ({"model": {"choices": [1]}}, "'model' is not a known key"),
    "fixed": ({"data.dir": {"choices": ["a"]}}, "set config.data.dir"),
    "metric": (
        {"eval.best_metric": {"choices": ["ndcg@5"]}},
        "same for all trials",
    ),
    "order": ({LR: {"low": 2.0, "high": 1.0}}, "low=2.0, high=1.0"),
    "no high": ({LR: {"low": 2.0}}, "must have low and high"),
    "no dict": ({LR: [1, 2]}, "must have low and high"),
    "nan": ({LR: {"low": float("nan"), "high": 1.0}}, "=nan must be finite"),
    "log of 0": ({LR: {"low": 0, "high": 1, "log": True}}, "low > 0"),
    "step": ({"model.latent": {"low": 1, "high": 9, "step": 0.5}}, "int"),
    "word": ({LR: {"low": 0.1, "high": 1.0, "lgo": True}}, "may have log"),
    "no choice": ({"model.latent": {"choices": []}}, "choices alone"),
    "twice": ({"model.latent": {"choices": [4, 4]}}, "repeat"),
    "both": ({"model.latent": {"choices": [4], "low": 1}}, "choices alone"),
    "range": (
        {"model.dropout_rate": {"low": 0.0, "high": 1.0}},
        r"config.model.dropout_rate=1.0 must be in \[0, 1\)",
    ),
    "type": ({"model.latent": {"low": 0.5, "high": 4}}, "of type int"),
    "value": ({"model.activation": {"choices": ["tahn"]}}, "mean tanh"),
    "empty": ({}, "at least one key"),
}


@pytest.mark.parametrize("name", BAD)
def test_spaces_that_are_refused(name, base):
    space, message = BAD[name]
    with pytest.raises(VaecfError, match=message) as caught:
        space_lib.check(space, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "KeyError: 'get_space'"),
        ("def get_space(): return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_files_without_a_space(text, message, tmp_path):
    path = tmp_path / "space.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(VaecfError, match=message):
        space_lib.load(path)


def test_kinds_of_intervals(base):
    space = {
        "model.latent": {"low": 2, "high": 9},
        # Integer bounds of a float setting.
        "loss.anneal_cap": {"low": 0, "high": 1},
        "train.batch_size": {"low": 8, "high": 64, "log": True},
        "model.hidden": {"choices": [(), (8,), (8, 4)]},
        "train.drop_remainder": {"choices": [False, True]},
    }
    space_lib.check(space, base)
    got = space_lib.distributions(space, base)
    assert got["model.latent"] == optuna.distributions.IntDistribution(2, 9)
    assert got["loss.anneal_cap"] == optuna.distributions.FloatDistribution(
        0, 1
    )
    assert got["train.batch_size"].log
    # A study's stored choices are turned back into the original values.
    for key, distribution in got.items():
        if not isinstance(
            distribution, optuna.distributions.CategoricalDistribution
        ):
            continue
        stored = json.loads(json.dumps(distribution.choices))
        values = [space_lib.values(space, {key: s})[key] for s in stored]
        assert values == space[key]["choices"]


SPACES = {
    "mult_vae": ("ml1m", "ml20m_paper", "netflix"),
    "mult_dae": ("ml1m_dae", "ml20m_paper", "netflix"),
    "rec_vae": ("ml1m_recvae", "ml20m_recvae", "blend"),
    "blend": ("blend",),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_spaces_of_the_repository(name):
    space = space_lib.load(ROOT / "configs" / "sweeps" / f"{name}.py")
    for config in SPACES[name]:
        module = importlib.import_module(f"configs.{config}")
        made = config_lib.from_mapping(module.get_config())
        space_lib.check(space, made)
        current = made.flat()
        for key, d in space.items():
            if (name, config) in (
                ("mult_vae", "ml1m"),
                ("mult_dae", "ml1m_dae"),
                ("rec_vae", "blend"),
                ("blend", "blend"),
            ):
                if "low" in d:
                    assert d["low"] <= current[key] <= d["high"], key
                else:  # as JSON, where a tuple is a list
                    assert current[key] in json.loads(json.dumps(d["choices"]))
    files = {p.stem for p in (ROOT / "configs" / "sweeps").glob("*.py")}
    assert files == {"__init__", *SPACES}
