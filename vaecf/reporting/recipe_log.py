"""Writes the log of NVIDIA's VAE-CF recipe, for programs that parse it.

The recipe logs with the DLLogger package. Each line is `DLLL ` and a JSON
object with the keys `timestamp`, `elapsedtime`, `datetime` and `type`; then
`step` and `data` (type LOG), or `metric` and `metadata` (type METADATA). The
step is the string PARAMETER, a list that holds the epoch, or an empty list
for the whole run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.reporting.writers import (
    Record,
    Writer,
    finite,
    open_text,
    plain,
)

# The recipe's name and unit for each of our names.
_NAMES = {
    "train/epoch_seconds": ("train_epoch_time", "s"),
    "train/users_per_second": ("train_throughput", "users/s"),
    "train/loss": ("train_loss", "nats/user"),
    "validation/seconds": ("valid_time", "s"),
    "validation/users_per_second": ("inference_throughput", "users/s"),
}


def _rename(name: str) -> tuple[str, str] | None:
    """Returns the recipe's name and unit, or None for a name it lacks."""
    split, _, metric = name.partition("/")
    return _NAMES.get(name, (metric, "1") if split == "validation" else None)


def _to_json(value: object) -> object:
    """Keeps mappings and sequences; other values become scalars or text.

    NaN and infinity become text, because JSON has neither.
    """
    if isinstance(value, Mapping):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v) for v in value]
    try:
        scalar = plain("", value)
    except TypeError:
        return str(value)
    if isinstance(scalar, float) and not math.isfinite(scalar):
        return str(scalar)
    return scalar


class RecipeLogWriter(Writer):
    """Logs settings, epochs, validations and final figures as the recipe does.

    Records of the training loop are renamed: `train/epoch_seconds` becomes
    `train_epoch_time`, and `validation/ndcg@100` becomes `ndcg@100`. Names that
    the recipe does not have are skipped. Each unit is logged before the first
    value.

    Args:
      path: the file; an existing file is replaced, as the recipe does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open_text(pathlib.Path(path), "w")
        self._start = time.time()
        self._declared: set[str] = set()
        # Values of each name by epoch, for the means over the run.
        self._history: dict[str, list[float]] = {}

    def parameters(self, values: Mapping[str, object]) -> None:
        """Logs the run's settings, with the step PARAMETER."""
        self.log(values, step="PARAMETER")

    def log(
        self,
        data: Mapping[str, object],
        *,
        step: str | Sequence[int] = (),
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Logs values.

        Args:
          data: values by name.
          step: 'PARAMETER', (epoch,), or () for the whole run.
          units: units by name, e.g. {'batch_1_mean_latency': 's'}; each is
            logged once.
        """
        for name, unit in (units or {}).items():
            if name not in self._declared:
                self._declared.add(name)
                self._emit(
                    "METADATA", {"metric": name, "metadata": {"unit": unit}}
                )
        where = step if isinstance(step, str) else list(step)
        self._emit("LOG", {"step": where, "data": _to_json(data)})

    def write(self, record: Record, step: int) -> None:
        """Logs the values of a record that the recipe has a name for.

        The log's step is the record's `epoch`, or `step` without one.
        """
        data: dict[str, object] = {}
        units: dict[str, str] = {}
        for name, value in record.items():
            if (renamed := _rename(name)) is None:
                continue
            new_name, unit = renamed
            data[new_name], units[new_name] = value, unit
            if (number := finite(value)) is not None:
                self._history.setdefault(new_name, []).append(number)
        if data:
            epoch = finite(record.get("epoch"))
            where = step if epoch is None else int(epoch)
            self.log(data, step=(where,), units=units)

    def final(
        self,
        values: Record | None = None,
        *,
        warm_up_epochs: int = 0,
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Logs the figures of the whole run, with their units.

        `mean_training_throughput` and `max_training_throughput` leave out the
        first `warm_up_epochs`, unless the run has no more epochs than that.
        `final_ndcg@100` and the like are from the last validation.

        Args:
          values: more figures; replaces figures of the same name.
          warm_up_epochs: number of epochs without influence on throughput.
          units: units of `values`, by name.
        """
        data: dict[str, object] = {}
        declared = dict(units or {})
        if times := self._history.get("train_epoch_time"):
            data["total_train_time"] = math.fsum(times)
            data["average_train_epoch_time"] = math.fsum(times) / len(times)
            declared |= dict.fromkeys(data, "s")
        if speeds := self._history.get("train_throughput"):
            speeds = speeds[warm_up_epochs:] or speeds
            for name, speed in (
                ("mean_training_throughput", math.fsum(speeds) / len(speeds)),
                ("max_training_throughput", max(speeds)),
            ):
                data[name], declared[name] = speed, "users/s"
        for name, history in self._history.items():
            if "@" in name and not name.endswith("_stderr"):
                data[f"final_{name}"] = history[-1]
                declared[f"final_{name}"] = "1"
        self.log({**data, **(values or {})}, step=(), units=declared)

    def _emit(self, kind: str, fields: Mapping[str, object]) -> None:
        now = time.time()
        line = {
            "timestamp": str(now),
            "elapsedtime": str(now - self._start),
            "datetime": str(datetime.datetime.fromtimestamp(now)),
            "type": kind,
            **fields,
        }
        self._file.write(f"DLLL {json.dumps(line, allow_nan=False)}\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_statistics(
    folder: pathlib.Path,
    arguments: Mapping[str, Any],
    results: Mapping[str, Any],
    records: Sequence[Record],
) -> None:
    """Writes args.json and statistics.json, the recipe's files of results.

    Args:
      folder: directory for the files.
      arguments: the command line.
      results: content of results.json.
      records: lines of metrics.jsonl.
    """
    history: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if "/" in name:
                history.setdefault(name, []).append(value)
    workdir_lib.write_json(folder / "args.json", dict(arguments))
    statistics = {"results": results, "history": history}
    workdir_lib.write_json(folder / "statistics.json", statistics)
