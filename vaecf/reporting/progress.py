"""Progress of long work: a bar on a terminal, plain lines elsewhere.

Elsewhere, such as in a log file, at most one line in ten seconds tells of it.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

from vaecf.reporting.tables import printable

SECONDS_BETWEEN_LINES = 10.0


class _Pace:
    """Decides when the next line may be printed."""

    def __init__(self) -> None:
        self._printed_at = float("-inf")

    def is_due(self) -> bool:
        """Returns whether a line may be printed now; it counts as printed."""
        now = time.monotonic()
        if now - self._printed_at < SECONDS_BETWEEN_LINES:
            return False
        self._printed_at = now
        return True


def paced(log: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a function that logs every line on a terminal.

    Elsewhere it logs a line in ten seconds, and drops those in between: they
    must be on disk or in a later line, too.
    """
    if sys.stdout.isatty():
        return log
    pace = _Pace()
    return lambda line: log(line) if pace.is_due() else None


def has_bar() -> bool:
    """Returns whether a bar can be drawn: on a terminal or in a notebook."""
    return _in_notebook() or sys.stderr.isatty()


def say(line: str) -> None:
    """Prints a line between the bars or lines of two trainings."""
    print(line, file=sys.stdout if _in_notebook() else sys.stderr)


def _tqdm() -> Any:
    with warnings.catch_warnings():
        # A kernel without ipywidgets gets lines instead of a bar.
        warnings.filterwarnings("ignore", "IProgress not found")
        from tqdm.auto import tqdm
    return tqdm


def _in_notebook() -> bool:
    tqdm = _tqdm()
    return any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)


def _make_bar(**options: Any) -> Any:
    """Returns a tqdm bar, or None where a bar cannot be drawn."""
    if not has_bar():
        return None
    if not _in_notebook():
        # Some containers have terminals of 0 by 0, where tqdm would draw
        # nothing: shutil returns a usual size for them.
        options["ncols"], options["nrows"] = shutil.get_terminal_size()
    return _tqdm()(**options)


class Progress:
    """Shows epoch, loss and speed of a training run. A context manager.

    A terminal or a notebook shows a bar with the time left. A pipe or a log
    file gets the latest line at the end of an epoch, at most every ten seconds,
    and at the end of the run. Everything goes to standard error, but for the
    notes in a notebook, which are as rare as in a file.

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
        self._pace = _Pace()
        self._line = ""  # the latest that is not printed yet
        self._is_note = False  # whether that line is a note

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._print()

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
        if not self._is_note:  # a note that waits to be printed says more
            self._line = f"{where}  {figures}"
        if step_in_epoch == self._steps and self._pace.is_due():
            self._print()

    def note(self, message: str) -> None:
        """Prints a line above a terminal's bar, or when a line is due.

        A later note replaces one that has not been printed.
        """
        if self._bar is not None and not _in_notebook():
            self._bar.write(printable(message, keep="\n"), file=sys.stderr)
            return
        self._line, self._is_note = message, True
        if self._pace.is_due():
            self._print()

    def _print(self) -> None:
        if self._enabled and self._line:
            line = printable(self._line, keep="\n")
            # Notebooks show what is written to standard error as a mistake.
            stream = sys.stderr if self._bar is None else sys.stdout
            print(line, file=stream, flush=True)
        self._line, self._is_note = "", False


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
