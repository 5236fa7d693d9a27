"""What each worker gets of the host."""

from __future__ import annotations

import os

from vaecf.parallel import workers


def test_workers_share_cores_and_gpus():
    cores = [workers.share_of_cores(n, 2) for n in range(2)]
    everything = sorted(os.sched_getaffinity(0))
    if len(everything) > 1:
        assert sorted(cores[0] + cores[1]) == everything
    assert all(workers.share_of_cores(n, 99) for n in range(99))
    four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert [workers.share_of_gpus(n, 2, four) for n in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "1,3"},
    ]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert workers.share_of_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": "0"}) == memory
    assert workers.share_of_gpus(0, 2, {}) == memory
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
    assert workers.share_of_gpus(0, 2, memory) == memory
