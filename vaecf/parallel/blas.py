"""The threads of the linear algebra of NumPy and SciPy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_one_caller = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets NumPy and SciPy compute in the calling thread, for one caller.

    Threads of OpenBLAS wait in a loop, for each other and for the next product,
    up to .1 s. They take the cores from threads of our own, and where other
    processes want the cores, a small factorisation takes seconds. Other callers
    wait until this one is done.
    """
    import threadpoolctl

    with _one_caller, threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield
