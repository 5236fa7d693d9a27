"""The time of OpenBLAS's threads, counted by the kernel."""

import time

import numpy as np
import pytest

from vaecf.parallel import blas, workers


def time_of_other_threads():
    """Seconds of all threads but the caller's."""
    mine = time.CLOCK_THREAD_CPUTIME_ID
    return time.process_time() - time.clock_gettime(mine)


@pytest.mark.skipif(len(workers.cores()) < 2, reason="needs two cores")
def test_products_stay_in_the_calling_thread():
    x = np.ones((512, 512), np.float32)
    x @ x
    time.sleep(0.2)  # until the threads of that product sleep
    before = time_of_other_threads()
    with blas.one_thread():
        for _ in range(20):
            x @ x
    assert time_of_other_threads() - before < 0.005
