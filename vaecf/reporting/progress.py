"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from vaecf.reporting.tables import MISSING, printable

_SECONDS_BETWEEN_LINES = 5.0


def _make_bar(**options: Any) -> Any:
    """Returns a tqdm bar, or None where a bar cannot be shown."""
    from tqdm.auto import tqdm

    notebook = any(c.__name__ == "tqdm_notebook" for c in tqdm.__mro__)
    if not (notebook or sys.stderr.isatty()):
        return None
    if not notebook:
        try:
            has_size = min(os.get_terminal_size(sys.stderr.fileno())) > 0
        except OSError:
            has_size = False
        # The terminals of some containers are 0 by 0: tqdm would hide the bar.
        options |= {"dynamic_ncols": True} if has_size else {"ncols": 80}
        options["nrows"] = None if has_size else 24
    return tqdm(file=sys.stderr, **options)


class Progress:
    """Shows epoch, loss and speed of a training run. A context manager.

    A terminal or a notebook shows a bar with the time left. A pipe or a log
    file gets a plain line when an epoch ends, at most every five seconds, and
    one line for the last epoch. Everything goes to standard error.

    Args:
      epochs: epochs of the whole run.
      steps: optimiser steps per epoch.
      initial_epoch: epochs that a resumed run has already done.
      enabled: False prints nothing, not even notes.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        *,
        initial_epoch: int = 0,
        enabled: bool | None = None,
    ) -> None:
        self._epochs, self._steps = epochs, steps
        self._enabled = enabled is not False
        self._bar: Any = None
        self._position = initial_epoch * steps
        self._loss: float | None = None
        self._speed = 0.0
        self._printed_epoch = initial_epoch
        self._printed_at = -_SECONDS_BETWEEN_LINES
        self._unprinted = False

    def __enter__(self) -> Self:
        if self._enabled:
            self._bar = _make_bar(
                total=self._epochs * self._steps,
                initial=self._position,
                bar_format="{desc} |{bar}| {remaining} left{postfix}",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._unprinted:
            self._print_line()

    def update(
        self,
        *,
        epoch: int,
        step_in_epoch: int,
        loss: float | None,
        users_per_second: float,
    ) -> None:
        """Shows how far the run is.

        Args:
          epoch: the current epoch, counted from 1.
          step_in_epoch: steps of the current epoch already done.
          loss: the latest loss; None keeps the loss shown before.
          users_per_second: the current speed.
        """
        steps_done = (epoch - 1) * self._steps + step_in_epoch - self._position
        self._position += steps_done
        self._loss = self._loss if loss is None else loss
        self._speed = users_per_second
        if self._bar is not None:
            self._bar.set_description_str(self._epoch_text(), refresh=False)
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(steps_done)
        elif self._enabled:
            self._unprinted = True
            ended = self._position // self._steps
            waited = time.monotonic() - self._printed_at
            if ended >= self._epochs or (
                ended > self._printed_epoch and waited >= _SECONDS_BETWEEN_LINES
            ):
                self._print_line()

    def note(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._enabled:
            return
        message = printable(message, keep_newlines=True)
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def _epoch_text(self) -> str:
        return f"epoch {-(-self._position // self._steps)}/{self._epochs}"

    def _figures(self) -> str:
        loss = MISSING if self._loss is None else f"{self._loss:.2f}"
        return f"loss {loss}, {self._speed:,.0f} users/s"

    def _print_line(self) -> None:
        self._printed_epoch = self._position // self._steps
        self._printed_at = time.monotonic()
        self._unprinted = False
        print(
            f"{self._epoch_text()}  {self._figures()}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function (done, total) -> None that updates a bar.

    Nothing is shown where standard error is no terminal or notebook.
    """
    bar = _make_bar(unit=f" {unit}", unit_scale=True)
    if bar is None:
        yield lambda done, total: None
        return
    with bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
