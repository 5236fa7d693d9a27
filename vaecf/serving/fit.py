"""Trains the model of a run: in epochs, or fitted in one go."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any

from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.training import fitted, loop

_logger = logging.getLogger("vaecf")


def train(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = _logger.info,
    **options: Any,
) -> dict[str, Any]:
    """Trains, or resumes, the run of a workdir and returns its summary.

    The caller holds the lock of the workdir. `options` are those of
    `loop.train`, for models that are trained in epochs.

    Raises:
      VaecfError, loop.Interrupted: as `loop.train` and `fitted.train` do.
    """
    if config.is_fitted:
        return fitted.train(config, dataset.train, workdir, log=log)
    return loop.train(config, dataset, workdir, log=log, **options).summary
