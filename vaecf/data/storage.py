"""Reads and writes the files of a dataset: arrays and the manifest."""

from __future__ import annotations

import hashlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

SCHEMA_VERSION = 1
_AGAIN = "prepare the dataset again"


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Returns the manifest's entry of an array: digest, dtype and shape.

    The digest is that of the ``.npy`` file which `save_array` writes, so that
    ``sha256sum`` agrees with the manifest.
    """
    digest = _Digest()
    np.lib.format.write_array(digest, np.ascontiguousarray(array))  # type: ignore[arg-type]
    return {
        "sha256": digest.sha256.hexdigest(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a ``.npy`` file."""
    np.save(path, np.ascontiguousarray(array), allow_pickle=False)


def load_array(
    path: pathlib.Path, expected: dict[str, Any], *, mmap: bool
) -> np.ndarray:
    """Opens a ``.npy`` file and compares it with its manifest entry.

    Args:
      path: the file.
      expected: ``{"dtype", "shape"}`` as `describe_array` returns them.
      mmap: map the values read-only instead of reading them.

    Raises:
      VaecfError: the file is missing, not an array, truncated, or of another
        dtype or shape.
    """
    mmap = mmap and math.prod(expected["shape"]) > 0
    try:
        array = np.load(path, mmap_mode="r" if mmap else None)
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
    return array


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
      VaecfError: not JSON, or another schema version.
    """
    manifest = workdir_lib.read_json(path)
    found = None
    if isinstance(manifest, dict):
        found = manifest.get("schema_version")
    if found != SCHEMA_VERSION:
        raise VaecfError(
            f"{path} has schema version {found}, this vaecf reads "
            f"{SCHEMA_VERSION}; update vaecf or {_AGAIN}"
        )
    return dict(manifest)


def as_json(value: Any) -> Any:
    """Converts NumPy scalars, at any depth, to Python's own."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


class _Digest:
    """A file that keeps the digest of what is written."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
