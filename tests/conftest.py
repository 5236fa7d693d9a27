"""Shared by all tests."""

from __future__ import annotations

import os
import pathlib
import tempfile

# Tests compile the same small programs again and again: once is enough, for
# all workers and the processes that tests start. Empty at every start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="vaecf-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Many programs of a few steps: machine code that is quickly made, of the same
# HLO. Asked otherwise, otherwise: XLA_FLAGS= compiles as a user's run does.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)

import jax
import pytest

# Four devices out of one processor, before anything starts it: meshes are
# tested everywhere. `make_mesh(1, 1)` still gives one device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
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
