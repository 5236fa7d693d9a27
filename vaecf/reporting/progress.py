"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from vaecf.reporting.tables import MISSING, printable

_SECONDS_BETWEEN_LINES = 10.0


def _make_bar(**options: Any) -> Any:
    """Returns a tqdm bar, or None where a bar cannot be shown."""
    from tqdm.auto import tqdm

    if any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__):
        return tqdm(**options)
    if not sys.stderr.isatty():
        return None
    # The terminals of some containers are 0 by 0: tqdm would hide the bar.
    with contextlib.suppress(OSError):
        if min(os.get_terminal_size(sys.stderr.fileno())) > 0:
            return tqdm(dynamic_ncols=True, **options)
    return tqdm(ncols=80, nrows=24, **options)


class Progress:
    """Shows epoch, loss and speed of a training run. A context manager.

    A terminal or a notebook shows a bar with the time left. A pipe or a log
    file gets a plain line when an epoch ends, at most every ten seconds, and
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
        self._steps_done = initial_epoch * steps
        self._loss = MISSING
        self._line = ""  # the latest state, if it is not printed yet
        self._printed_epoch = initial_epoch
        self._printed_at = float("-inf")

    def __enter__(self) -> Self:
        if self._enabled:
            self._bar = _make_bar(
                total=self._epochs * self._steps,
                initial=self._steps_done,
                bar_format="{desc} |{bar}| {remaining} left{postfix}",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._line:
            self.note(self._line)

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
        new_steps = (epoch - 1) * self._steps + step_in_epoch - self._steps_done
        self._steps_done += new_steps
        if loss is not None:
            self._loss = f"{loss:.2f}"
        where = f"epoch {epoch}/{self._epochs}"
        figures = f"loss {self._loss}, {users_per_second:,.0f} users/s"
        if self._bar is not None:
            self._bar.set_description_str(where, refresh=False)
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(new_steps)
            return
        self._line = f"{where}  {figures}"
        ended = self._steps_done // self._steps
        waited = time.monotonic() - self._printed_at
        is_due = (
            ended > self._printed_epoch and waited >= _SECONDS_BETWEEN_LINES
        )
        if is_due or ended >= self._epochs:
            self._printed_epoch, self._printed_at = ended, time.monotonic()
            self.note(self._line)
            self._line = ""

    def note(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._enabled:
            return
        message = printable(message, keep_newlines=True)
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)


@contextlib.contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function (done, total) -> None that updates a bar.

    Nothing is shown where standard error is no terminal or notebook.
    """
    bar = _make_bar(unit=f" {unit}", unit_scale=True)

    def show(done: int, total: int) -> None:
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)

    with contextlib.nullcontext() if bar is None else bar:
        yield show
