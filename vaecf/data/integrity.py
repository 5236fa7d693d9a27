"""Finds damage in the arrays of a directory before anybody computes with them.

Digests take long to check for a large dataset, so a directory remembers in
``.verified.json`` which files were found whole: their sizes, times and inode
numbers.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vaecf import files
from vaecf.errors import VaecfError

_VERIFIED = ".verified.json"
# A file that changes again so soon may keep its times.
_CLOCK_SECONDS = 0.1

Stamps = dict[str, list[int]]


def describe(array: np.ndarray) -> dict[str, Any]:
    """Returns SHA-256, dtype and shape of a C-contiguous array.

    The digest is that of the file that `np.save` writes, so that ``sha256sum``
    agrees with it.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, np.lib.format.header_data_from_array_1_0(array)
    )
    digest = hashlib.sha256(header.getvalue())
    digest.update(array.ravel().data)
    return {
        "sha256": digest.hexdigest(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def map_array(
    path: pathlib.Path, expected: Mapping[str, Any], fix: str
) -> np.ndarray:
    """Maps a ``.npy`` file read-only; `expected` has its dtype and shape.

    Raises:
      VaecfError: the file is missing or not exactly this array; the message
        ends with `fix`.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise VaecfError(f"{path} is missing; {fix}") from None
    except Exception:  # what a damaged header can raise has no common class
        raise VaecfError(
            f"{path} is truncated or not a NumPy array; {fix}"
        ) from None
    found = {"dtype": array.dtype.str, "shape": list(array.shape)}
    wanted = {key: expected.get(key) for key in found}
    if found != wanted or not array.flags.c_contiguous:
        raise VaecfError(f"{path} holds {found}, but needs {wanted}; {fix}")
    if path.stat().st_size != array.offset + array.nbytes:
        raise VaecfError(f"{path} has bytes after the array; {fix}")
    return array


def stamps(folder: pathlib.Path, names: Iterable[str]) -> Stamps:
    """Returns size, times in ns and inode number of files by name.

    A missing file is left out.
    """
    found = {}
    for name in names:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        times = stat.st_mtime_ns, stat.st_ctime_ns
        found[name] = [stat.st_size, *times, stat.st_ino]
    return found


def is_verified(folder: pathlib.Path, now: Stamps) -> bool:
    """Returns whether the files were found whole and are still the same."""
    try:
        known: Any = files.read_json(folder / _VERIFIED)
    except VaecfError:
        return False
    return isinstance(known, dict) and known == now


def remember(folder: pathlib.Path, verified: Stamps, began: float) -> None:
    """Records that a check, which began at `began`, found the files whole.

    Nothing is recorded for files that were just written, nor in a directory
    that cannot be written: the next call checks again.
    """
    newest = max(changed for _, _, changed, _ in verified.values()) / 1e9
    if newest < began - _CLOCK_SECONDS:
        try:
            files.write_json(folder / _VERIFIED, verified, digest=True)
        except VaecfError:
            return
