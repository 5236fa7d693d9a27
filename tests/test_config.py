"""Every key typed, checked and reachable from the command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
import sys
import typing
from typing import Any

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags

from configs import default
from vaecf import config as config_lib
from vaecf.errors import VaecfError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem != "__init__"
)

# Every key: a text for the command line, and what it must become. No config
# has any of these values.
OVERRIDES: dict[str, tuple[str, Any]] = {
    "seed": ("11", 11),
    "data.dir": ("some where/else", "some where/else"),
    "data.feed": ("streamed", "streamed"),
    "model.name": ("mult_dae", "mult_dae"),
    "model.hidden": ("(30,20)", (30, 20)),
    "model.latent": ("7", 7),
    "model.activation": ("relu", "relu"),
    "model.dropout_rate": ("0.25", 0.25),
    "model.input": ("gather", "gather"),
    "model.item_block": ("512", 512),
    "model.init": ("spectral", "spectral"),
    "linear.l2": ("33", 33.0),
    "linear.dropout": ("0.125", 0.125),
    "linear.user_exponent": ("0.75", 0.75),
    "linear.rank": ("24", 24),
    "loss.anneal_cap": ("0.75", 0.75),
    "loss.total_anneal_steps": ("12", 12),
    "loss.weight_decay": ("0.125", 0.125),
    "loss.gamma": ("0.375", 0.375),
    "optimizer.learning_rate": ("1e-2", 0.01),
    "optimizer.beta1": ("0.5", 0.5),
    "optimizer.beta2": ("0.75", 0.75),
    "optimizer.epsilon": ("1e-6", 1e-6),
    "train.epochs": ("3", 3),
    "train.alternating_epochs": ("(5,2)", (5, 2)),
    "train.ema": ("0.5", 0.5),
    "train.batch_size": ("17", 17),
    "train.microbatch": ("13", 13),
    "train.drop_remainder": ("true", True),
    "train.warm_up_epochs": ("2", 2),
    "eval.every_epochs": ("9", 9),
    "eval.batch_size": ("19", 19),
    "eval.metrics": ("('map@10','mrr@5')", ("map@10", "mrr@5")),
    "eval.best_metric": ("map@10", "map@10"),
    "eval.patience": ("4", 4),
    "precision.policy": ("bf16", "bf16"),
    "precision.initial_loss_scale": ("1024", 1024.0),
    "precision.loss_scale_growth_interval": ("5", 5),
    "precision.max_skipped_in_a_row": ("6", 6),
    "mesh.data": ("2", 2),
    "mesh.item": ("4", 4),
    "mesh.zero": ("true", True),
    "mesh.reduce": ("compute", "compute"),
    "mesh.peer_timeout": ("60", 60.0),
}
# Changing one of these changes no number of a step.
MAY_DIFFER = {
    "data.dir",
    "data.feed",
    "train.epochs",
    "train.microbatch",
    "train.warm_up_epochs",
    "eval.every_epochs",
    "eval.batch_size",
    "eval.metrics",
    "eval.patience",
    "precision.max_skipped_in_a_row",
    "mesh.data",
    "mesh.item",
    "mesh.zero",
    "mesh.peer_timeout",
}


def plain() -> dict[str, Any]:
    return default.get_config().to_dict()


def changed(key: str, value: Any) -> dict[str, Any]:
    config = plain()
    section = config
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    return config


def leaves(cls: type, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys |= leaves(hint, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


def from_command_line(config: str, *arguments: str) -> Any:
    values = flags.FlagValues()
    argv = [
        "main.py",
        f"--config={ROOT / 'configs' / config}.py",
        *arguments,
    ]
    holder = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
    return holder.value


def test_keys_of_the_default_config_are_the_fields() -> None:
    keys = set(config_lib.flatten(plain()))
    assert keys == leaves(config_lib.Config) == set(OVERRIDES)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_can_be_given_on_the_command_line(config: str) -> None:
    sys.modules.pop("config_config", None)
    before = config_lib.flatten(from_command_line(config).to_dict())
    given = [f"--config.{k}={text}" for k, (text, _) in OVERRIDES.items()]
    made = config_lib.from_mapping(from_command_line(config, *given))
    for key, (_, expected) in OVERRIDES.items():
        value: Any = made
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected and type(value) is type(expected), key
        unchanged = {
            "ml20m": {"train.drop_remainder"},
            "ml1m_dae": {"model.name"},
            "ml20m_dae": {"model.name"},
            "netflix_dae": {"model.name"},
            "msd_dae": {"model.name"},
            "blend": {"model.init"},
        }
        assert (before[key] == expected) == (
            key in unchanged.get(config, ())
        ), key


def test_a_switch_can_be_turned_off() -> None:
    config = from_command_line("ml20m", "--noconfig.train.drop_remainder")
    assert config_lib.from_mapping(config).train.drop_remainder is False


def test_one_value_stands_for_a_tuple_of_one() -> None:
    assert config_lib.from_mapping(
        changed("model.hidden", 50)
    ).model.hidden == (50,)
    made = config_lib.from_mapping(changed("eval.metrics", "mrr@5"))
    assert made.eval.metrics == ("mrr@5",)
    assert (
        config_lib.from_mapping(changed("model.hidden", [])).model.hidden == ()
    )


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    made = config_lib.from_mapping(changed("optimizer.learning_rate", 1))
    assert type(made.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1.5),
        ("seed", True),
        ("seed", "0"),
        ("data.dir", None),
        ("data.dir", 3),
        ("model.hidden", 3.5),
        ("model.hidden", (600, 2.5)),
        ("model.hidden", (600, True)),
        ("model.latent", 20.0),
        ("model.latent", None),
        ("model.dropout_rate", "0.5"),
        ("model.dropout_rate", True),
        ("optimizer.learning_rate", math.nan),
        ("optimizer.learning_rate", math.inf),
        ("optimizer.learning_rate", None),
        ("train.drop_remainder", 1),
        ("train.epochs", 1e3),
        ("eval.patience", 2.0),
        ("eval.patience", True),
        ("eval.metrics", 100),
        ("eval.metrics", (100,)),
        ("eval.metrics", None),
        ("model", 3),
    ],
)
def test_a_value_of_another_type(key: str, value: object) -> None:
    refused(changed(key, value), key)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", (-1, 2**32)),
        ("model.hidden", ((0,), (600, -1))),
        ("model.dropout_rate", (-0.1, 1.0)),
        ("optimizer.beta1", (-0.1, 1.0, 1.5)),
        ("optimizer.beta2", (-0.1, 1.0)),
        ("loss.anneal_cap", (-0.1,)),
        ("loss.total_anneal_steps", (-1,)),
        ("loss.weight_decay", (-1e-9,)),
        ("optimizer.learning_rate", (0.0, -1.0)),
        ("optimizer.epsilon", (0.0, -1e-8)),
        ("precision.initial_loss_scale", (0.0,)),
        ("train.epochs", (-1,)),
        ("train.microbatch", (-1,)),
        ("train.warm_up_epochs", (-1,)),
        ("eval.patience", (0, -1)),
        ("eval.metrics", ((),)),
        ("mesh.data", (0, -2)),
        ("mesh.item", (0, -2)),
        ("mesh.peer_timeout", (-1.0,)),
        ("mesh.reduce", ("fp16", "")),
        *(
            (key, (0, -1))
            for key in (
                "model.latent",
                "train.batch_size",
                "eval.batch_size",
                "eval.every_epochs",
                "precision.loss_scale_growth_interval",
                "precision.max_skipped_in_a_row",
            )
        ),
    ],
)
def test_a_value_out_of_range(key: str, values: tuple) -> None:
    for value in values:
        refused(changed(key, value), key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32 - 1),
        ("loss.total_anneal_steps", 0),
        ("loss.anneal_cap", 0.0),
        ("model.dropout_rate", 0.0),
        ("optimizer.beta1", 0.0),
        ("train.epochs", 0),
        ("train.warm_up_epochs", 0),
        ("eval.patience", 1),
        ("mesh.item", -1),
        ("mesh.peer_timeout", 0.0),
        ("model.latent", 1),
    ],
)
def test_a_value_at_the_edge(key: str, value: object) -> None:
    flat = config_lib.flatten(
        config_lib.from_mapping(changed(key, value)).to_dict()
    )
    assert flat[key] == value


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("model.name", "mult-vae", "mult_vae"),
        ("model.activation", "tanhh", "tanh"),
        ("model.input", "gathr", "gather"),
        ("data.feed", "streaming", "streamed"),
        ("precision.policy", "bf61", "bf16"),
    ],
)
def test_an_unknown_choice_names_the_nearest(
    key: str, value: str, near: str
) -> None:
    message = refused(changed(key, value), key)
    assert f"did you mean {near}?" in message
    with pytest.raises(VaecfError, match="use one of") as error:
        config_lib.from_mapping(changed(key, "zzzzzz"))
    assert "did you mean" not in str(error.value)


def refused(config: dict[str, Any], key: str) -> str:
    with pytest.raises(VaecfError) as error:
        config_lib.from_mapping(config)
    message = str(error.value)
    assert message.startswith(f"config.{key}=")
    assert "\n" not in message
    return message


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(VaecfError, match=r"^config\.model\.latnet .*latent\?$"):
        config_lib.from_mapping(changed("model.latnet", 200))
    config = plain()
    config["optimiser"] = {}
    with pytest.raises(VaecfError, match=r"^config\.optimiser .*optimizer\?$"):
        config_lib.from_mapping(config)


@pytest.mark.parametrize("key", sorted(OVERRIDES))
def test_a_missing_key_is_an_error(key: str) -> None:
    config = plain()
    section = config
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section[parent]
    del section[leaf]
    with pytest.raises(VaecfError, match=rf"^config\.{key} is missing"):
        config_lib.from_mapping(config)


@pytest.mark.parametrize("key", sorted(OVERRIDES))
def test_which_keys_may_differ_on_resumption(key: str) -> None:
    old = config_lib.from_mapping(plain()).to_dict()
    new = config_lib.from_mapping(changed(key, OVERRIDES[key][1])).to_dict()
    assert old != new
    expected = [] if key in MAY_DIFFER else [key]
    assert config_lib.differing_keys(old, new) == expected
    assert config_lib.differing_keys(new, old) == expected


def test_keys_on_one_side_only_differ() -> None:
    old = config_lib.from_mapping(plain()).to_dict()
    new = copy.deepcopy(old)
    del new["model"]["latent"]
    new["loss"]["gamma"] = None
    assert config_lib.differing_keys(old, new) == ["loss.gamma", "model.latent"]


@given(
    seed=st.integers(0, 2**32 - 1),
    hidden=st.lists(st.integers(1, 10_000), max_size=4),
    rate=st.floats(1e-300, 1e300),
    beta=st.floats(0, 1, exclude_max=True),
    patience=st.none() | st.integers(1, 100),
    directory=st.text(),
)
def test_written_and_read_again(
    seed: int,
    hidden: list[int],
    rate: float,
    beta: float,
    patience: int | None,
    directory: str,
) -> None:
    config = plain()
    config["seed"] = seed
    config["data"]["dir"] = directory
    config["model"]["hidden"] = hidden
    config["optimizer"]["learning_rate"] = rate
    config["optimizer"]["beta1"] = beta
    config["eval"]["patience"] = patience
    made = config_lib.from_mapping(config)
    assert (made.seed, made.data.dir) == (seed, directory)
    assert made.model.hidden == tuple(hidden)
    assert (made.optimizer.learning_rate, made.optimizer.beta1) == (rate, beta)
    assert made.eval.patience == patience
    again = config_lib.from_mapping(json.loads(json.dumps(made.to_dict())))
    assert again == made


def test_options_do_not_change() -> None:
    made = config_lib.from_mapping(plain())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1  # type: ignore[misc]


def test_the_config_of_a_run(tmp_path: pathlib.Path) -> None:
    config = default.get_config().lock()
    assert config_lib.config_of_run(tmp_path, config) is config
    assert config_lib.from_mapping(config) == config_lib.from_config(plain())
    run = config_lib.from_mapping(
        from_command_line(
            "ml1m",
            *(f"--config.{k}={text}" for k, (text, _) in OVERRIDES.items()),
        )
    )
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    assert config_lib.load(tmp_path / "config.json") == run
    again = config_lib.config_of_run(tmp_path, config)
    assert config_lib.from_mapping(again) == run
    assert again.is_locked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "not JSON"),
        ('{"seed": 0', "not JSON"),
        ("[]", "must be a section"),
        ("{}", r"config\.seed is missing"),
    ],
)
def test_a_damaged_config_of_a_run(
    tmp_path: pathlib.Path, text: str | None, message: str
) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(VaecfError, match=message) as error:
        config_lib.load(path)
    assert "\n" not in str(error.value)


def test_a_run_from_before_microbatches_loads(tmp_path: pathlib.Path) -> None:
    config = config_lib.from_mapping(plain()).to_dict()
    del config["train"]["microbatch"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert config_lib.load(path).train.microbatch == 0


@pytest.mark.parametrize(("l2", "rank"), [(0.0, None), (150.0, 0)])
def test_a_path_from_before_there_was_a_rank_is_whole(
    tmp_path: pathlib.Path, l2: float, rank: int | None
) -> None:
    """And a run without one goes on under today's default."""
    config = config_lib.from_mapping(plain()).to_dict()
    del config["linear"]["rank"], config["model"]["init"]
    config["linear"]["l2"] = l2
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    loaded = config_lib.load(path)
    assert loaded.linear.rank == rank and loaded.model.init == "random"
