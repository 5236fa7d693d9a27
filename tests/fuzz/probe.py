"""Probes Parquet files in forks of one process that has imported polars.

The product starts a new interpreter for every Parquet file whose content it
cannot trust. That takes a quarter of a second, so long campaigns replace the
interpreter: the same program reads the file in a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import types
from typing import Any

from vaecf.data import layouts

_SERVER = """
import json, os, signal, socket, sys
import polars  # it starts no threads yet
requests = socket.socket(fileno=int(sys.argv[1]))
while True:
    data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 1)
    if not data:  # the fuzzing process has ended
        break
    [output] = descriptors
    program, *arguments = json.loads(data)
    if (child := os.fork()) == 0:
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["-c", *arguments]
        status = 1
        try:
            exec(program, {})
            status = 0
        except SystemExit as error:
            status = error.code or 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(output)
    requests.sendall(json.dumps(child).encode())
    _, status = os.waitpid(child, 0)
    requests.sendall(json.dumps(status).encode())
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
        self.stdout, output = os.pipe()
        request = json.dumps([*map(str, command[2:])]).encode()
        socket.send_fds(Fork._server, [request], [output])
        os.close(output)
        self.stdout = os.fdopen(self.stdout, errors="replace")
        self.pid = json.loads(Fork._server.recv(100))
        self.returncode: int | None = None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __exit__(self, *error: Any) -> None:
        self.stdout.close()
        self.returncode = json.loads(Fork._server.recv(100))


def install() -> None:
    """Makes the product probe files in forks."""
    names = "PIPE", "STDOUT"
    constants = {name: getattr(subprocess, name) for name in names}
    layouts.subprocess = types.SimpleNamespace(Popen=Fork, **constants)
