"""The progress of a run: what is counted, recorded, checked and summarised."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vaecf import config as config_lib
from vaecf.config import Config, TrainConfig
from vaecf.errors import VaecfError
from vaecf.models import losses
from vaecf.parallel import processes
from vaecf.reporting import writers
from vaecf.training import optimizers, precision
from vaecf.training.state import TrainState
from vaecf.training.step import StepMetrics

# Epochs, or rounds of alternating epochs, that `train.max_steps` always allows.
_LEAST_ROUNDS = 3


class Diverged(VaecfError):
    """The loss or a parameter is not finite; earlier checkpoints are sound."""


@dataclasses.dataclass
class TrainProgress:
    """How far a run is; saved beside the arrays of a checkpoint."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0
    # Best value of the validation metric; None before the first validation.
    best: float | None = None
    best_epoch: int = 0  # finished epochs at the best value
    validations_without_gain: int = 0  # validations since the best value
    seconds: float = 0.0  # training time, without validation and compilation
    timed_users: int = 0  # users trained after the warm-up epochs
    timed_seconds: float = 0.0  # training time after the warm-up epochs
    epoch_seconds: float = 0.0  # training time of the current epoch
    # `StepMetrics` of the current epoch, added up.
    epoch_sums: list[float] = dataclasses.field(default_factory=list)

    def add(
        self, metrics: StepMetrics, seconds: float, train: TrainConfig
    ) -> None:
        """Adds some steps of the current epoch; metrics are arrays [steps].

        The sums are taken step by step in float64. They do not depend on the
        number of steps of a dispatch, which the clock decides.
        """
        for step in zip(*metrics, strict=True):
            sums = self.epoch_sums or [0.0] * len(step)
            self.epoch_sums = [
                a + float(b) for a, b in zip(sums, step, strict=True)
            ]
            self.step_in_epoch += 1
        self.epoch_seconds += seconds
        self.seconds += seconds
        if self.epoch >= min(train.warm_up_epochs, train.epochs - 1):
            self.timed_users += int(metrics.users.sum())
            self.timed_seconds += seconds

    def next_epoch(self) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch += 1
        self.step_in_epoch, self.epoch_seconds, self.epoch_sums = 0, 0.0, []

    def validated(self, value: float) -> bool:
        """Records a validation and returns whether it is the best so far."""
        better = self.best is None or value > self.best
        if better:
            self.best, self.best_epoch = value, self.epoch
            self.validations_without_gain = 0
        else:
            self.validations_without_gain += 1
        return better

    def out_of_patience(self, patience: int | None) -> bool:
        """Returns whether that many validations in a row brought no gain."""
        return (
            patience is not None and self.validations_without_gain >= patience
        )


def training_record(
    config: Config, opt_state: Any, progress: TrainProgress, steps: int
) -> dict[str, Any]:
    """Returns the means of the epoch whose last step was just taken."""
    sums = StepMetrics(*progress.epoch_sums)
    last_step = (progress.epoch + 1) * steps - 1
    return {
        "epoch": progress.epoch + 1,
        "train/loss": sums.loss / sums.users,
        "train/nll": sums.nll / sums.users,
        "train/kl": sums.kl / sums.users,
        "train/anneal": float(losses.anneal_weight(last_step, config.loss)),
        "train/users_per_second": sums.users / progress.epoch_seconds,
        "train/epoch_seconds": progress.epoch_seconds,
        "train/loss_scale": float(optimizers.loss_scale_of(opt_state)),
        "train/skipped_steps": int(optimizers.skips_of(opt_state)),
    }


def check_health(
    config: Config,
    opt_state: Any,
    metrics: StepMetrics,
    progress: TrainProgress,
) -> None:
    """Raises Diverged if the loss has diverged.

    `progress` is that before the steps, `opt_state` the one after them.
    """
    epoch = progress.epoch + 1
    if isinstance(opt_state, optimizers.LossScaleState):
        in_a_row = int(opt_state.skipped_in_a_row)
        if in_a_row >= config.precision.max_skipped_in_a_row:
            raise Diverged(
                f"float16 gradients overflowed {in_a_row} steps in a row in "
                f"epoch {epoch}, at loss scale {opt_state.scale:g}: lower "
                "config.optimizer.learning_rate, or set "
                "config.precision.policy='bf16'"
            )
        return
    bad = np.flatnonzero(~np.isfinite(metrics.loss))
    if len(bad):
        step = progress.step_in_epoch + int(bad[0]) + 1
        raise Diverged(
            f"the loss is {metrics.loss[bad[0]]} in epoch {epoch}, step "
            f"{step}: lower config.optimizer.learning_rate, and use a new "
            "workdir if this one has checkpoints"
        )


def is_trained(state: TrainState) -> bool:
    """Returns whether a step was applied; float16 may skip all of them."""
    return int(state.step) > int(optimizers.skips_of(state.opt_state))


def require_trained(state: TrainState) -> None:
    """Raises VaecfError if steps were taken and none was applied."""
    if int(state.step) and not is_trained(state):
        raise VaecfError(
            f"nothing was learned: the gradients of all {int(state.step)} "
            "steps overflowed in float16, and no step was applied; train more "
            "epochs, or set config.precision.policy='bf16' in a new workdir"
        )


def require_finite(state: TrainState, progress: TrainProgress) -> None:
    """Raises Diverged if a parameter is infinite or NaN.

    The loss of a step is computed before its update, so `check_health` does
    not see the parameters after the last step.
    """
    if not bool(_all_finite((state.params, state.average))):
        raise Diverged(
            f"parameters are not finite after epoch {progress.epoch}, step "
            f"{int(state.step)} of the run, and are not saved: lower "
            "config.optimizer.learning_rate, and use a new workdir if this one "
            "has checkpoints"
        )


_all_finite = jax.jit(optimizers.all_finite)


def summarise(
    progress: TrainProgress, pipeline: Any, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """Returns speed, length and devices of a training run."""
    timed = progress.timed_seconds
    return {
        "users_per_second": progress.timed_users / timed if timed else None,
        "seconds": progress.seconds,
        "epochs": progress.epoch,
        # Without validation users, the last epoch counts as the best.
        "best_epoch": (
            progress.epoch if progress.best is None else progress.best_epoch
        ),
        "compile_seconds": pipeline.compile_seconds,
        "precision": precision.policy(config.precision.policy).name,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
    }


# --- Lines and records ------------------------------------------------------


def last_epoch(train: TrainConfig, steps: int) -> int:
    """Returns the number of epochs of a run with `steps` steps per epoch.

    These are `train.epochs`, or as many as `train.max_steps` allows.
    """
    if not train.max_steps:
        return train.epochs
    size = max(1, sum(train.alternating_epochs))  # epochs of a round
    most = max(_LEAST_ROUNDS, train.max_steps // (steps * size)) * size
    return min(train.epochs, most)


def limit_epochs(
    config: Config, steps: int, *, log: Callable[[str], None]
) -> Config:
    """Returns the config with as many epochs as `train.max_steps` allows.

    `steps` is the number of steps per epoch.
    """
    most = last_epoch(config.train, steps)
    if most == config.train.epochs:
        return config
    log(
        f"at most {most} epochs of {steps:,} steps: "
        f"config.train.max_steps={config.train.max_steps:,}"
    )
    return config_lib.replace(config, {"train.epochs": most})


def resume_line(
    config: Config, progress: TrainProgress, state: TrainState
) -> str:
    """Returns what a run that was called again is about to do."""
    if progress.epoch >= config.train.epochs:
        return f"nothing left to train: {progress.epoch} epochs are done"
    return f"resuming from epoch {progress.epoch}, step {int(state.step)}"


def is_summarised(workdir: pathlib.Path, step: int) -> bool:
    """Returns whether metrics.jsonl needs no summary of the run up to a step.

    A call that was stopped after the last epoch may not have written it.
    """
    path = workdir / "metrics.jsonl"
    if step == 0 or not processes.is_lead():
        return True
    return path.exists() and any(
        "final/epochs" in record and record["step"] == step
        for record in writers.read_records(path)
    )


def patience_line(config: Config, progress: TrainProgress) -> str:
    """Returns why training stops early."""
    return (
        f"stopping early: no gain in {config.eval.patience} validations, best "
        f"at epoch {progress.best_epoch}"
    )


def validation_line(
    config: Config,
    progress: TrainProgress,
    record: dict[str, Any],
    better: bool,
) -> str:
    """Returns the metrics of a validation."""
    names = dict.fromkeys((config.eval.best_metric, *config.eval.metrics))
    values = "  ".join(f"{n} {record[f'validation/{n}']:.4f}" for n in names)
    mark = "  (best so far)" if better else ""
    return f"epoch {progress.epoch}  validation: {values}{mark}"
