"""Free memory, and the check that a computation fits into it."""

import os

import pytest
from oracles import refuses

from vaecf.parallel import memory


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 1_024_000), ("5000", 4000), ("500", 0)]
)
def test_host_free_bytes(tmp_path, monkeypatch, limit, expected):
    """The smaller of the machine's memory and the container's."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemFree: 7 kB\nMemAvailable:   1000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.host_free_bytes() == 1_024_000  # no container
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.host_free_bytes() == expected


def test_host_free_bytes_without_proc(tmp_path, monkeypatch):
    for name in ("_MEMINFO", "_CGROUP"):
        monkeypatch.setattr(memory, name, tmp_path / "missing")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 3}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert memory.host_free_bytes() == 12_288


def test_require_free(monkeypatch):
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 2**30)
    assert memory.require_free(2**30, "A fit", "1 x 1", "shrink it") == 2**30
    with refuses(r"A fit needs 3 x 2\^30.*3.0 GiB.*1.0 GiB.*: shrink"):
        memory.require_free(3 * 2**30, "A fit", "3 x 2^30", "shrink it")
