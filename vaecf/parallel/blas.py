"""The threads of the linear algebra of NumPy and SciPy."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

# Modules that are linked with a library of their own.
_LINKED = "numpy.linalg._umath_linalg", "scipy.linalg._flapack"
# OpenBLAS's functions as the wheels of NumPy and SciPy name them, and systems.
_OPENBLAS = (
    "scipy_openblas_%s_num_threads64_",
    "scipy_openblas_%s_num_threads",
    "openblas_%s_num_threads",
)
_one_caller = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets NumPy and SciPy compute in the calling thread, for one caller.

    Threads of OpenBLAS wait in a loop, for each other and for the next product,
    up to .1 s. They take the cores from threads of our own, and where other
    processes want the cores, a small factorisation takes seconds. Other callers
    wait until this one is done. Other libraries than OpenBLAS, and SciPy's if
    nobody has imported it, are left as they are.
    """
    with _one_caller, contextlib.ExitStack() as restored:
        for module in _LINKED:
            if module not in sys.modules:
                continue
            library = ctypes.CDLL(sys.modules[module].__file__)
            for name in _OPENBLAS:
                if hasattr(library, name % "set"):
                    set_threads = getattr(library, name % "set")
                    restored.callback(
                        set_threads, getattr(library, name % "get")()
                    )
                    set_threads(1)
                    break
        yield
