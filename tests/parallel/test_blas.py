"""The number of threads, as OpenBLAS in the wheels of NumPy says it."""

import ctypes

import pytest
from numpy.linalg import _umath_linalg

from vaecf.parallel import blas

LIBRARY = ctypes.CDLL(_umath_linalg.__file__)


@pytest.mark.skipif(
    not hasattr(LIBRARY, "scipy_openblas_get_num_threads64_"),
    reason="another library than that of the wheels",
)
def test_one_thread_inside_and_all_after_an_error():
    threads = LIBRARY.scipy_openblas_get_num_threads64_
    before = threads()
    with pytest.raises(ZeroDivisionError), blas.one_thread():
        assert threads() == 1
        raise ZeroDivisionError
    assert threads() == before
