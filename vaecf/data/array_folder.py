"""A directory of arrays: <name>.npy, and their digests in arrays.json."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.data import integrity
from vaecf.errors import VaecfError

ARRAYS = "arrays.json"


def write(folder: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and their digests to an existing directory."""
    entries = {}
    for name, value in arrays.items():
        array = np.asarray(value, order="C")
        np.save(folder / f"{name}.npy", array)
        entries[name] = integrity.describe(array)
    workdir_lib.write_json(folder / ARRAYS, entries, digest=True)


def read(folder: pathlib.Path, fix: str) -> dict[str, np.ndarray]:
    """Maps the arrays that arrays.json lists, if they have its digests.

    Args:
      fix: end of the messages, such as "train again".

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    began = time.time()
    entries = workdir_lib.read_json(folder / ARRAYS)
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise VaecfError(f"{folder / ARRAYS}: no list of arrays; {fix}")
    paths = {name: folder / f"{name}.npy" for name in entries}
    files = [*(path.name for path in paths.values()), ARRAYS]
    stamps = integrity.stamps(folder, files)
    arrays = {
        name: integrity.map_array(paths[name], entries[name], fix)
        for name in entries
    }
    if not integrity.is_verified(folder, stamps):
        for name, array in arrays.items():
            if integrity.describe(array) != entries[name]:
                raise VaecfError(
                    f"{paths[name]}: damaged (it has another SHA-256); {fix}"
                )
        integrity.remember(folder, stamps, began)
    return arrays
