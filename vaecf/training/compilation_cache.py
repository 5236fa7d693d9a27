"""Compiled programs, kept from one process to the next.

JAX can store what XLA compiles and load it again; entry points ask for that
here. Nothing else does: in a notebook JAX stays as its user configured it.
"""

from __future__ import annotations

import os
import pathlib
import stat
import tempfile
from typing import Any

import jax

# Ours take 2 to 140 kB each on a CPU.
_MAX_BYTES = 1 << 30


def keep_programs(max_bytes: int = _MAX_BYTES) -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache.

    What the user has set wins: a directory in JAX_COMPILATION_CACHE_DIR (or
    jax.config) is left as it is with all that belongs to it, an empty one and
    JAX_ENABLE_COMPILATION_CACHE=0 mean no cache.

    Args:
      max_bytes: beyond this, programs that were not used for longest are
        deleted first.

    Raises:
      OSError: the directory cannot be written; nothing was changed.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None:
        return
    if not config.jax_enable_compilation_cache:
        return
    import platformdirs

    # Not among the downloads, which people share by $VAECF_CACHE: loading a
    # program is running it, so nobody else may write here.
    directory = pathlib.Path(platformdirs.user_cache_dir("vaecf")) / "jax"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if hasattr(os, "getuid") and (
        status.st_uid != os.getuid() or status.st_mode & 0o022
    ):
        raise OSError(f"{directory}: others can write there")
    with tempfile.TemporaryFile(dir=directory):
        pass  # JAX would warn of every program that it cannot store
    _shrink(directory, max_bytes)
    config.update("jax_compilation_cache_dir", str(directory))
    # JAX leaves out what compiles within a second: half of our programs.
    name = "jax_persistent_cache_min_compile_time_secs"
    if name.upper() not in os.environ:
        config.update(name, 0.0)


def _shrink(directory: pathlib.Path, max_bytes: int) -> None:
    """Deletes the files that were used last the longest ago.

    JAX's own bound (jax_compilation_cache_max_size) needs another package,
    locks the directory for every program, and stores nothing ever after when
    a process dies between the two files that it writes for each.
    """
    files = []
    for path in directory.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # another process shrinks too
        if stat.S_ISREG(status.st_mode):
            used = max(status.st_atime, status.st_mtime)
            files.append((used, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
