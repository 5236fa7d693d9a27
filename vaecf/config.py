"""Every setting of a run: its default, its meaning, and what is allowed.

Only this module declares settings. `configs/default.py` makes an ml_collections
ConfigDict of the defaults, the other config files change a few keys, and
`from_mapping` makes the frozen dataclasses that the library uses.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from vaecf.baseline_config import FITTED, BaselineConfig
from vaecf.errors import VaecfError, did_you_mean
from vaecf.setting import (
    COUNT,
    DEVICES,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    checked,
    one_of,
    setting,
)

# Resumable settings change how long or where a run computes, not the numbers of
# a step.
_resumable = functools.partial(setting, resumable=True)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset and how it reaches the device."""

    dir: str = _resumable(
        "data/synthetic",
        "Directory written by the command prepare, or the paper's pro_sg "
        "directory, or the recipe's preprocessed directory.",
    )
    feed: str = _resumable(
        "auto",
        "Where training interactions are kept: 'resident' on the device, "
        "'streamed' from disk, or 'auto' by size.",
        one_of("auto", "resident", "streamed"),
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    name: str = setting(
        "mult_vae",
        "Model: an autoencoder ('mult_vae', 'mult_dae' or 'rec_vae'), or a "
        "model that is fitted in one go ('popularity', 'itemknn', 'rp3beta', "
        "'slim', 'ials' or 'ease'), with its settings in `baseline`.",
        one_of("mult_vae", "mult_dae", "rec_vae", *FITTED),
    )
    hidden: tuple[int, ...] = setting(
        (600,),
        "Units of the encoder's hidden layers, from the items inwards; the "
        "decoder mirrors them.",
        Rule("sizes of at least 1", lambda sizes: all(n >= 1 for n in sizes)),
    )
    latent: int = setting(200, "Units of the latent layer.", COUNT)
    activation: str = setting(
        "tanh",
        "Activation: 'tanh' or 'relu'. rec_vae always uses swish.",
        one_of("tanh", "relu"),
    )
    dropout_rate: float = setting(
        0.5,
        "Share of a user's interactions dropped from the input in training.",
        FRACTION,
    )
    input: str = setting(
        "auto",
        "Input layer: 'gather' or 'dense' (same numbers to rounding), or "
        "'auto' by device.",
        one_of("auto", "gather", "dense"),
    )
    item_block: int = setting(
        0,
        "Items per block of the likelihood, to save memory with large "
        "catalogues; 0 computes all items at once.",
        NOT_NEGATIVE,
    )
    init: str = setting(
        "random",
        "Initial output weights: 'random', or 'spectral' (from the singular "
        "vectors of the interactions), which needs fewer epochs.",
        one_of("random", "spectral"),
    )


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """The linear item-item branch of a blend (`vaecf.models.blend`)."""

    l2: float = setting(
        0.0,
        "L2 regularisation λ of the linear branch, in squared interactions; "
        "0 trains the model without a linear branch. 150 is a good start.",
        NOT_NEGATIVE,
    )
    dropout: float = setting(
        0.5,
        "Dropout rate of the linear branch's input (Steck 2020).",
        FRACTION,
    )
    user_exponent: float = setting(
        0.5,
        "Weighs a user with n items by n ** -user_exponent in the fit.",
        NOT_NEGATIVE,
    )
    experts: tuple[str, ...] = setting(
        (),
        "Closed forms in the branch, of 'ease', 'graph' (a graph filter), "
        "'ials' (implicit ALS) and 'slim' (SLIM on neighbours); () means ease "
        "and ials up to 25,000 items, and all beyond.",
        Rule(
            "(), or some of ease, graph, ials, slim",
            lambda names: set(names) <= {"ease", "graph", "ials", "slim"},
        ),
    )
    rank: int | None = setting(
        None,
        "Rank of EASE's factors; 0 keeps the full items x items matrix; "
        "None means 0 up to 25,000 items and 512 beyond.",
        NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss."""

    anneal_cap: float = setting(
        0.2,
        "Largest weight of the KL term, which is "
        "min(anneal_cap, step / total_anneal_steps).",
        NOT_NEGATIVE,
    )
    total_anneal_steps: int = setting(
        200_000, "Steps of KL annealing; 0 starts at the cap.", NOT_NEGATIVE
    )
    weight_decay: float = setting(
        0.0,
        "Factor of the sum of squared weights (without biases) in the loss.",
        NOT_NEGATIVE,
    )
    gamma: float = setting(
        0.0,
        "If above 0, the KL weight is gamma times the user's number of "
        "interactions (RecVAE) instead of the annealed weight.",
        NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser."""

    name: str = setting(
        "adam", "Optimiser, a key of `vaecf.training.optimizers.OPTIMIZERS`."
    )
    learning_rate: float = setting(1e-3, "Learning rate.", POSITIVE)
    beta1: float = setting(0.9, "Decay of the first moment.", FRACTION)
    beta2: float = setting(0.999, "Decay of the second moment.", FRACTION)
    epsilon: float = setting(1e-8, "Term in the denominator.", POSITIVE)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = _resumable(
        200, "Passes over the training users.", NOT_NEGATIVE
    )
    max_steps: int = _resumable(
        0,
        "Most steps, in whole epochs (with alternating_epochs: rounds); three "
        "of these are always allowed. 0 sets no limit.",
        NOT_NEGATIVE,
    )
    alternating_epochs: tuple[int, ...] = setting(
        (),
        "rec_vae: epochs that train the encoder and epochs that train the "
        "decoder, in alternation, such as (3, 1). () for the other models.",
        Rule(
            "() or two numbers of at least 1",
            lambda n: n == () or (len(n) == 2 and min(n) >= 1),
        ),
    )
    ema: float = setting(
        0.0,
        "Decay per epoch of the moving average of the parameters that is used "
        "for ranking, such as 0.95; 0 uses the parameters themselves.",
        FRACTION,
    )
    refit_epochs: int = _resumable(
        0,
        "Epochs, after the best one, of training on all interactions known "
        "before the test, validation users' too; 0 keeps the best epoch.",
        NOT_NEGATIVE,
    )
    init_from: str = setting(
        "",
        "Workdir or saved model of the same architecture: known items keep its "
        "parameters, and new ones start from co-occurring items.",
    )
    batch_size: int = setting(500, "Users per step, over all devices.", COUNT)
    microbatch: int = _resumable(
        0,
        "Users whose activations a device holds at once; a larger batch sums "
        "the gradients of several (same numbers to rounding). 0 means 1024 on "
        "a CPU and the whole batch on an accelerator.",
        NOT_NEGATIVE,
    )
    drop_remainder: bool = setting(
        False, "Drop the users that do not fill the last batch of an epoch."
    )
    trackers: tuple[str, ...] = _resumable(
        (),
        "Where the records of training go, too: 'wandb' (Weights & Biases) and "
        "'mlflow'.",
        Rule("(), or some of wandb, mlflow", {"wandb", "mlflow"}.issuperset),
    )
    warm_up_epochs: int = _resumable(
        1,
        "First epochs that the mean throughput leaves out.",
        NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation and test."""

    every_epochs: int = _resumable(1, "Epochs between validations.", COUNT)
    batch_size: int = _resumable(2000, "Users per evaluation batch.", COUNT)
    metrics: tuple[str, ...] = _resumable(
        ("ndcg@100", "recall@20", "recall@50"),
        "Names in evaluation.metrics with their cut-offs, such as ndcg@100.",
        Rule("not empty", bool),
    )
    best_metric: str = setting(
        "ndcg@100", "Metric that decides which epoch is the best."
    )
    patience: int | None = _resumable(
        None,
        "Validations without improvement that stop training; None: never.",
        COUNT,
    )


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Numeric precision and dynamic loss scaling."""

    policy: str = setting(
        "fp32",
        "Precision of matrix products: 'fp32', 'tf32', 'bf16', 'fp16', or "
        "'amp' (bf16 where the device supports it, else fp16).",
        one_of("amp", "fp32", "tf32", "bf16", "fp16"),
    )
    initial_loss_scale: float = setting(
        2.0**15,
        "First loss scale of fp16.",
        Rule("in [1, 2**24]", lambda x: 1 <= x <= 2**24),
    )
    loss_scale_growth_interval: int = setting(
        2000, "Finite steps before the loss scale doubles.", COUNT
    )
    max_skipped_in_a_row: int = _resumable(
        50,
        "Consecutive steps with overflowing gradients that raise an error.",
        COUNT,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices, and the traffic between them."""

    data: int = _resumable(
        -1,
        "Devices along the users; -1 uses what mesh.item leaves.",
        DEVICES,
    )
    item: int = _resumable(
        1,
        "Devices along the items; -1 uses what mesh.data leaves.",
        DEVICES,
    )
    zero: bool = _resumable(
        False,
        "Shard the optimiser moments over the users' devices, to save memory.",
    )
    reduce: str = setting(
        "fp32",
        "Precision in which gradients are summed over devices: 'fp32', or "
        "'compute' for that of the matrix products (half the traffic in bf16).",
        one_of("fp32", "compute"),
    )
    peer_timeout: float = _resumable(
        300.0,
        "Seconds without progress after which a run of several processes "
        "fails; longer than a compilation and a validation. 0 waits forever.",
        NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = setting(
        0,
        "Seed of initialisation, batch order, dropout and noise.",
        Rule("in [0, 2**32)", lambda seed: 0 <= seed < 2**32),
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    linear: LinearConfig = LinearConfig()
    baseline: BaselineConfig = BaselineConfig()  # noqa: RUF009  (frozen)
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

    @property
    def is_fitted(self) -> bool:
        """Whether the model is fitted in one go instead of in epochs."""
        return self.model.name in FITTED

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
    "train.alternating_epochs": (3, 1),
    "train.ema": 0.9,
    "train.epochs": 56,
    "train.max_steps": 2000,
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


def fitted_settings(name: str) -> dict[str, Any]:
    """Returns the dataclass fields of a fitted model's settings by name."""
    prefix = f"baseline.{name}_"
    return {
        key.removeprefix(prefix): field
        for key, field in settings().items()
        if key.startswith(prefix)
    }


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
        new_value = checked(f"config.{key}", known[key], value)
        sections.setdefault(section, {})[leaf] = new_value
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
