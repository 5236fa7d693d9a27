"""Flags of train and test: ours, and those of NVIDIA's recipe VAE-CF."""

from __future__ import annotations

import pathlib
import secrets
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from vaecf import cli, cli_flags, config_files
from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.baseline_config import FITTED
from vaecf.config import Config, fitted_settings
from vaecf.data import dataset
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    from vaecf.experiment import Actions

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
    for name in FITTED
    for key in fitted_settings(name)
}

# Flag -> the flag without which it has no effect.
_NEEDS = {
    "baselines": "test",
    "baselines_tuned": "baselines",
    "per_user": "test",
    "trace": "train",
    "init_from": "train",
    "inference_batch_sizes": "inference_benchmark",
}

_DEFINE: dict[type, Any] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


_SWITCHES = {
    "train": "Train, or resume training.",
    "test": "Evaluate the best checkpoint.",
    "inference_benchmark": "Measure query latency; without a directory, of an "
    "untrained model.",
    "baselines_tuned": "Tune the baselines on the validation users.",
    "trace": "Profile steps into <workdir>/trace.",
    "amp": "Sets config.precision.policy to amp.",
    "xla": "No effect: XLA is always on here.",
}
_PATHS = {
    "workdir": "Directory of the run; default: a new one in runs/.",
    "checkpoint_dir": "The same as --workdir.",
    "init_from": "Sets config.train.init_from: start from this run or saved "
    "model.",
    "per_user": "Parquet or .csv file for the test users' metrics.",
    "log_path": "JSON log in the recipe's format.",
    "results_dir": "Directory for args.json and statistics.json.",
}


def define() -> None:
    """Defines the flags."""
    cli.define_config("ml20m")
    for name, about in _SWITCHES.items():
        flags.DEFINE_bool(name, False, about)
    flags.DEFINE_alias("use_tf_amp", "amp")  # its older name
    for name, about in _PATHS.items():
        cli_flags.define_path(name, None, about)
    about = "Evaluate baselines: all of them without a value, or a list."
    cli_flags.define_list_switch("baselines", tuple(FITTED), about)
    about = "Batch sizes of --inference_benchmark."
    flags.DEFINE_list("inference_batch_sizes", ["1"], about)
    about = "List length of --inference_benchmark."
    flags.DEFINE_integer("top_results", 100, about, lower_bound=1)
    for flag, (name, key) in _BASELINE_SETTINGS.items():
        setting = fitted_settings(name)[key]
        about = setting.metadata["meaning"]
        _DEFINE[type(setting.default)](flag, setting.default, about)
    recipe = config_files.load_config("ml20m").flat()
    recipe["data.dir"] = f"{dataset.RECIPE_DATA_DIR}, else {recipe['data.dir']}"
    for flag, key in _RECIPE.items():
        setting = config_lib.settings()[key]
        about = (
            f"{setting.metadata['meaning']} (config.{key}; default without "
            f"--config: {recipe[key]})"
        )
        _DEFINE[type(setting.default)](flag, None, about)
    cli_flags.define_processes()


def parse(
    values: Any,
) -> tuple[Config, pathlib.Path | None, Actions]:
    """Returns the arguments of `experiment.run`.

    Without --train and --config the config is that of the run in --workdir. The
    directory is None to measure an untrained model.

    Raises:
      VaecfError: flags contradict each other, or the config is not valid.
    """
    _check(values)
    directory = values["workdir"].value or values["checkpoint_dir"].value
    workdir = pathlib.Path(directory) if directory else None
    flag = values["config"]
    config = flag.value
    given = {name: (key, values[name].value) for name, key in _RECIPE.items()}
    if init_from := values["init_from"].value:
        given["init_from"] = "train.init_from", str(init_from)
    given["amp"] = "precision.policy", "amp" if values["amp"].value else None
    is_run = workdir is not None and (workdir / workdir_lib.CONFIG).exists()
    if not (values["train"].value or flag.present):
        if workdir is not None and is_run:
            with config.unlocked():
                config.update(workdir_lib.read_config(workdir).to_dict())
        config.update_from_flattened_dict(flag.override_values)
    if not flag.present and (values["train"].value or not is_run):
        is_given = (
            values["data_dir"].value or "data.dir" in flag.override_values
        )
        root = pathlib.Path(dataset.RECIPE_DATA_DIR)
        is_recipe = (root / "ml-20m" / "extracted").is_dir()
        if not is_given and (is_recipe or dataset.holds_dataset(root)):
            given["data_dir"] = "data.dir", str(root)
    made = cli.make_config(given)
    if workdir is None and values["train"].value:
        workdir = _new_workdir(made)
    return made, workdir, _actions(values, made)


def _new_workdir(config: Config) -> pathlib.Path:
    """Returns a directory name in runs/ that is the same in all processes."""
    from vaecf.parallel import processes

    now = float(time.strftime("%Y%m%d%H%M%S"))
    now, mark = processes.from_lead([now, secrets.randbelow(2**16)])
    name = f"{config.title}-{now:.0f}-{int(mark):04x}"
    workdir = pathlib.Path("runs") / name
    if processes.is_lead():
        cli.log(f"no directory was given: training in {workdir}")
    return workdir


def _check(values: Any) -> None:
    wanted = ("train", "test", "inference_benchmark")
    if not any(values[name].value for name in wanted):
        raise VaecfError(
            "nothing to do: give --train, --test or --inference_benchmark"
        )
    given = [values[name].value for name in ("workdir", "checkpoint_dir")]
    if "" in given:
        raise VaecfError(
            "--workdir= is empty: give the run one directory, or leave the "
            "flag out"
        )
    if all(given):
        raise VaecfError(
            "--workdir and --checkpoint_dir are the same: give the run one "
            "directory"
        )
    # A new model can be trained or timed, but it has nothing to test.
    only_test = values["test"].value and not values["train"].value
    if only_test and not any(given):
        raise VaecfError(
            "--test needs the directory of a trained run, such as "
            "--workdir=runs/first"
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
    sizes = values["inference_batch_sizes"].value
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise VaecfError(
            f"--inference_batch_sizes={','.join(sizes)}: give numbers of users"
        )


def _actions(values: Any, config: Config) -> Actions:
    from vaecf.experiment import Actions

    settings: dict[str, dict[str, float]] = {}
    for flag, (name, key) in _BASELINE_SETTINGS.items():
        if values[flag].present:
            settings.setdefault(name, {})[key] = values[flag].value
    same = ("train", "test", "trace", "top_results", "baselines")
    given: dict[str, Any] = {
        name: values[name].value for name in (*same, "baselines_tuned")
    }
    for name in ("per_user", "log_path", "results_dir"):
        if path := values[name].value:
            given[name] = pathlib.Path(path)
    if values["inference_benchmark"].value:
        sizes = values["inference_batch_sizes"].value
        given["inference_batch_sizes"] = tuple(map(int, sizes))
    # The recipe's flags with their values in the config, as in its args.json,
    # then all other flags, then the overrides of the config.
    flat = config.flat()
    arguments = {name: flat[key] for name, key in _RECIPE.items()}
    for own in values.flags_by_module_dict()[__name__]:
        arguments.setdefault(own.name, own.value)
    flag = values["config"]
    arguments["config"] = flag.config_filename
    for key, value in flag.override_values.items():
        arguments[f"config.{key}"] = value
    return Actions(**given, settings=settings, arguments=arguments)
