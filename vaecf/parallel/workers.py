"""Worker processes on one host, with a share of its cores and GPUs each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from typing import Any

from vaecf import interrupts


def cores() -> list[int]:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def run(
    work: Callable[..., None], workers: int, arguments: tuple[Any, ...]
) -> list[int | None]:
    """Calls `work(*arguments)` in new processes and returns their statuses.

    An interrupt is passed on to the workers, and raised when all have ended. A
    second interrupt kills them.
    """
    spawn = multiprocessing.get_context("spawn")
    call = pickle.dumps((work, arguments))
    processes = []
    try:
        for number in range(workers):
            process = spawn.Process(target=_start, args=(number, workers, call))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            if process.is_alive() and process.pid is not None:
                # The interrupt may have come when the worker had just ended.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        for process in processes:
            process.join()
        raise
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _start(number: int, workers: int, call: bytes) -> None:
    # Before anything heavy is imported: `call` holds the module of the work.
    interrupts.exit_at_once()
    os.setsid()  # Ctrl-C reaches the workers once, from the parent
    # Before XLA starts its threads and looks for GPUs.
    os.environ.update(share_of_gpus(number, workers, os.environ))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share_of_cores(number, workers))
    work, arguments = pickle.loads(call)
    with interrupts.raised():
        work(*arguments)


def share_of_cores(number: int, workers: int) -> list[int]:
    """Returns the CPU cores of a worker: neighbours, which share caches."""
    all_cores = cores()
    first, end = (n * len(all_cores) // workers for n in (number, number + 1))
    return all_cores[first:end] or [all_cores[number % len(all_cores)]]


def share_of_gpus(
    number: int, workers: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns a worker's share of the GPUs, as environment variables.

    Each worker has GPUs of its own if CUDA_VISIBLE_DEVICES names enough.
    Otherwise all workers use all GPUs, and a part of their memory each.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(devices) >= workers > 1:
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[number::workers])}
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return {name: environment.get(name, f"{0.9 / workers:.3f}")}
