"""The threads of NumPy's linear algebra."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from numpy.linalg import _umath_linalg

# OpenBLAS as NumPy's wheels name its functions, and as systems do.
_OPENBLAS = "scipy_openblas_%s_num_threads64_", "openblas_%s_num_threads"
_one_caller = threading.Lock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets NumPy multiply in the calling thread, for one caller at a time.

    After each product, the threads of OpenBLAS wait for the next one in a loop.
    They take the cores from threads of our own for up to .1 s. Other libraries
    than OpenBLAS are left as they are.
    """
    library = ctypes.CDLL(_umath_linalg.__file__)
    names = [name for name in _OPENBLAS if hasattr(library, name % "set")]
    if not names:
        yield
        return
    with _one_caller:
        threads = getattr(library, names[0] % "get")()
        set_threads = getattr(library, names[0] % "set")
        set_threads(1)
        try:
            yield
        finally:
            set_threads(threads)
