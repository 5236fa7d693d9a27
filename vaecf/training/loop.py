"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vaecf.config import Config, MeshConfig
from vaecf.data.dataset import Dataset
from vaecf.evaluation import scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import trackers, writers
from vaecf.reporting.progress import Progress
from vaecf.training import input_pipeline, linear_branch, signals
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.epochs import Epochs
from vaecf.training.first_state import Start, resumed_or_new
from vaecf.training.input_pipeline import Epoch, InputPipeline
from vaecf.training.progress import (
    TrainProgress,
    check_health,
    is_summarised,
    is_trained,
    limit_epochs,
    patience_line,
    require_finite,
    require_trained,
    summarise,
    training_record,
    validation_line,
)
from vaecf.training.signals import Interrupted, SyncedStatus
from vaecf.training.state import TrainSetup, TrainState
from vaecf.training.step import StepMetrics

# Without a validation, the state is saved this often.
CHECKPOINT_SECONDS = 600.0

_logger = logging.getLogger("vaecf")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a training run."""

    setup: TrainSetup  # static part of the run, for scoring
    params: Any  # scoring parameters of the last step, on the mesh
    progress: TrainProgress  # progress at the end of the run
    summary: dict[str, Any]  # {'users_per_second', 'seconds', 'epochs', ...}


class Shared(NamedTuple):
    """What several runs share; each run makes for itself what is None."""

    # Input pipeline with the seed of the run.
    pipeline: InputPipeline | None = None
    # Linear branch of a blend, on the mesh.
    linear: dict[str, Any] | None = None


def train(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    show_progress: bool | None = None,
    extra_writer: writers.Writer | None = None,
    trace_dir: pathlib.Path | None = None,
    shared: Shared | None = None,
    start: Start | None = None,
    resumable: bool = True,
    log: Callable[[str], None] = _logger.info,
) -> TrainResult:
    """Trains a model, resuming from the latest checkpoint of the workdir.

    The caller holds the lock of the workdir. With several processes, all call
    this function alike, with a workdir on a shared file system.

    Args:
      show_progress: None shows a progress bar if stderr is a terminal.
      extra_writer: also receives every record.
      trace_dir: directory for a profile of a few seconds of training (for
        Perfetto, xprof or TensorBoard); None for no profile.
      start: continue from these parameters instead of starting at epoch 0.
      resumable: False saves the latest state only at an interrupt, and after
        `CHECKPOINT_SECONDS`.

    Raises:
      Interrupted: after SIGINT or SIGTERM, with the state saved.
      VaecfError: a setting does not fit, the loss is not finite, or float16
        gradients keep overflowing.
    """
    # --- Mesh, model, data --------------------------------------------------
    trackers.require(config.train.trackers)
    shared = shared or Shared()
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    setup = state_lib.make_setup(config, dataset.n_items, mesh)
    steps, order_of = input_pipeline.batch_order(config, setup, dataset.train)
    config = limit_epochs(config, steps, log=log)
    pipeline = shared.pipeline or input_pipeline.make_pipeline(
        config.data.feed, setup, dataset.train, config.seed, log=log
    )
    epochs = Epochs(pipeline, setup, config.train, order_of)

    # --- State, validation, writers -----------------------------------------
    saved = Checkpoints(workdir / "checkpoints")
    progress, state = resumed_or_new(
        config, setup, dataset.train, saved, workdir, start, steps, log=log
    )
    linear = shared.linear or linear_branch.prepare(
        config.linear, dataset.train, workdir, mesh, log=log
    )
    validate = _make_validator(config, dataset, setup, linear)
    writer = _open_writers(
        config, workdir, progress.epoch, int(state.step), extra_writer
    )
    saver = _Saver(saved, writer, setup, config.mesh, resumable)

    # --- Epochs -------------------------------------------------------------
    with (
        signals.interrupts() as interrupted,
        contextlib.closing(writer),
        contextlib.closing(saved),
        Progress(
            config.train.epochs,
            steps,
            initial_epoch=progress.epoch,
            enabled=processes.is_lead() and show_progress is not False,
        ) as bar,
    ):
        dispatcher = _Dispatcher(pipeline, saver, interrupted, trace_dir)
        while progress.epoch < config.train.epochs:
            if progress.out_of_patience(config.eval.patience):
                bar.note(patience_line(config, progress))
                break
            if progress.step_in_epoch == 0:
                phase = epochs.phase(progress.epoch)
                state = state_lib.begin_phase(setup, state, phase)
            epoch = epochs.take(progress.epoch)

            # Each iteration is one dispatch, of a few seconds.
            while progress.step_in_epoch < steps:
                state, metrics, now = dispatcher.run(
                    state, epoch, progress.step_in_epoch, epochs.prepare_next
                )
                check_health(config, state.opt_state, metrics, progress)
                progress.add(metrics, now.seconds, config.train)
                _update_bar(bar, progress, metrics.users.sum(), now.seconds)
                # The last step of an epoch is saved after its validation.
                unfinished = progress.step_in_epoch < steps
                if unfinished and (now.interrupted or now.overdue):
                    saver.save(LATEST, state, progress)
                    if now.interrupted:
                        raise _stopped(progress, workdir)

            # --- End of the epoch -------------------------------------------
            record = training_record(config, state.opt_state, progress, steps)
            ema = config.train.ema
            state = state_lib.update_average(state, ema, progress.epoch)
            progress.next_epoch()
            step = progress.epoch * steps
            writer.write(record, step=step)
            due = progress.epoch % config.eval.every_epochs == 0
            due |= progress.epoch == config.train.epochs
            if due:
                saver.require_finite(state, progress)
            if due and (record := validate(state)):
                better = is_trained(state) and progress.validated(
                    record[f"validation/{config.eval.best_metric}"]
                )
                writer.write({"epoch": progress.epoch, **record}, step=step)
                bar.note(validation_line(config, progress, record, better))
                if better:
                    saver.save(BEST, state, progress)
            now = dispatcher.status()
            if (due and resumable) or now.interrupted or now.overdue:
                saver.save(LATEST, state, progress)
            if now.interrupted and progress.epoch < config.train.epochs:
                raise _stopped(progress, workdir)

        saver.finish(state, progress)
        summary = summarise(progress, pipeline, config, mesh)
        if not is_summarised(workdir, int(state.step)):
            record = {f"final/{k}": v for k, v in summary.items()}
            writer.write(record, step=int(state.step))
        if dispatcher.status().interrupted:  # after the last epoch
            raise _stopped(progress, workdir)
    params = state_lib.scoring_params(setup, state)
    return TrainResult(setup, params, progress, summary)


class _Saver:
    """Saves checkpoints and remembers when it last did."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        writer: writers.Writer,
        setup: TrainSetup,
        mesh: MeshConfig,
        resumable: bool,
    ) -> None:
        self.checkpoints, self._writer = checkpoints, writer
        self.deadline = functools.partial(processes.deadline, mesh.peer_timeout)
        self._setup, self._resumable = setup, resumable
        self._saved_at = time.monotonic()
        self._checked = -1  # step whose parameters are known to be finite

    def save(
        self, which: str, state: TrainState, progress: TrainProgress
    ) -> None:
        self.require_finite(state, progress)
        tree: Any = state
        if which == BEST:
            tree = state_lib.scoring_params(self._setup, state)
        position = dataclasses.asdict(progress)
        self._writer.flush()  # a resumed run does not write them again
        with self.deadline("saving a checkpoint"):
            self.checkpoints.save(which, int(state.step), tree, position)
        self._saved_at = time.monotonic()

    def require_finite(
        self, state: TrainState, progress: TrainProgress
    ) -> None:
        """Checks the parameters of each step once; see `progress`."""
        if self._checked != int(state.step):
            require_finite(state, progress)
            self._checked = int(state.step)

    def finish(self, state: TrainState, progress: TrainProgress) -> None:
        require_trained(state)
        if progress.best is None:
            # Without validation users, the last parameters count as the best.
            self.save(BEST, state, progress)
        is_saved = self.checkpoints.step(LATEST) == int(state.step)
        if self._resumable and not is_saved:
            self.save(LATEST, state, progress)

    def overdue(self) -> bool:
        return time.monotonic() - self._saved_at > CHECKPOINT_SECONDS


def _update_bar(
    bar: Progress, progress: TrainProgress, users: float, seconds: float
) -> None:
    """Shows the mean loss of the epoch so far, and the latest speed."""
    sums = StepMetrics(*progress.epoch_sums)
    bar.update(
        epoch=progress.epoch + 1,
        step_in_epoch=progress.step_in_epoch,
        loss=sums.loss / sums.users,
        users_per_second=users / seconds,
    )


class _Dispatcher:
    """Runs steps in dispatches of a few seconds and syncs the processes."""

    def __init__(
        self,
        pipeline: InputPipeline,
        saver: _Saver,
        interrupted: Callable[[], bool],
        trace_dir: pathlib.Path | None,
    ) -> None:
        self._pipeline, self._saver = pipeline, saver
        self._interrupted = interrupted
        self._clock, self._trace_dir = signals.Clock(), trace_dir
        self._dispatches = 0

    def run(
        self,
        state: TrainState,
        epoch: Epoch,
        start: int,
        meanwhile: Callable[[], None],
    ) -> tuple[TrainState, StepMetrics, SyncedStatus]:
        """Takes some steps of an epoch and waits for them; see `InputPipeline`.

        The seconds of the returned status are without compilation.
        """
        stop = self._clock.next_stop(start, epoch.steps, epoch.short)
        with self._profile(), self._saver.deadline("a dispatch of steps"):
            compiled_before = self._pipeline.compile_seconds
            began = time.perf_counter()
            state, metrics = self._pipeline.run(
                state, epoch, start, stop, meanwhile
            )
            seconds = time.perf_counter() - began
            seconds -= self._pipeline.compile_seconds - compiled_before
            now = self.status(seconds)
        self._clock.ran(stop - start, now.seconds)
        return state, metrics, now

    def _profile(self) -> contextlib.AbstractContextManager[Any]:
        """Profiles the second dispatch; the first one compiles."""
        self._dispatches += 1
        if self._trace_dir is None or self._dispatches != 2:
            return contextlib.nullcontext()
        return jax.profiler.trace(self._trace_dir, create_perfetto_trace=True)

    def status(self, seconds: float = 0.0) -> SyncedStatus:
        return signals.sync_status(
            seconds, self._interrupted(), self._saver.overdue()
        )


def _open_writers(
    config: Config,
    workdir: pathlib.Path,
    epoch: int,
    step: int,
    extra: writers.Writer | None,
) -> writers.MultiWriter:
    """Opens the writers of process 0; records after `step` are dropped.

    There is nothing to write if the run is done and has its summary.
    """
    is_done = epoch >= config.train.epochs
    if not processes.is_lead() or (is_done and is_summarised(workdir, step)):
        return writers.MultiWriter([])
    names, settings = config.train.trackers, config.flat()
    return writers.MultiWriter(
        [
            writers.JsonlWriter(workdir / "metrics.jsonl", step),
            writers.TensorBoardWriter(workdir / "tensorboard", step),
            *trackers.open_writers(names, workdir, settings),
            *([] if extra is None else [extra]),
        ]
    )


def _stopped(progress: TrainProgress, workdir: pathlib.Path) -> Interrupted:
    where = f"after epoch {progress.epoch}"
    if progress.step_in_epoch:
        where = f"in epoch {progress.epoch + 1}"
    return Interrupted(
        f"stopped {where}; train again in workdir {workdir} to resume"
    )


def _make_validator(
    config: Config,
    dataset: Dataset,
    setup: TrainSetup,
    linear: dict[str, Any] | None,
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns a function from a state to a record of validation metrics.

    The record is {} if there are no validation users.
    """
    validation = Evaluator.for_split(
        dataset, "validation", config.eval, setup.mesh
    )
    ranker = validation.compile(scorers.model(setup.model))

    def validate(state: TrainState) -> dict[str, Any]:
        params = state_lib.scoring_params(setup, state)
        began = time.perf_counter()
        with processes.deadline(config.mesh.peer_timeout, "a validation"):
            result = validation(ranker, scorers.ModelParams(params, linear))
        if validation.is_empty:
            return {}
        seconds = time.perf_counter() - began
        return {
            **result.record("validation"),
            "validation/seconds": seconds,
            "validation/users_per_second": validation.fold_in.n_users / seconds,
        }

    return validate
