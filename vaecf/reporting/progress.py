"""How far training is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TextIO

from vaecf.reporting.text import MISSING, duration, printable

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_DRAWINGS = 0.1


def _knows_size(stream: TextIO) -> bool:
    """Whether the terminal has a size; some containers' are 0 by 0."""
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


class Progress:
    """Progress of a training run, as a context manager.

    On a terminal a bar shows epoch, loss, users per second and the time
    left. Elsewhere (a pipe, a log file) a plain line is printed when an
    epoch ends, but not more often than every five seconds, and one for the
    last epoch in any case; no control character is ever written there.

    The time left is that of the whole run at the pace since the first
    report: the first dispatch, which compiles, does not count.

    Args:
      total_epochs: epochs of the whole run.
      steps_per_epoch: optimiser steps in each.
      users_per_epoch: users in each, to derive users per second where the
        caller does not measure them.
      initial_epoch: epochs already done when a run is resumed.
      stream: where to; standard error by default.
      enabled: False prints nothing at all, notes included; None and True
        choose bar or lines by the stream.
      clock: gives seconds; for tests.
    """

    def __init__(
        self,
        total_epochs: int,
        steps_per_epoch: int,
        users_per_epoch: int,
        *,
        initial_epoch: int = 0,
        stream: TextIO | None = None,
        enabled: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs = total_epochs
        self._steps_per_epoch = max(1, steps_per_epoch)
        self._users_per_step = users_per_epoch / self._steps_per_epoch
        self._steps = total_epochs * self._steps_per_epoch
        self._position = initial_epoch * self._steps_per_epoch
        self._stream = sys.stderr if stream is None else stream
        self._silent = enabled is False
        self._clock = clock
        self._terminal = not self._silent and self._stream.isatty()
        self._bar: Any = None
        self._first: tuple[int, float] | None = None  # (steps, time)
        self._latest: tuple[int, float] | None = None
        self._loss: float | None = None
        self._speed: float | None = None
        self._printed_position = self._position
        self._printed_at: float | None = None
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        if self._terminal:
            from tqdm import tqdm

            sized = _knows_size(self._stream)
            self._bar = tqdm(
                total=self._steps,
                initial=self._position,
                file=self._stream,
                ncols=None if sized else 80,
                nrows=None if sized else 24,
                dynamic_ncols=sized,
                bar_format=self._format(),
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(
        self,
        *,
        epoch: int,
        step_in_epoch: int,
        loss: float | None = None,
        users_per_second: float | None = None,
    ) -> None:
        """Reports how far training is.

        Args:
          epoch: the epoch in work, counted from 1.
          step_in_epoch: its steps already done, 0 to steps_per_epoch.
          loss: the latest loss known; None keeps the one shown.
          users_per_second: None derives it from the steps since the last
            report.
        """
        now = self._clock()
        position = (epoch - 1) * self._steps_per_epoch + step_in_epoch
        if users_per_second is None and self._latest is not None:
            steps = position - self._latest[0]
            seconds = now - self._latest[1]
            if steps > 0 and seconds > 0:
                users_per_second = steps * self._users_per_step / seconds
        self._loss = self._loss if loss is None else loss
        if users_per_second is not None:
            self._speed = users_per_second
        self._first = self._first or (position, now)
        self._latest = (position, now)
        self._position = position
        if self._bar is not None:
            self._draw(now)
        elif not self._silent:
            self._print_if_due(now)

    def note(self, message: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._silent:
            return
        # Titles and ids in a message must not move the cursor either.
        message = printable(message, keep_newlines=True)
        if self._bar is None:
            print(message, file=self._stream, flush=True)
        else:
            self._bar.write(message, file=self._stream)

    def close(self) -> None:
        """Shows the last state and ends the bar. May be called twice."""
        if self._bar is not None:
            self._draw(float("inf"))
            self._bar.close()
            self._bar = None
        elif not self._silent and self._position > self._printed_position:
            self._print(self._clock())

    def seconds_left(self) -> float | None:
        """Seconds that the rest of the run takes; None if not yet known."""
        if self._first is None or self._latest is None:
            return None
        steps = self._latest[0] - self._first[0]
        if steps <= 0:
            return 0.0 if self._position >= self._steps else None
        pace = (self._latest[1] - self._first[1]) / steps
        return pace * max(0, self._steps - self._position)

    def _epoch_in_work(self) -> int:
        done, rest = divmod(self._position, self._steps_per_epoch)
        return min(self._epochs, done + (1 if rest else 0))

    def _figures(self) -> str:
        loss = MISSING if self._loss is None else f"{self._loss:.2f}"
        speed = MISSING if self._speed is None else f"{self._speed:,.0f}"
        return f"loss {loss}  {speed} users/s"

    def _format(self) -> str:
        left = duration(self.seconds_left())
        epoch = f"epoch {self._epoch_in_work()}/{self._epochs}"
        return f"{epoch} |{{bar}}| {self._figures()}  {left} left"

    def _draw(self, now: float) -> None:
        if now - self._drawn_at < _SECONDS_BETWEEN_DRAWINGS:
            return
        self._drawn_at = now
        self._bar.n = self._position
        self._bar.bar_format = self._format()
        self._bar.refresh()

    def _print_if_due(self, now: float) -> None:
        done = self._position // self._steps_per_epoch
        if done <= self._printed_position // self._steps_per_epoch:
            return
        due = (
            self._printed_at is None
            or now - self._printed_at >= _SECONDS_BETWEEN_LINES
        )
        if due or done >= self._epochs:
            self._print(now)

    def _print(self, now: float) -> None:
        self._printed_position = self._position
        self._printed_at = now
        print(
            f"epoch {self._epoch_in_work()}/{self._epochs}  "
            f"{self._figures()}  time left {duration(self.seconds_left())}",
            file=self._stream,
            flush=True,
        )


@contextlib.contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; yields (done, total) -> None."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", unit_scale=True, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
