"""Writers of a run's records: JSON lines and TensorBoard events.

A record is a mapping of names to plain values. In a run of several processes
only process 0 makes writers.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

Value = float | int | str | None
Record = Mapping[str, Value]


# A record is on the disk before the next one that comes so much later.
_FLUSH_SECONDS = 2.0


class Writer:
    """Base class of writers."""

    def write(self, record: Record, step: int) -> None:
        """Writes a record that belongs to a training step.

        Raises:
          TypeError: a value is not a number, string or None.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Writes what is buffered, before a checkpoint counts on it."""

    def close(self) -> None:
        """Writes what is buffered. May be called twice."""


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


def is_nonfinite(value: object) -> bool:
    """Returns whether the value is NaN or infinite, which JSON cannot hold."""
    return isinstance(value, float) and not math.isfinite(value)


def finite(value: object) -> float | None:
    """Returns the value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


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
    lines = [(n, x) for n, x in enumerate(data.split(b"\n"), 1) if x.strip()]
    records = []
    for number, line in lines:
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0]:
                break
            raise VaecfError(
                f"{path}, line {number}: not a JSON record; delete that line"
            ) from error
        records.append(record)
    return records


def write_text(path: pathlib.Path, text: str, *, mode: str = "a") -> None:
    """Appends to a text file, or replaces it; creates its directories.

    Raises:
      VaecfError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise VaecfError(
            f"cannot write {path}: {error.strerror}; choose another path"
        ) from error


class JsonlWriter(Writer):
    """Appends one JSON object per line: `{"step": 28, "time": ...}`.

    `time` is in seconds since 1970. JSON has no NaN and no infinity: such
    values become null, and the list `nonfinite` holds their names.

    Records of steps after `resume_from_step`, the step of the checkpoint that
    the run resumes from, are removed from an existing file, because the run
    will write them again. So is an incomplete last line.

    Raises:
      VaecfError: the file cannot be written, or a line other than the last one
        is damaged.
    """

    def __init__(self, path: pathlib.Path, resume_from_step: int = 0) -> None:
        kept = [
            json.dumps(record) + "\n"
            for record in (read_records(path) if path.exists() else [])
            if record.get("step", 0) <= resume_from_step
        ]
        workdir_lib.write_bytes(path, "".join(kept).encode())
        self._path = path

    def write(self, record: Record, step: int) -> None:
        """Appends a record; readers of the file see the line at once."""
        values = {name: plain(name, value) for name, value in record.items()}
        nonfinite = [name for name, v in values.items() if is_nonfinite(v)]
        now = round(time.time(), 3)
        line: dict[str, Any] = {"step": int(step), "time": now, **values}
        if nonfinite:
            line |= {**dict.fromkeys(nonfinite), "nonfinite": nonfinite}
        write_text(self._path, json.dumps(line, allow_nan=False) + "\n")


class TensorBoardWriter(Writer):
    """Writes records as TensorBoard events, with tensorboardX.

    Numbers become scalars and strings become texts; None is skipped. A tag
    cannot contain `@`: `ndcg@100` becomes `ndcg_100`.

    Each writer adds a file to the directory. TensorBoard hides the events of
    steps after `resume_from_step` in earlier files.

    tensorboardX's SummaryWriter writes in a thread, which dies on a full disk
    and then lets the process wait forever. This class writes in the calling
    thread, at most every `_FLUSH_SECONDS`: tensorboardX syncs the disk, which
    takes as long as a short epoch.

    Raises:
      VaecfError: the files cannot be written.
    """

    def __init__(
        self, directory: pathlib.Path, resume_from_step: int = 0
    ) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._directory, self._flushed_at = directory, 0.0
        # A file's name holds the time in seconds. The suffix keeps a run that
        # is restarted within a second from overwriting its first file.
        with self._disk():
            directory.mkdir(parents=True, exist_ok=True)
            earlier = len([*directory.glob("events.out.tfevents.*")])
            prefix, suffix = str(directory / "events"), f".{earlier}"
            self._file: EventsWriter | None = EventsWriter(prefix, suffix)
            start = SessionLog(status=SessionLog.START)
            self._add(resume_from_step + 1, session_log=start)

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        assert self._file is not None  # not closed
        event = Event(wall_time=time.time(), step=step, **what)
        self._file.write_event(event)

    def write(self, record: Record, step: int) -> None:
        """Adds an event for each value."""
        from tensorboardX import summary

        for name, value in record.items():
            value = plain(name, value)
            tag = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            if value is None:
                continue
            is_text = isinstance(value, str)
            make = summary.text if is_text else summary.scalar
            with self._disk():
                self._add(step, summary=make(tag, value))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the events so far to the disk."""
        self._flushed_at = time.monotonic()
        with self._disk():
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        with self._disk():
            if file is not None:
                file.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VaecfError(
                f"cannot write {self._directory}: {error.strerror}; free "
                "space, or choose another workdir"
            ) from error


class MultiWriter(Writer):
    """Writes every record with each of several writers, in order."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, record: Record, step: int) -> None:
        """Writes the record with each writer."""
        for writer in self._writers:
            writer.write(record, step=step)

    def flush(self) -> None:
        """Flushes the writers."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes the writers."""
        for writer in self._writers:
            writer.close()
