"""Search spaces: checks, and the values that reach the config."""

import importlib
import json

import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from oracles import ROOT, refuses

from vaecf import config as config_lib
from vaecf.tuning import space as space_lib

LR = "optimizer.learning_rate"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optimizer.learning_rat": {"low": 0.1, "high": 1.0}},
            r"'optimizer.learning_rat' is not a known key; did you mean optimizer",
        ),
        ({"model": {"choices": [1]}}, "'model' is not a known key"),
        ({"data.dir": {"choices": ["a"]}}, "set config.data.dir"),
        (
            {"eval.best_metric": {"choices": ["ndcg@5"]}},
            "same for all trials",
        ),
        ({LR: {"low": 2.0, "high": 1.0}}, "low=2.0, high=1.0"),
        ({LR: {"low": 2.0}}, "must have low and high"),
        ({LR: [1, 2]}, "must have low and high"),
        ({LR: {"low": float("nan"), "high": 1.0}}, "=nan must be finite"),
        ({LR: {"low": 0, "high": 1, "log": True}}, "low > 0"),
        ({"model.latent": {"low": 1, "high": 9, "step": 0.5}}, "int"),
        ({LR: {"low": 0.1, "high": 1.0, "lgo": True}}, "may have log"),
        ({"model.latent": {"choices": []}}, "choices alone"),
        ({"model.latent": {"choices": [4, 4]}}, "repeat"),
        ({"model.latent": {"choices": [4], "low": 1}}, "choices alone"),
        (
            {"model.dropout_rate": {"low": 0.0, "high": 1.0}},
            r"config.model.dropout_rate=1.0 must be in \[0, 1\)",
        ),
        ({"model.latent": {"low": 0.5, "high": 4}}, "of type int"),
        ({"model.activation": {"choices": ["tahn"]}}, "mean tanh"),
        ({}, "at least one key"),
    ],
)
def test_spaces_that_are_refused(space, message, base):
    with refuses(message):
        space_lib.check(space, base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "KeyError: 'get_space'"),
        (
            "def get_space(): return 1 / 0",
            r"space.py, line 1: .*ZeroDivisionErr",
        ),
        ("\ndef get_space(:", r"space.py, line 2: .*SyntaxError"),
    ],
)
def test_files_without_a_space(text, message, tmp_path):
    path = tmp_path / "space.py"
    if text is not None:
        path.write_text(text)
    with refuses(message):
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
    assert got["model.latent"] == IntDistribution(2, 9)
    assert got["loss.anneal_cap"] == FloatDistribution(0, 1)
    assert got["train.batch_size"].log
    # A study's stored choices are turned back into the original values.
    for key, distribution in got.items():
        if not isinstance(distribution, CategoricalDistribution):
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
