"""Sweeps: workers that run the trials of a study until enough are finished."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState

from vaecf import config as config_lib
from vaecf import interrupts
from vaecf import workdir as workdir_lib
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import metrics
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import workers as workers_lib
from vaecf.reporting import progress, report, sweep_page, tables
from vaecf.reporting.writers import Writer
from vaecf.training import compilation_cache, precision
from vaecf.training.loop import Shared
from vaecf.training.progress import last_epoch
from vaecf.tuning import population
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning.study import SweepPlan

Log = Callable[[str], None]

# More failures in a row are not the fault of the trials.
_MAX_FAILED = 5
_SHOWN = 10
_LEAST_FOR_IMPORTANCE = 10  # complete trials: fewer say nothing
# Errors that end a trial but not the sweep: a diverged loss, or a model that
# does not fit the memory of the device.
_TRIAL_ERRORS = (VaecfError, jax.errors.JaxRuntimeError)


def sweep(
    plan: SweepPlan, *, workers: int = 1, log: Log = print
) -> list[dict[str, Any]]:
    """Runs the remaining trials of a sweep and summarises all of them.

    The validation users decide; the test users are never read. Other
    processes, on this host or others, may work on the same study meanwhile.
    The same call resumes a sweep that was interrupted.

    Args:
      workers: processes on this host; 1 for the calling process. Several are
        started by `multiprocessing`, which imports the main module in each.

    Returns:
      A row per trial with 'number', 'state', 'value' (of the best metric),
      'epochs', 'best_epoch', 'seconds', 'began', 'host', 'folder', 'error' and
      'params' ({setting: value}).

    Raises:
      VaecfError: the plan cannot be carried out, or no trial succeeded.
      KeyboardInterrupt: the sweep was interrupted, with everything saved.
    """
    if workers < 1:
        raise VaecfError(f"workers={workers} must be at least 1")
    workdir_lib.require_no_other(plan.workdir, "sweep")
    metrics.parse(plan.base.eval.best_metric)
    space_lib.check(plan.space, plan.base)
    if plan.population > 1:
        population.check_settings(plan.space)
    # Small enough that every worker has some trials.
    at_once = min(plan.population, -(-plan.trials // workers))
    plan = dataclasses.replace(plan, population=at_once)
    dataset = find_dataset(plan.base.data.dir)
    if dataset.validation.held_out.nnz == 0:
        raise VaecfError(
            f"{plan.base.data.dir}: a sweep needs validation users; prepare "
            "the dataset with more held_out_users"
        )
    study = study_lib.open_study(plan, dataset.manifest_hash)
    _check_or_create(plan)

    def how_far() -> str:
        n_finished = len(study_lib.finished(study))
        return f"{n_finished} of {plan.trials} trials are finished"

    log(f"study {plan.study}: {how_far()}; {plan.storage_name}")
    try:
        if workers == 1:
            # Without a bar, a line per trial is enough.
            bar = None if progress.has_bar() else False
            _work(plan, dataset, show_progress=bar, log=log)
        else:
            _work_in_processes(plan, workers, log)
    except KeyboardInterrupt:
        summarise(plan, study, dataset.about, log)
        raise KeyboardInterrupt(
            f"{how_far()}; the same call resumes the sweep ({plan.workdir})"
        ) from None
    rows = summarise(plan, study, dataset.about, log)
    if len(study_lib.finished(study)) < plan.trials:
        log(f"{how_far()}; other workers, or the next call, run the rest")
    elif not any(row["state"] == "complete" for row in rows):
        raise VaecfError(
            f"none of the {len(rows)} trials succeeded ({_reasons(rows)}): "
            "change the settings or the search space, in another workdir"
        )
    return rows


def _reasons(rows: list[dict[str, Any]]) -> str:
    """Returns how many trials ended in which way, and an error."""
    ends = collections.Counter(row["state"] for row in rows)
    text = ", ".join(f"{n} {state}" for state, n in ends.items())
    errors = [row["error"] for row in rows if row["error"]]
    return f"{text}; the last error is: {errors[-1]}" if errors else text


def _check_or_create(plan: SweepPlan) -> None:
    """Records the study that the workdir belongs to, or checks it."""
    path, storage = plan.workdir / workdir_lib.SWEEP, plan.storage_name
    if "://" not in storage:  # the directories may be moved together
        storage = os.path.relpath(storage, plan.workdir)
    new = {"study": plan.study, "storage": storage}
    if not path.exists():
        workdir_lib.write_json(path, new)
    if (old := workdir_lib.read_json(path)) != new:
        raise VaecfError(
            f"workdir {plan.workdir} holds the trials of {old}, not of {new}: "
            "use the same, or choose another workdir"
        )


# --- Trials -----------------------------------------------------------------


def _work(
    plan: SweepPlan, dataset: Dataset, *, show_progress: bool | None, log: Log
) -> None:
    """Runs trials until none is left to begin."""
    # Settings that this machine cannot run would fail every trial.
    precision.policy(plan.base.precision.policy)
    mesh_lib.make_mesh(plan.base.mesh.data, plan.base.mesh.item)
    study = study_lib.open_study(plan, dataset.manifest_hash)
    log_result = progress.paced(log)
    failed = 0
    while True:
        trials: list[Trial] = []
        try:
            for trial in study_lib.next_trials(study, plan):
                trials.append(trial)
            runs = [
                TrialRun(plan, study, trial, log, log_result)
                for trial in trials
            ]
            sound = [run for run in runs if run.state is None]
            _train(sound, dataset, show_progress)
        except BaseException:  # interrupted, or a defect
            for trial in trials:
                study_lib.enqueue_again(study, trial.number)
            raise
        finally:
            jax.clear_caches()  # the next trials compile their own programs
        if not trials:
            return
        for run in runs:
            failed = failed + 1 if run.state == TrialState.FAIL else 0
        if failed >= _MAX_FAILED:
            raise VaecfError(
                f"{failed} trials in a row failed, see above: check the disk "
                "and the search space, then resume the sweep"
            )


def _train(
    runs: list[TrialRun], dataset: Dataset, show_progress: bool | None
) -> None:
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.opened(dataset))
        if len(runs) == 1:
            runs[0].train(dataset, show_progress=show_progress)
        elif runs:
            population.train_members(
                [run.config for run in runs],
                [run.directory for run in runs],
                dataset,
                lambda m, shared: runs[m].train(dataset, shared),
            )


class _Pruned(Exception):
    """The pruner has stopped the trial, or another worker runs it."""


class TrialRun(Writer):
    """A trial that this process runs; receives the records of its training.

    `state` is None until the trial has ended.
    """

    def __init__(
        self,
        plan: SweepPlan,
        study: optuna.Study,
        trial: Trial,
        log: Log,
        log_result: Log,
    ) -> None:
        self.number, self.config = trial.number, plan.base
        self.directory = plan.trial_directory(trial.number)
        self.state: TrialState | None = None
        self._params = space_lib.values(plan.space, trial.params)
        self._study, self._trial = study, trial
        self._log, self._log_result = log, log_result
        self._keep_all = plan.keep_all
        frozen = study.get_trials(deepcopy=False)[trial.number]
        self._curve = dict(frozen.intermediate_values)
        try:
            self.config = config_lib.replace(plan.base, self._params)
        except VaecfError as error:
            self._finish(TrialState.FAIL, error=error)

    @contextlib.contextmanager
    def opened(self, dataset: Dataset) -> Iterator[None]:
        """Holds the workdir and sends heartbeats."""
        # The files of an interrupted attempt. A worker that only seems to be
        # lost keeps them; those on another disk are not moved.
        earlier = self._trial.user_attrs.get(study_lib.FOLDER, "")
        may_move = os.path.isdir(earlier) and not self.directory.exists()
        if may_move and study_lib.is_free(pathlib.Path(earlier)):
            with contextlib.suppress(OSError):
                os.replace(earlier, self.directory)
        with (
            workdir_lib.locked(self.directory),
            study_lib.heartbeat(self._trial, self.directory),
        ):
            workdir_lib.check_or_create(self.directory, self.config, dataset)
            yield

    def train(
        self,
        dataset: Dataset,
        shared: Shared | None = None,
        show_progress: bool | None = False,
    ) -> None:
        """Trains the trial, or resumes it, and tells the study its result."""
        try:
            summary = population.train_run(
                *(self.config, dataset, self.directory, shared),
                writer=self,
                show_progress=show_progress,
            )
        except _Pruned:
            self._finish(TrialState.PRUNED)
        except _TRIAL_ERRORS as error:
            if shared and "RESOURCE_EXHAUSTED" in str(error):
                raise VaecfError(
                    "the population does not fit the memory of the device "
                    f"({_first_line(error)}): train fewer trials at once"
                ) from error
            self._finish(TrialState.FAIL, error=error)
        else:
            self._finish(TrialState.COMPLETE, value=summary["value"])

    def write(self, record: Mapping[str, Any], step: int) -> None:
        """Reports a validation; raises to stop a pruned trial."""
        value = record.get(f"validation/{self.config.eval.best_metric}")
        if value is None:
            return
        epoch = int(record["epoch"])
        try:
            # An interrupted trial may repeat a validation.
            if epoch not in self._curve:
                self._trial.report(value, epoch)
                self._curve[epoch] = value
        except study_lib.ENDED:
            raise _Pruned from None
        ends = self.config.is_fitted or epoch >= last_epoch(
            self.config.train, steps=step // epoch
        )
        if not ends and self._trial.should_prune():
            raise _Pruned

    def _finish(
        self,
        state: TrialState,
        *,
        value: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Tells the study the result, and logs it."""
        self.state, result = state, state.name.lower()
        try:
            if error is not None:
                result = f"failed: {_first_line(error)}"
                self._trial.set_user_attr(study_lib.ERROR, _first_line(error))
            self._study.tell(self._trial, value, state)
        except study_lib.ENDED:
            self._log(f"trial {self.number}: taken over by another worker")
            return
        unused = ["tensorboard", "checkpoints/latest"]
        if state != TrialState.COMPLETE:
            unused += [workdir_lib.CHECKPOINTS, workdir_lib.LINEAR]
        for name in unused if not self._keep_all else ():
            shutil.rmtree(self.directory / name, ignore_errors=True)
        if value is not None:
            result = f"{self.config.eval.best_metric} {value:.4f}"
        settings = ", ".join(
            f"{k}={tables.quantity(v)}" for k, v in self._params.items()
        )
        n_epochs = max(self._curve, default=0)
        log = self._log_result if error is None else self._log
        log(f"trial {self.number}: {result}; {settings}; {n_epochs} epochs")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- Several processes ------------------------------------------------------


def _work_in_processes(plan: SweepPlan, workers: int, log: Log) -> None:
    statuses = workers_lib.run(_worker, workers, (plan,))
    for number, status in enumerate(statuses):
        if status:
            log(f"worker {number} ended with status {status}")
    if all(statuses):
        raise VaecfError("every worker failed, see above: resume the sweep")


def _worker(plan: SweepPlan) -> None:
    log = functools.partial(print, flush=True)
    try:
        with contextlib.suppress(OSError):  # the parent has warned of it
            compilation_cache.use_compilation_cache()
        dataset = find_dataset(plan.base.data.dir)
        _work(plan, dataset, show_progress=False, log=log)
    except VaecfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(interrupts.STATUS)


# --- Results ----------------------------------------------------------------


def summarise(
    plan: SweepPlan, study: optuna.Study, about: str, log: Log
) -> list[dict[str, Any]]:
    """Writes trials.csv, best.json and report.html, and returns the rows."""
    rows = [_row(plan, trial) for trial in study_lib.counted(study)]
    frame = pd.DataFrame([{**row, **row["params"]} for row in rows])
    frame = frame.drop(columns="params", errors="ignore")
    path = plan.workdir / "trials.csv"
    workdir_lib.write_bytes(path, frame.to_csv(index=False).encode())
    complete = [row for row in rows if row["state"] == "complete"]
    complete.sort(key=lambda row: -row["value"])
    if not complete:
        log(f"no trial is complete yet; trials: {path}")
        return rows
    metric = plan.base.eval.best_metric
    names = ("number", "folder", "value", "best_epoch", "params")
    best = {name: complete[0][name] for name in names}
    best |= {"study": plan.study, "metric": f"validation/{metric}"}
    workdir_lib.write_json(plan.workdir / "best.json", best)
    sweep_page.write_sweep(
        plan.workdir / workdir_lib.REPORT,
        model=plan.base.title,
        about=about,
        metric=metric,
        trials=rows,
        space=plan.space,
        importances=_importances(study),
        environment=report.environment(),
    )
    shown = [
        {
            "number": row["number"],
            tables.metric_label(metric): row["value"],
            "best epoch": row["best_epoch"],
            "epochs": row["epochs"],
            **row["params"],
        }
        for row in complete[:_SHOWN]
    ]
    log(
        f"\nBest of {len(complete)} complete trials, by validation users\n"
        f"{tables.printable(about)}\n\n"
        f"{tables.format_table(shown)}\n\ntrials: {path}\n"
        f"best: {plan.workdir / 'best.json'}\n"
        f"report: {plan.workdir / workdir_lib.REPORT}"
    )
    return rows


def _importances(study: optuna.Study) -> dict[str, float]:
    """Returns the share of each setting; {} if there are too few trials."""
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _LEAST_FOR_IMPORTANCE:
        return {}
    try:
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator
        )
    except (RuntimeError, ValueError):  # such as equal values everywhere
        return {}


def _row(plan: SweepPlan, trial: FrozenTrial) -> dict[str, Any]:
    curve, attributes = trial.intermediate_values, trial.user_attrs
    return {
        "number": trial.number,
        "state": trial.state.name.lower().replace("fail", "failed"),
        "value": trial.value,
        "epochs": max(curve, default=None),
        "best_epoch": max(curve, key=lambda e: (curve[e], -e), default=None),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "began": trial.datetime_start,
        **{name: attributes.get(name) for name in ("host", "folder", "error")},
        "params": space_lib.values(plan.space, trial.params),
    }
