"""Where a run is: epochs, the best so far, sums of the epoch under way."""

from __future__ import annotations

import dataclasses

from vaecf.config import TrainConfig
from vaecf.training.step import StepMetrics


@dataclasses.dataclass
class TrainProgress:
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
      epoch_sums: `StepMetrics` of the epoch under way.
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
        self, stretch: StepMetrics, seconds: float, train: TrainConfig
    ) -> None:
        """Books a stretch of an epoch, step by step.

        One step after the other in float64: how an epoch was cut into
        stretches, which goes by the clock, does not show in the sums.
        """
        for totals in zip(*stretch, strict=True):
            sums = self.epoch_sums or [0.0] * len(totals)
            self.epoch_sums = [
                a + float(b) for a, b in zip(sums, totals, strict=True)
            ]
            self.step_in_epoch += 1
        self.epoch_seconds += seconds
        self.seconds += seconds
        if self.epoch >= min(train.warm_up_epochs, train.epochs - 1):
            self.timed_users += int(stretch.users.sum())
            self.timed_seconds += seconds

    def next_epoch(self) -> None:
        """Moves to the first step of the next epoch."""
        self.epoch += 1
        self.step_in_epoch, self.epoch_seconds, self.epoch_sums = 0, 0.0, []

    def validated(self, value: float) -> bool:
        """Books a validation; whether it is the best so far."""
        better = self.best is None or value > self.best
        if better:
            self.best, self.best_epoch = value, self.epoch
            self.validations_without_gain = 0
        else:
            self.validations_without_gain += 1
        return better

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether that many validations brought no gain; None: never."""
        return (
            patience is not None and self.validations_without_gain >= patience
        )
