"""Fixtures of the models' tests; oracles.py has their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vaecf.parallel import memory


@pytest.fixture
def free_bytes(monkeypatch) -> Callable[[int], None]:
    """Sets the free memory that fits see."""
    return lambda free: monkeypatch.setattr(
        memory, "host_free_bytes", lambda: free
    )
