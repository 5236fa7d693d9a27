"""Flags of main.py: ours, and those of NVIDIA's VAE-CF recipe by its names."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from vaecf import cli, experiment
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines

# Recipe flag -> (kind, config key, help). The recipe's defaults are those of
# configs/ml20m.py, which is what main.py uses without --config.
_OVERRIDES: dict[str, tuple[str, str, str]] = {
    "epochs": ("integer", "train.epochs", "Epochs to train (recipe: 400)."),
    "batch_size_train": (
        "integer",
        "train.batch_size",
        "Global batch size (24576).",
    ),
    "batch_size_validation": (
        "integer",
        "eval.batch_size",
        "Users a block in evaluation (10000).",
    ),
    "validation_step": (
        "integer",
        "eval.every_epochs",
        "Epochs between validations (50).",
    ),
    "warm_up_epochs": (
        "integer",
        "train.warm_up_epochs",
        "First epochs left out of the mean throughput (5).",
    ),
    "total_anneal_steps": (
        "integer",
        "loss.total_anneal_steps",
        "Annealing steps (15000).",
    ),
    "anneal_cap": ("float", "loss.anneal_cap", "Annealing cap (0.1)."),
    "lam": (
        "float",
        "loss.weight_decay",
        "L2 regularisation. In the recipe it never reaches the loss; here it "
        "does, so it is off unless given (0).",
    ),
    "lr": ("float", "optimizer.learning_rate", "Learning rate (0.004)."),
    "beta1": ("float", "optimizer.beta1", "Adam's beta1 (0.9)."),
    "beta2": ("float", "optimizer.beta2", "Adam's beta2 (0.9)."),
    "activation": ("string", "model.activation", "tanh or relu (tanh)."),
    "seed": ("integer", "seed", "Seed of everything random (0)."),
}

# Flag -> (baseline, its setting).
_SETTINGS = {
    f"{name}_{key}": (name, key)
    for name, baseline in baselines.BASELINES.items()
    for key in baseline.settings
}

# Flag -> the one without which it would do nothing.
_BELONGS_TO = {
    "baselines": "test",
    "baselines_tuned": "baselines",
    "per_user": "test",
    "trace": "train",
    "inference_batch_sizes": "inference_benchmark",
}


def define() -> None:
    """Defines the flags; called once, at import of main.py."""
    flags.DEFINE_string("workdir", None, "The run's directory.")
    flags.DEFINE_bool("train", False, "Train, or go on where the run stopped.")
    flags.DEFINE_bool("test", False, "Evaluate the best checkpoint.")
    flags.DEFINE_bool("inference_benchmark", False, "Measure query latency.")
    flags.DEFINE_list(
        "inference_batch_sizes", ["1"], "Batch sizes of --inference_benchmark."
    )
    cli.define_list_switch(
        "baselines",
        tuple(baselines.BASELINES),
        "Evaluate baselines beside the model: bare for all, or a list.",
    )
    flags.DEFINE_bool(
        "baselines_tuned",
        False,
        "Choose the baselines' settings on the validation users; begins with "
        "those given.",
    )
    for flag, (name, key) in _SETTINGS.items():
        setting = baselines.BASELINES[name].settings[key]
        whole = isinstance(setting.default, int)
        define_number = flags.DEFINE_integer if whole else flags.DEFINE_float
        define_number(flag, setting.default, setting.meaning)
    flags.DEFINE_string(
        "per_user",
        None,
        "Write the test users' metrics to this Parquet (or .csv) file.",
    )
    cli.define_processes()
    _define_recipe()


def _define_recipe() -> None:
    """Those not given leave the config as it is."""
    definers: dict[str, Any] = {
        "integer": flags.DEFINE_integer,
        "float": flags.DEFINE_float,
        "string": flags.DEFINE_string,
    }
    for name, (kind, key, text) in _OVERRIDES.items():
        definers[kind](name, None, f"{text} Sets config.{key}.")
    flags.DEFINE_bool(
        "amp", False, "Mixed precision: config.precision.policy=amp."
    )
    flags.DEFINE_bool("xla", False, "Accepted; XLA is always on here.")
    flags.DEFINE_integer(
        "top_results", 100, "List length of the inference benchmark."
    )
    flags.DEFINE_bool(
        "trace", False, "Profile some steps into <workdir>/trace."
    )
    flags.DEFINE_string("log_path", None, "JSON log in the recipe's form.")
    flags.DEFINE_string(
        "data_dir",
        None,
        "Directory of the prepared data; also looks where the recipe's "
        "preparation puts it. Sets config.data.dir.",
    )
    flags.DEFINE_string(
        "checkpoint_dir", None, "The run's directory, as --workdir."
    )
    flags.DEFINE_string(
        "results_dir", None, "Also write args.json and statistics.json there."
    )


def override(config: Any, values: flags.FlagValues) -> None:
    """Puts the recipe's flags that were given into the config."""
    for name, (_, key, _) in _OVERRIDES.items():
        if values[name].value is not None:
            *sections, leaf = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[leaf] = values[name].value
    if values["amp"].value:
        config.precision.policy = "amp"
    if values["data_dir"].value is not None:
        config.data.dir = values["data_dir"].value


def workdir(values: flags.FlagValues) -> pathlib.Path:
    """Where the run lives: --workdir, or the recipe's --checkpoint_dir."""
    ours, recipe = values["workdir"].value, values["checkpoint_dir"].value
    if ours and recipe:
        raise VaecfError(
            "--workdir and --checkpoint_dir name the same thing: "
            "give one of them"
        )
    if not (ours or recipe):
        raise VaecfError(
            "--workdir (or the recipe's --checkpoint_dir) is missing: give "
            "the run a directory, e.g. --workdir=runs/first"
        )
    return pathlib.Path(ours or recipe)


def actions(values: flags.FlagValues) -> experiment.Actions:
    """What the flags ask for."""
    wanted = {
        n: values[n].value for n in ("train", "test", "inference_benchmark")
    }
    if not any(wanted.values()):
        raise VaecfError(
            "nothing to do: give --train, --test or --inference_benchmark"
        )
    for name, other in _BELONGS_TO.items():
        given = values[name].value and values[name].present
        if given and not values[other].value:
            raise VaecfError(f"--{name} does nothing without --{other}")
    settings: dict[str, dict[str, float]] = {}
    for flag, (name, key) in _SETTINGS.items():
        if not values[flag].present:
            continue
        if name not in values["baselines"].value:
            raise VaecfError(
                f"--{flag} does nothing without --baselines={name}"
            )
        settings.setdefault(name, {})[key] = values[flag].value
    if values["xla"].value:
        cli.log("--xla: always on here")
    sizes: tuple[int, ...] = ()
    if wanted["inference_benchmark"]:
        texts = values["inference_batch_sizes"].value
        if not all(text.isdecimal() and int(text) > 0 for text in texts):
            raise VaecfError(
                f"--inference_batch_sizes={','.join(texts)}: give numbers of "
                "users of at least 1, separated by commas"
            )
        sizes = tuple(int(text) for text in texts)
    if values["top_results"].value < 1:
        raise VaecfError(
            f"--top_results={values['top_results'].value} must be at least 1"
        )
    paths = {
        name: pathlib.Path(values[name].value) if values[name].value else None
        for name in ("per_user", "log_path", "results_dir")
    }
    return experiment.Actions(
        train=wanted["train"],
        test=wanted["test"],
        inference_batch_sizes=sizes,
        baselines=values["baselines"].value,
        settings=settings,
        baselines_tuned=values["baselines_tuned"].value,
        top_results=values["top_results"].value,
        trace=values["trace"].value,
        **paths,
    )


def arguments(values: flags.FlagValues, config: Any) -> dict[str, Any]:
    """What the flags came to, as the recipe's args.json has them.

    Args:
      values: the flags.
      config: with the overrides in it: flags not given have its values.
    """
    names = (
        "train",
        "test",
        "inference_benchmark",
        "amp",
        "xla",
        "top_results",
        "trace",
        "log_path",
        "data_dir",
        "checkpoint_dir",
        "results_dir",
        "workdir",
    )
    settled: dict[str, Any] = {}
    for name, (_, key, _) in _OVERRIDES.items():
        section, _, leaf = key.rpartition(".")
        settled[name] = (config[section] if section else config)[leaf]
    return settled | {name: values[name].value for name in names}
