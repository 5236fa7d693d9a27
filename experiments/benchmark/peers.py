"""Other implementations of the same work, each in a process of its own.

Memory and threads do not mix with ours, and the processes wait while another
one is measured, so that all of them see the same machine in turns. What they
run is in `torch_peer.py`.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from vaecf.errors import VaecfError

NAMES = ("torch_dense", "torch_sparse", "torch_compile_bf16")

_SCRIPT = pathlib.Path(__file__).with_name("torch_peer.py")
_FIND_TORCH = (
    "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
)


def check(names: Sequence[str], python: str) -> None:
    """Fails early where the peers could not run.

    Args:
      names: peers asked for.
      python: interpreter that has PyTorch.

    Raises:
      VaecfError: an unknown peer, no such interpreter, or no PyTorch in it.
    """
    for name in names:
        if name not in NAMES:
            raise VaecfError(
                f"--peers={name} is unknown: use some of {', '.join(NAMES)}"
            )
    if not names:
        return
    try:
        found = subprocess.run([python, "-c", _FIND_TORCH]).returncode == 0
    except OSError as error:
        raise VaecfError(
            f"--peer_python={python} cannot be run: {error.strerror}"
        ) from None
    if not found:
        raise VaecfError(
            f"--peers={','.join(names)} needs PyTorch, which {python} does not "
            "have: pip install torch, or name another interpreter with "
            "--peer_python"
        )


def write_data(directory: pathlib.Path, train: Any) -> None:
    """Writes training interactions where the peers read them."""
    np.save(directory / "indptr.npy", train.indptr)
    np.save(directory / "indices.npy", train.indices)


class Peer:
    """A peer's process, warmed up and waiting.

    Attributes:
      name: one of `NAMES`.
      facts: {'version', 'device', 'threads'}.
    """

    def __init__(
        self,
        name: str,
        python: str,
        data: pathlib.Path,
        *,
        n_items: int,
        hidden: Sequence[int],
        latent: int,
        batch_size: int,
    ) -> None:
        """Starts the process and waits until it has warmed up.

        Args:
          name: one of `NAMES`.
          python: interpreter that has PyTorch.
          data: directory that `write_data` filled.
          n_items: items of the catalogue.
          hidden: widths from the items inwards.
          latent: units of the bottleneck.
          batch_size: users a step.

        Raises:
          VaecfError: the process fails; with the last line that it wrote.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (`close` closes it)
        self._process = subprocess.Popen(
            [
                python,
                str(_SCRIPT),
                f"--mode={name}",
                f"--data={data}",
                f"--n_items={n_items}",
                "--hidden",
                *(str(width) for width in hidden),
                f"--latent={latent}",
                f"--batch_size={batch_size}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def measure(self, seconds: float) -> dict[str, Any]:
        """Trains for about `seconds`, at least one step.

        Returns:
          {'users', 'steps', 'seconds', 'first_loss', 'loss',
          'peak_rss_bytes', ...}.

        Raises:
          VaecfError: the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"measure {seconds}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.terminate()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Peer:
        """The peer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer = json.loads(line)
        if "error" in answer:
            raise VaecfError(f"--peers={self.name}: {answer['error']}")
        return answer

    def _failure(self) -> VaecfError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return VaecfError(
            f"--peers={self.name}: the process ended with status {status}: "
            f"{lines[-1] if lines else 'it wrote nothing'}"
        )
