"""The number of threads, as OpenBLAS in the wheels says it."""

import ctypes

import pytest
from numpy.linalg import _umath_linalg
from scipy.linalg import _flapack

from vaecf.parallel import blas


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (_umath_linalg, "scipy_openblas_get_num_threads64_"),
        (_flapack, "scipy_openblas_get_num_threads"),
    ],
)
def test_one_thread_inside_and_all_after_an_error(module, name):
    threads = getattr(ctypes.CDLL(module.__file__), name, None)
    if threads is None:
        pytest.skip("another library than that of the wheels")
    before = threads()
    with pytest.raises(ZeroDivisionError), blas.one_thread():
        with blas.one_thread():
            assert threads() == 1
        assert threads() == 1
        raise ZeroDivisionError
    assert threads() == before
