"""Describes and opens the arrays of a dataset."""

from __future__ import annotations

import hashlib
import io
import pathlib
from typing import Any

import numpy as np

from vaecf.errors import VaecfError

_AGAIN = "prepare the dataset again"


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Returns the manifest's entry of a C-contiguous array.

    The digest is that of the file that `np.save` writes, so that ``sha256sum``
    agrees with the manifest.
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


def load_array(path: pathlib.Path, expected: dict[str, Any]) -> np.ndarray:
    """Maps a ``.npy`` file read-only and compares it with its manifest entry.

    Raises:
      VaecfError: the file is missing, not an array, or of another dtype, shape
        or size.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise VaecfError(f"{path} is missing; {_AGAIN}") from None
    except (ValueError, EOFError, OSError):
        raise VaecfError(
            f"{path} is truncated or not a NumPy array; {_AGAIN}"
        ) from None
    dtype, shape = np.dtype(expected["dtype"]), tuple(expected["shape"])
    if array.shape != shape or array.dtype != dtype:
        raise VaecfError(
            f"{path} holds {array.dtype} {list(array.shape)}, its manifest "
            f"says {dtype} {list(shape)}; {_AGAIN}"
        )
    if path.stat().st_size != array.offset + array.nbytes:
        raise VaecfError(f"{path} has bytes after the array; {_AGAIN}")
    return array
