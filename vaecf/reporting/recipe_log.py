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
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.reporting import writers
from vaecf.reporting.writers import Record, Writer

Figures = Mapping[str, tuple[Any, str]]  # {name: (value, unit)}

# The recipe's name and unit for each of our names.
_NAMES = {
    "train/epoch_seconds": ("train_epoch_time", "s"),
    "train/users_per_second": ("train_throughput", "users/s"),
    "train/loss": ("train_loss", "nats/user"),
    "validation/seconds": ("valid_time", "s"),
    "validation/users_per_second": ("inference_throughput", "users/s"),
}


class RecipeLogWriter(Writer):
    """Logs settings, epochs, validations and final figures as the recipe does.

    Records of the training loop are renamed: `train/epoch_seconds` becomes
    `train_epoch_time`, and `validation/ndcg@100` becomes `ndcg@100`. Names that
    the recipe does not have are skipped. Each unit is logged before the first
    value. An existing file is replaced, as the recipe does.
    """

    def __init__(self, path: pathlib.Path) -> None:
        writers.write_text(path, "", mode="w")
        self._path = path
        self._start = time.time()
        self._declared: set[str] = set()
        # Values of each name by epoch, for the means over the run.
        self._history: dict[str, list[float]] = {}
        # Seconds of training with its validations, once they are known.
        self.elapsed_seconds: float | None = None

    def parameters(self, values: Mapping[str, object]) -> None:
        """Logs the run's settings, with the step PARAMETER."""
        self._emit("LOG", step="PARAMETER", data=values)

    def log(self, figures: Figures, step: Sequence[object] = ()) -> None:
        """Logs figures of an epoch, `step=(epoch,)`, or of the whole run."""
        for name, (_, unit) in figures.items():
            if name not in self._declared:
                self._declared.add(name)
                self._emit("METADATA", metric=name, metadata={"unit": unit})
        data = {
            name: writers.plain(name, v) for name, (v, _) in figures.items()
        }
        self._emit("LOG", step=list(step), data=data)

    def write(self, record: Record, step: int) -> None:
        """Logs the values of a record that the recipe has a name for.

        The log's step is the record's `epoch`, or `step` without one.
        """
        figures = {}
        for name, value in record.items():
            split, _, metric = name.partition("/")
            if name not in _NAMES and split != "validation":
                continue
            new_name, unit = _NAMES.get(name, (metric, "1"))
            figures[new_name] = value, unit
            if (number := writers.finite(value)) is not None:
                self._history.setdefault(new_name, []).append(number)
        if figures:
            self.log(figures, step=(record.get("epoch", step),))

    def final(self, figures: Figures, *, warm_up_epochs: int = 0) -> None:
        """Logs `figures` and the means of the whole run, by the recipe's names.

        `mean_training_throughput` and `max_training_throughput` leave out the
        first `warm_up_epochs`, unless the run has no more epochs than that.
        `final_ndcg@100` and the like are from the last validation.
        """
        of_run: dict[str, tuple[Any, str]] = {}
        history = self._history
        if seconds := history.get("train_epoch_time"):
            of_run["total_train_time"] = sum(seconds), "s"
            # The recipe's spelling.
            of_run["average_train_epoch time"] = statistics.fmean(seconds), "s"
            if self.elapsed_seconds is not None:
                of_run["total_elapsed_time"] = self.elapsed_seconds, "s"
        if seconds := history.get("valid_time"):
            of_run["total_valid_time"] = sum(seconds), "s"
            of_run["average_validation_time"] = statistics.fmean(seconds), "s"
        for kind, left_out in (("train", warm_up_epochs), ("inference", 0)):
            if speeds := history.get(f"{kind}_throughput"):
                speeds = speeds[left_out:] or speeds
                name = "training" if kind == "train" else kind
                mean = statistics.fmean(speeds)
                of_run[f"mean_{name}_throughput"] = mean, "users/s"
                of_run[f"max_{name}_throughput"] = max(speeds), "users/s"
        for name, values in self._history.items():
            if "@" in name and not name.endswith("_stderr"):
                of_run[f"final_{name}"] = values[-1], "1"
        self.log({**of_run, **figures})

    def _emit(self, kind: str, **fields: Any) -> None:
        now = time.time()
        if "data" in fields:
            # JSON has neither NaN nor infinity.
            fields["data"] = {
                name: str(value) if writers.is_nonfinite(value) else value
                for name, value in fields["data"].items()
            }
        line = {
            "timestamp": str(now),
            "elapsedtime": str(now - self._start),
            "datetime": str(datetime.datetime.fromtimestamp(now)),
            "type": kind,
            **fields,
        }
        text = json.dumps(line, default=str)
        writers.write_text(self._path, f"DLLL {text}\n")


def write_statistics(
    folder: pathlib.Path,
    arguments: Mapping[str, Any],
    results: Mapping[str, Any],
    records: Sequence[Record],
) -> None:
    """Writes args.json and statistics.json, the recipe's files of results.

    `arguments` is the command line by flag, `results` the content of
    results.json and `records` that of metrics.jsonl.
    """
    history: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if "/" in name:
                history.setdefault(name, []).append(value)
    workdir_lib.write_json(folder / "args.json", dict(arguments))
    workdir_lib.write_json(
        folder / "statistics.json", {"results": results, "history": history}
    )
