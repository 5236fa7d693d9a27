"""The epochs of a run, the next one prepared while the device trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vaecf.config import TrainConfig
from vaecf.models.mult_vae import Phase
from vaecf.training.input_pipeline import Epoch, InputPipeline
from vaecf.training.state import TrainSetup


class Epochs:
    """Prepares epochs, which are counted from 0, in their order."""

    def __init__(
        self,
        pipeline: InputPipeline,
        setup: TrainSetup,
        config: TrainConfig,
        order_of: Callable[[int], np.ndarray],
    ) -> None:
        """`order_of` returns the `input_pipeline.epoch_order` of an epoch."""
        self._pipeline, self._setup = pipeline, setup
        self._config, self._order_of = config, order_of
        self._made: dict[int, Epoch] = {}
        self._last = -1

    def phase(self, n: int) -> Phase:
        """Returns what epoch n trains."""
        return self._setup.model.phase(n, self._config)

    def take(self, n: int) -> Epoch:
        """Returns epoch n."""
        self._last = n
        return self._made.pop(n, None) or self._prepare(n)

    def prepare_next(self) -> None:
        """Prepares the epoch after the one that was taken last, if any."""
        n = self._last + 1
        if n < self._config.epochs and n not in self._made:
            self._made = {n: self._prepare(n)}

    def _prepare(self, n: int) -> Epoch:
        setup = self._setup.in_phase(self.phase(n))
        return self._pipeline.prepare(self._order_of(n), setup)
