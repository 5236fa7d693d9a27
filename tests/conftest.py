"""Shared by all tests."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest

# Four devices out of one processor, before anything starts it: meshes are
# tested everywhere. `make_mesh(1, 1)` still gives one device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
# A forgotten axis must not broadcast in silence.
jax.config.update("jax_numpy_rank_promotion", "raise")

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def realdata_dir() -> pathlib.Path:
    """Folder of the real ratings; tests that need it skip without it."""
    path = pathlib.Path(os.environ.get("VAECF_REALDATA", _BESIDE))
    if not path.is_dir():
        pytest.skip(f"no real ratings in {path} (set VAECF_REALDATA)")
    return path
