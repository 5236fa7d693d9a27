"""Interrupts, the length of dispatches, and the status of processes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vaecf.parallel import processes

# Length of a dispatch: short enough for the progress bar and for interrupts.
# With 1 s, a CPU spends 6 % of the time on mapping the memory of every
# dispatch (at the size of MovieLens-20M).
STRETCH_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """Raised after SIGINT or SIGTERM, once the state is saved.

    `number` is the signal; None if another process received it.
    """

    number: int | None = None


class Clock:
    """Chooses the number of steps of each dispatch."""

    def __init__(self) -> None:
        self._seconds_a_step: float | None = None

    def next_stop(self, start: int, steps: int, short: bool = False) -> int:
        """Returns the end of a dispatch that starts at `start`.

        `short` says that all steps of the epoch may be one dispatch, even if
        the last one was slow: another number of steps is another program.
        """
        if short:
            return steps
        if self._seconds_a_step is None:
            return start + 1
        n = max(1, round(STRETCH_SECONDS / max(self._seconds_a_step, 1e-9)))
        return min(steps, start + n)

    def ran(self, n: int, seconds: float) -> None:
        """Records the time that n steps took."""
        self._seconds_a_step = seconds / n


class SyncedStatus(NamedTuple):
    """Status that all processes of a run share between dispatches."""

    seconds: float  # time of the last dispatch
    interrupted: bool  # whether a process received a signal
    overdue: bool  # whether a process last saved too long ago


def sync_status(
    seconds: float, interrupted: bool, overdue: bool
) -> SyncedStatus:
    """Returns the longest time, and whether any process has a flag set.

    All processes must take the same steps and save after the same step, but
    their clocks and signals differ.
    """
    if processes.alone():
        return SyncedStatus(seconds, interrupted, overdue)
    everyone = processes.gather(
        np.array([seconds, interrupted, overdue], np.float32)
    )
    longest, stopped, late = everyone.max(axis=0)
    return SyncedStatus(float(longest), bool(stopped), bool(late))


# Signals that the main thread has received in its blocks of `interrupts`.
_received: list[list[int]] = []


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Defers SIGINT and SIGTERM: yields a function that tells if one came.

    A signal that came is sent again when the block ends without an exception,
    so that one that came too late to be asked for is not lost.

    Only the main thread handles signals. In another thread, the function tells
    what the block of the main thread has received, if there is one.
    """
    if threading.current_thread() is not threading.main_thread():
        seen = _received[-1] if _received else []
        yield lambda: bool(seen)
        return
    seen = []
    _received.append(seen)
    previous = {
        number: signal.signal(number, lambda n, _: seen.append(n))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(seen)
    except Interrupted as error:
        error.number = seen[0] if seen else None
        raise
    finally:
        _received.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen:
        signal.raise_signal(seen[0])
