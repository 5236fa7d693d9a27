"""Free memory of the host and of devices."""

from __future__ import annotations

import os
import pathlib

from vaecf.errors import VaecfError

_MEMINFO = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def host_free_bytes() -> int:
    """Returns the free and reclaimable memory of this machine, in bytes.

    A container's limit counts as well. Without /proc (not Linux) the physical
    memory is the best estimate.
    """
    free = []
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    try:
        if (text := limit.read_text().strip()) != "max":
            free.append(max(0, int(text) - int(used.read_text())))
    except OSError:
        pass  # no control groups, or the older version of them
    return min(free)


def device_free_bytes() -> int | None:
    """Returns the free memory of a local device, in bytes; None if unknown.

    A CPU device has the memory of the host.
    """
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_free_bytes() if device.platform == "cpu" else None


def require_free(needed: int, what: str, arithmetic: str, advice: str) -> int:
    """Returns the host's free memory, in bytes.

    Raises:
      VaecfError: `needed` bytes are not free. The message says `what` needs
        them, by which `arithmetic`, and gives `advice`.
    """
    free = host_free_bytes()
    if needed > free:
        raise VaecfError(
            f"{what} needs {arithmetic} = {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: {advice}"
        )
    return free
