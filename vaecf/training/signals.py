"""Around the dispatches of a run: their length, a profile, interrupts."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from vaecf.parallel import processes

# A stretch of steps is one dispatch. About this long keeps the bar alive and
# an interrupt prompt; at 1 s, on a CPU, mapping the memory of every dispatch
# costs 6 % of the time at MovieLens-20M's size.
STRETCH_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, after the state was saved."""


class Clock:
    """Chooses how many steps a dispatch takes."""

    def __init__(self) -> None:
        self._seconds_a_step: float | None = None

    def next_stop(self, start: int, steps: int) -> int:
        """End of the next stretch."""
        if self._seconds_a_step is None:
            return start + 1
        n = max(1, round(STRETCH_SECONDS / max(self._seconds_a_step, 1e-9)))
        return min(steps, start + n)

    def ran(self, n: int, seconds: float) -> None:
        """Takes note of a stretch."""
        self._seconds_a_step = seconds / n


class SyncedStatus(NamedTuple):
    """What the processes of a run agree on between dispatches."""

    seconds: float
    interrupted: bool
    overdue: bool


def sync_status(
    seconds: float, interrupted: bool, overdue: bool
) -> SyncedStatus:
    """The longest time, and whether any process is interrupted or overdue.

    Every process must take the same steps and save after the same one; their
    clocks and signals differ.
    """
    if processes.alone():
        return SyncedStatus(seconds, interrupted, overdue)
    everyone = processes.gather(
        np.array([seconds, interrupted, overdue], np.float32)
    )
    longest, stopped, late = everyone.max(axis=0)
    return SyncedStatus(float(longest), bool(stopped), bool(late))


class Tracer:
    """Profiles the second dispatch: the first compiles."""

    def __init__(self, directory: pathlib.Path | None) -> None:
        self._directory, self._stretches = directory, 0

    @contextlib.contextmanager
    def stretch(self) -> Iterator[None]:
        """Around a dispatch and the wait for it."""
        self._stretches += 1
        if self._directory is None or self._stretches != 2:
            yield
            return
        with jax.profiler.trace(self._directory, create_perfetto_trace=True):
            yield


# Signals that the main thread has received in its blocks of `interrupts`.
_received: list[list[int]] = []


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Defers SIGINT and SIGTERM: yields a function that tells if one came.

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
    finally:
        _received.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)
