"""Where a run's numbers go: a JSON-lines file, TensorBoard, the console.

A writer has `write(record, step=...)` and `close()`. Files open at the first
write and their folders are made then. On several hosts only process 0 makes
writers; that is the caller's part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Protocol, Self, TextIO

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.reporting.text import finite, printable

Value = float | int | str | None
Record = Mapping[str, Value]

_RESERVED = ("step", "time", "nonfinite")


class Writer(Protocol):
    """Anything that takes records."""

    def write(self, record: Record, *, step: int) -> None:
        """Takes one record of plain values that belongs to `step`."""

    def close(self) -> None:
        """Writes what is left and lets go of files. May be called twice."""


class _Closing:
    """`with` for writers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to let go of."""


def plain(name: str, value: object) -> Value:
    """The value as a builtin; NumPy scalars are converted.

    Raises:
      TypeError: the value is no number, string or None.
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


def parse_lines(
    data: bytes, where: str, *, prefix: bytes = b""
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, its JSON object) of JSON lines; a torn last line is left out.

    Args:
      data: the file's bytes.
      where: the file's name, for messages.
      prefix: what every line starts with, before the JSON.

    Raises:
      VaecfError: a line other than the last one cannot be read.
    """
    lines = data.split(b"\n")
    last = len(lines) - 1
    while last >= 0 and not lines[last].strip():
        last -= 1
    for number, line in enumerate(lines[: last + 1]):
        if not line.strip():
            continue
        try:
            if not line.startswith(prefix):
                raise ValueError("prefix missing")
            record = json.loads(line[len(prefix) :].decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == last:  # The process died while it wrote this.
                return
            raise VaecfError(
                f"{where}, line {number + 1}: not a JSON record; "
                "delete that line"
            ) from error
        yield line, record


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a JSON-lines file in file order, without a torn last line.

    Raises:
      VaecfError: there is no such file, or another line is damaged.
    """
    return [record for _, record in parse_lines(_read(path), str(path))]


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise VaecfError(
            f"cannot read {path}: {error.strerror}; check the path"
        ) from error


def keep_lines(
    path: pathlib.Path,
    keep: Callable[[dict[str, Any]], bool],
    *,
    prefix: bytes = b"",
) -> list[dict[str, Any]]:
    """Drops the records that are not to be kept, and a torn last line.

    The file is replaced in one piece, and only if something changes.
    Returns the records kept; none if there is no file.
    """
    if not path.exists():
        return []
    data = _read(path)
    kept = [
        (line, record)
        for line, record in parse_lines(data, str(path), prefix=prefix)
        if keep(record)
    ]
    rewritten = b"".join(line + b"\n" for line, _ in kept)
    if rewritten != data:
        workdir_lib.write_bytes(path, rewritten)
    return [record for _, record in kept]


def open_for_append(path: pathlib.Path) -> IO[str]:
    """Opens a text file at its end, creating its parents."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8", newline="\n")
    except OSError as error:
        raise VaecfError(
            f"cannot write {path}: {error.strerror}; choose another path"
        ) from error


class JsonlWriter(_Closing):
    """Appends one strict JSON object a line: `{"step": 28, "time": ...}`.

    `time` is seconds since 1970. NaN and infinities, which JSON does not
    know, become null and their names stand in the list `nonfinite`.

    Args:
      path: the file.
      resume_from_step: the step of the checkpoint that the run goes on
        from. Records of later steps, which will be written again, are
        dropped when the file opens, as is a torn last line; 0 starts the
        run over but keeps what was logged at step 0. None keeps all.
      clock: gives the time; for tests.

    Raises:
      VaecfError (at the first write): the file cannot be written, or a line
        before the last one is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resume_from_step: int | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = pathlib.Path(path)
        self._limit = resume_from_step
        self._clock = clock
        self._file: IO[str] | None = None

    def write(self, record: Record, *, step: int) -> None:
        """Appends a record and hands the line to the operating system."""
        line: dict[str, Any] = {
            "step": int(step),
            "time": round(self._clock(), 3),
        }
        nonfinite = []
        for name, value in record.items():
            if name in _RESERVED:
                continue
            value = plain(name, value)
            if isinstance(value, float) and not math.isfinite(value):
                nonfinite.append(name)
                value = None
            line[name] = value
        if nonfinite:
            line["nonfinite"] = nonfinite
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def _open(self) -> IO[str]:
        limit = math.inf if self._limit is None else self._limit
        keep_lines(
            self._path,
            lambda record: (finite(record.get("step")) or 0) <= limit,
        )
        # Only the first opening resumes; a later one goes on at the end.
        self._limit = None
        return open_for_append(self._path)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardWriter(_Closing):
    """Scalars as TensorBoard events, through tensorboardX.

    Numbers become scalars, strings become texts, None is left out. TensorBoard
    tags allow no `@`: `ndcg@100` is shown as `ndcg_100`.

    Args:
      directory: where the event files go; every writer makes a new one.
      resume_from_step: TensorBoard hides earlier files' events of later
        steps, which will be written again.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        resume_from_step: int | None = None,
    ) -> None:
        self._directory = pathlib.Path(directory)
        self._purge = None if resume_from_step is None else resume_from_step + 1
        self._events: Any = None

    def write(self, record: Record, *, step: int) -> None:
        """Adds an event for every value but `step` and `time`."""
        if self._events is None:
            self._events = self._open()
        for name, value in record.items():
            value = plain(name, value)
            if value is None or name in _RESERVED:
                continue
            tag = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            if isinstance(value, str):
                self._events.add_text(tag, value, step)
            else:
                self._events.add_scalar(tag, float(value), step)

    def _open(self) -> Any:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise VaecfError(
                f"TensorBoard events need tensorboardX ({error}); "
                "pip install tensorboardX"
            ) from error
        # File names hold whole seconds and an existing file is overwritten:
        # the number keeps a quick restart from erasing its predecessor.
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


def format_record(record: Record, *, step: int) -> str:
    """One line of `key=value`.

    Numbers have six digits; strings that hold spaces, quotes or equal signs
    are quoted.
    """
    parts = [f"step={step}"]
    for name, value in record.items():
        value = plain(name, value)
        if name in _RESERVED or value is None:
            continue
        if isinstance(value, str):
            text = printable(value)
            if not text or re.search(r"[\s=\"]", text):
                text = json.dumps(text, ensure_ascii=False)
        elif isinstance(value, float):
            text = f"{value:.6g}"
        else:
            text = str(value)
        parts.append(f"{printable(name)}={text}")
    return " ".join(parts)


class StdoutWriter(_Closing):
    """One `key=value` line a record, for pipes and log files."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, record: Record, *, step: int) -> None:
        """Prints the line at once."""
        stream = self._stream or sys.stdout
        print(format_record(record, step=step), file=stream, flush=True)


class LoggingWriter(_Closing):
    """One `key=value` message a record to a logger."""

    def __init__(
        self, logger: logging.Logger | None = None, level: int = logging.INFO
    ) -> None:
        self._logger = logger or logging.getLogger("vaecf")
        self._level = level

    def write(self, record: Record, *, step: int) -> None:
        """Logs the line."""
        self._logger.log(self._level, "%s", format_record(record, step=step))


class MultiWriter(_Closing):
    """Gives every record to several writers, in order."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, record: Record, *, step: int) -> None:
        """Writes to each."""
        for writer in self._writers:
            writer.write(record, step=step)

    def close(self) -> None:
        """Closes each, also when closing another one fails."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)
