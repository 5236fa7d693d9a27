"""Flags of main.py: ours, and those of NVIDIA's VAE-CF recipe by its names."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from vaecf import cli, experiment
from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.evaluation.baselines import BASELINES

# Flag of the recipe -> setting. The recipe's defaults are those of
# configs/ml20m.py, which main.py uses without --config.
_RECIPE = {
    "epochs": "train.epochs",
    "batch_size_train": "train.batch_size",
    "batch_size_validation": "eval.batch_size",
    "validation_step": "eval.every_epochs",
    "warm_up_epochs": "train.warm_up_epochs",
    "total_anneal_steps": "loss.total_anneal_steps",
    "anneal_cap": "loss.anneal_cap",
    # The recipe computes this term and never adds it to its loss. Here it is
    # added, so it is off unless the flag is given.
    "lam": "loss.weight_decay",
    "lr": "optimizer.learning_rate",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "activation": "model.activation",
    "seed": "seed",
    "data_dir": "data.dir",
}

# Flag -> (baseline, setting of the baseline).
_BASELINE_SETTINGS = {
    f"{name}_{key}": (name, key)
    for name, baseline in BASELINES.items()
    for key in baseline.settings
}

# Flag -> the flag without which it has no effect.
_NEEDS = {
    "baselines": "test",
    "baselines_tuned": "baselines",
    "per_user": "test",
    "trace": "train",
    "inference_batch_sizes": "inference_benchmark",
}

_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


def define() -> None:
    """Defines the flags; main.py calls this function once."""
    flags.DEFINE_bool("train", False, "Train, or resume training.")
    flags.DEFINE_bool("test", False, "Evaluate the best checkpoint.")
    flags.DEFINE_bool("inference_benchmark", False, "Measure query latency.")
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_string("checkpoint_dir", None, "The same as --workdir.")
    flags.DEFINE_list(
        "inference_batch_sizes", ["1"], "Batch sizes of --inference_benchmark."
    )
    flags.DEFINE_integer(
        "top_results", 100, "List length of --inference_benchmark."
    )
    cli.define_list_switch(
        "baselines",
        tuple(BASELINES),
        "Evaluate baselines as well: all of them without a value, or a list.",
    )
    flags.DEFINE_bool(
        "baselines_tuned",
        False,
        "Choose the baselines' settings on the validation users, starting "
        "from the given ones.",
    )
    for flag, (name, key) in _BASELINE_SETTINGS.items():
        setting = BASELINES[name].settings[key]
        _DEFINE[type(setting.default)](flag, setting.default, setting.meaning)
    for flag, key in _RECIPE.items():
        setting = config_lib.settings()[key]
        meaning = setting.metadata["meaning"]
        _DEFINE[type(setting.default)](flag, None, f"{meaning} (config.{key})")
    flags.DEFINE_bool("amp", False, "Sets config.precision.policy to amp.")
    flags.DEFINE_bool("xla", False, "Accepted; XLA is always on here.")
    flags.DEFINE_bool("trace", False, "Profile steps into <workdir>/trace.")
    flags.DEFINE_string(
        "per_user", None, "Parquet or .csv file for the test users' metrics."
    )
    flags.DEFINE_string("log_path", None, "JSON log in the recipe's format.")
    flags.DEFINE_string(
        "results_dir", None, "Directory for args.json and statistics.json."
    )
    cli.define_processes()


def parse(
    values: flags.FlagValues,
) -> tuple[Config, pathlib.Path, experiment.Actions]:
    """Returns the arguments of `experiment.run`.

    Without --train and --config the config is that of the run in --workdir.

    Raises:
      VaecfError: flags contradict each other, or the config is not valid.
    """
    _check(values)
    workdir = pathlib.Path(
        values["workdir"].value or values["checkpoint_dir"].value
    )
    flag = values["config"]
    config = flag.value
    if not (values["train"].value or flag.present):
        if (workdir / workdir_lib.CONFIG).exists():
            with config.unlocked():
                config.update(workdir_lib.read_config(workdir).to_dict())
        config.update_from_flattened_dict(flag.override_values)
    changes = {
        key: values[name].value
        for name, key in _RECIPE.items()
        if values[name].value is not None
    }
    if values["amp"].value:
        changes["precision.policy"] = "amp"
    config.update_from_flattened_dict(changes)
    made = config_lib.from_mapping(config)
    return made, workdir, _actions(values, made)


def _check(values: flags.FlagValues) -> None:
    wanted = ("train", "test", "inference_benchmark")
    if not any(values[name].value for name in wanted):
        raise VaecfError(
            "nothing to do: give --train, --test or --inference_benchmark"
        )
    directories = (values["workdir"].value, values["checkpoint_dir"].value)
    if all(directories):
        raise VaecfError(
            "--workdir and --checkpoint_dir mean the same: give one of them"
        )
    if not any(directories):
        raise VaecfError(
            "--workdir (or the recipe's --checkpoint_dir) is missing: give "
            "the run a directory, e.g. --workdir=runs/first"
        )
    for name, other in _NEEDS.items():
        given = values[name].value and values[name].present
        if given and not values[other].value:
            raise VaecfError(f"--{name} has no effect without --{other}")
    for flag, (name, _) in _BASELINE_SETTINGS.items():
        if values[flag].present and name not in values["baselines"].value:
            raise VaecfError(
                f"--{flag} has no effect without --baselines={name}"
            )
    if values["top_results"].value < 1:
        raise VaecfError(
            f"--top_results={values['top_results'].value} must be at least 1"
        )
    sizes = values["inference_batch_sizes"].value
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise VaecfError(
            f"--inference_batch_sizes={','.join(sizes)}: give numbers of users "
            "of at least 1, separated by commas"
        )
    if values["xla"].value:
        cli.log("--xla: always on here")


def _actions(values: flags.FlagValues, config: Config) -> experiment.Actions:
    settings: dict[str, dict[str, float]] = {}
    for flag, (name, key) in _BASELINE_SETTINGS.items():
        if values[flag].present:
            settings.setdefault(name, {})[key] = values[flag].value
    sizes = values["inference_batch_sizes"].value
    same = ("train", "test", "baselines", "baselines_tuned", "top_results")
    paths = ("per_user", "log_path", "results_dir")
    return experiment.Actions(
        **{name: values[name].value for name in (*same, "trace")},
        **{
            name: pathlib.Path(values[name].value)
            for name in paths
            if values[name].value
        },
        settings=settings,
        inference_batch_sizes=(
            tuple(map(int, sizes))
            if values["inference_benchmark"].value
            else ()
        ),
        arguments=_arguments(values, config),
    )


def _arguments(values: flags.FlagValues, config: Config) -> dict[str, Any]:
    """Returns the recipe's flags as its args.json has them, and --workdir."""
    settings = config_lib.flatten(config.to_dict())
    names = (
        *("train", "test", "inference_benchmark", "top_results", "trace"),
        *("amp", "xla", "log_path", "results_dir", "checkpoint_dir", "workdir"),
    )
    return {
        **{name: settings[key] for name, key in _RECIPE.items()},
        **{name: values[name].value for name in names},
    }
