"""PyTorch implementations of Mult-VAE, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import scipy.sparse

from experiments.benchmark import machine
from vaecf.config import Config
from vaecf.errors import VaecfError

# The variants of torch_mult_vae.py.
VARIANTS = ("torch_dense", "torch_sparse", "torch_compile_bf16")


class Peer:
    """A process with a PyTorch model, which trains while ours waits.

    Its memory and threads are separate from ours. It ends when our process ends
    and closes its stdin.

    `name` is one of `VARIANTS`, `python` an interpreter that has PyTorch, NumPy
    and SciPy. `figures` holds {'version', 'loss', 'peak_rss_bytes', ...} of the
    process.
    """

    def __init__(
        self, name: str, python: str, config: Config, train: Any
    ) -> None:
        self._name = name
        script = pathlib.Path(__file__).with_name("torch_mult_vae.py")
        with tempfile.TemporaryDirectory() as folder:
            matrix = f"{folder}/train.npz"
            settings = json.dumps(config.to_dict())
            scipy.sparse.save_npz(matrix, train.to_scipy(), compressed=False)
            self._process = subprocess.Popen(
                [python, str(script), name, matrix, settings],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(machine.ROOT)},
            )
            self.figures = self._answer()

    def measure(self, seconds: float) -> float:
        """Trains for about `seconds`, at least one step; returns users/s."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(f"{seconds}\n".encode())
        self.figures = self._answer()
        return self.figures["users_per_second"]

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise VaecfError(
            f"--peers={self._name}: the process ended with status "
            f"{self._process.wait()}; its error is above"
        )
