"""Memory that was freed is used again without asking the kernel."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes, json, resource, sys
from vaecf import host_memory

changed = host_memory.keep_freed() if "keep" in sys.argv else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(200 << 20)
    libc.memset(block, 1, 200 << 20)
    libc.free(block)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    faults.append(after - before)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([changed, faults, peak]))
"""


def _run(*arguments: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again() -> None:
    _, plain, _ = _run()
    changed, kept, peak = _run("keep")
    if not changed:
        pytest.skip("this C library's allocator has no such settings")
    # The first block is new memory; another one of its size is not.
    assert kept[0] > 50 and max(kept[1:]) < 20
    assert min(plain[1:]) > 50
    # Reserved memory is not used memory: half of the machine would show.
    assert peak < 400 << 10


def test_elsewhere_nothing_is_changed(monkeypatch) -> None:
    from vaecf import host_memory

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert host_memory.keep_freed() is False
