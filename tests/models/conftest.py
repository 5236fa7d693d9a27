"""Fixtures of the models' tests; oracles.py has their references."""

import pytest

from vaecf.parallel import memory


@pytest.fixture
def free_bytes(monkeypatch):
    """Sets the free memory that fits see."""
    return lambda free: monkeypatch.setattr(
        memory, "host_free_bytes", lambda: free
    )
