"""Several processes that are one run: start, agreement, and failure.

JAX's own runtime connects them (NCCL on GPUs, gloo on CPUs). Every process
does the same; process 0, the lead, alone writes and speaks. With one process
everything here is a no-op.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vaecf.errors import VaecfError

# A process that does not answer for so long is taken for dead, and the runtime
# ends all others.
_HEARTBEAT_SECONDS = 30
_START_SECONDS = 300
# How long a shared file system may take to show a file to another host.
_SHARED_SECONDS = 30.0


def launched_together() -> bool:
    """Whether Slurm, Open MPI or Kubernetes started several of us."""
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    return (
        {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys()
        # JAX asks the cluster through it.
        and importlib.util.find_spec("kubernetes") is not None
    )


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes; before anything else is done with JAX.

    What is not given comes from Slurm, Open MPI or Kubernetes. With none of
    them, or with num_processes=1, the process stays alone.

    Args:
      coordinator_address: 'host:port' of process 0, a free port there.
      num_processes: processes of the run.
      process_id: of this one, from 0.

    Raises:
      VaecfError: the arguments do not fit, or the others were not met.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _check(coordinator_address, num_processes, process_id)
    if num_processes == 1:
        return
    if not launched_together():
        missing = [f"--{k}" for k, v in given.items() if v is None]
        if len(missing) == len(given):
            return
        if missing:
            raise VaecfError(
                f"{' and '.join(missing)} missing: without Slurm, Open MPI or "
                f"Kubernetes all of --{', --'.join(given)} are needed"
            )
    if process_id == 0 and coordinator_address is not None:
        _check_port(coordinator_address)
    # It would take SIGTERM for itself, and nobody would end on it.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator_address or "the coordinator"
    failed = (
        f"--coordinator_address: the other processes were not met at {where}: "
        "are all of them started, with the same address and --num_processes, "
        "and each with its own --process_id?"
    )
    try:
        with _waiting(where, failed):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=_START_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        raise VaecfError(f"{failed} ({str(error).splitlines()[0]})") from None
    # What the runtime says of a peer that died is not to be buried under the
    # stacks of all threads.
    faulthandler.disable()


@contextlib.contextmanager
def _waiting(where: str, failed: str) -> Iterator[None]:
    """Says that others are waited for, and gives up before JAX aborts."""

    def note() -> None:
        print(
            f"waiting for the other processes at {where}, "
            f"{_START_SECONDS} s at most",
            file=sys.stderr,
            flush=True,
        )

    def give_up() -> None:
        print(f"error: {failed}", file=sys.stderr, flush=True)
        os._exit(2)

    timers = [
        threading.Timer(min(5.0, _START_SECONDS / 2), note),
        threading.Timer(0.95 * _START_SECONDS, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _check_port(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise VaecfError(
                f"--coordinator_address={address}: port {port} cannot be had "
                f"here ({error.strerror}): choose another one"
            ) from None


def _check(
    address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise VaecfError(
                f"--coordinator_address={address} must be host:port, process "
                "0's host and a free port there"
            )
    if num_processes is not None and num_processes < 1:
        raise VaecfError(f"--num_processes={num_processes} must be at least 1")
    if process_id is not None and (
        process_id < 0
        or (num_processes is not None and process_id >= num_processes)
    ):
        raise VaecfError(
            f"--process_id={process_id} must be from 0 to --num_processes - 1"
        )


def alone() -> bool:
    """Whether there is just one process."""
    return jax.process_count() == 1


def is_lead() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays that all processes hold alike, onto the devices.

    `jax.device_put` that asks nobody: it would compare the arrays of all
    processes first.

    Args:
      tree: pytree of NumPy arrays, or of arrays of this process's own device.
      shardings: one Sharding, or a pytree of them.
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
    """The concatenation of shards along the first axis, of which a process
    needs only those on its own devices.

    Args:
      shards: by number, arrays of one shape.
      n_shards: of all processes.
      sharding: shards the first axis, n_shards ways.
    """
    size, *rest = next(iter(shards.values())).shape

    def shard(index: Any) -> np.ndarray:
        return shards[(index[0].start or 0) // size]

    return jax.make_array_from_callback(
        (n_shards * size, *rest), sharding, shard
    )


def gather(value: Any) -> np.ndarray:
    """[processes, ...]: everyone's value. All processes must call it."""
    if alone():
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """An error of one process inside is an error of all of them.

    Raises:
      VaecfError: this process's own, or that another one had one.
    """
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
    """All processes must have been started for the same thing.

    Args:
      values: plain values by what they are called, the same names everywhere.

    Raises:
      VaecfError: another process has another value; names it.
    """
    digests = [
        np.frombuffer(
            hashlib.sha256(json.dumps(value).encode()).digest()[:8], np.uint32
        )
        for value in values.values()
    ]
    everyone = gather(np.stack(digests))  # [processes, values, 2]
    for name, of_all in zip(values, everyone.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((of_all != of_all[0]).any(axis=1))
        if len(others):
            raise VaecfError(
                f"process {others[0]} has another {name} than process 0: "
                "start all processes alike"
            )


def require_shared_directory(directory: pathlib.Path) -> None:
    """Raises unless all processes see the same directory.

    All processes must call this function. Process 0 writes a file there, for
    which the others wait: a network file system may show it later.

    Raises:
      VaecfError: this process does not see the file of process 0.
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


def from_lead(values: Sequence[float]) -> list[float]:
    """Process 0's numbers, to the last bit. All processes must call it."""
    # As integers: float64 would be rounded on the way.
    bits = np.array(values, np.float64).view(np.uint32)
    return gather(bits)[0].copy().view(np.float64).tolist()


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Ends this process if what is inside does not end.

    A process that waits for one that hangs cannot be interrupted otherwise.

    Args:
      seconds: allowed; 0 for any time.
      what: is done inside, for the message.
    """
    if alone() or not seconds:
        yield
        return

    def give_up() -> None:
        abandon(
            f"{what} took more than {seconds:g} s: another process hangs or "
            "cannot be reached (config.mesh.peer_timeout allows more)"
        )

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def abandon(message: str, status: int = 1) -> None:
    """Ends this process at once, and with it the run.

    Leaving in the usual way would wait for the others, who may be waiting
    for us; the runtime tells them that we are gone.
    """
    print(
        f"error: process {jax.process_index()}: {message}",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(status)
