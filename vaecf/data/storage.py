"""Arrays and small files on disk, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pathlib
from typing import Any

import numpy as np

from vaecf.errors import VaecfError

_HASH_BLOCK = 1 << 20


def file_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _npy_header(array: np.ndarray) -> bytes:
    """The header that ``np.save`` writes before the values."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, np.lib.format.header_data_from_array_1_0(array)
    )
    return stream.getvalue()


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """The manifest's entry for an array: digest of its file, dtype, shape.

    The digest is that of the ``.npy`` file which ``save_array`` writes, so
    that ``sha256sum`` agrees with the manifest.
    """
    flat = np.ascontiguousarray(array)
    digest = hashlib.sha256(_npy_header(flat))
    view = flat.reshape(-1).view(np.uint8).data
    for start in range(0, len(view), _HASH_BLOCK):
        digest.update(view[start : start + _HASH_BLOCK])
    return {
        "sha256": digest.hexdigest(),
        "dtype": flat.dtype.str,
        "shape": list(flat.shape),
    }


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a ``.npy`` file and waits until it is on the disk."""
    flat = np.ascontiguousarray(array)
    with open(path, "wb") as stream:
        stream.write(_npy_header(flat))
        stream.write(flat.reshape(-1).view(np.uint8).data)
        sync(stream)


def load_array(
    path: pathlib.Path, expected: dict[str, Any], *, mmap: bool
) -> np.ndarray:
    """Opens a ``.npy`` file after comparing it with its manifest entry.

    Args:
      path: the file.
      expected: ``{"dtype", "shape"}`` as ``describe_array`` gives them.
      mmap: map the values read-only instead of reading them.

    Raises:
      VaecfError: if the file is missing, not an array, cut short, or of
        another dtype or shape.
    """
    mend = "prepare the dataset again"
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_header(stream)
            offset = stream.tell()
            size = os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        raise VaecfError(f"{path} is missing; {mend}") from None
    except (ValueError, KeyError, EOFError):
        raise VaecfError(
            f"{path} is truncated or not a NumPy array; {mend}"
        ) from None
    if list(shape) != list(expected["shape"]) or dtype != np.dtype(
        expected["dtype"]
    ):
        raise VaecfError(
            f"{path} holds {dtype} {list(shape)}, its manifest says "
            f"{np.dtype(expected['dtype'])} {expected['shape']}; {mend}"
        )
    n_values = math.prod(map(int, shape))
    wanted = offset + n_values * dtype.itemsize
    if fortran or size != wanted:
        what = "is truncated" if size < wanted else "has bytes too many"
        raise VaecfError(
            f"{path} {what}: {size:,} bytes where {wanted:,} are expected; "
            f"{mend}"
        )
    if mmap and n_values:  # an empty array cannot be mapped
        return np.memmap(path, dtype, "r", offset, shape)
    with open(path, "rb") as stream:
        stream.seek(offset)
        return np.fromfile(stream, dtype, n_values).reshape(shape)


def sync(stream: Any) -> None:
    """Flushes a file object through to the disk."""
    stream.flush()
    os.fsync(stream.fileno())
