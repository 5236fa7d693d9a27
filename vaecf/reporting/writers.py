"""Writers of a run's records: JSON lines and TensorBoard events.

A record is a mapping of names to plain values. A new kind of writer derives
from `Writer` and implements `write(record, step)` and `close()`. In a run of
several processes only process 0 makes writers.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

Value = float | int | str | None
Record = Mapping[str, Value]


class Writer:
    """Base class of writers; leaving its `with` block closes the writer."""

    def write(self, record: Record, step: int) -> None:
        """Writes a record that belongs to a training step.

        Raises:
          TypeError: a value is not a number, string or None.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Writes what is buffered and closes files. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def plain(name: str, value: object) -> Value:
    """Returns the value as a Python scalar; converts NumPy scalars.

    Raises:
      TypeError: the value is not a number, string or None.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(
        f"record value {name!r} is {type(value).__name__}, not a number, "
        "string or None"
    )


def finite(value: object) -> float | None:
    """Returns the value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


# --- JSON lines -------------------------------------------------------------


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file, in the order of the file.

    An incomplete last line, written when the process died, is ignored.

    Raises:
      VaecfError: the file is missing, or another line is damaged.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise VaecfError(
            f"cannot read {path}: {error.strerror}; check the path"
        ) from error
    return [record for _, record in _parse(data, path)]


def _parse(
    data: bytes, path: str | os.PathLike[str]
) -> list[tuple[bytes, dict[str, Any]]]:
    lines = [(n, x) for n, x in enumerate(data.split(b"\n"), 1) if x.strip()]
    parsed = []
    for number, line in lines:
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise VaecfError(
                f"{path}, line {number}: not a JSON record; delete that line"
            ) from error
        parsed.append((line, record))
    return parsed


def open_text(path: pathlib.Path, mode: str) -> IO[str]:
    """Opens a text file to write or append; creates its directories.

    Raises:
      VaecfError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode, encoding="utf-8", newline="\n")
    except OSError as error:
        raise VaecfError(
            f"cannot write {path}: {error.strerror}; choose another path"
        ) from error


class JsonlWriter(Writer):
    """Appends one JSON object per line: `{"step": 28, "time": ...}`.

    `time` is in seconds since 1970. JSON has no NaN and no infinity: such
    values become null, and the list `nonfinite` holds their names.

    Args:
      path: the file. An incomplete last line is removed.
      resume_from_step: step of the checkpoint that the run resumes from.
        Records of later steps are removed, because the run will write them
        again. None keeps all records.

    Raises:
      VaecfError: the file cannot be written, or a line other than the last one
        is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], resume_from_step: int | None = None
    ) -> None:
        path = pathlib.Path(path)
        last_step = math.inf if resume_from_step is None else resume_from_step
        if path.exists():
            data = path.read_bytes()
            kept = b"".join(
                line + b"\n"
                for line, record in _parse(data, path)
                if (finite(record.get("step")) or 0) <= last_step
            )
            if kept != data:
                workdir_lib.write_bytes(path, kept)
        self._file = open_text(path, "a")

    def write(self, record: Record, step: int) -> None:
        """Appends a record; readers of the file see the line at once."""
        values = {name: plain(name, value) for name, value in record.items()}
        nonfinite = [
            name
            for name, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        now = round(time.time(), 3)
        line: dict[str, Any] = {"step": int(step), "time": now, **values}
        line |= dict.fromkeys(nonfinite)
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


# --- TensorBoard ------------------------------------------------------------


class TensorBoardWriter(Writer):
    """Writes records as TensorBoard events, with tensorboardX.

    Numbers become scalars and strings become texts; None is skipped. A tag
    cannot contain `@`: `ndcg@100` becomes `ndcg_100`.

    Args:
      directory: directory of the event files; each writer adds a file.
      resume_from_step: step of the checkpoint that the run resumes from.
        TensorBoard hides the events of later steps in earlier files.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        resume_from_step: int | None = None,
    ) -> None:
        self._directory = pathlib.Path(directory)
        self._purge = None if resume_from_step is None else resume_from_step + 1
        self._events: Any = None

    def write(self, record: Record, step: int) -> None:
        """Adds an event for each value."""
        if self._events is None:
            self._events = self._open()
        for name, value in record.items():
            value = plain(name, value)
            tag = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            if isinstance(value, str):
                self._events.add_text(tag, value, step)
            elif value is not None:
                self._events.add_scalar(tag, float(value), step)

    def _open(self) -> Any:
        from tensorboardX import SummaryWriter

        # A file's name holds the time in seconds. The suffix keeps a run that
        # is restarted within a second from overwriting its first file.
        number = len(list(self._directory.glob("events.out.tfevents.*")))
        return SummaryWriter(
            str(self._directory),
            purge_step=self._purge,
            flush_secs=30,
            filename_suffix=f".{number}",
        )

    def close(self) -> None:
        """Writes the queued events and closes the file."""
        if self._events is not None:
            self._events.close()
            self._events = None


# --- Several writers --------------------------------------------------------


class MultiWriter(Writer):
    """Writes every record with each of several writers, in order.

    Args:
      writers: writers that `close` closes.
      borrowed: writers that `close` leaves open.
    """

    def __init__(
        self, writers: Sequence[Writer], borrowed: Sequence[Writer] = ()
    ) -> None:
        self._own = tuple(writers)
        self._writers = (*writers, *borrowed)

    def write(self, record: Record, step: int) -> None:
        """Writes the record with each writer."""
        for writer in self._writers:
            writer.write(record, step=step)

    def close(self) -> None:
        """Closes its own writers, even if closing one of them raises."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._own):
                stack.callback(writer.close)
