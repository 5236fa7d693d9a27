"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from vaecf.reporting.tables import printable

_SECONDS_BETWEEN_LINES = 10.0


def _make_bar(**options: Any) -> Any:
    """Returns a tqdm bar, or None where a bar cannot be drawn."""
    from tqdm.auto import tqdm

    if any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__):
        return tqdm(**options)
    if not sys.stderr.isatty():
        return None
    # Some containers have terminals of 0 by 0, where tqdm would draw nothing:
    # shutil returns a usual size for them.
    columns, rows = shutil.get_terminal_size()
    return tqdm(ncols=columns, nrows=rows, **options)


class Progress:
    """Shows epoch, loss and speed of a training run. A context manager.

    A terminal or a notebook shows a bar with the time left. A pipe or a log
    file gets a plain line when an epoch ends, at most every ten seconds, and
    one line for the last epoch. Everything goes to standard error.

    Args:
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
        enabled: bool = True,
    ) -> None:
        self._epochs, self._steps = epochs, steps
        self._enabled = enabled
        self._bar: Any = None
        if enabled:
            self._bar = _make_bar(
                total=epochs * steps,
                initial=initial_epoch * steps,
                bar_format="{desc} |{bar}| {remaining} left{postfix}",
            )
        self._line = ""  # the latest state, if it is not printed yet
        self._printed_at = float("-inf")

    def __enter__(self) -> Self:
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
        loss: float,
        users_per_second: float,
    ) -> None:
        """Shows the state after `step_in_epoch` steps of an epoch, from 1."""
        where = f"epoch {epoch}/{self._epochs}"
        figures = f"loss {loss:.2f}, {users_per_second:,.0f} users/s"
        if self._bar is not None:
            self._bar.set_description_str(where, refresh=False)
            self._bar.set_postfix_str(figures, refresh=False)
            done = (epoch - 1) * self._steps + step_in_epoch
            self._bar.update(done - self._bar.n)
            return
        self._line = f"{where}  {figures}"
        now = time.monotonic()
        waited = now - self._printed_at >= _SECONDS_BETWEEN_LINES
        if step_in_epoch == self._steps and (waited or epoch == self._epochs):
            self.note(self._line)
            self._line, self._printed_at = "", now

    def note(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        message = printable(message, keep="\n")
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        elif self._enabled:
            print(message, file=sys.stderr, flush=True)


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
