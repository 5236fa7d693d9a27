"""Writers for experiment trackers: Weights & Biases and MLflow, both extras.

The environment says where records go, as these packages document: WANDB_MODE
(such as offline), WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
The id of a tracker's run is kept in the workdir, so that a run that resumes
continues it.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.reporting.writers import Record, Writer, finite, plain

_SETTINGS_AT_ONCE = 100  # the most that MLflow takes


def open_writers(
    names: Iterable[str], workdir: pathlib.Path, settings: Mapping[str, Any]
) -> list[Writer]:
    """Returns a writer for each of the trackers `config.train.trackers`.

    Args:
      settings: of the run, by dotted key; they are sent, too.

    Raises:
      VaecfError: a package is missing, or its service refuses the run.
    """
    return [_WRITERS[name](workdir, settings) for name in names]


def require(names: Iterable[str]) -> None:
    """Raises VaecfError if the package of a tracker is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise VaecfError(
                f"config.train.trackers={name} needs a package ({error}): pip "
                f"install 'vaecf[{name}]'"
            ) from error


class WandbWriter(Writer):
    """Sends numbers and texts to a run of Weights & Biases.

    Steps that were sent before the run was resumed are not sent again.
    """

    def __init__(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        import wandb

        path = workdir / "wandb.json"
        if not path.exists():
            workdir_lib.write_json(path, {"run": secrets.token_hex(4)})
        try:
            self._run = wandb.init(
                dir=workdir,
                id=workdir_lib.read_json(path)["run"],
                name=workdir.name,
                config=dict(settings),
                resume="allow",
                reinit="create_new",  # threads of a population have one each
            )
        except wandb.Error as error:
            raise _refused("wandb", error) from error

    def write(self, record: Record, step: int) -> None:
        """Sends a record; wandb does so in the background."""
        values = {name: plain(name, value) for name, value in record.items()}
        values = {k: value for k, value in values.items() if value is not None}
        self._run.log(values, step=step)

    def close(self) -> None:
        """Ends the run there, when all is sent."""
        self._run.finish()


class MlflowWriter(Writer):
    """Sends finite numbers to a run of MLflow.

    MLflow's names have no '@': 'ndcg@100' becomes 'ndcg_100'.
    """

    def __init__(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        import mlflow
        from mlflow import entities

        self._client, self._metric = mlflow.MlflowClient(), entities.Metric
        path = workdir / "mlflow.json"
        try:
            if path.exists():
                self._run = workdir_lib.read_json(path)["run"]
                self._client.update_run(self._run, status="RUNNING")
                return
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vaecf")
            known = self._client.get_experiment_by_name(name)
            where = known.experiment_id if known else None
            where = where or self._client.create_experiment(name)
            made = self._client.create_run(where, run_name=workdir.name)
            self._run = made.info.run_id
            params = [entities.Param(k, str(v)) for k, v in settings.items()]
            for first in range(0, len(params), _SETTINGS_AT_ONCE):
                block = params[first : first + _SETTINGS_AT_ONCE]
                self._client.log_batch(self._run, params=block)
        except mlflow.MlflowException as error:
            raise _refused("mlflow", error) from error
        workdir_lib.write_json(path, {"run": self._run})

    def write(self, record: Record, step: int) -> None:
        """Sends the numbers of a record."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(re.sub(r"[^-/\w. ]", "_", name), number, now, step)
            for name, value in record.items()
            if (number := finite(value)) is not None
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._run)


_WRITERS: dict[str, Any] = {"wandb": WandbWriter, "mlflow": MlflowWriter}


def _refused(name: str, error: Exception) -> VaecfError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return VaecfError(
        f"config.train.trackers={name}: {reason}; see its documentation, or "
        "leave it out"
    )
