"""Settings that all tests share."""

import importlib.metadata
import os
import pathlib
import tempfile

# One compilation cache for all workers and for the processes that tests start.
# It is empty at the start of every session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="vaecf-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The tests compile many programs and run each for a few steps, so machine code
# that compiles fast saves most of the time. `XLA_FLAGS= pytest ...` compiles as
# a user's run does; tests/real_settings is collected only then.
if "XLA_FLAGS" not in os.environ:
    _FAST = "--xla_backend_optimization_level=0 "
    _FAST += "--xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jax").startswith("0.10."):
        # Halves the time of compilation. Later versions do not know this flag,
        # and end the process that names it.
        _FAST += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _FAST
if "xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]:
    collect_ignore = ["real_settings"]

import hypothesis
import jax
import pytest

# Examples of a property whose test does not say how many.
hypothesis.settings.register_profile("vaecf", max_examples=50)
hypothesis.settings.load_profile("vaecf")

# Eight devices on one CPU, so that all tests can use meshes. `make_mesh(1, 1)`
# still uses one device. On a GPU only tests/models/test_gpu_kernels.py is run.
jax.config.update("jax_platforms", os.environ.get("VAECF_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
# Broadcasting to a higher rank must be explicit.
jax.config.update("jax_numpy_rank_promotion", "raise")

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def realdata_dir():
    """Returns the folder of the real ratings; skips the test without it."""
    path = pathlib.Path(os.environ.get("VAECF_REALDATA", _BESIDE))
    if not path.is_dir():
        pytest.skip(f"no real ratings in {path} (set VAECF_REALDATA)")
    return path
