"""Every setting is typed, checked, documented and reachable as a flag.

Most tests go through `config.settings()`, so that a new setting needs a test
only for what is particular to it.
"""

import dataclasses
import json
import math
import operator
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from oracles import ROOT, refuses

from configs import default
from vaecf import config as config_lib
from vaecf import workdir as workdir_lib

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
SETTINGS = config_lib.settings()


def choices(key):
    return getattr(SETTINGS[key].metadata["rule"], "choices", ())


# Values to choose another one from, and values of another type.
OTHERS = {
    str: ("some where/else",),
    bool: (True, False),
    int: (17, 2),
    int | None: (24,),
    float: (0.125, 7.5),
    tuple[int, ...]: ((5, 2),),
    tuple[str, ...]: (("map@10", "mrr@5"), ("graph",), ("mlflow",)),
}
WRONG = {
    str: (3, None),
    bool: (1, "true"),
    int: (1.5, 20.0, True, "0", None, np.float64(2), np.bool_(True)),
    int | None: (2.0, True),
    float: ("0.5", True, math.nan, np.float32("inf"), 10**400, None),
    tuple[int, ...]: (3.5, (600, 2.5), (600, True), None),
    tuple[str, ...]: (100, (100,), None),
}


def another(key):
    """A value that is allowed and not the default."""
    field, rule = SETTINGS[key], SETTINGS[key].metadata["rule"]
    values = choices(key) or OTHERS[SETTINGS[key].type]
    allowed = (v for v in values if rule is None or rule.holds(v))
    return next(v for v in allowed if v != field.default)


def plain():
    return default.get_config().to_dict()


def changed(key, value):
    config = plain()
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = value
    return config


def value_of(config, key):
    return operator.attrgetter(key)(config)


def refused(config, key):
    with refuses() as error:
        config_lib.from_mapping(config)
    message = str(error.value)
    assert message.startswith(f"config.{key}=")
    assert "\n" not in message
    return message


def from_command_line(config, *arguments):
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    path = ROOT / "configs" / f"{config}.py"
    argv = ["main.py", f"--config={path}", *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
    return holder.value


def test_default_config_holds_every_setting():
    defaults = config_lib.flatten(dataclasses.asdict(config_lib.Config()))
    assert config_lib.flatten(plain()) == defaults
    assert defaults.keys() == SETTINGS.keys()
    made = config_lib.from_mapping(default.get_config().lock())
    assert made == config_lib.Config()


@pytest.mark.parametrize("key", SETTINGS)
def test_setting_is_documented(key):
    meaning = SETTINGS[key].metadata["meaning"]
    assert len(meaning.split()) > 1 and meaning.endswith(".")
    for choice in choices(key):
        assert f"'{choice}'" in meaning


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_can_be_given_on_the_command_line(config):
    wanted = {key: another(key) for key in SETTINGS}
    flags = (f"--config.{key}={value}" for key, value in wanted.items())
    made = config_lib.from_mapping(from_command_line(config, *flags))
    for key, expected in wanted.items():
        value = value_of(made, key)
        assert value == expected and type(value) is type(expected), key


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hidden", 50, (50,)),
        ("model.hidden", [], ()),
        ("eval.metrics", "mrr@5", ("mrr@5",)),
        ("optimizer.learning_rate", 1, 1.0),
        # Numbers of NumPy, as from a search over np.linspace.
        ("model.latent", np.int64(7), 7),
        ("model.latent", np.array(7), 7),
        ("eval.patience", np.uint8(3), 3),
        ("optimizer.learning_rate", np.float32(0.5), 0.5),
        ("optimizer.learning_rate", np.int16(1), 1.0),
        ("mesh.zero", np.bool_(True), True),
        ("model.name", np.str_("mult_dae"), "mult_dae"),
        ("model.hidden", np.int32(50), (50,)),
        ("model.hidden", np.array([600, 200]), (600, 200)),
        ("train.alternating_epochs", (np.int64(3), np.int64(1)), (3, 1)),
    ],
)
def test_conversions(key, value, expected):
    config = config_lib.from_mapping(changed(key, value))
    made = value_of(config, key)
    assert made == expected and type(made) is type(expected)
    assert config_lib.from_mapping(config.to_dict()) == config


@pytest.mark.parametrize("key", SETTINGS)
def test_a_value_of_another_type(key):
    for value in WRONG[SETTINGS[key].type]:
        refused(changed(key, value), key)
    if section := key.rpartition(".")[0]:
        with refuses(f"config.{section} is not a kn"):
            config_lib.from_mapping(changed(section, 3))


# Keys, values out of range, and a value at the end of the range.
# What a rule's text promises: values to refuse, and the extreme to accept.
RANGES = {
    "above 0": ((0.0, -1.0), 1e-300),
    "at least 0": ((-1,), 0),
    "at least 1": ((0, -1), 1),
    "in [0, 1)": ((-0.1, 1.0, 1.5), 0.0),
    "-1 or at least 1": ((0, -2), -1),
    "in [1, 2**24]": ((0.5, -2.0, 2.0**25), 2.0**24),
    "in [0, 2**32)": ((-1, 2**32), 2**32 - 1),
    "sizes of at least 1": (((0,), (600, -1)), (1,)),
    "not empty": (((),), ("ndcg@1",)),
    "() or two numbers": (((3,), (0, 1), (1, 2, 3)), (3, 1)),
    "(), or some of wandb": (
        (("wandb", "tensorboard"),),
        ("mlflow", "wandb"),
    ),
    "(), or some of ease": ((("knn",), ("ease", "EASE")), ("graph", "slim")),
}
RANGED = [
    key
    for key, field in SETTINGS.items()
    if field.metadata["rule"] and not choices(key)
]


@pytest.mark.parametrize("key", RANGED)
def test_range_of_a_value(key):
    text = SETTINGS[key].metadata["rule"].text
    [(bad, good)] = [
        RANGES[known] for known in RANGES if text.startswith(known)
    ]
    for value in bad:
        refused(changed(key, value), key)
    made = config_lib.from_mapping(changed(key, good))
    assert value_of(made, key) == good


@pytest.mark.parametrize("key", list(filter(choices, SETTINGS)))
def test_an_unknown_choice_names_the_nearest(key):
    longest = max(choices(key), key=len)
    message = refused(changed(key, f"{longest}x"), key)
    assert f"did you mean {longest}?" in message
    message = refused(changed(key, "zzzzzz"), key)
    assert longest in message and "did you mean" not in message


def test_an_unknown_key_names_the_nearest():
    with refuses(r"^config\.model\.latnet .*latent\?$"):
        config_lib.from_mapping(changed("model.latnet", 200))
    with refuses(r"^config\.optimiser\.name .*izer\.name"):
        config_lib.from_mapping({**plain(), "optimiser": {"name": "adam"}})


@pytest.mark.parametrize("key", SETTINGS)
def test_a_missing_key_is_an_error(key):
    config = plain()
    section, _, leaf = key.rpartition(".")
    del (config[section] if section else config)[leaf]
    with refuses(rf"^config\.{key} is missing"):
        config_lib.from_mapping(config)


@pytest.mark.parametrize("key", SETTINGS)
def test_which_keys_may_differ_on_resumption(key):
    old = config_lib.Config()
    new = config_lib.replace(old, {key: another(key)})
    assert old != new
    expected = [] if SETTINGS[key].metadata["resumable"] else [key]
    assert workdir_lib.differing_keys(old, new) == expected
    assert workdir_lib.differing_keys(new, old) == expected


def test_replace():
    config = config_lib.Config()
    made = config_lib.replace(config, {"seed": 3, "model.hidden": (5, 3)})
    assert (made.seed, made.model.hidden) == (3, (5, 3))
    assert config == config_lib.Config()
    for key, near in (("model.latnet", "latent"), ("model.latent.x", "latent")):
        with refuses(f"config.{key} .*{near}"):
            config_lib.replace(config, {key: 1})
    with refuses(r"config\.train\.epochs=-1 must"):
        config_lib.replace(config, {"train.epochs": -1})


def test_json_round_trip():
    wanted = {key: another(key) for key in SETTINGS}
    for changes in ({}, wanted, {"data.dir": 'é "\n', "model.hidden": ()}):
        made = config_lib.replace(config_lib.Config(), changes)
        assert {key: value_of(made, key) for key in changes} == changes
        again = config_lib.from_mapping(json.loads(json.dumps(made.to_dict())))
        assert again == made
