"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vaecf.errors import VaecfError
from vaecf.evaluation import evaluate as evaluate_lib
from vaecf.evaluation import metrics, ranking, scorers
from vaecf.models import losses, sharding
from vaecf.options import Options
from vaecf.reporting import writers
from vaecf.reporting.progress import Progress
from vaecf.training import batches, checkpoints, feeds, loss_scale
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints

# A stretch of steps is one dispatch. About this long keeps the bar alive and
# an interrupt prompt, at no cost to the device.
_STRETCH_SECONDS = 1.0
_CHECKPOINT_SECONDS = 600.0


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, after the state was saved."""


@dataclasses.dataclass
class Position:
    """Where a run is; stored in the checkpoint beside the arrays.

    Attributes:
      epoch: epochs finished.
      step_in_epoch: steps taken of the epoch under way.
      best: value of the best metric so far, None before the first validation.
      best_epoch: epochs finished when it was reached.
      validations_without_gain: validations since.
      seconds: training time so far, validation and compilation left out.
      timed_users: users trained after the warm-up epochs.
      timed_seconds: training time of those.
      epoch_seconds: training time of the epoch under way.
      epoch_sums: `Totals` of the epoch under way.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    best_epoch: int = 0
    validations_without_gain: int = 0
    seconds: float = 0.0
    timed_users: int = 0
    timed_seconds: float = 0.0
    epoch_seconds: float = 0.0
    epoch_sums: list[float] = dataclasses.field(default_factory=list)

    def add(
        self,
        stretch: step_lib.Totals,
        steps: int,
        seconds: float,
        options: Options,
    ) -> None:
        """Books a stretch of an epoch."""
        sums = self.epoch_sums or [0.0] * len(stretch)
        self.epoch_sums = [
            a + float(b) for a, b in zip(sums, stretch, strict=True)
        ]
        self.step_in_epoch += steps
        self.epoch_seconds += seconds
        self.seconds += seconds
        train = options.train
        if self.epoch >= min(train.warm_up_epochs, train.epochs - 1):
            self.timed_users += int(stretch.users)
            self.timed_seconds += seconds

    def next_epoch(self) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch += 1
        self.step_in_epoch, self.epoch_seconds, self.epoch_sums = 0, 0.0, []


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training run leaves in memory.

    Attributes:
      problem: static part, for scoring.
      params: parameters of the last step.
      position: end of the run.
      summary: {'users_per_second', 'seconds', 'epochs', ...}.
    """

    problem: step_lib.Problem
    params: Any
    position: Position
    summary: dict[str, Any]


def train(
    options: Options,
    dataset: Any,
    workdir: pathlib.Path,
    *,
    show_progress: bool | None = None,
    extra_writer: Any | None = None,
    trace_dir: pathlib.Path | None = None,
    log: Callable[[str], None] = logging.info,
) -> TrainResult:
    """Trains a model, or goes on with it where the workdir left off.

    The caller holds the workdir (`workdir.locked`, `workdir.claim`).

    Args:
      options: the run.
      dataset: `data.dataset.Dataset`.
      workdir: where checkpoints and metrics go.
      show_progress: None decides by whether stderr is a terminal.
      extra_writer: gets every record too.
      trace_dir: where to write a profile of a few seconds of training (for
        Perfetto, xprof or TensorBoard); None for none.
      log: gets one line of text at a time.

    Raises:
      Interrupted: after SIGINT or SIGTERM, with the state saved.
      VaecfError: the loss is not finite, or float16 overflows for good.
    """
    # --- Mesh, model, state -------------------------------------------------
    mesh = sharding.make_mesh(options.mesh.data, options.mesh.item)
    problem = step_lib.make_problem(options, dataset.n_items, mesh)
    saved = Checkpoints(workdir / "checkpoints")
    # Resume order: 1. the latest checkpoint of the workdir, 2. from scratch.
    if saved.step(LATEST) is not None:
        position = Position(**saved.position(LATEST))
        state = restore_state(problem, saved)
        log(f"going on from epoch {position.epoch}, step {int(state.step)}")
    else:
        position, state = Position(), step_lib.init_state(problem, options.seed)

    # --- Data ---------------------------------------------------------------
    n_users = dataset.train.n_users
    if n_users == 0:
        raise VaecfError(f"{dataset.path}: the dataset has no training users")
    shards = problem.data_shards
    # A batch beyond the users would be padding and change nothing.
    batch_size = min(options.train.batch_size, n_users)
    if not options.train.drop_remainder:
        batch_size = -(-batch_size // shards) * shards
    if batch_size % shards:
        raise VaecfError(
            f"config.train.batch_size={batch_size} must be a multiple of the "
            f"{shards} devices along the users when drop_remainder is set"
        )
    steps = batches.steps_per_epoch(
        n_users, batch_size, options.train.drop_remainder
    )
    feed = feeds.make_feed(
        options.data.feed, problem, dataset.train, options.seed
    )

    # --- Evaluator, writers -------------------------------------------------
    validate = _validator(options, dataset, problem, state.params)
    step_now = position.epoch * steps + position.step_in_epoch
    writer = writers.MultiWriter(
        [
            writers.JsonlWriter(
                workdir / "metrics.jsonl", resume_from_step=step_now
            ),
            writers.TensorBoardWriter(
                workdir / "tensorboard", resume_from_step=step_now
            ),
            *([extra_writer] if extra_writer is not None else []),
        ]
    )
    clock, tracer = _Clock(), _Tracer(trace_dir)
    last_saved = time.monotonic()

    def save() -> None:
        nonlocal last_saved
        saved.save(LATEST, int(state.step), state, dataclasses.asdict(position))
        last_saved = time.monotonic()

    # --- Epochs -------------------------------------------------------------
    with (
        _interrupts() as interrupted,
        contextlib.closing(writer),
        contextlib.closing(saved),
        Progress(
            options.train.epochs,
            steps,
            n_users,
            initial_epoch=position.epoch,
            enabled=show_progress,
        ) as progress,
    ):
        while position.epoch < options.train.epochs:
            if _out_of_patience(options, position):
                progress.note(
                    f"stopping early: no gain in {options.eval.patience} "
                    f"validations, best at epoch {position.best_epoch}"
                )
                break
            order = batches.epoch_order(
                options.seed,
                position.epoch,
                n_users,
                batch_size,
                drop_remainder=options.train.drop_remainder,
            )
            epoch = feed.prepare(order)
            while position.step_in_epoch < steps:
                start = position.step_in_epoch
                stop = clock.next_stop(start, steps)
                compiled_before = feed.compile_seconds
                began = time.perf_counter()
                with tracer.stretch():
                    state, device_totals = feed.run(state, epoch, start, stop)
                    totals = step_lib.Totals(*jax.device_get(device_totals))
                seconds = time.perf_counter() - began
                seconds -= feed.compile_seconds - compiled_before
                clock.ran(stop - start, seconds)
                position.add(totals, stop - start, seconds, options)
                _check_health(options, state, totals, position)
                progress.update(
                    epoch=position.epoch + 1,
                    step_in_epoch=stop,
                    loss=float(totals.loss / totals.steps),
                    users_per_second=float(totals.users / seconds),
                )
                if interrupted() or (
                    stop < steps
                    and time.monotonic() - last_saved > _CHECKPOINT_SECONDS
                ):
                    save()
                if interrupted():
                    raise Interrupted(
                        f"stopped in epoch {position.epoch + 1}; the same "
                        f"command goes on from here ({workdir})"
                    )
            record = _training_record(options, state, position, steps)
            position.next_epoch()
            step_now = position.epoch * steps
            writer.write(record, step=step_now)
            last = position.epoch == options.train.epochs
            if position.epoch % options.eval.every_epochs == 0 or last:
                record = validate(state.params)
                if record:
                    better = _note_validation(options, position, record)
                    writer.write(
                        {"epoch": position.epoch, **record}, step=step_now
                    )
                    progress.note(
                        _validation_line(options, position, record, better)
                    )
                    if better:
                        saved.save(
                            BEST,
                            int(state.step),
                            state.params,
                            dataclasses.asdict(position),
                        )
                save()
        if saved.step(BEST) is None:
            # No validation users: the last parameters are the best there are.
            saved.save(
                BEST,
                int(state.step),
                state.params,
                dataclasses.asdict(position),
            )
        if saved.step(LATEST) != int(state.step):
            save()
        summary = _summary(position, feed, options, mesh)
        writer.write(
            {f"final/{k}": v for k, v in summary.items()}, step=int(state.step)
        )
    return TrainResult(problem, state.params, position, summary)


def restore_state(
    problem: step_lib.Problem, saved: Checkpoints
) -> step_lib.TrainState:
    """The latest state, onto this problem's mesh."""
    shapes = jax.eval_shape(lambda: step_lib.init_state(problem, 0))
    return saved.restore(
        LATEST, checkpoints.abstract(shapes, step_lib.state_shardings(problem))
    )


def restore_params(problem: step_lib.Problem, saved: Checkpoints) -> Any:
    """The best parameters, onto this problem's mesh."""
    shapes = jax.eval_shape(lambda: step_lib.init_state(problem, 0)).params
    spec = step_lib.state_shardings(problem).params
    return saved.restore(BEST, checkpoints.abstract(shapes, spec))


def item_share(train: Any) -> np.ndarray:
    """Share of training users who have each item, float64 [I]."""
    return train.item_counts() / max(1, train.n_users)


def _validator(
    options: Options, dataset: Any, problem: step_lib.Problem, params: Any
) -> Callable[[Any], dict[str, Any]]:
    """params -> record of validation metrics; {} without validation users."""
    held = dataset.split("validation")
    if held.held_out.nnz == 0:
        return lambda params: {}
    names = (*options.eval.metrics,)
    if options.eval.best_metric not in names:
        names = (*names, options.eval.best_metric)
    ranker = ranking.Ranker(
        scorers.model(problem.model, params), problem.mesh, metrics.depth(names)
    )
    share_I = item_share(dataset.train)

    def validate(params: Any) -> dict[str, Any]:
        began = time.perf_counter()
        result = evaluate_lib.evaluate(
            ranker,
            params,
            held.fold_in,
            held.held_out,
            names=names,
            batch_size=options.eval.batch_size,
            item_share_I=share_I,
        )
        seconds = time.perf_counter() - began
        return {
            **evaluate_lib.flat(result.summary, "validation"),
            "validation/seconds": seconds,
        }

    return validate


def _note_validation(
    options: Options, position: Position, record: dict[str, Any]
) -> bool:
    """Books a validation; whether it is the best so far."""
    value = record[f"validation/{options.eval.best_metric}"]
    better = position.best is None or value > position.best
    if better:
        position.best, position.best_epoch = value, position.epoch
        position.validations_without_gain = 0
    else:
        position.validations_without_gain += 1
    return better


def _validation_line(
    options: Options, position: Position, record: dict[str, Any], better: bool
) -> str:
    values = "  ".join(
        f"{name} {record[f'validation/{name}']:.4f}"
        for name in dict.fromkeys(
            (options.eval.best_metric, *options.eval.metrics)
        )
    )
    mark = "  (best so far)" if better else ""
    return f"epoch {position.epoch}  validation: {values}{mark}"


def _out_of_patience(options: Options, position: Position) -> bool:
    patience = options.eval.patience
    return (
        patience is not None and position.validations_without_gain >= patience
    )


def _training_record(
    options: Options, state: step_lib.TrainState, position: Position, steps: int
) -> dict[str, Any]:
    """Means over the epoch that just ended."""
    totals = step_lib.Totals(*position.epoch_sums)
    skipped, _ = loss_scale.skips_of(state.opt_state)
    last_step = (position.epoch + 1) * steps - 1
    return {
        "epoch": position.epoch + 1,
        "train/loss": totals.loss / totals.steps,
        "train/nll": totals.nll / totals.users,
        "train/kl": totals.kl / totals.users,
        "train/anneal": float(
            losses.anneal_weight(
                last_step,
                cap=options.loss.anneal_cap,
                total_steps=options.loss.total_anneal_steps,
            )
        ),
        "train/users_per_second": totals.users / position.epoch_seconds,
        "train/epoch_seconds": position.epoch_seconds,
        "train/loss_scale": float(loss_scale.scale_of(state.opt_state)),
        "train/skipped_steps": int(skipped),
    }


def _check_health(
    options: Options,
    state: step_lib.TrainState,
    totals: step_lib.Totals,
    position: Position,
) -> None:
    """Gives up on a loss that is lost.

    Raises:
      VaecfError: see `train`.
    """
    scaled = isinstance(state.opt_state, loss_scale.LossScaleState)
    if scaled:
        _, in_a_row = (int(x) for x in loss_scale.skips_of(state.opt_state))
        if in_a_row >= options.precision.max_skipped_in_a_row:
            raise VaecfError(
                f"float16 gradients overflowed {in_a_row} steps in a row in "
                f"epoch {position.epoch + 1}, at loss scale "
                f"{float(loss_scale.scale_of(state.opt_state)):g}: lower "
                "config.optimizer.learning_rate, or use "
                "--config.precision.policy=bf16"
            )
    elif not math.isfinite(totals.loss):
        raise VaecfError(
            f"the loss is {totals.loss} in epoch {position.epoch + 1}, step "
            f"{position.step_in_epoch}: lower config.optimizer.learning_rate; "
            "the last checkpoint is from before it"
        )


def _summary(
    position: Position, feed: Any, options: Options, mesh: Any
) -> dict[str, Any]:
    timed = position.timed_seconds
    return {
        "users_per_second": position.timed_users / timed if timed else None,
        "seconds": position.seconds,
        "epochs": position.epoch,
        "best_epoch": position.best_epoch,
        "compile_seconds": feed.compile_seconds,
        "precision": step_lib.precision.policy(options.precision.policy).name,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
    }


class _Clock:
    """Chooses how many steps a dispatch takes."""

    def __init__(self) -> None:
        self._seconds_a_step: float | None = None

    def next_stop(self, start: int, steps: int) -> int:
        """End of the next stretch."""
        if self._seconds_a_step is None:
            return start + 1
        n = max(1, round(_STRETCH_SECONDS / max(self._seconds_a_step, 1e-9)))
        return min(steps, start + n)

    def ran(self, n: int, seconds: float) -> None:
        """Takes note of a stretch."""
        self._seconds_a_step = seconds / n


class _Tracer:
    """Profiles the second dispatch: the first compiles."""

    def __init__(self, directory: pathlib.Path | None) -> None:
        self._directory, self._stretches = directory, 0

    @contextlib.contextmanager
    def stretch(self) -> Iterator[None]:
        """Around a dispatch and the wait for it."""
        self._stretches += 1
        if self._directory is None or self._stretches != 2:
            yield
            return
        with jax.profiler.trace(self._directory, create_perfetto_trace=True):
            yield


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question asked between dispatches."""
    seen: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(
                number, lambda n, _: seen.append(n)
            )
    except ValueError:
        # Not the main thread: its owner handles signals.
        previous = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
