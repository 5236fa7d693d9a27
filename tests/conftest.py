"""Shared by all tests."""

from __future__ import annotations

import os
import pathlib

import pytest

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def realdata_dir() -> pathlib.Path:
    """Folder of the real ratings; tests that need it skip without it."""
    path = pathlib.Path(os.environ.get("VAECF_REALDATA", _BESIDE))
    if not path.is_dir():
        pytest.skip(f"no real ratings in {path} (set VAECF_REALDATA)")
    return path
