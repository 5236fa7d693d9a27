"""Every setting of a run: its default, its meaning, and what is allowed.

Only this module declares settings. `configs/default.py` makes an ml_collections
ConfigDict of the defaults, the other config files change a few keys, and
`from_mapping` makes the frozen dataclasses that the library uses.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vaecf.errors import VaecfError, did_you_mean, short


class Rule(NamedTuple):
    """A condition on a value, and the end of "the value must be ..."."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> Rule:
    text = f"one of {', '.join(choices)}"
    return Rule(text, choices.__contains__, choices)


_POSITIVE = Rule("above 0", lambda x: x > 0)
_NOT_NEGATIVE = Rule("at least 0", lambda x: x >= 0)
_COUNT = Rule("at least 1", lambda x: x >= 1)
_FRACTION = Rule("in [0, 1)", lambda x: 0 <= x < 1)
_DEVICES = Rule("-1 or at least 1", lambda x: x == -1 or x >= 1)


def _setting(
    default: Any,
    meaning: str,
    rule: Rule | None = None,
    *,
    resumable: bool = False,
) -> Any:
    """Declares a setting; resumable ones may change when a run is resumed."""
    about = {"meaning": meaning, "rule": rule, "resumable": resumable}
    return dataclasses.field(default=default, metadata=about)


# Resumable settings change how long or where a run computes, not the numbers of
# a step.
_resumable = functools.partial(_setting, resumable=True)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset and how it reaches the device."""

    dir: str = _resumable(
        "data/synthetic",
        "Directory written by prepare_dataset.py, or the paper's pro_sg "
        "directory, or the recipe's preprocessed directory.",
    )
    feed: str = _resumable(
        "auto",
        "Where training interactions are kept: 'resident' on the device, "
        "'streamed' from disk, or 'auto' by size.",
        _one_of("auto", "resident", "streamed"),
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    name: str = _setting(
        "mult_vae",
        "Model: 'mult_vae', 'mult_dae' or 'rec_vae'.",
        _one_of("mult_vae", "mult_dae", "rec_vae"),
    )
    hidden: tuple[int, ...] = _setting(
        (600,),
        "Units of the encoder's hidden layers, from the items inwards; the "
        "decoder mirrors them.",
        Rule("sizes of at least 1", lambda sizes: all(n >= 1 for n in sizes)),
    )
    latent: int = _setting(200, "Units of the latent layer.", _COUNT)
    activation: str = _setting(
        "tanh",
        "Activation: 'tanh' or 'relu'. rec_vae always uses swish.",
        _one_of("tanh", "relu"),
    )
    dropout_rate: float = _setting(
        0.5,
        "Share of a user's interactions dropped from the input in training.",
        _FRACTION,
    )
    input: str = _setting(
        "auto",
        "Input layer: 'gather' or 'dense' (same numbers to rounding), or "
        "'auto' by device.",
        _one_of("auto", "gather", "dense"),
    )
    item_block: int = _setting(
        0,
        "Items per block of the likelihood, to save memory with large "
        "catalogues; 0 computes all items at once.",
        _NOT_NEGATIVE,
    )
    init: str = _setting(
        "random",
        "Initial output weights: 'random', or 'spectral' (from the singular "
        "vectors of the interactions), which needs fewer epochs.",
        _one_of("random", "spectral"),
    )


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """The linear item-item branch of a blend (`vaecf.models.blend`)."""

    l2: float = _setting(
        0.0,
        "L2 regularisation λ of the linear branch, in squared interactions; "
        "0 trains the model without a linear branch. 150 is a good start.",
        _NOT_NEGATIVE,
    )
    dropout: float = _setting(
        0.5,
        "Dropout rate of the linear branch's input (Steck 2020).",
        _FRACTION,
    )
    user_exponent: float = _setting(
        0.5,
        "Weighs a user with n items by n ** -user_exponent in the fit.",
        _NOT_NEGATIVE,
    )
    rank: int | None = _setting(
        None,
        "Rank of the branch's factors; 0 keeps the full items x items matrix; "
        "None means 0 up to 25,000 items and 512 beyond.",
        _NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss."""

    anneal_cap: float = _setting(
        0.2,
        "Largest weight of the KL term, which is "
        "min(anneal_cap, step / total_anneal_steps).",
        _NOT_NEGATIVE,
    )
    total_anneal_steps: int = _setting(
        200_000, "Steps of KL annealing; 0 starts at the cap.", _NOT_NEGATIVE
    )
    weight_decay: float = _setting(
        0.0,
        "Factor of the sum of squared weights (without biases) in the loss.",
        _NOT_NEGATIVE,
    )
    gamma: float = _setting(
        0.0,
        "If above 0, the KL weight is gamma times the user's number of "
        "interactions (RecVAE) instead of the annealed weight.",
        _NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser."""

    name: str = _setting(
        "adam", "Optimiser, a key of `vaecf.training.optimizers.OPTIMIZERS`."
    )
    learning_rate: float = _setting(1e-3, "Learning rate.", _POSITIVE)
    beta1: float = _setting(0.9, "Decay of the first moment.", _FRACTION)
    beta2: float = _setting(0.999, "Decay of the second moment.", _FRACTION)
    epsilon: float = _setting(1e-8, "Term in the denominator.", _POSITIVE)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = _resumable(
        200, "Passes over the training users.", _NOT_NEGATIVE
    )
    alternating_epochs: tuple[int, ...] = _setting(
        (),
        "rec_vae: epochs that train the encoder and epochs that train the "
        "decoder, in alternation, such as (3, 1). () for the other models.",
        Rule(
            "() or two numbers of at least 1",
            lambda n: n == () or (len(n) == 2 and min(n) >= 1),
        ),
    )
    ema: float = _setting(
        0.0,
        "Decay per epoch of the moving average of the parameters that is used "
        "for ranking, such as 0.95; 0 uses the parameters themselves.",
        _FRACTION,
    )
    batch_size: int = _setting(500, "Users per step, over all devices.", _COUNT)
    microbatch: int = _resumable(
        0,
        "Users whose activations a device holds at once; a larger batch sums "
        "the gradients of several (same numbers to rounding). 0 means 1024 on "
        "a CPU and the whole batch on an accelerator.",
        _NOT_NEGATIVE,
    )
    drop_remainder: bool = _setting(
        False, "Drop the users that do not fill the last batch of an epoch."
    )
    warm_up_epochs: int = _resumable(
        1,
        "First epochs that the mean throughput leaves out.",
        _NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation and test."""

    every_epochs: int = _resumable(1, "Epochs between validations.", _COUNT)
    batch_size: int = _resumable(2000, "Users per evaluation batch.", _COUNT)
    metrics: tuple[str, ...] = _resumable(
        ("ndcg@100", "recall@20", "recall@50"),
        "Names in evaluation.metrics with their cut-offs, such as ndcg@100.",
        Rule("not empty", bool),
    )
    best_metric: str = _setting(
        "ndcg@100", "Metric that decides which epoch is the best."
    )
    patience: int | None = _resumable(
        None,
        "Validations without improvement that stop training; None: never.",
        _COUNT,
    )


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Numeric precision and dynamic loss scaling."""

    policy: str = _setting(
        "fp32",
        "Precision of matrix products: 'fp32', 'tf32', 'bf16', 'fp16', or "
        "'amp' (bf16 where the device supports it, else fp16).",
        _one_of("amp", "fp32", "tf32", "bf16", "fp16"),
    )
    initial_loss_scale: float = _setting(
        2.0**15,
        "First loss scale of fp16.",
        Rule("in [1, 2**24]", lambda x: 1 <= x <= 2**24),
    )
    loss_scale_growth_interval: int = _setting(
        2000, "Finite steps before the loss scale doubles.", _COUNT
    )
    max_skipped_in_a_row: int = _resumable(
        50,
        "Consecutive steps with overflowing gradients that raise an error.",
        _COUNT,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices, and the traffic between them."""

    data: int = _resumable(
        -1,
        "Devices along the users; -1 uses what mesh.item leaves.",
        _DEVICES,
    )
    item: int = _resumable(
        1,
        "Devices along the items; -1 uses what mesh.data leaves.",
        _DEVICES,
    )
    zero: bool = _resumable(
        False,
        "Shard the optimiser moments over the users' devices, to save memory.",
    )
    reduce: str = _setting(
        "fp32",
        "Precision in which gradients are summed over devices: 'fp32', or "
        "'compute' for that of the matrix products (half the traffic in bf16).",
        _one_of("fp32", "compute"),
    )
    peer_timeout: float = _resumable(
        300.0,
        "Seconds without progress after which a run of several processes "
        "fails; longer than a compilation and a validation. 0 waits forever.",
        _NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = _setting(
        0,
        "Seed of initialisation, batch order, dropout and noise.",
        Rule("in [0, 2**32)", lambda seed: 0 <= seed < 2**32),
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    linear: LinearConfig = LinearConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def title(self) -> str:
        """Short name of the ranking model: 'rec_vae' or 'rec_vae+linear'."""
        return self.model.name + ("+linear" if self.linear.l2 else "")

    def to_dict(self) -> dict[str, Any]:
        """Returns the nested dict of JSON values that config.json holds."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def flat(self) -> dict[str, Any]:
        """Returns the JSON values by dotted key: {'model.latent': 200, ...}."""
        return flatten(self.to_dict())


# The blend: RecVAE (Shenbin et al. 2020) beside a linear branch. The settings
# that differ from the paper were chosen on validation users of MovieLens-1M.
BLEND: dict[str, Any] = {
    "model.name": "rec_vae",
    "model.init": "spectral",
    "model.dropout_rate": 0.65,
    "linear.l2": 150.0,
    "loss.gamma": 0.005,
    "optimizer.learning_rate": 5e-4,
    "train.alternating_epochs": (3, 1),
    "train.ema": 0.95,
    "train.epochs": 160,
    "train.batch_size": 200,
    "eval.every_epochs": 8,
    "eval.patience": 3,
}


def settings(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Returns the dataclass field of every setting by its dotted key."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            found |= settings(type(field.default), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Returns the Config of a nested mapping that holds every key.

    The mapping is an ml_collections ConfigDict or the content of config.json.

    Raises:
      VaecfError: a key is missing; or see `replace`.
    """
    flat = flatten(values)
    config = replace(Config(), flat)
    for key in settings():
        if key not in flat:
            raise VaecfError(f"config.{key} is missing: add it to the config")
    return config


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the config with changes such as {"train.epochs": 40}.

    Raises:
      VaecfError: a key is unknown, or a value is not allowed; names the key.
    """
    known = settings()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        if key not in known:
            raise VaecfError(
                f"config.{key} is not a known key{did_you_mean(key, known)}"
            )
        section, _, leaf = key.rpartition(".")
        checked = _checked(f"config.{key}", known[key], value)
        sections.setdefault(section, {})[leaf] = checked
    new = sections.pop("", {})
    for section, values in sections.items():
        new[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **new)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'model.latent': 200, ...} for a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if hasattr(value, "items"):  # a dict, or a ConfigDict
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value as the type of the setting, if its rule allows it."""
    value, rule = convert(field.type, value, name), field.metadata["rule"]
    # None stands outside the range of an optional number.
    if rule and value is not None and not rule.holds(value):
        hint = did_you_mean(value, rule.choices) if rule.choices else ""
        raise VaecfError(f"{name}={short(value)} must be {rule.text}{hint}")
    return value


def plain(value: Any) -> Any:
    """Returns scalars and arrays of NumPy as numbers and lists of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def convert(hint: Any, value: Any, where: str) -> Any:
    """Returns the value as the type of a setting; a bool is not an int."""
    value = plain(value)
    if hint == int | None:
        return None if value is None else convert(int, value, where)
    if hint in (tuple[int, ...], tuple[str, ...]):
        kind = hint.__args__[0]
        items = (value,) if isinstance(value, kind) else value
        if not isinstance(items, (tuple, list)):
            raise VaecfError(
                f"{where}={short(value)} must be a tuple of {kind.__name__}"
            )
        return tuple(convert(kind, item, where) for item in items)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise VaecfError(
            f"{where}={short(value)} must be of type {hint.__name__}"
        )
    if hint is float and not math.isfinite(value):
        raise VaecfError(f"{where}={short(value)} must be finite")
    return value
