"""Populations: runs that share one compiled program.

Members of a population differ only in their seed and in numbers that the
program takes as arguments (`VARIED`). Each member is a run of `training.loop`
in a thread of its own, and computes what a separate run computes, to rounding.
The members share the interactions on the device, the compiled steps and the
linear branch, and as many of them as there are cores are trained at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax
import pandas as pd

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import metrics
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes, workers
from vaecf.reporting import tables
from vaecf.reporting.writers import Writer
from vaecf.serving import growth, trained_model
from vaecf.training import fitted, linear_branch, loop, signals
from vaecf.training.shared_pipeline import NUMBERS, SharedPipeline

T = TypeVar("T")

# The settings in which members may differ.
VARIED = ("seed", *NUMBERS)
_FIGURES = ("best_epoch", "epochs", "seconds")


def check_settings(keys: Iterable[str]) -> None:
    """Raises VaecfError if a setting must not vary within a population."""
    for key in keys:
        if key not in VARIED:
            raise VaecfError(
                f"{key} changes the program, so it must not vary within a "
                f"population: vary {', '.join(VARIED)}, or train separate runs"
            )


def check(configs: Sequence[Config]) -> None:
    """Raises VaecfError unless runs fit in one program on one device."""
    if not configs:
        raise VaecfError("a population needs at least one member")
    flats = [config.flat() for config in configs]
    check_settings(
        k for k in flats[0] if any(f[k] != flats[0][k] for f in flats)
    )
    if not processes.alone() or _mesh(configs[0]).size > 1:
        raise VaecfError(
            "a population is trained by one process on one device: set "
            "num_processes=1, config.mesh.data=1 and config.mesh.item=1"
        )


def _mesh(config: Config) -> jax.sharding.Mesh:
    return mesh_lib.make_mesh(config.mesh.data, config.mesh.item)


# --- A grid of settings -----------------------------------------------------


def grid(
    values: Mapping[str, Sequence[Any]], base: Config
) -> dict[str, Config]:
    """Returns the config of every combination of values, by a short name.

    {'seed': [0, 1], 'loss.gamma': [0.01]} makes 'seed=0,gamma=0.01' and
    'seed=1,gamma=0.01'. The first setting varies slowest.

    Raises:
      VaecfError: a setting is unknown, has no values or one value twice, or
        the config refuses a value.
    """
    if not values or not all(values.values()):
        raise VaecfError(
            "members: give a setting and its values, such as seed=0,1,2"
        )
    configs: dict[str, Config] = {}
    for combination in itertools.product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        try:
            config = config_lib.replace(base, changes)
        except VaecfError as error:
            raise VaecfError(f"members: {error}") from None
        flat = config.flat()
        # No two settings that may vary end in the same word.
        name = ",".join(f"{k.rpartition('.')[2]}={flat[k]}" for k in values)
        if name in configs:
            raise VaecfError(f"members: {name} is there twice: remove one")
        configs[name] = config
    return configs


def train_grid(
    values: Mapping[str, Sequence[Any]],
    base: Config,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains or resumes the members of a grid, and returns a row for each.

    Each member has a workdir of its name in `workdir`. Members of earlier calls
    stay, and trained members are not trained again. The rows are those of
    members.csv, the best member first.

    Raises:
      VaecfError: bad input, or every member failed.
      KeyboardInterrupt: interrupted, with everything saved.
    """
    members = grid(values, base)
    names, configs = [*members], [*members.values()]
    directories = [workdir / name for name in names]
    check(configs)
    metrics.parse(base.eval.best_metric)
    dataset = find_dataset(base.data.dir)
    value = f"validation/{base.eval.best_metric}"

    def train_member(m: int, shared: loop.Shared) -> dict[str, Any]:
        flat = configs[m].flat()
        row = {"member": names[m], **{key: flat[key] for key in values}}
        # One progress bar: the members advance at about one speed.
        bar = None if m == 0 else False
        run = configs[m], dataset, directories[m], shared
        try:
            summary = train_run(*run, show_progress=bar)
        except VaecfError as error:
            return {**row, "error": str(error)}
        row[value] = summary["value"]
        return row | {key: summary[key] for key in _FIGURES}

    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        workdir_lib.require_no_other(workdir, "population")
        for directory, config in zip(directories, configs, strict=True):
            stack.enter_context(workdir_lib.locked(directory))
            workdir_lib.check_or_create(directory, config, dataset)
        log(f"training {len(members)} members on {dataset.about}")
        rows = train_members(
            configs, directories, dataset, train_member, log=log
        )
        rows.sort(key=lambda row: ("error" in row, -(row.get(value) or 0)))
        path = workdir / workdir_lib.MEMBERS
        columns = ["member", *values, value, *_FIGURES, "error"]
        csv = pd.DataFrame(rows, columns=columns).to_csv(index=False)
        workdir_lib.write_bytes(path, csv.encode())
    for row in rows:
        if "error" in row:
            log(f"{row['member']} failed: {row['error']}")
    sound = [row for row in rows if "error" not in row]
    if not sound:
        raise VaecfError(
            "every member failed, see above: change the settings, and choose "
            "another workdir"
        )
    about = tables.printable(dataset.about)
    table = tables.format_table(sound)
    log(f"\nValidation users\n{about}\n\n{table}\n\ntable: {path}")
    return rows


# --- Runs -------------------------------------------------------------------


def train_run(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    shared: loop.Shared | None = None,
    *,
    writer: Writer | None = None,
    show_progress: bool | None = False,
) -> dict[str, Any]:
    """Trains or resumes a member or a trial, and returns its summary.

    The summary is that of results.json, and 'value': the best metric of the
    validation users, or None if there are none. A blend is tuned first, as it
    is where users load it.
    """
    if config.is_fitted:
        return _fit_run(config, dataset, workdir, writer)
    result = loop.train(
        config,
        dataset,
        workdir,
        show_progress=show_progress,
        extra_writer=writer,
        shared=shared,
        start=growth.start(config, dataset, workdir, log=lambda line: None),
        log=lambda line: None,
    )
    path, value = workdir / workdir_lib.RESULTS, result.progress.best
    results = workdir_lib.read_json(path) if path.exists() else {}
    # Other results belong to a model of fewer epochs.
    if results.get("train", {}).get("epochs") != result.summary["epochs"]:
        (workdir / workdir_lib.PER_USER).unlink(missing_ok=True)
        workdir_lib.write_json(path, {"train": result.summary}, digest=True)
    if config.linear.l2 and value is not None:
        mesh = result.setup.mesh
        users = Evaluator.for_split(dataset, "validation", config.eval, mesh)
        model = trained_model.load(workdir, mesh=mesh)
        model = trained_model.tune_blend(model, users)
        value = users.best_value(model.ranker(users.depth), model.scorer_params)
    return {**result.summary, "value": value}


def _fit_run(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    writer: Writer | None,
) -> dict[str, Any]:
    """Fits a model without epochs; its only validation is that of epoch 1."""
    summary = fitted.train(config, dataset.train, workdir)
    results = {"train": summary}
    path = workdir / workdir_lib.RESULTS
    workdir_lib.write_json(path, results, digest=True)
    model = trained_model.load(workdir, mesh=_mesh(config))
    users = Evaluator.for_split(dataset, "validation", config.eval, model.mesh)
    value = None
    if not users.is_empty:
        value = users.best_value(users.compile(model.scorer()), model.params)
        if writer is not None:
            metric = f"validation/{config.eval.best_metric}"
            writer.write({"epoch": 1, metric: value}, step=1)
    return {**summary, "value": value}


def train_members(
    configs: Sequence[Config],
    directories: Sequence[pathlib.Path],
    dataset: Dataset,
    train: Callable[[int, loop.Shared], T],
    *,
    log: Callable[[str], None] = lambda line: None,
) -> list[T]:
    """Trains the members of a population, each in a thread of its own.

    The caller has locked the workdirs, `directories`. `train` trains a member
    by its index, with what the members share. If one call raises, the others
    save and stop. Returns the results of `train`, in the order of the members.

    Raises:
      VaecfError: the runs are not a population, see `check`.
      KeyboardInterrupt: the members were interrupted, with everything saved.
    """
    check(configs)
    linear = linear_branch.prepare(
        *(configs[0].linear, dataset.train, directories[0], _mesh(configs[0])),
        log=log,
    )
    if linear is not None:
        for directory in directories[1:]:
            linear_branch.share(directories[0], directory)
    pipeline = SharedPipeline(configs, dataset)
    with (
        signals.interrupts() as interrupted,
        futures.ThreadPoolExecutor(len(workers.cores()), "member") as threads,
    ):
        jobs = [
            threads.submit(
                train, m, loop.Shared(pipeline.of_member(own), linear)
            )
            for m, own in enumerate(configs)
        ]
        done, _ = futures.wait(jobs, return_when=futures.FIRST_EXCEPTION)
        for job in done:
            if error := job.exception():
                signal.raise_signal(signal.SIGINT)  # the others save and stop
                threads.shutdown(cancel_futures=True)
                raise error
        if interrupted():
            raise KeyboardInterrupt
    return [job.result() for job in jobs]
