"""The machine that benchmarks run on: processor, memory, versions, processes.

Loads only the standard library, because `torch_mult_vae.py` runs in an
interpreter that may have neither JAX nor absl.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time

from vaecf import __version__
from vaecf.errors import VaecfError
from vaecf.parallel import workers

ROOT = pathlib.Path(__file__).resolve().parents[2]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "pandas")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def peak_rss_bytes() -> int:
    """Returns the largest resident memory of this process so far.

    On Linux `ru_maxrss` starts with the parent's memory at the fork.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0])
    return _RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor() -> str:
    """Returns the model name of the host's processor and its cores."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {len(workers.cores())} cores"


def versions() -> dict[str, str]:
    """Returns the versions of Python, vaecf and the installed packages."""
    found = {"python": platform.python_version(), "vaecf": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def run_script(script: str, *arguments: str) -> dict[str, float]:
    """Runs a script, a path below experiments/, in a process of its own.

    Returns:
      {'seconds', 'peak_rss_bytes'}; the peak is at least the memory that this
      process has at the fork.
    """
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise VaecfError(
            f"{script} ended with status {process.returncode}: {last}"
        )
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * _RSS_UNIT}
