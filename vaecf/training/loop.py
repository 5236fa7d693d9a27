"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vaecf import distributed
from vaecf.errors import VaecfError
from vaecf.evaluation import evaluate as evaluate_lib
from vaecf.evaluation import metrics, ranking, scorers
from vaecf.models import losses, sharding
from vaecf.options import Options
from vaecf.reporting import writers
from vaecf.reporting.progress import Progress
from vaecf.training import (
    batches,
    checkpoints,
    dispatch,
    feeds,
    linear_path,
    loss_scale,
    spectral,
)
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.dispatch import Interrupted
from vaecf.training.position import Position

CHECKPOINT_SECONDS = 600.0


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

    The caller holds the workdir (`workdir.locked`, `workdir.claim`). Of
    several processes all call it alike, on one shared file system.

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
    # --- Mesh, model, data --------------------------------------------------
    mesh = sharding.make_mesh(options.mesh.data, options.mesh.item)
    problem = step_lib.make_problem(options, dataset.n_items, mesh)
    n_users = dataset.train.n_users
    if n_users == 0:
        raise VaecfError(f"{dataset.name}: the dataset has no training users")
    # A batch beyond the users would be padding and change nothing.
    batch_size = min(options.train.batch_size, n_users)
    drop_remainder = options.train.drop_remainder
    steps = batches.steps_per_epoch(n_users, batch_size, drop_remainder)
    kind = options.data.feed
    if kind == "auto":
        kind, why = feeds.choose(dataset.train)
        log(f"interactions: {kind} ({why})")
    feed = feeds.make_feed(kind, problem, dataset.train, options.seed)

    # --- State --------------------------------------------------------------
    saved = Checkpoints(workdir / "checkpoints")
    # Resume order: 1. the latest checkpoint of the workdir, 2. from scratch.
    within = functools.partial(distributed.deadline, options.mesh.peer_timeout)
    if saved.step(LATEST) is not None:
        with within("reading a checkpoint"):
            position, state = resume(problem, saved, steps)
        if position.epoch >= options.train.epochs:
            log(f"nothing left to train: {position.epoch} epochs are done")
        else:
            log(f"going on from epoch {position.epoch}, step {int(state.step)}")
    else:
        position, state = Position(), step_lib.init_state(problem, options.seed)
        if options.model.init == "spectral":
            [state] = spectral.start(
                [state], [options.seed], dataset.train, workdir, log=log
            )
    first_step = int(state.step)

    # --- Evaluator, writers -------------------------------------------------
    path = linear_path.prepare(
        options.linear, dataset.train, workdir, mesh, log=log
    )
    validate = make_validator(
        options, dataset, problem, step_lib.scoring_params(state), path
    )
    writer = open_writers(workdir, first_step, extra_writer)
    clock, tracer = dispatch.Clock(), dispatch.Tracer(trace_dir)
    last_saved = time.monotonic()

    def save(which: str = LATEST) -> None:
        nonlocal last_saved
        tree: Any = step_lib.stored(state)
        if which == BEST:
            tree = step_lib.scoring_params(state)
        where = dataclasses.asdict(position)
        with within("a checkpoint"):
            saved.save(which, int(state.step), tree, where)
        last_saved = time.monotonic()

    def overdue() -> bool:
        return time.monotonic() - last_saved > CHECKPOINT_SECONDS

    # --- Epochs -------------------------------------------------------------
    with (
        dispatch.interrupts() as interrupted,
        contextlib.closing(writer),
        contextlib.closing(saved),
        Progress(
            options.train.epochs,
            steps,
            n_users,
            initial_epoch=position.epoch,
            enabled=show_progress if distributed.is_lead() else False,
        ) as progress,
    ):
        while position.epoch < options.train.epochs:
            if position.out_of_patience(options.eval.patience):
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
                drop_remainder=drop_remainder,
                parts=problem.parts(batch_size),
            )
            now_trained = step_lib.in_turn(
                problem, options.train, position.epoch
            )
            if position.step_in_epoch == 0 and step_lib.starts_decoder(
                options.train, position.epoch
            ):
                state = step_lib.renew_prior(problem, state)
            epoch = feed.prepare(order, now_trained)
            while position.step_in_epoch < steps:
                start = position.step_in_epoch
                stop = clock.next_stop(start, steps)
                compiled_before = feed.compile_seconds
                began = time.perf_counter()
                with tracer.stretch(), within("a stretch of training"):
                    state, totals = feed.run(state, epoch, start, stop)
                    seconds = time.perf_counter() - began
                    seconds -= feed.compile_seconds - compiled_before
                    now = dispatch.agree(seconds, interrupted(), overdue())
                clock.ran(stop - start, now.seconds)
                check_health(options, state.opt_state, totals, position)
                position.add(totals, now.seconds, options.train)
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
            record = training_record(options, state.opt_state, position, steps)
            state = step_lib.average(state, options.train.ema, position.epoch)
            position.next_epoch()
            step_now = position.epoch * steps
            writer.write(record, step=step_now)
            last = position.epoch == options.train.epochs
            due = position.epoch % options.eval.every_epochs == 0 or last
            record = {}
            if due:
                with within("a validation"):
                    record = validate(step_lib.scoring_params(state))
            if record:
                best_metric = f"validation/{options.eval.best_metric}"
                better = position.validated(record[best_metric])
                writer.write({"epoch": position.epoch, **record}, step=step_now)
                progress.note(
                    _validation_line(options, position, record, better)
                )
                if better:
                    save(BEST)
            now = dispatch.agree(now.seconds, interrupted(), overdue())
            if due or now.interrupted or now.overdue:
                save()
            if now.interrupted:
                raise stopped(position, workdir)
        if position.best is None:
            # No validation users: the last parameters are the best there are.
            save(BEST)
        if saved.step(LATEST) != int(state.step):
            save()
        summary = summarise(position, feed, options, mesh)
        if int(state.step) > first_step:
            writer.write(
                {f"final/{k}": v for k, v in summary.items()},
                step=int(state.step),
            )
    params = step_lib.scoring_params(state)
    return TrainResult(problem, params, position, summary)


def restore_state(
    problem: step_lib.Problem, saved: Checkpoints
) -> step_lib.TrainState:
    """The latest state, onto this problem's mesh."""
    shapes = jax.eval_shape(lambda: step_lib.init_state(problem, 0))
    places = step_lib.state_shardings(problem)
    restored = saved.restore(
        LATEST,
        checkpoints.abstract(step_lib.stored(shapes), step_lib.stored(places)),
        problem.model.n_items,
    )
    return step_lib.TrainState(*restored)


def resume(
    problem: step_lib.Problem, saved: Checkpoints, steps: int
) -> tuple[Position, step_lib.TrainState]:
    """Where the workdir left off, with `steps` an epoch."""
    position = Position(**saved.position(LATEST))
    state = restore_state(problem, saved)
    step = position.epoch * steps + position.step_in_epoch
    if step != int(state.step):
        raise VaecfError(
            f"checkpoints/latest: the checkpoint is of step "
            f"{int(state.step)}, and with {steps} steps an epoch its position "
            f"is step {step}: it is damaged, or of another batch size or "
            "dataset"
        )
    return position, state


def restore_params(problem: step_lib.Problem, saved: Checkpoints) -> Any:
    """The best parameters, onto this problem's mesh."""
    shapes = step_lib.scoring_params(
        jax.eval_shape(lambda: step_lib.init_state(problem, 0))
    )
    spec = step_lib.scoring_params(step_lib.state_shardings(problem))
    return saved.restore(
        BEST, checkpoints.abstract(shapes, spec), problem.model.n_items
    )


def item_share(train: Any, names: Sequence[str]) -> np.ndarray:
    """Share of training users who have each item, float64 [I].

    Zeros when none of these metrics asks: it reads all interactions.
    """
    if all(metrics.parse(name).kind != "popularity" for name in names):
        return np.zeros(train.n_items)
    return train.item_counts() / max(1, train.n_users)


def open_writers(
    workdir: pathlib.Path, step: int, extra: Any | None
) -> writers.MultiWriter:
    """All writers; records after `step` are dropped. Only the lead writes."""
    if not distributed.is_lead():
        return writers.MultiWriter([])
    return writers.MultiWriter(
        [
            writers.JsonlWriter(
                workdir / "metrics.jsonl", resume_from_step=step
            ),
            writers.TensorBoardWriter(
                workdir / "tensorboard", resume_from_step=step
            ),
            *([] if extra is None else [extra]),
        ]
    )


def stopped(position: Position, workdir: pathlib.Path) -> Interrupted:
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
    options: Options,
    dataset: Any,
    problem: step_lib.Problem,
    params: Any,
    path: dict[str, Any] | None = None,
) -> Callable[[Any], dict[str, Any]]:
    """params -> record of validation metrics; {} without validation users.

    Args:
      options: of the run.
      dataset: whose validation users they are.
      problem: of the run.
      params: of the kind that will be validated.
      path: linear path beside the model; None for none.
    """
    held = dataset.split("validation")
    if held.held_out.nnz == 0:
        return lambda params: {}
    names = (*options.eval.metrics,)
    if options.eval.best_metric not in names:
        names = (*names, options.eval.best_metric)
    scorer = scorers.ranked(problem.model, params, path)
    ranker = ranking.Ranker(scorer, problem.mesh, metrics.depth(names))
    share_I = item_share(dataset.train, names)

    def validate(params: Any) -> dict[str, Any]:
        began = time.perf_counter()
        result = evaluate_lib.evaluate(
            ranker,
            scorers.ranked_params(params, path),
            held.fold_in,
            held.held_out,
            names=names,
            batch_size=options.eval.batch_size,
            item_share_I=share_I,
        )
        record = {
            **evaluate_lib.flat(result.summary, "validation"),
            "validation/seconds": time.perf_counter() - began,
        }
        # A last bit that differs must not part the processes.
        return dict(zip(record, distributed.from_lead([*record.values()])))

    return validate


def _validation_line(
    options: Options, position: Position, record: dict[str, Any], better: bool
) -> str:
    """A validation for a person."""
    values = "  ".join(
        f"{name} {record[f'validation/{name}']:.4f}"
        for name in dict.fromkeys(
            (options.eval.best_metric, *options.eval.metrics)
        )
    )
    mark = "  (best so far)" if better else ""
    return f"epoch {position.epoch}  validation: {values}{mark}"


def training_record(
    options: Options, opt_state: Any, position: Position, steps: int
) -> dict[str, Any]:
    """Means over the epoch that just ended."""
    totals = step_lib.Totals(*position.epoch_sums)
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
                cap=options.loss.anneal_cap,
                total_steps=options.loss.total_anneal_steps,
            )
        ),
        "train/users_per_second": totals.users / position.epoch_seconds,
        "train/epoch_seconds": position.epoch_seconds,
        "train/loss_scale": float(loss_scale.scale_of(opt_state)),
        "train/skipped_steps": int(skipped),
    }


def check_health(
    options: Options,
    opt_state: Any,
    totals: step_lib.Totals,
    position: Position,
) -> None:
    """Gives up on a loss that is lost.

    Raises:
      VaecfError: see `train`.
    """
    scaled = isinstance(opt_state, loss_scale.LossScaleState)
    if scaled:
        _, in_a_row = (int(x) for x in loss_scale.skips_of(opt_state))
        if in_a_row >= options.precision.max_skipped_in_a_row:
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
    position: Position, feed: Any, options: Options, mesh: Any
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
        "precision": step_lib.precision.policy(options.precision.policy).name,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
    }
