"""Trials: runs of their own, watched while they train.

Alone (`run`), or several as one population (`run_together`).
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.training import linear_branch, loop, population_loop
from vaecf.training.population_loop import Member
from vaecf.training.progress import TrainProgress
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning import weighing
from vaecf.tuning.study import Plan

# What a trial may fail of without being the last: a loss that is lost, and a
# model that the device's memory cannot hold.
_OWN_FAULTS = (VaecfError, jax.errors.JaxRuntimeError)


class _Pruned(Exception):
    """The trial is not worth more epochs."""


class _Watch:
    """A writer that reports validations, and stops the run if it is told."""

    def __init__(self, trial: Trial, config: Config) -> None:
        before = trial.study.get_trials(deepcopy=False)[trial.number]
        self._trial, self._reported = trial, set(before.intermediate_values)
        self._metric = f"validation/{config.eval.best_metric}"
        self._last = config.train.epochs
        self.is_lost = False  # taken over by another worker

    def write(self, record: Mapping[str, Any], *, step: int) -> None:
        """Takes every record of the run."""
        del step
        if not self._goes_on(record):
            raise _Pruned

    def goes_on(self, record: Mapping[str, Any]) -> bool:
        """Takes a validation of a member; whether it is worth more epochs."""
        try:
            return self._goes_on(record)
        except optuna.exceptions.UpdateFinishedTrialError:
            self.is_lost = True
            return False

    def _goes_on(self, record: Mapping[str, Any]) -> bool:
        if (value := record.get(self._metric)) is None:
            return True
        epoch = int(record["epoch"])
        # A run that goes on from its checkpoint may validate once more.
        if epoch not in self._reported:
            self._trial.report(float(value), epoch)
            self._reported.add(epoch)
        return epoch >= self._last or not self._trial.should_prune()

    def close(self) -> None:
        """Nothing to let go of."""


def run(
    plan: Plan,
    study: optuna.Study,
    trial: Trial,
    dataset: Dataset,
    *,
    bars: bool,
    log: Callable[[str], None],
) -> FrozenTrial | None:
    """Trains a trial and tells the study what came of it.

    Args:
      plan: the sweep.
      study: its study.
      trial: just handed out.
      dataset: what to train on.
      bars: show progress if stderr is a terminal.
      log: gets one line.

    Returns:
      What came of it; None if another worker took it over.

    Raises:
      KeyboardInterrupt: stopped; the trial waits to be gone on with.
    """
    folder = study_lib.folder_of(plan, trial.number)
    _move_here(trial.user_attrs.get(study_lib.FOLDER), folder)
    params = space_lib.values(plan.space, trial.params)
    try:
        config = config_lib.replace(plan.base, params)
        with workdir_lib.locked(folder), study_lib.alive(trial, folder):
            workdir_lib.check_or_create(folder, config, dataset)
            state, value = _train(
                trial, config, dataset, folder, bars=bars and not _quiet()
            )
            study.tell(trial, value, state)
            if not plan.keep_all:
                _clear(folder, keep_best=state == TrialState.COMPLETE)
    except optuna.exceptions.UpdateFinishedTrialError:
        return _taken_over(trial, log)
    except BaseException:
        # Interrupted, or a defect: it is tried again when the sweep goes on.
        study_lib.enqueue_again(study, trial.number)
        raise
    finally:
        jax.clear_caches()  # every trial compiles programs of its own
    frozen = study.get_trials()[trial.number]
    log(line(frozen, params, config.eval.best_metric))
    return frozen


def run_together(
    plan: Plan,
    study: optuna.Study,
    trials: Sequence[Trial],
    dataset: Dataset,
    *,
    bars: bool,
    log: Callable[[str], None],
) -> list[FrozenTrial | None]:
    """Trains trials as one population and tells the study what came of them.

    Args:
      plan: the sweep; its space has keys of `population.VARIED` alone.
      study: its study.
      trials: just handed out, at least one.
      dataset: what to train on.
      bars: show progress if stderr is a terminal.
      log: gets a line a trial.

    Returns:
      As of `run`, for each.

    Raises:
      KeyboardInterrupt: stopped; the trials wait to be gone on with.
      VaecfError: the device's memory cannot hold so many.
    """
    told: dict[int, FrozenTrial | None] = {}
    how: dict[str, Any] = {"bars": bars, "say": log}
    try:
        try:
            _train_together(plan, study, trials, dataset, told, **how)
        except _OWN_FAULTS as error:
            if _is_memory(error) and len(trials) > 1:
                raise VaecfError(
                    f"--population={plan.population}: {_first_line(error)}; "
                    "train fewer at once"
                ) from error
            # Whose fault it is shows when each is alone.
            log(f"one after the other: {_first_line(error)}")
            for trial in trials:
                if trial.number not in told:
                    told[trial.number] = run(plan, study, trial, dataset, **how)
    except BaseException:
        # Interrupted, or a defect: they are tried again when the sweep goes
        # on.
        for trial in trials:
            if trial.number not in told:
                study_lib.enqueue_again(study, trial.number)
        raise
    finally:
        jax.clear_caches()
    return [told[trial.number] for trial in trials]


def _train_together(
    plan: Plan,
    study: optuna.Study,
    trials: Sequence[Trial],
    dataset: Dataset,
    told: dict[int, FrozenTrial | None],
    *,
    bars: bool,
    log: Callable[[str], None],
) -> None:
    """Fills `told` with the trials that are over, also before it raises."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        entered: list[tuple[Trial, Member, _Watch]] = []
        for trial in trials:
            try:
                entered.append(_enter(plan, trial, dataset, stack))
            except optuna.exceptions.UpdateFinishedTrialError:
                told[trial.number] = _taken_over(trial, log)
        interrupted = True
        try:
            interrupted = bool(entered) and population_loop.train(
                [member for _, member, _ in entered],
                dataset,
                plan.workdir,
                show_progress=None if bars and not _quiet() else False,
                log=lambda line: None,
            )
        except _OWN_FAULTS:
            interrupted = False
            raise
        finally:
            seconds = (time.perf_counter() - began) / len(trials)
            for trial, member, watch in entered:
                if not member.over or (interrupted and _is_to_weigh(member)):
                    # Who interrupts does not wait for blends to be weighed.
                    with contextlib.suppress(
                        optuna.exceptions.UpdateFinishedTrialError
                    ):
                        _add_seconds(trial, seconds)
                else:
                    told[trial.number] = _tell(
                        plan, study, trial, dataset, member, watch, seconds, log
                    )
    if interrupted:
        raise KeyboardInterrupt


def _enter(
    plan: Plan, trial: Trial, dataset: Dataset, stack: contextlib.ExitStack
) -> tuple[Trial, Member, _Watch]:
    """A trial as a member, its folder held until the stack is left."""
    folder = study_lib.folder_of(plan, trial.number)
    _move_here(trial.user_attrs.get(study_lib.FOLDER), folder)
    config = config_lib.replace(
        plan.base, space_lib.values(plan.space, trial.params)
    )
    stack.enter_context(workdir_lib.locked(folder))
    stack.enter_context(study_lib.alive(trial, folder))
    workdir_lib.check_or_create(folder, config, dataset)
    watch = _Watch(trial, config)
    name = f"trial {trial.number}"
    return trial, Member(name, config, folder, goes_on=watch.goes_on), watch


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)
    )


def _taken_over(trial: Trial, log: Callable[[str], None]) -> FrozenTrial | None:
    log(f"trial {trial.number}: taken over by another worker")
    return None


def _tell(
    plan: Plan,
    study: optuna.Study,
    trial: Trial,
    dataset: Dataset,
    member: Member,
    watch: _Watch,
    seconds: float,
    log: Callable[[str], None],
) -> FrozenTrial | None:
    """What a member came to."""
    began = time.perf_counter()
    try:
        if watch.is_lost:
            raise optuna.exceptions.UpdateFinishedTrialError
        if member.error is not None:
            state, value = _failed(trial, member.error)
        elif member.stopped:
            state, value = _pruned(trial)
        else:
            state, value = _weighed(
                trial, member.config, member.workdir, dataset, member.position
            )
        _add_seconds(trial, seconds + time.perf_counter() - began)
        study.tell(trial, value, state)
    except optuna.exceptions.UpdateFinishedTrialError:
        return _taken_over(trial, log)
    if not plan.keep_all:
        _clear(member.workdir, keep_best=state == TrialState.COMPLETE)
    frozen = study.get_trials()[trial.number]
    params = space_lib.values(plan.space, trial.params)
    log(line(frozen, params, plan.base.eval.best_metric))
    return frozen


def _is_to_weigh(member: Member) -> bool:
    is_sound = member.error is None and not member.stopped
    return is_sound and member.config.linear.l2 > 0


def _weighed(
    trial: Trial,
    config: Config,
    folder: pathlib.Path,
    dataset: Dataset,
    position: TrainProgress,
) -> tuple[TrialState, float | None]:
    """A trial that is over, with its value or what it failed of."""
    try:
        value = weighing.value(config, folder, dataset, position)
    except _OWN_FAULTS as error:
        return _failed(trial, _first_line(error))
    trial.set_user_attr(study_lib.EPOCHS, position.epoch)
    trial.set_user_attr(study_lib.BEST_EPOCH, position.best_epoch)
    return TrialState.COMPLETE, value


def _add_seconds(trial: Trial, seconds: float) -> None:
    """To those of before it was interrupted, if it was."""
    seconds += trial.user_attrs.get(study_lib.SECONDS, 0.0)
    trial.set_user_attr(study_lib.SECONDS, round(seconds, 3))


def _pruned(trial: Trial) -> tuple[TrialState, float | None]:
    now = trial.study.get_trials(deepcopy=False)[trial.number]
    curve = now.intermediate_values
    trial.set_user_attr(study_lib.EPOCHS, max(curve))
    trial.set_user_attr(
        study_lib.BEST_EPOCH, max(curve, key=lambda e: (curve[e], -e))
    )
    return TrialState.PRUNED, None


def _failed(trial: Trial, reason: str) -> tuple[TrialState, float | None]:
    trial.set_user_attr(study_lib.ERROR, reason)
    return TrialState.FAIL, None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _quiet() -> bool:
    return not sys.stderr.isatty()


def _train(
    trial: Trial,
    config: Config,
    dataset: Dataset,
    folder: pathlib.Path,
    *,
    bars: bool,
) -> tuple[TrialState, float | None]:
    """(state, best validation metric)."""
    began = time.perf_counter()
    try:
        position = loop.train(
            config,
            dataset,
            folder,
            show_progress=None if bars else False,
            extra_writer=_Watch(trial, config),
            log=lambda line: None,
        ).position
        state, value = _weighed(trial, config, folder, dataset, position)
    except _Pruned:
        state, value = _pruned(trial)
    except _OWN_FAULTS as error:
        state, value = _failed(trial, _first_line(error))
    except BaseException:  # interrupted: it is gone on with
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            _add_seconds(trial, time.perf_counter() - began)
        raise
    _add_seconds(trial, time.perf_counter() - began)
    return state, value


def _move_here(earlier: str | None, folder: pathlib.Path) -> None:
    """Takes over the files of the attempt before, if this host has them."""
    if earlier is None or folder.exists() or not pathlib.Path(earlier).is_dir():
        return
    # A worker that is only believed to be dead keeps its files.
    if study_lib.is_free(pathlib.Path(earlier)):
        with contextlib.suppress(OSError):  # on another disk: it starts over
            os.replace(earlier, folder)


def _clear(folder: pathlib.Path, *, keep_best: bool) -> None:
    """What nobody will ask for: states to go on from, events, no models."""
    unused = [folder / "tensorboard", folder / "checkpoints" / "latest"]
    if not keep_best:
        unused += [folder / "checkpoints", folder / linear_branch.FOLDER]
    for path in unused:
        shutil.rmtree(path, ignore_errors=True)


def line(trial: FrozenTrial, params: Mapping[str, Any], metric: str) -> str:
    """What a trial came to, in one line of the log."""
    attributes = trial.user_attrs
    if trial.value is None or not math.isfinite(trial.value):
        result = f"failed: {attributes.get(study_lib.ERROR, 'no value')}"
    else:
        result = f"{metric} {trial.value:.4f}"
    settings = ", ".join(
        f"{key}={shown(value)}" for key, value in params.items()
    )
    parts = [f"trial {trial.number}: {result}", settings]
    spent = f"{attributes.get(study_lib.SECONDS, 0.0):.1f} s"
    if study_lib.EPOCHS in attributes:
        spent = (
            f"{attributes[study_lib.EPOCHS]} epochs (best "
            f"{attributes[study_lib.BEST_EPOCH]}), {spent}"
        )
    parts.append(spent)
    if trial.state == TrialState.PRUNED:
        parts.append("pruned")
    return "; ".join(parts)


def shown(value: Any) -> str:
    """A parameter, short enough for a line."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
