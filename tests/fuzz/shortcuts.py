"""Makes inputs of long campaigns cheap, where the time is not the reader's.

Parquet files are probed in forks of one process that has imported polars: the
product starts a new interpreter for every Parquet file whose content it cannot
trust, which takes a quarter of a second. And of checkpoints with the same bytes
only every fiftieth is restored.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import types
from typing import Any

from vaecf.data import layouts

# The process that has imported polars forks a worker, and another one whenever
# a worker dies. The worker runs the programs.
_SERVER = """
import json, os, socket, sys
import polars  # it starts no threads yet
requests = socket.socket(fileno=int(sys.argv[1]))
nothing = os.open(os.devnull, os.O_WRONLY)
say = lambda *message: requests.sendall(json.dumps(message).encode())
while (worker := os.fork()) != 0:
    _, status = os.waitpid(worker, 0)
    if status == 0:  # there are no more requests
        sys.exit()
    say('died', status)
while True:
    data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 1)
    if not data:
        os._exit(0)
    say('began', os.getpid())
    program, *arguments = json.loads(data)
    os.dup2(descriptors[0], 1), os.dup2(descriptors[0], 2)
    os.close(descriptors[0])
    sys.argv = ['-c', *arguments]
    status = 0
    try:
        exec(program, {})
    except SystemExit as error:
        status = error.code or 0
    sys.stdout.flush()
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    say('ended', status)
"""


class Fork(contextlib.AbstractContextManager):
    """Runs `python -c PROGRAM ARGUMENTS` as subprocess.Popen does."""

    _server: socket.socket | None = None
    _process: Any = None  # keeps the server's Popen

    def __init__(self, command: list[Any], **options: Any) -> None:
        if Fork._server is None:
            Fork._server, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
            argv = [sys.executable, "-c", _SERVER, str(other.fileno())]
            Fork._process = subprocess.Popen(argv, pass_fds=[other.fileno()])
            other.close()
        read, write = os.pipe()
        request = json.dumps([*map(str, command[2:])]).encode()
        socket.send_fds(Fork._server, [request], [write])
        os.close(write)
        self.stdout = os.fdopen(read, errors="replace")
        self._worker = self._next("began")
        self._killed = False
        self.returncode: int | None = None

    def _next(self, *kinds: str) -> int:
        assert Fork._server is not None
        while True:
            kind, number = json.loads(Fork._server.recv(100))
            if kind in kinds:
                return number

    def kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._worker, signal.SIGKILL)

    def __exit__(self, *error: Any) -> None:
        self.stdout.close()
        self.returncode = self._next(*["died", "ended"][: 2 - self._killed])


def probe_in_forks() -> None:
    """Makes the product probe files in forks."""
    names = "PIPE", "STDOUT"
    constants = {name: getattr(subprocess, name) for name in names}
    layouts.subprocess = types.SimpleNamespace(Popen=Fork, **constants)


def remember_checkpoints() -> None:
    """Makes the product restore most checkpoints of known bytes from memory."""
    from vaecf.training.checkpoints import Checkpoints

    known: dict[Any, Any] = {}
    calls = itertools.count()

    def remembering(method: Any) -> Any:
        def call(self: Any, which: str, *args: Any, **options: Any) -> Any:
            # Its step is the last argument of both methods.
            step = inspect.signature(method).bind(self, which, *args, **options)
            step = step.arguments.get("step") or self.step(which)
            self.check(which, step)
            self._manager(which, writes=False)  # reads all checkpoints
            directory = self.directory / which / str(step)
            files = sorted(
                path for path in directory.rglob("*") if path.is_file()
            )
            data = [(path.name, path.read_bytes()) for path in files]
            key = method.__name__, which, hash(tuple(data))
            if key not in known or next(calls) % 50 == 0:
                known[key] = method(self, which, *args, **options)
            return known[key]

        return call

    Checkpoints.restore = remembering(Checkpoints.restore)
    Checkpoints.position = remembering(Checkpoints.position)
