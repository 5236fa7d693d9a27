"""Ctrl-C (SIGINT) and SIGTERM, from the first line of a command to its last.

Python's own handler raises KeyboardInterrupt wherever the program stands. In
the import of a compiled module that ends the process with a segmentation fault,
or becomes an ImportError, or is lost. `training.signals` defers signals while
a run trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
STATUS = 128 + signal.SIGINT  # exit status after either signal
_WAIT_SECONDS = 0.05


def exit_at_once() -> None:
    """Lets a signal end the process, which has opened nothing yet.

    The first statement of an entry point, before imports that take seconds.
    """
    for number in NUMBERS:
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
    os._exit(STATUS)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Lets signals raise KeyboardInterrupt, but not within an import.

    A signal that comes during an import is sent again when the import is over.
    So is one whose exception was ignored, because a callback of the garbage
    collector or of a compiled module raised it. Outside the main thread, the
    block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    hook = sys.unraisablehook

    def handle(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise KeyboardInterrupt
        send_again(number)

    def send_again(number: int) -> None:
        waiting[:] = [number]
        signal.setitimer(signal.ITIMER_REAL, _WAIT_SECONDS)

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if waiting:
            signal.raise_signal(waiting.pop())

    def on_ignored(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            send_again(signal.SIGINT)
        else:
            hook(ignored)

    handlers: dict[int, Any] = dict.fromkeys(NUMBERS, handle)
    handlers[signal.SIGALRM] = on_alarm
    before = {n: signal.signal(n, handlers[n]) for n in handlers}
    sys.unraisablehook = on_ignored
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
