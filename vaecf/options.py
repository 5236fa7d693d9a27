"""Typed, validated settings of a run.

`configs/` holds the defaults as an ml_collections ConfigDict; this module
turns one into plain frozen dataclasses, checks every value, and is all that
the library knows of configuration. Fields have no defaults here on purpose:
a key missing from a config is an error, not a silent choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from vaecf.errors import VaecfError


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which dataset, and how it reaches the device."""

    dir: str
    feed: str


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Architecture."""

    name: str
    hidden: tuple[int, ...]
    latent: int
    activation: str
    dropout_rate: float
    input: str
    item_block: int
    init: str


@dataclasses.dataclass(frozen=True)
class LinearOptions:
    """The linear path beside the model, fitted in closed form."""

    l2: float
    dropout: float
    user_exponent: float
    rank: int | None


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights of the loss's terms."""

    anneal_cap: float
    total_anneal_steps: int
    weight_decay: float
    gamma: float


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Adam."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The training loop."""

    epochs: int
    alternate: tuple[int, ...]
    ema: float
    batch_size: int
    microbatch: int
    drop_remainder: bool
    warm_up_epochs: int


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Validation and test."""

    every_epochs: int
    batch_size: int
    metrics: tuple[str, ...]
    best_metric: str
    patience: int | None


@dataclasses.dataclass(frozen=True)
class PrecisionOptions:
    """Numeric policy."""

    policy: str
    initial_loss_scale: float
    loss_scale_growth_interval: int
    max_skipped_in_a_row: int


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along users and items (-1 means the rest), and between them."""

    data: int
    item: int
    zero: bool
    reduce: str
    peer_timeout: float


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything a run depends on."""

    seed: int
    data: DataOptions
    model: ModelOptions
    linear: LinearOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    train: TrainOptions
    eval: EvalOptions
    precision: PrecisionOptions
    mesh: MeshOptions

    @property
    def title(self) -> str:
        """What ranks, by its short name: 'rec_vae', or 'rec_vae+linear'."""
        return title_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def title_of(config: Mapping[str, Any]) -> str:
    """`Options.title` of a config.json."""
    path = "+linear" if config.get("linear", {}).get("l2") else ""
    return f"{config['model']['name']}{path}"


# Keys that may differ between a run and its resumption: they change how long
# or where it runs, not what the numbers of a step are.
RESUMABLE = frozenset(
    {
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
)

_ACTIVATIONS = ("tanh", "relu")
_FEEDS = ("auto", "resident", "streamed")
_INPUTS = ("auto", "gather", "dense")
_INITS = ("random", "spectral")
_MODELS = ("mult_vae", "mult_dae", "rec_vae")
_REDUCTIONS = ("fp32", "compute")
_POLICIES = ("amp", "fp32", "tf32", "bf16", "fp16")


def from_config(config: Mapping[str, Any]) -> Options:
    """Options of a nested mapping (ConfigDict, or config.json's content).

    Raises:
      VaecfError: an unknown, missing or ill-typed key, or a value out of
        range; names the key as `config.section.key` and the mend.
    """
    options = _build(Options, config, "config")
    _check(options)
    return options


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.latent': 200, ...} of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two config dicts differ so that resuming is refused."""
    a, b = flatten(old), flatten(new)
    return sorted(
        key
        for key in a.keys() | b.keys()
        if key not in RESUMABLE and a.get(key, ...) != b.get(key, ...)
    )


# Keys that came later, and what a run did before there was one.
_LATER = {
    ("model", "init"): "random",
    ("train", "microbatch"): 0,
    ("loss", "gamma"): 0.0,
    ("train", "alternate"): (),
    ("train", "ema"): 0.0,
    ("linear", "l2"): 0.0,
    ("linear", "dropout"): 0.5,
    ("linear", "user_exponent"): 0.5,
    ("linear", "rank"): None,
    ("mesh", "zero"): False,
    ("mesh", "reduce"): "fp32",
    ("mesh", "peer_timeout"): 300.0,
}


def load(path: pathlib.Path) -> Options:
    """Options of a run's config.json, also of one written before a key was.

    Raises:
      VaecfError: the file is missing or not JSON.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise VaecfError(
            f"{path}: no such file; is its directory the workdir of a run?"
        ) from None
    except OSError as error:
        raise VaecfError(
            f"{path}: cannot be read ({error.strerror}); give the workdir of a "
            "run"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VaecfError(f"{path}: not JSON ({error})") from None
    return from_config(with_later_keys(config))


def with_later_keys(config: Any) -> Any:
    """A run's config.json with the keys that it was written before."""
    if not isinstance(config, dict):
        return config  # `from_config` says what is wrong
    filled = dict(config)
    for (section, key), value in _LATER.items():
        given = filled.setdefault(section, {})
        if isinstance(given, dict):
            filled[section] = {key: value, **given}
    linear = config.get("linear")
    if isinstance(linear, dict) and linear.get("l2") and "rank" not in linear:
        filled["linear"]["rank"] = 0  # all paths were whole
    return filled


def config_of_run(workdir: pathlib.Path, config: Any) -> Any:
    """The ConfigDict `config` with the values of the run in `workdir`.

    As it is when there is no run: what comes next says so.
    """
    path = workdir / "config.json"
    if path.exists():
        values = load(path).to_dict()
        with config.unlocked():
            config.update(values)
    return config


def nearest(word: str, words: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest of `words`, or ''."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _build(cls: type, values: Any, where: str) -> Any:
    hints = get_type_hints(cls)
    if not hasattr(values, "items"):
        raise VaecfError(
            f"{where}={values!r} must be a section with keys {', '.join(hints)}"
        )
    given = dict(values.items())
    for key in given:
        if key not in hints:
            raise VaecfError(
                f"{where}.{key} is not a known key{nearest(key, hints)}"
            )
    for key in hints:
        if key not in given:
            raise VaecfError(f"{where}.{key} is missing: add it to the config")
    return cls(
        **{
            key: _convert(hint, given[key], f"{where}.{key}")
            for key, hint in hints.items()
        }
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as the field's type; bool is not an int, int is a float."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if hint == int | None:
        return None if value is None else _convert(int, value, where)
    if hint in (tuple[int, ...], tuple[str, ...]):
        kind = hint.__args__[0]
        items = (value,) if isinstance(value, kind) else value
        if not isinstance(items, (tuple, list)):
            raise VaecfError(
                f"{where}={value!r} must be a tuple of {kind.__name__}"
            )
        return tuple(_convert(kind, item, where) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise VaecfError(f"{where}={value!r} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise VaecfError(f"{where}={value!r} must be finite")
    return value


def _check(o: Options) -> None:
    """Ranges and choices, one line each: (key, value, rule, holds)."""
    _choice("model.name", o.model.name, _MODELS)
    _choice("model.activation", o.model.activation, _ACTIVATIONS)
    _choice("model.input", o.model.input, _INPUTS)
    _choice("model.init", o.model.init, _INITS)
    _choice("data.feed", o.data.feed, _FEEDS)
    _choice("mesh.reduce", o.mesh.reduce, _REDUCTIONS)
    _choice("precision.policy", o.precision.policy, _POLICIES)
    _rule("seed", o.seed, "in [0, 2**32)", 0 <= o.seed < 2**32)
    for size in o.model.hidden:
        _rule("model.hidden", o.model.hidden, "sizes >= 1", size >= 1)
    turns = o.train.alternate
    _rule(
        "train.alternate",
        turns,
        "() or epochs of the encoder and of the decoder, both >= 1",
        turns == () or (len(turns) == 2 and min(turns) >= 1),
    )
    growth_interval = o.precision.loss_scale_growth_interval
    positive: dict[str, float] = {
        "model.latent": o.model.latent,
        "train.batch_size": o.train.batch_size,
        "eval.batch_size": o.eval.batch_size,
        "eval.every_epochs": o.eval.every_epochs,
        "precision.loss_scale_growth_interval": growth_interval,
        "precision.max_skipped_in_a_row": o.precision.max_skipped_in_a_row,
    }
    for key, value in positive.items():
        _rule(key, value, "at least 1", value >= 1)
    not_negative: dict[str, float] = {
        "train.epochs": o.train.epochs,
        "train.microbatch": o.train.microbatch,
        "train.warm_up_epochs": o.train.warm_up_epochs,
        "model.item_block": o.model.item_block,
        "mesh.peer_timeout": o.mesh.peer_timeout,
        "loss.anneal_cap": o.loss.anneal_cap,
        "loss.total_anneal_steps": o.loss.total_anneal_steps,
        "loss.weight_decay": o.loss.weight_decay,
        "loss.gamma": o.loss.gamma,
        "linear.l2": o.linear.l2,
        "linear.user_exponent": o.linear.user_exponent,
    }
    for key, value in not_negative.items():
        _rule(key, value, "at least 0", value >= 0)
    above_zero = {
        "optimizer.learning_rate": o.optimizer.learning_rate,
        "optimizer.epsilon": o.optimizer.epsilon,
        "precision.initial_loss_scale": o.precision.initial_loss_scale,
    }
    for key, real in above_zero.items():
        _rule(key, real, "above 0", real > 0)
    fractions = {
        "model.dropout_rate": o.model.dropout_rate,
        "linear.dropout": o.linear.dropout,
        "train.ema": o.train.ema,
        "optimizer.beta1": o.optimizer.beta1,
        "optimizer.beta2": o.optimizer.beta2,
    }
    for key, real in fractions.items():
        _rule(key, real, "in [0, 1)", 0 <= real < 1)
    for key, count in (("mesh.data", o.mesh.data), ("mesh.item", o.mesh.item)):
        _rule(key, count, "-1 or at least 1", count == -1 or count >= 1)
    patience = o.eval.patience
    _rule(
        "eval.patience",
        patience,
        "None or at least 1",
        patience is None or patience >= 1,
    )
    rank = o.linear.rank
    _rule("linear.rank", rank, "None or at least 0", rank is None or rank >= 0)
    _rule("eval.metrics", o.eval.metrics, "not empty", bool(o.eval.metrics))


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise VaecfError(
            f"config.{key}={value!r} is unknown{nearest(value, choices)} "
            f"(use one of {', '.join(choices)})"
        )


def _rule(key: str, value: Any, rule: str, holds: bool) -> None:
    if not holds:
        raise VaecfError(f"config.{key}={value!r} must be {rule}")
