"""The log that users of NVIDIA's VAE-CF recipe parse (`--log_path`).

Lines are `DLLL {json}`, the JSON stream of the DLLogger package, with its
keys: `timestamp`, `elapsedtime`, `datetime`, `type`, then `step` and `data`
(LOG) or `metric` and `metadata` (METADATA). A step is the string PARAMETER,
a list with the epoch, or an empty list for the whole run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from vaecf.reporting.text import finite
from vaecf.reporting.writers import (
    Record,
    _Closing,
    keep_lines,
    open_for_append,
    plain,
)

_PREFIX = b"DLLL "
# Our record's name: the recipe's name and its unit.
_NAMES = {
    "train/epoch_seconds": ("train_epoch_time", "s"),
    "train/users_per_second": ("train_throughput", "users/s"),
    "train/loss": ("train_loss", "nats/user"),
    "validation/seconds": ("valid_time", "s"),
    "validation/users_per_second": ("inference_throughput", "users/s"),
}


def _builtin(value: object) -> object:
    """JSON for parameters: sequences and mappings kept, the rest as text.

    NaN and infinities become text too, for the file is strict JSON.
    """
    if isinstance(value, Mapping):
        return {str(k): _builtin(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_builtin(v) for v in value]
    try:
        scalar = plain("", value)
    except TypeError:
        return str(value)
    if isinstance(scalar, float) and not math.isfinite(scalar):
        return str(scalar)
    return scalar


class RecipeLogWriter(_Closing):
    """Parameters, epochs, validations and final figures in DLLogger's form.

    As a writer it takes the training loop's records, keeps what the recipe
    logs and renames it: `train/epoch_seconds` is `train_epoch_time`,
    `train/users_per_second` is `train_throughput`, `validation/ndcg@100` is
    `ndcg@100`, `test/ndcg@100` is `test_ndcg@100`.

    Args:
      path: the file. It is started afresh, as the recipe does,
      resume_from_epoch: unless this epoch is given: then the lines up to it
        stay, and its epochs count in the final means.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resume_from_epoch: int | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = pathlib.Path(path)
        self._resume = resume_from_epoch
        self._clock = clock
        self._start = clock()
        self._file: IO[str] | None = None
        self._opened = False
        self._declared: set[str] = set()
        self._history: dict[str, list[float]] = {}
        self._metrics: list[str] = []  # validation metrics, in order

    def parameters(self, values: Mapping[str, object]) -> None:
        """Logs the run's settings under the step PARAMETER."""
        self.log(dict(values), step="PARAMETER")

    def metadata(self, metric: str, **fields: str) -> None:
        """Declares a metric's fields, `unit` above all. Once is enough."""
        self._emit("METADATA", {"metric": metric, "metadata": fields})
        self._declared.add(metric)

    def log(
        self,
        data: Mapping[str, object],
        *,
        step: str | Sequence[int] = (),
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Logs values, their units first where not yet declared.

        Args:
          data: names and values.
          step: "PARAMETER", (epoch,) or () for the run as a whole.
          units: unit of a name, e.g. {"batch_1_mean_latency": "s"}.
        """
        for name, unit in (units or {}).items():
            self._declare(name, unit)
        self._emit(
            "LOG",
            {
                "step": step if isinstance(step, str) else list(step),
                "data": _builtin(data),
            },
        )
        self._remember(data, step)

    def write(self, record: Record, *, step: int) -> None:
        """Logs what the recipe knows of a training or validation record.

        The recipe's step is the record's `epoch`, or the training step
        where the record has none.
        """
        epoch = finite(record.get("epoch"))
        data: dict[str, object] = {}
        units: dict[str, str] = {}
        for name, value in record.items():
            renamed = self._rename(name)
            if renamed is not None:
                data[renamed[0]] = value
                units[renamed[0]] = renamed[1]
        if data:
            where = step if epoch is None else int(epoch)
            self.log(data, step=(where,), units=units)

    def _rename(self, name: str) -> tuple[str, str] | None:
        if name in _NAMES:
            return _NAMES[name]
        split, _, metric = name.partition("/")
        if split == "validation" and metric:
            return metric, "1"
        if split == "test" and metric:
            return f"test_{metric}", "1"
        return None

    def final(
        self,
        values: Record | None = None,
        *,
        warm_up_epochs: int = 0,
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Logs the figures of the whole run, with their units.

        `mean_training_throughput` and `max_training_throughput` leave out
        the first `warm_up_epochs` (all epochs count where there are no
        more); `final_ndcg@100` and its like are the last validation's.

        Args:
          values: further figures, and ones that replace those.
          warm_up_epochs: epochs that only warm up.
          units: units of the further figures.
        """
        speeds = self._history.get("train_throughput", [])
        speeds = speeds[warm_up_epochs:] or speeds
        times = self._history.get("train_epoch_time", [])
        data: dict[str, object] = {}
        declared = dict(units or {})
        if times:
            data["total_train_time"] = math.fsum(times)
            data["average_train_epoch_time"] = math.fsum(times) / len(times)
            declared |= dict.fromkeys(data, "s")
        if speeds:
            for name, speed in (
                ("mean_training_throughput", math.fsum(speeds) / len(speeds)),
                ("max_training_throughput", max(speeds)),
            ):
                data[name], declared[name] = speed, "users/s"
        for metric in self._metrics:
            data[f"final_{metric}"] = self._history[metric][-1]
            declared[f"final_{metric}"] = "1"
        self.log({**data, **(values or {})}, step=(), units=declared)

    def _remember(
        self, data: Mapping[str, object], step: str | Sequence[int]
    ) -> None:
        if isinstance(step, str) or not step:
            return
        for name, value in data.items():
            number = finite(value)
            if number is None:
                continue
            self._history.setdefault(name, []).append(number)
            is_metric = "@" in name and not name.endswith("_stderr")
            of_test = name.startswith("test_")
            if is_metric and not of_test and name not in self._metrics:
                self._metrics.append(name)

    def _declare(self, metric: str, unit: str) -> None:
        if metric not in self._declared:
            self.metadata(metric, unit=unit)

    def _emit(self, kind: str, fields: Mapping[str, object]) -> None:
        file = self._opened_file()
        now = self._clock()
        line = {
            "timestamp": str(now),
            "elapsedtime": str(now - self._start),
            "datetime": str(datetime.datetime.fromtimestamp(now)),
            "type": kind,
            **fields,
        }
        file.write(_PREFIX.decode() + json.dumps(line, allow_nan=False) + "\n")
        file.flush()

    def _opened_file(self) -> IO[str]:
        if self._file is None:
            if not self._opened:
                self._opened = True
                self._take_over()
            self._file = open_for_append(self._path)
        return self._file

    def _take_over(self) -> None:
        limit = self._resume

        def keep(line: dict[str, Any]) -> bool:
            if limit is None or line.get("type") != "LOG":
                return limit is not None
            step = line.get("step")
            if isinstance(step, list):  # [] is an earlier run's summary.
                return bool(step) and step[0] <= limit
            return True

        if limit is None:
            if self._path.is_file():
                self._path.unlink()
            return
        for line in keep_lines(self._path, keep, prefix=_PREFIX):
            if line.get("type") == "METADATA":
                self._declared.add(line["metric"])
            elif line.get("type") == "LOG":
                self._remember(line["data"], line["step"])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
