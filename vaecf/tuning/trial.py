"""A trial of a sweep: trains with the proposed settings, records the result."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optuna
from optuna.trial import Trial, TrialState

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.reporting.writers import Writer
from vaecf.training import loop
from vaecf.training.input_pipeline import InputPipeline
from vaecf.tuning import population
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning.study import SweepPlan

# Errors that end a trial but not the sweep: a diverged loss, or a model that
# does not fit the memory of the device.
_TRIAL_ERRORS = (VaecfError, jax.errors.JaxRuntimeError)
_TakenOver = optuna.exceptions.UpdateFinishedTrialError


class _Pruned(Exception):
    """The pruner has stopped the trial."""


class TrialRun:
    """A trial that this process runs.

    Attributes:
      number: number of the trial.
      config: settings of the trial.
      directory: its workdir.
      state: how the trial ended; None until then.
    """

    def __init__(
        self,
        plan: SweepPlan,
        study: optuna.Study,
        trial: Trial,
        log: Callable[[str], None],
    ) -> None:
        self.number = trial.number
        self.params = space_lib.values(plan.space, trial.params)
        self.config = config_lib.replace(plan.base, self.params)
        self.directory = study_lib.trial_directory(plan, trial.number)
        self.state: TrialState | None = None
        self._study, self._trial, self._log = study, trial, log
        self._keep_all = plan.keep_all
        frozen = study.get_trials(deepcopy=False)[trial.number]
        self._curve = dict(frozen.intermediate_values)
        self._seconds_before = frozen.user_attrs.get(study_lib.SECONDS, 0.0)
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def opened(self, dataset: Dataset) -> Iterator[None]:
        """Holds the workdir and sends heartbeats."""
        earlier = self._trial.user_attrs.get(study_lib.FOLDER)
        if earlier is not None:
            _take_over_files(pathlib.Path(earlier), self.directory)
        with (
            workdir_lib.locked(self.directory),
            study_lib.heartbeat(self._trial, self.directory),
        ):
            workdir_lib.check_or_create(self.directory, self.config, dataset)
            yield

    def report(self, record: Mapping[str, Any]) -> bool:
        """Reports a validation; returns False if the trial is to stop."""
        value = record.get(f"validation/{self.config.eval.best_metric}")
        if value is None:
            return True
        epoch = int(record["epoch"])
        try:
            # An interrupted trial may repeat a validation.
            if epoch not in self._curve:
                self._trial.report(value, epoch)
                self._curve[epoch] = value
        except _TakenOver:
            return False
        last = epoch >= self.config.train.epochs
        return last or not self._trial.should_prune()

    def finish(
        self,
        state: TrialState,
        *,
        value: float | None = None,
        error: BaseException | str | None = None,
    ) -> None:
        """Tells the study the result, and logs it."""
        curve = self._curve
        self.state = state
        try:
            self._set(study_lib.SECONDS, self._seconds())
            if error is not None:
                self._set(study_lib.ERROR, _first_line(error))
            if curve:
                best = min(curve, key=lambda epoch: (-curve[epoch], epoch))
                self._set(study_lib.EPOCHS, max(curve))
                self._set(study_lib.BEST_EPOCH, best)
            self._study.tell(self._trial, value, state)
        except _TakenOver:
            self._log(f"trial {self.number}: taken over by another worker")
            return
        if not self._keep_all:
            _remove_unused(self.directory, state == TrialState.COMPLETE)
        result = "pruned"
        if error is not None:
            result = f"failed: {_first_line(error)}"
        elif value is not None:
            result = f"{self.config.eval.best_metric} {value:.4f}"
        settings = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in self.params.items()
        )
        self._log(
            f"trial {self.number}: {result}; {settings}; "
            f"{max(curve, default=0)} epochs, {self._seconds():.1f} s"
        )

    def complete(self, dataset: Dataset) -> None:
        """Tells the study the value of a trial that was trained to its end."""
        value = max(self._curve.values())
        try:
            if self.config.linear.l2:
                value = population.tuned_value(self.directory, dataset)
        except _TRIAL_ERRORS as error:
            self.finish(TrialState.FAIL, error=error)
        else:
            self.finish(TrialState.COMPLETE, value=value)

    def enqueue_again(self) -> None:
        """Leaves an interrupted trial to the next call or another worker."""
        with contextlib.suppress(_TakenOver):
            self._set(study_lib.SECONDS, self._seconds())
        study_lib.enqueue_again(self._study, self.number)

    def _set(self, name: str, value: Any) -> None:
        self._trial.set_user_attr(name, value)

    def _seconds(self) -> float:
        now = time.perf_counter()
        return round(self._seconds_before + now - self._began, 3)


class _Reporter(Writer):
    """A metrics writer that reports validations and stops a pruned run."""

    def __init__(self, run: TrialRun) -> None:
        self._run = run

    def write(self, record: Mapping[str, Any], step: int) -> None:
        del step
        if not self._run.report(record):
            raise _Pruned


def train(
    run: TrialRun,
    dataset: Dataset,
    *,
    show_progress: bool | None,
    pipeline: InputPipeline | None = None,
) -> None:
    """Trains a trial, or resumes it, and tells the study its result.

    Args:
      run: the trial, with its workdir `opened`.
      dataset: data to train on.
      show_progress: None for True if stderr is a terminal.
      pipeline: that of a member of a population; None for a separate run.

    Raises:
      VaecfError: the memory of the device cannot hold the population.
    """
    try:
        loop.train(
            run.config,
            dataset,
            run.directory,
            show_progress=show_progress,
            extra_writer=_Reporter(run),
            pipeline=pipeline,
            log=lambda line: None,
        )
    except _Pruned:
        run.finish(TrialState.PRUNED)
    except _TRIAL_ERRORS as error:
        if pipeline is not None and "RESOURCE_EXHAUSTED" in str(error):
            raise VaecfError(
                "the population does not fit the memory of the device "
                f"({_first_line(error)}): train fewer trials at once"
            ) from error
        run.finish(TrialState.FAIL, error=error)
    else:
        run.complete(dataset)


def _take_over_files(earlier: pathlib.Path, directory: pathlib.Path) -> None:
    """Moves the files of the interrupted attempt, if this host has them."""
    if directory.exists() or not earlier.is_dir():
        return
    # A worker that only seems to be lost keeps its files.
    if study_lib.is_free(earlier):
        with contextlib.suppress(OSError):  # on another disk: starts anew
            os.replace(earlier, directory)


def _remove_unused(directory: pathlib.Path, keep_best: bool) -> None:
    unused = ["tensorboard", "checkpoints/latest"]
    if not keep_best:
        unused += [workdir_lib.CHECKPOINTS, workdir_lib.LINEAR]
    for name in unused:
        shutil.rmtree(directory / name, ignore_errors=True)


def _first_line(error: BaseException | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
