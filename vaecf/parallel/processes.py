"""Several processes that run as one: start-up, agreement, and failure.

JAX's runtime connects the processes (NCCL on GPUs, gloo on CPUs). All of them
run the same program. Only process 0, the lead, writes files and logs. With a
single process every function here is a no-op.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vaecf.errors import VaecfError

# The runtime ends all processes if one does not answer for this long.
_HEARTBEAT_SECONDS = 30
_START_SECONDS = 300
# How long a shared file system may take to show a file to another host.
_SHARED_SECONDS = 30.0

# Set by mpirun, as are the names of rank and local rank.
_MPI_SIZE = "OMPI_COMM_WORLD_SIZE"


# --- Start ------------------------------------------------------------------


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process to the others; call it before any use of JAX.

    Slurm, Open MPI and Kubernetes provide arguments that are None. Without
    any of them, or with num_processes=1, the process runs alone. Under Open
    MPI each process uses one GPU of its machine, as in NVIDIA's recipe.
    `coordinator_address` is 'host:port' of process 0, with a free port;
    `process_id` counts from 0.

    Raises:
      VaecfError: the arguments are invalid or incomplete, or the other
        processes did not connect.
    """
    _check(coordinator_address, num_processes, process_id)
    if num_processes == 1:
        return
    device_ids = None
    if int(os.environ.get(_MPI_SIZE, 1)) > 1:
        num_processes = num_processes or int(os.environ[_MPI_SIZE])
        if process_id is None:
            process_id = int(os.environ["OMPI_COMM_WORLD_RANK"])
        coordinator_address = (
            coordinator_address
            or os.environ.get("JAX_COORDINATOR_ADDRESS")
            or _mpi_coordinator()
        )
        _check(coordinator_address, num_processes, process_id)
        device_ids = [int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))]
    elif not _launched_together():
        given = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            raise VaecfError(
                f"{' and '.join(missing)} missing: without Slurm, Open MPI or "
                f"Kubernetes, give all of {', '.join(given)}"
            )
    if process_id == 0 and coordinator_address is not None:
        _check_port(coordinator_address)
    # This service would catch SIGTERM and not end the process.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator_address or "the coordinator"
    waits = (
        f"waiting for the other processes at {where}, for up to "
        f"{_START_SECONDS} s"
    )
    failed = (
        f"coordinator_address: the other processes did not connect at {where}: "
        "start all of them with the same address and num_processes, and each "
        "with its own process_id"
    )

    try:
        # Exits before the runtime would abort with the stacks of all threads.
        with (
            _timer(min(5.0, _START_SECONDS / 2), lambda: _log(waits)),
            _timer(0.95 * _START_SECONDS, lambda: _end(f"error: {failed}", 2)),
        ):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                device_ids,
                initialization_timeout=_START_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        raise VaecfError(f"{failed} ({str(error).splitlines()[0]})") from None
    # The stacks of all threads would hide the runtime's message about a
    # process that died.
    faulthandler.disable()


def _check(
    address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise VaecfError(
                f"coordinator_address={address} must be host:port, the host "
                "of process 0 and a free port"
            )
    if num_processes is not None and num_processes < 1:
        raise VaecfError(f"num_processes={num_processes} must be at least 1")
    last = sys.maxsize if num_processes is None else num_processes - 1
    if process_id is not None and not 0 <= process_id <= last:
        raise VaecfError(
            f"process_id={process_id} must be from 0 to num_processes - 1"
        )


def _launched_together() -> bool:
    """Returns whether JAX can ask Slurm or Kubernetes for the arguments."""
    env = os.environ
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    return (
        {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys()
        # JAX needs this package to ask Kubernetes.
        and importlib.util.find_spec("kubernetes") is not None
    )


def _mpi_coordinator() -> str:
    """Returns the address of process 0 of a job that mpirun has started.

    Versions 4 and 5 of Open MPI set the ranks alike, but each names the host
    of mpirun in a variable of its own. JAX only knows that of version 4.
    """
    env = os.environ
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == env[_MPI_SIZE]:
        host = "localhost"
    elif found := re.search(
        r"tcp://([\w.]+)", env.get("OMPI_MCA_orte_hnp_uri", "")
    ) or re.fullmatch(r"prterun-(.+)-\d+@\d+", job or ""):
        host = found[1]  # where mpirun runs, and usually process 0
    else:
        job = None
    if job is None:
        raise VaecfError(
            "coordinator_address missing: this version of Open MPI does not "
            "tell it; give host:port, the host of process 0 and a free port"
        )
    # All processes derive the same port, above those that systems hand out.
    return f"{host}:{61440 + zlib.crc32(job.encode()) % 4096}"


def _check_port(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise VaecfError(
                f"coordinator_address={address}: port {port} is not available "
                f"({error.strerror}): choose another one"
            ) from None


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end(message: str, status: int) -> None:
    # A normal exit would wait for the other processes, which may be waiting
    # for this one. The runtime tells them that it has gone.
    _log(message)
    sys.stdout.flush()
    os._exit(status)


@contextlib.contextmanager
def _timer(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` from another thread if the context takes longer."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def alone() -> bool:
    """Returns whether there is only one process."""
    return jax.process_count() == 1


def is_lead() -> bool:
    """Returns whether this is process 0, which writes files and logs."""
    return jax.process_index() == 0


def put(tree: Any, shardings: Any) -> Any:
    """Returns arrays on the devices, made from equal copies of all processes.

    Unlike `jax.device_put`, this does not compare the copies, which would need
    a collective. `shardings` is one Sharding, or a pytree of them.
    """
    if alone():
        return jax.device_put(tree, shardings)

    def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def from_shards(
    shards: Mapping[int, np.ndarray],
    n_shards: int,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Returns the concatenation of shards along the first axis.

    `shards` holds arrays of equal shapes by shard number; a process needs only
    those on its own devices. `sharding` divides the first axis into n_shards.
    """
    size, *rest = next(iter(shards.values())).shape

    def shard(index: Any) -> np.ndarray:
        return shards[(index[0].start or 0) // size]

    shape = (n_shards * size, *rest)
    return jax.make_array_from_callback(shape, sharding, shard)


# --- Agreement: all processes must call these functions ---------------------


def gather(value: Any) -> np.ndarray:
    """Returns the values of all processes, [processes, ...]."""
    if alone():
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def from_lead(values: Sequence[float]) -> list[float]:
    """Broadcasts numbers of process 0, to the last bit."""
    # The collective would round float64, so it transfers integers.
    bits = np.array(values, np.float64).view(np.uint32)
    return gather(bits)[0].copy().view(np.float64).tolist()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """Raises in all processes if the context raises a VaecfError in one."""
    own: VaecfError | None = None
    try:
        yield
    except VaecfError as error:
        own = error
    failed = np.flatnonzero(gather(own is not None))
    if own is not None:
        raise own
    if len(failed):
        raise VaecfError(
            f"process {failed[0]} stopped: its own message says why"
        )


def require_same(values: Mapping[str, Any]) -> None:
    """Raises a VaecfError unless all processes have the same JSON values.

    The error names the value. The names are the same in all processes.
    """
    texts = (json.dumps(value).encode() for value in values.values())
    digests = [hashlib.sha256(text).digest()[:8] for text in texts]
    numbers = np.stack([np.frombuffer(d, np.uint32) for d in digests])
    gathered = gather(numbers)  # [processes, values, 2]
    for name, of_all in zip(values, gathered.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((of_all != of_all[0]).any(axis=1))
        if len(others):
            raise VaecfError(
                f"process {others[0]} has another {name} than process 0: "
                "start all processes with the same settings and data"
            )


def require_shared_directory(directory: pathlib.Path) -> None:
    """Raises a VaecfError unless all processes see the same directory.

    Process 0 writes a file there, for which the others wait: a network file
    system may show it later.
    """
    if alone():
        return
    token = gather(np.frombuffer(os.urandom(8), np.uint32))[0].tobytes()
    path = directory / ".processes"
    if is_lead():
        path.write_bytes(token)
    began, seen = time.monotonic(), False
    while not seen and time.monotonic() - began < _SHARED_SECONDS:
        seen = path.exists() and path.read_bytes() == token
        time.sleep(0.0 if seen else 0.1)
    gather(True)  # all have looked
    if is_lead():
        path.unlink(missing_ok=True)
    if not seen:
        raise VaecfError(
            f"workdir {directory} is another directory here than that of "
            "process 0: give all processes the same one, on a file system "
            "that they share"
        )


# --- Failure ----------------------------------------------------------------


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Ends this process if the context takes longer than a deadline.

    A process that waits for a hanging process cannot be interrupted otherwise.
    0 seconds mean no deadline; `what` names the context in the message.
    """
    if alone() or not seconds:
        yield
        return
    message = (
        f"error: process {jax.process_index()}: {what} took more than "
        f"{seconds:g} s: another process hangs or cannot be reached "
        "(config.mesh.peer_timeout sets the limit)"
    )
    with _timer(seconds, lambda: _end(message, 1)):
        yield
