"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.evaluation import scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import losses
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import writers
from vaecf.reporting.progress import Progress
from vaecf.training import (
    checkpoints,
    input_pipeline,
    linear_branch,
    loss_scale,
    precision,
    signals,
    spectral_init,
)
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.progress import TrainProgress
from vaecf.training.signals import Interrupted

CHECKPOINT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training run leaves in memory.

    Attributes:
      setup: static part, for scoring.
      params: parameters of the last step.
      position: end of the run.
      summary: {'users_per_second', 'seconds', 'epochs', ...}.
    """

    setup: state_lib.TrainSetup
    params: Any
    position: TrainProgress
    summary: dict[str, Any]


def train(
    config: Config,
    dataset: Any,
    workdir: pathlib.Path,
    *,
    show_progress: bool | None = None,
    extra_writer: Any | None = None,
    trace_dir: pathlib.Path | None = None,
    log: Callable[[str], None] = logging.info,
) -> TrainResult:
    """Trains a model, or goes on with it where the workdir left off.

    The caller holds the workdir (`workdir.locked`, `workdir.claim`). Of
    several processes all call it alike, on one shared file system.

    Args:
      config: the run.
      dataset: `data.dataset.Dataset`.
      workdir: where checkpoints and metrics go.
      show_progress: None decides by whether stderr is a terminal.
      extra_writer: receives every record too; the caller closes it.
      trace_dir: where to write a profile of a few seconds of training (for
        Perfetto, xprof or TensorBoard); None for none.
      log: gets one line of text at a time.

    Raises:
      Interrupted: after SIGINT or SIGTERM, with the state saved.
      VaecfError: the loss is not finite, or float16 overflows for good.
    """
    # --- Mesh, model, data --------------------------------------------------
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    setup = state_lib.make_setup(config, dataset.n_items, mesh)
    n_users = dataset.train.n_users
    if n_users == 0:
        raise VaecfError(f"{dataset.name}: the dataset has no training users")
    # A batch beyond the users would be padding and change nothing.
    batch_size = min(config.train.batch_size, n_users)
    drop_remainder = config.train.drop_remainder
    steps = input_pipeline.steps_per_epoch(n_users, batch_size, drop_remainder)
    kind = config.data.feed
    if kind == "auto":
        kind, why = input_pipeline.choose(dataset.train)
        log(f"interactions: {kind} ({why})")
    feed = input_pipeline.make_pipeline(kind, setup, dataset.train, config.seed)

    # --- State --------------------------------------------------------------
    saved = Checkpoints(workdir / "checkpoints")
    # Resume order: 1. the latest checkpoint of the workdir, 2. from scratch.
    within = functools.partial(processes.deadline, config.mesh.peer_timeout)
    if saved.step(LATEST) is not None:
        with within("reading a checkpoint"):
            position, state = resume(setup, saved, steps)
        if position.epoch >= config.train.epochs:
            log(f"nothing left to train: {position.epoch} epochs are done")
        else:
            log(f"going on from epoch {position.epoch}, step {int(state.step)}")
    else:
        position, state = (
            TrainProgress(),
            state_lib.init_state(setup, config.seed),
        )
        if config.model.init == "spectral":
            [state] = spectral_init.start(
                [state], [config.seed], dataset.train, workdir, log=log
            )
    first_step = int(state.step)

    # --- Evaluator, writers -------------------------------------------------
    path = linear_branch.prepare(
        config.linear, dataset.train, workdir, mesh, log=log
    )
    validate = make_validator(config, dataset, setup, path)
    writer = open_writers(workdir, first_step, extra_writer)
    clock, tracer = signals.Clock(), signals.Tracer(trace_dir)
    last_saved = time.monotonic()

    def save(which: str = LATEST) -> None:
        nonlocal last_saved
        tree: Any = state
        if which == BEST:
            tree = state_lib.scoring_params(setup, state)
        where = dataclasses.asdict(position)
        with within("a checkpoint"):
            saved.save(which, int(state.step), tree, where)
        last_saved = time.monotonic()

    def overdue() -> bool:
        return time.monotonic() - last_saved > CHECKPOINT_SECONDS

    # --- Epochs -------------------------------------------------------------
    with (
        signals.interrupts() as interrupted,
        contextlib.closing(writer),
        contextlib.closing(saved),
        Progress(
            config.train.epochs,
            steps,
            initial_epoch=position.epoch,
            enabled=show_progress if processes.is_lead() else False,
        ) as progress,
    ):
        while position.epoch < config.train.epochs:
            if position.out_of_patience(config.eval.patience):
                progress.note(
                    f"stopping early: no gain in {config.eval.patience} "
                    f"validations, best at epoch {position.best_epoch}"
                )
                break
            order = input_pipeline.epoch_order(
                config.seed,
                position.epoch,
                n_users,
                batch_size,
                drop_remainder=drop_remainder,
                parts=setup.parts(batch_size),
            )
            phase = setup.model.phase(
                position.epoch, config.train.alternating_epochs
            )
            if position.step_in_epoch == 0:
                state = state_lib.begin_phase(setup, state, phase)
            epoch = feed.prepare(order, setup.in_phase(phase))
            while position.step_in_epoch < steps:
                start = position.step_in_epoch
                stop = clock.next_stop(start, steps)
                compiled_before = feed.compile_seconds
                began = time.perf_counter()
                with tracer.stretch(), within("a stretch of training"):
                    state, totals = feed.run(state, epoch, start, stop)
                    seconds = time.perf_counter() - began
                    seconds -= feed.compile_seconds - compiled_before
                    now = signals.sync_status(seconds, interrupted(), overdue())
                clock.ran(stop - start, now.seconds)
                check_health(config, state.opt_state, totals, position)
                position.add(totals, now.seconds, config.train)
                progress.update(
                    epoch=position.epoch + 1,
                    step_in_epoch=stop,
                    loss=float(totals.loss.sum() / totals.users.sum()),
                    users_per_second=float(totals.users.sum() / now.seconds),
                )
                # After its last step an epoch is finished before it is saved:
                # a step is saved only once.
                if stop < steps and (now.interrupted or now.overdue):
                    save()
                    if now.interrupted:
                        raise stopped(position, workdir)
            record = training_record(config, state.opt_state, position, steps)
            state = state_lib.update_average(
                state, config.train.ema, position.epoch
            )
            position.next_epoch()
            step_now = position.epoch * steps
            writer.write(record, step=step_now)
            last = position.epoch == config.train.epochs
            due = position.epoch % config.eval.every_epochs == 0 or last
            record = {}
            if due:
                with within("a validation"):
                    record = validate(state_lib.scoring_params(setup, state))
            if record:
                best_metric = f"validation/{config.eval.best_metric}"
                better = position.validated(record[best_metric])
                writer.write({"epoch": position.epoch, **record}, step=step_now)
                progress.note(
                    _validation_line(config, position, record, better)
                )
                if better:
                    save(BEST)
            now = signals.sync_status(now.seconds, interrupted(), overdue())
            if due or now.interrupted or now.overdue:
                save()
            if now.interrupted:
                raise stopped(position, workdir)
        if position.best is None:
            # No validation users: the last parameters are the best there are.
            save(BEST)
        if saved.step(LATEST) != int(state.step):
            save()
        summary = summarise(position, feed, config, mesh)
        if int(state.step) > first_step:
            writer.write(
                {f"final/{k}": v for k, v in summary.items()},
                step=int(state.step),
            )
    params = state_lib.scoring_params(setup, state)
    return TrainResult(setup, params, position, summary)


def restore_state(
    setup: state_lib.TrainSetup, saved: Checkpoints
) -> state_lib.TrainState:
    """Returns the latest state, placed on the mesh of `setup`."""
    shapes = state_lib.abstract_state(setup)
    places = state_lib.state_shardings(setup)
    return saved.restore(
        LATEST, checkpoints.abstract(shapes, places), setup.model.n_items
    )


def resume(
    setup: state_lib.TrainSetup, saved: Checkpoints, steps: int
) -> tuple[TrainProgress, state_lib.TrainState]:
    """Where the workdir left off, with `steps` an epoch."""
    position = TrainProgress(**saved.position(LATEST))
    state = restore_state(setup, saved)
    step = position.epoch * steps + position.step_in_epoch
    if step != int(state.step):
        raise VaecfError(
            f"checkpoints/latest: the checkpoint is of step "
            f"{int(state.step)}, and with {steps} steps an epoch its position "
            f"is step {step}: it is damaged, or of another batch size or "
            "dataset"
        )
    return position, state


def open_writers(
    workdir: pathlib.Path, step: int, extra: Any | None
) -> writers.MultiWriter:
    """All writers; records after `step` are dropped. Only the lead writes."""
    if not processes.is_lead():
        return writers.MultiWriter([])
    return writers.MultiWriter(
        [
            writers.JsonlWriter(
                workdir / "metrics.jsonl", resume_from_step=step
            ),
            writers.TensorBoardWriter(
                workdir / "tensorboard", resume_from_step=step
            ),
        ],
        borrowed=[] if extra is None else [extra],
    )


def stopped(position: TrainProgress, workdir: pathlib.Path) -> Interrupted:
    """What ends a run whose state is saved."""
    where = (
        f"in epoch {position.epoch + 1}"
        if position.step_in_epoch
        else f"after epoch {position.epoch}"
    )
    return Interrupted(
        f"stopped {where}; the same command goes on from here ({workdir})"
    )


def make_validator(
    config: Config,
    dataset: Any,
    setup: state_lib.TrainSetup,
    linear: dict[str, Any] | None = None,
) -> Callable[[Any], dict[str, Any]]:
    """Returns a function from parameters to a record of validation metrics.

    The record is {} if there are no validation users.

    Args:
      config: settings of the run.
      dataset: holds the validation users.
      setup: static part of the run.
      linear: linear branch of a blend; None for none.
    """
    validation = Evaluator.for_split(
        dataset, "validation", config.eval, setup.mesh
    )
    ranker = validation.compile(scorers.model(setup.model))

    def validate(params: Any) -> dict[str, Any]:
        began = time.perf_counter()
        result = validation(ranker, scorers.ModelParams(params, linear))
        if result is None:
            return {}
        seconds = time.perf_counter() - began
        return {**result.record("validation"), "validation/seconds": seconds}

    return validate


def _validation_line(
    config: Config,
    position: TrainProgress,
    record: dict[str, Any],
    better: bool,
) -> str:
    """A validation for a person."""
    values = "  ".join(
        f"{name} {record[f'validation/{name}']:.4f}"
        for name in dict.fromkeys(
            (config.eval.best_metric, *config.eval.metrics)
        )
    )
    mark = "  (best so far)" if better else ""
    return f"epoch {position.epoch}  validation: {values}{mark}"


def training_record(
    config: Config, opt_state: Any, position: TrainProgress, steps: int
) -> dict[str, Any]:
    """Means over the epoch that just ended."""
    totals = step_lib.StepMetrics(*position.epoch_sums)
    skipped, _ = loss_scale.skips_of(opt_state)
    last_step = (position.epoch + 1) * steps - 1
    return {
        "epoch": position.epoch + 1,
        "train/loss": totals.loss / totals.users,
        "train/nll": totals.nll / totals.users,
        "train/kl": totals.kl / totals.users,
        "train/anneal": float(
            losses.anneal_weight(
                last_step,
                cap=config.loss.anneal_cap,
                total_steps=config.loss.total_anneal_steps,
            )
        ),
        "train/users_per_second": totals.users / position.epoch_seconds,
        "train/epoch_seconds": position.epoch_seconds,
        "train/loss_scale": float(loss_scale.scale_of(opt_state)),
        "train/skipped_steps": int(skipped),
    }


def check_health(
    config: Config,
    opt_state: Any,
    totals: step_lib.StepMetrics,
    position: TrainProgress,
) -> None:
    """Gives up on a loss that is lost.

    Raises:
      VaecfError: see `train`.
    """
    scaled = isinstance(opt_state, loss_scale.LossScaleState)
    if scaled:
        _, in_a_row = (int(x) for x in loss_scale.skips_of(opt_state))
        if in_a_row >= config.precision.max_skipped_in_a_row:
            raise VaecfError(
                f"float16 gradients overflowed {in_a_row} steps in a row in "
                f"epoch {position.epoch + 1}, at loss scale "
                f"{float(loss_scale.scale_of(opt_state)):g}: lower "
                "config.optimizer.learning_rate, or use "
                "--config.precision.policy=bf16"
            )
        return
    lost = np.flatnonzero(~np.isfinite(totals.loss))
    if len(lost):
        step = position.step_in_epoch + int(lost[0]) + 1
        raise VaecfError(
            f"the loss is {totals.loss[lost[0]]} in epoch "
            f"{position.epoch + 1}, step {step}: lower "
            "config.optimizer.learning_rate, in another workdir if this one "
            "has checkpoints"
        )


def summarise(
    position: TrainProgress, feed: Any, config: Config, mesh: Any
) -> dict[str, Any]:
    """What a run says of its training; of a feed the compilation."""
    timed = position.timed_seconds
    return {
        "users_per_second": position.timed_users / timed if timed else None,
        "seconds": position.seconds,
        "epochs": position.epoch,
        # Without validation users the last one is used.
        "best_epoch": (
            position.epoch if position.best is None else position.best_epoch
        ),
        "compile_seconds": feed.compile_seconds,
        "precision": precision.policy(config.precision.policy).name,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
    }
