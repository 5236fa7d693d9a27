"""The manifest: what a dataset is, in JSON, without times or paths."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaecf.data import id_files, storage
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError

SCHEMA_VERSION = 1


def build(
    *,
    name: str,
    protocol: str,
    matrices: Mapping[str, Interactions],
    tables: Mapping[str, IdTable],
    constants: Mapping[str, Any],
    counts: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    oracle_facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A manifest without its arrays' digests: see ``make_dataset``.

    Args:
      name: of the data.
      protocol: how it was split.
      matrices: ``train``, ``validation_fold_in`` and so on.
      tables: ``items`` and ``users``.
      constants: the protocol's.
      counts: added to the sizes of the matrices.
      source: of the ratings, or None.
      oracle_facts: of generated data, or None.
    """
    sizes: dict[str, Any] = {
        "users": len(tables["users"]),
        "items": len(tables["items"]),
        "interactions": sum(matrix.nnz for matrix in matrices.values()),
        "train_users": matrices["train"].n_users,
        "validation_users": matrices["validation_fold_in"].n_users,
        "test_users": matrices["test_fold_in"].n_users,
    }
    sizes["train_interactions"] = matrices["train"].nnz
    for part in ("validation_fold_in", "validation_held_out",
                 "test_fold_in", "test_held_out"):  # fmt: skip
        sizes[part] = matrices[part].nnz
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "vaecf_version": _version(),
        "name": name,
        "protocol": protocol,
        "protocol_constants": _plain(constants),
        "counts": _plain({**sizes, **counts}),
        "source": None if source is None else _plain(source),
        "ids": {
            which: {
                "type": table.type,
                "count": len(table),
                "sha256": table.sha256(),
            }
            for which, table in tables.items()
        },
    }
    if oracle_facts is not None:
        manifest["oracle"] = _plain(oracle_facts)
    return manifest


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads and checks what the rest relies on."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VaecfError(
            f"{path} is not JSON ({error}); prepare the dataset again"
        ) from None
    needed = ("schema_version", "name", "protocol", "arrays", "ids")
    missing = [
        key
        for key in needed
        if not isinstance(manifest, dict) or key not in manifest
    ]
    if missing:
        raise VaecfError(
            f"{path} lacks {', '.join(missing)}; prepare the dataset again"
        )
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise VaecfError(
            f"{path} has schema version {manifest['schema_version']}, this "
            f"vaecf reads {SCHEMA_VERSION}; update vaecf or prepare again"
        )
    return manifest


def read_ids(
    directory: pathlib.Path, column: str, manifest: dict[str, Any]
) -> IdTable:
    """Reads ``items.parquet`` or ``users.parquet``."""
    path = directory / f"{column}s.parquet"
    expected = manifest["ids"][f"{column}s"]
    table = id_files.read_ids(path, column)
    if expected["count"] == 0:
        return IdTable(np.zeros(0, np.int64))
    if len(table) != expected["count"] or table.type != expected["type"]:
        raise VaecfError(
            f"{path} holds {len(table)} ids of type {table.type}, the "
            f"manifest says {expected['count']} of type {expected['type']}; "
            "prepare the dataset again"
        )
    return table


def verify(
    directory: pathlib.Path,
    manifest: dict[str, Any],
    tables: dict[str, IdTable],
) -> None:
    """Compares every digest of the manifest with what is on the disk."""
    found = {
        f"{name}.npy": (
            storage.file_sha256(directory / f"{name}.npy"),
            entry["sha256"],
        )
        for name, entry in manifest["arrays"].items()
    }
    for name, table in tables.items():
        found[f"{name}.parquet"] = (
            table.sha256(),
            manifest["ids"][name]["sha256"],
        )
    for name, (actual, expected) in found.items():
        if actual != expected:
            raise VaecfError(
                f"{directory / name} has SHA-256 {actual}, the manifest says "
                f"{expected}; prepare the dataset again"
            )


def _plain(value: Any) -> Any:
    """The value with NumPy scalars made JSON's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _version() -> str:
    """The version of vaecf that writes."""
    import vaecf

    return str(getattr(vaecf, "__version__", "unknown"))
