"""Reads and writes the files of a dataset: arrays and the manifest."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaecf.data.id_table import IdTable
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
    with open(path, "rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        wanted = stream.tell() + array.nbytes
    if (size := path.stat().st_size) != wanted:
        raise VaecfError(
            f"{path} has {size:,} bytes instead of {wanted:,}; {_AGAIN}"
        )
    return array


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest and checks the keys that opening a dataset needs.

    Raises:
      VaecfError: not JSON, a key is missing, or another schema version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VaecfError(f"{path} is not JSON ({error}); {_AGAIN}") from None
    needed = ("schema_version", "name", "protocol", "arrays", "ids")
    found = manifest if isinstance(manifest, dict) else {}
    missing = [key for key in needed if key not in found]
    if missing:
        raise VaecfError(f"{path} lacks {', '.join(missing)}; {_AGAIN}")
    if found["schema_version"] != SCHEMA_VERSION:
        raise VaecfError(
            f"{path} has schema version {found['schema_version']}, this vaecf "
            f"reads {SCHEMA_VERSION}; update vaecf or prepare again"
        )
    return found


def read_ids(
    directory: pathlib.Path, name: str, manifest: dict[str, Any]
) -> IdTable:
    """Reads ``items.parquet`` or ``users.parquet`` and checks the count.

    Raises:
      VaecfError: the file is missing, damaged, or not the manifest's.
    """
    path, expected = directory / f"{name}.parquet", manifest["ids"][name]
    table = IdTable.read(path, name.removesuffix("s"))
    same_type = not len(table) or table.type == expected["type"]
    if len(table) != expected["count"] or not same_type:
        raise VaecfError(
            f"{path} holds {len(table)} ids of type {table.type}, the "
            f"manifest says {expected['count']} of type {expected['type']}; "
            f"{_AGAIN}"
        )
    return table


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
