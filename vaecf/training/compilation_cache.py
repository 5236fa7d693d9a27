"""Keeps compiled programs from one process to the next.

Entry points turn on JAX's persistent compilation cache here. The library does
not do so by itself, because JAX has one cache for all programs of a process,
also for those of others.
"""

from __future__ import annotations

import os
import pathlib
import stat
import tempfile
from typing import Any

import jax

# Our programs take 2 to 140 kB each on a CPU.
_MAX_BYTES = 1 << 30


def use_compilation_cache(max_bytes: int = _MAX_BYTES) -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    Later processes then load the programs that this one compiles, those of
    other libraries too. Most of the time of the first `recommend` after
    `Recommender.load` is compilation. The commands call this function; call
    it at the start of a notebook or of a process that serves.

    >>> vaecf.use_compilation_cache()

    Settings of the user take precedence: JAX_COMPILATION_CACHE_DIR (an empty
    value means no cache), JAX_ENABLE_COMPILATION_CACHE, or `jax.config`.
    If the cache is larger than `max_bytes`, the least recently used programs
    are deleted now, when a run starts.

    Raises:
      OSError: the folder cannot be written; nothing was changed.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None:
        return
    if not config.jax_enable_compilation_cache:
        return
    import platformdirs

    # Not in the folder of downloads, which people share by $VAECF_CACHE:
    # loading a program runs it, so nobody else may write here.
    directory = pathlib.Path(platformdirs.user_cache_dir("vaecf")) / "jax"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if hasattr(os, "getuid") and (
        status.st_uid != os.getuid() or status.st_mode & 0o022
    ):
        raise OSError(f"{directory}: other users can write there")
    with tempfile.TemporaryFile(dir=directory):
        pass  # otherwise JAX would warn for every program
    _shrink(directory, max_bytes)
    config.update("jax_compilation_cache_dir", str(directory))
    # By default JAX skips programs that compile within a second: half of ours.
    name = "jax_persistent_cache_min_compile_time_secs"
    if name.upper() not in os.environ:
        config.update(name, 0.0)


def _shrink(directory: pathlib.Path, max_bytes: int) -> None:
    """Deletes the least recently used files.

    JAX's own limit (jax_compilation_cache_max_size) needs another package,
    locks the folder for every program, and stops storing programs after a
    process has died between the two files of a program.
    """
    files = []
    for path in directory.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # deleted by another process
        if stat.S_ISREG(status.st_mode):
            used = max(status.st_atime, status.st_mtime)
            files.append((used, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
