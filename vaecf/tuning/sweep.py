"""Sweeps: workers that run the trials of a study until enough are finished."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

import vaecf
from vaecf import workdir as workdir_lib
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import metrics
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting import plots, sweep_plots, tables
from vaecf.training import compilation_cache, precision
from vaecf.tuning import population
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning import trial as trial_lib
from vaecf.tuning.study import SweepPlan

Log = Callable[[str], None]

# More failures in a row are not the fault of the trials.
_MAX_FAILED = 5
_WORKER = "from vaecf.tuning import sweep; sweep.worker()"
_SHOWN = 10
# A parameter is important if it decides which trials are in the best quarter;
# with fewer than five trials there, the figure would describe the sampler.
_QUANTILE, _MIN_FOR_IMPORTANCES = 0.25, 20
_COLUMNS = (
    *("number", "state", "value", "epochs", "best_epoch", "seconds"),
    *("began", "host", "folder", "error"),
)


def sweep(
    plan: SweepPlan, *, workers: int = 1, log: Log = print
) -> list[dict[str, Any]]:
    """Runs the remaining trials of a sweep and summarises all of them.

    The validation users decide; the test users are never read. Other
    processes, on this host or others, may work on the same study meanwhile.
    The same call resumes a sweep that was interrupted.

    Args:
      plan: what to do.
      workers: processes on this host; 1 for the calling process.
      log: receives one line of text at a time.

    Returns:
      A row per trial with 'number', 'state', 'value' (of the best metric),
      'epochs', 'best_epoch', 'seconds', 'began', 'host', 'folder', 'error' and
      'params' ({setting: value}).

    Raises:
      VaecfError: the plan cannot be carried out.
      KeyboardInterrupt: the sweep was interrupted, with everything saved.
    """
    for name, value, least in (
        ("trials", plan.trials, 1),
        ("workers", workers, 1),
        ("population", plan.population, 1),
        ("prune_after", plan.prune_after or 0, 0),
    ):
        if value < least:
            raise VaecfError(f"{name}={value} must be at least {least}")
    workdir_lib.require_no_other(plan.workdir, "sweep")
    metrics.parse(plan.base.eval.best_metric)
    space_lib.check(plan.space, plan.base)
    if plan.population > 1:
        population.check_settings(plan.space)
    plan = dataclasses.replace(
        plan,
        storage=study_lib.storage_of(plan),
        # Small enough that every worker has some trials.
        population=min(plan.population, -(-plan.trials // workers)),
    )
    dataset = _find_dataset(plan)
    study = study_lib.open_study(plan, dataset.manifest_hash)
    _check_or_create(plan)

    def progress() -> str:
        n_finished = len(study_lib.finished(study))
        return f"{n_finished} of {plan.trials} trials are finished"

    storage = study_lib.without_password(plan.storage)
    log(f"study {plan.study}: {progress()}; {storage}")
    try:
        with _sigterm_interrupts():
            if workers == 1:
                _work(plan, dataset, show_progress=None, log=log)
            else:
                _work_in_processes(plan, workers, log)
    except KeyboardInterrupt:
        summarise(plan, study, log)
        raise KeyboardInterrupt(
            f"{progress()}; the same call resumes the sweep ({plan.workdir})"
        ) from None
    if len(study_lib.finished(study)) < plan.trials:
        log(f"{progress()}; other workers run the rest, or the next call does")
    return summarise(plan, study, log)


def _find_dataset(plan: SweepPlan) -> Dataset:
    dataset = find_dataset(plan.base.data.dir)
    if dataset.validation.held_out.nnz == 0:
        raise VaecfError(
            f"{plan.base.data.dir}: a sweep needs validation users; prepare "
            "the dataset with more held_out_users"
        )
    return dataset


def _check_or_create(plan: SweepPlan) -> None:
    """Records the study that the workdir belongs to, or checks it."""
    path = plan.workdir / workdir_lib.SWEEP
    storage = study_lib.without_password(plan.storage)
    if "://" not in storage:  # the directories may be moved together
        storage = os.path.relpath(storage, plan.workdir)
    new = {"study": plan.study, "storage": storage}
    if not path.exists():
        workdir_lib.write_json(path, new)
    old = workdir_lib.read_json(path)
    for name, value in new.items():
        if old.get(name) != value:
            raise VaecfError(
                f"workdir {plan.workdir} holds the trials of {name} "
                f"{old.get(name)!r}, not {value!r}: use the same {name}, or "
                "choose another workdir"
            )


def _work(
    plan: SweepPlan, dataset: Dataset, *, show_progress: bool | None, log: Log
) -> None:
    """Runs trials until none is left to begin."""
    # Settings that this machine cannot run would fail every trial.
    precision.policy(plan.base.precision.policy)
    mesh_lib.make_mesh(plan.base.mesh.data, plan.base.mesh.item)
    if plan.population > 1:
        population.check([plan.base])
    study = study_lib.open_study(plan, dataset.manifest_hash)
    failed = 0
    while trials := study_lib.next_trials(study, plan):
        runs = [trial_lib.TrialRun(plan, study, t, log) for t in trials]
        try:
            with contextlib.ExitStack() as stack:
                for run in runs:
                    stack.enter_context(run.opened(dataset))
                _train(runs, dataset, show_progress)
        except BaseException:  # interrupted, or a defect
            for run in runs:
                if run.state is None:
                    run.enqueue_again()
            raise
        finally:
            jax.clear_caches()  # the next trials compile their own programs
        for run in runs:
            failed = failed + 1 if run.state == TrialState.FAIL else 0
        if failed >= _MAX_FAILED:
            raise VaecfError(
                f"{failed} trials in a row failed, see above: check the disk "
                "and the search space, then resume the sweep"
            )


def _train(
    runs: list[trial_lib.TrialRun], dataset: Dataset, show_progress: bool | None
) -> None:
    if len(runs) == 1:
        trial_lib.train(runs[0], dataset, show_progress=show_progress)
        return
    population.train_members(
        [run.config for run in runs],
        [run.directory for run in runs],
        dataset,
        lambda m, pipeline: trial_lib.train(
            runs[m], dataset, show_progress=False, pipeline=pipeline
        ),
    )


# --- Several processes ------------------------------------------------------


def _work_in_processes(plan: SweepPlan, workers: int, log: Log) -> None:
    """Starts workers and waits for them; passes an interrupt on.

    Raises:
      KeyboardInterrupt: after the workers have saved.
      VaecfError: every worker failed.
    """
    package = pathlib.Path(vaecf.__file__).resolve().parents[1]
    path = os.pathsep.join(
        filter(None, [str(package), os.environ.get("PYTHONPATH")])
    )
    processes = []
    for number in range(workers):
        gpus = share_of_gpus(number, workers, os.environ)
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            env=os.environ | gpus | {"PYTHONPATH": path},
            # Ctrl-C reaches the workers once, from this process.
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(pickle.dumps((plan, share_of_cores(number, workers))))
        processes.append(process)
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        raise
    finally:
        for process in processes:
            process.kill()  # after a second Ctrl-C
    statuses = [process.returncode for process in processes]
    for number, status in enumerate(statuses):
        if status:
            log(
                f"worker {number} ended with status {status}; another worker, "
                "or the next call, resumes its trial"
            )
    if all(statuses):
        raise VaecfError(
            "every worker failed: see their messages above, then resume the "
            "sweep"
        )


def share_of_cores(number: int, workers: int) -> list[int]:
    """Returns a worker's CPU cores; [] where they cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    # Neighbours share caches.
    first, end = (n * len(cores) // workers for n in (number, number + 1))
    return cores[first:end] or [cores[number % len(cores)]]


def share_of_gpus(
    number: int, workers: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns a worker's share of the GPUs, as environment variables.

    Each worker has GPUs of its own if CUDA_VISIBLE_DEVICES names enough.
    Otherwise all workers use all GPUs, and a part of their memory each.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(devices) >= workers > 1:
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[number::workers])}
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return {name: environment.get(name, f"{0.9 / workers:.3f}")}


def worker() -> None:
    """Runs a process of `_work_in_processes`, which sends the plan to stdin."""
    plan, cores = pickle.loads(sys.stdin.buffer.read())
    if cores:  # before XLA starts its threads
        os.sched_setaffinity(0, cores)
    try:
        with contextlib.suppress(OSError):  # the parent has warned of it
            compilation_cache.keep_programs()
        with _sigterm_interrupts():
            _work(
                plan,
                _find_dataset(plan),
                show_progress=False,
                log=lambda line: print(line, flush=True),
            )
    except VaecfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Handles SIGTERM as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- Results ----------------------------------------------------------------


def summarise(
    plan: SweepPlan, study: optuna.Study, log: Log
) -> list[dict[str, Any]]:
    """Writes trials.csv, best.json and plots, and returns the rows."""
    rows = [_row(plan, trial) for trial in study_lib.counted(study)]
    flat = [row | row["params"] for row in rows]
    frame = pd.DataFrame(flat, columns=[*_COLUMNS, *plan.space])
    path = plan.workdir / "trials.csv"
    workdir_lib.write_bytes(path, frame.to_csv(index=False).encode())
    complete = sorted(
        (row for row in rows if row["state"] == "complete"),
        key=lambda row: (-row["value"], row["number"]),
    )
    if not complete:
        log(f"no trial is complete yet; trials: {path}")
        return rows
    metric = plan.base.eval.best_metric
    title = (
        f"Best of {len(complete)} complete trials, {len(rows)} in all "
        "(validation users)"
    )
    log("")
    log(tables.trials_table(complete[:_SHOWN], metric=metric, title=title))
    names = ("number", "folder", "value", "best_epoch", "params")
    best = {name: complete[0][name] for name in names}
    best |= {"study": plan.study, "metric": f"validation/{metric}"}
    workdir_lib.write_json(plan.workdir / "best.json", best)
    log(f"\ntrials: {path}\nbest: {plan.workdir / 'best.json'}")
    for name, figure in _plots(plan, study, rows, len(complete)).items():
        workdir_lib.write_bytes(plan.workdir / name, plots.to_png(figure))
        log(f"plot: {plan.workdir / name}")
    return rows


def _row(plan: SweepPlan, trial: FrozenTrial) -> dict[str, Any]:
    attributes = trial.user_attrs
    return {
        "number": trial.number,
        "state": trial.state.name.lower().replace("fail", "failed"),
        "value": trial.value,
        "epochs": attributes.get(study_lib.EPOCHS),
        "best_epoch": attributes.get(study_lib.BEST_EPOCH),
        "seconds": attributes.get(study_lib.SECONDS),
        "began": trial.datetime_start,
        "host": attributes.get(study_lib.HOST),
        "folder": attributes.get(study_lib.FOLDER),
        "error": attributes.get(study_lib.ERROR),
        "params": space_lib.values(plan.space, trial.params),
    }


def _plots(
    plan: SweepPlan,
    study: optuna.Study,
    rows: list[dict[str, Any]],
    n_complete: int,
) -> dict[str, Any]:
    """Returns figures by file name."""
    metric = plan.base.eval.best_metric
    logarithmic = {k for k, d in plan.space.items() if d.get("log")}
    figures = {
        "history.png": sweep_plots.history(rows, metric=metric),
        "slices.png": sweep_plots.slices(
            rows, [*plan.space], metric=metric, logarithmic=logarithmic
        ),
    }
    if n_complete >= _MIN_FOR_IMPORTANCES:
        make: Any = optuna.importance.PedAnovaImportanceEvaluator
        try:
            evaluator = make(target_quantile=_QUANTILE)
        except TypeError:  # before optuna 5
            evaluator = make(baseline_quantile=_QUANTILE)
        # Optuna raises if no parameter varies.
        with contextlib.suppress(ValueError, RuntimeError):
            shares = optuna.importance.get_param_importances(
                study, evaluator=evaluator
            )
            figures["importances.png"] = sweep_plots.importances(
                shares, metric=metric
            )
    return figures
