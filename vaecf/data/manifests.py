"""The manifest of a dataset: which entries it has, and how it is read."""

from __future__ import annotations

import pathlib
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

MANIFEST = "manifest.json"
FOLDS = "folds.json"  # of a folder of datasets; see `folds`
SCHEMA_VERSION = 1
TABLES = ("items", "users")
AGAIN = "prepare the dataset again"
_PARTS = (
    *("train", "validation.fold_in", "validation.held_out"),
    *("test.fold_in", "test.held_out"),
)


def read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a dataset's manifest and the digests of its tables.

    Raises:
      VaecfError: the file is damaged, of another version, or lacks an entry
        that a dataset needs.
    """
    file = folder / MANIFEST
    manifest, tables = workdir_lib.read_manifest(file)
    if (found := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise VaecfError(
            f"{folder} has schema version {found}, this vaecf reads "
            f"{SCHEMA_VERSION}; update vaecf or prepare the dataset again"
        )
    arrays = [
        f"{part}.{kind}" for part in _PARTS for kind in ("indptr", "indices")
    ]
    listed = manifest.get("arrays")
    more = listed if isinstance(listed, dict) else ()
    wanted: list[tuple[Any, str, type]] = [
        *((manifest, key, str) for key in ("name", "protocol")),
        *((manifest, key, dict) for key in ("counts", "ids", "arrays")),
        *((manifest.get("ids"), key, dict) for key in TABLES),
        *((listed, key, dict) for key in dict.fromkeys((*arrays, *more))),
    ]
    for entries, key, kind in wanted:
        if not isinstance(entries.get(key), kind):
            raise VaecfError(f"{file} does not list {key!r}; {AGAIN}")
    return manifest, tables
