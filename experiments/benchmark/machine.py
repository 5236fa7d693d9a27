"""What a benchmark says about the machine; the standard library only.

Peers run in an interpreter of their own that may have little installed, so
nothing here imports more.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
from collections.abc import Iterable

_STATUS = pathlib.Path("/proc/self/status")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux's VmHWM where there is one: `ru_maxrss` of a child starts with what
    its parent had when it was forked.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Model name of the host's processor, and its cores."""
    name = platform.processor() or platform.machine()
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
