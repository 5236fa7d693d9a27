"""Checks of the directory that a dataset, or folds, are written to."""

from __future__ import annotations

import pathlib

from vaecf import files
from vaecf.data import integrity
from vaecf.data.manifests import FOLDS, MANIFEST
from vaecf.errors import VaecfError


def check(
    directory: str | pathlib.Path, *, overwrite: bool
) -> integrity.Stamps:
    """Checks that a dataset may be written to `directory`.

    Returns:
      The state of the directory, for `write_dataset`.

    Raises:
      VaecfError: the directory is a file, or is not empty, unless it holds a
        vaecf dataset, or folds, and `overwrite` is true.
    """
    path = files.user_path(directory)
    files.recover(path)
    files.remove_leftovers(path)
    if path.exists() and not path.is_dir():
        raise VaecfError(f"{path} is a file; name a directory to write to")
    # Never delete files that another program has written.
    is_dataset = any((path / name).is_file() for name in (MANIFEST, FOLDS))
    if path.exists() and any(path.iterdir()) and not is_dataset:
        raise VaecfError(
            f"{path} exists, is not empty and is no vaecf dataset; choose "
            "another output"
        )
    if is_dataset and not overwrite:
        raise VaecfError(
            f"{path} holds a dataset already; pass overwrite=True to replace "
            "it, or choose another output"
        )
    return integrity.stamps(path, [MANIFEST, FOLDS])


def require_unchanged(target: pathlib.Path, expected: integrity.Stamps) -> None:
    """Raises VaecfError if a directory changed since `check`."""
    if integrity.stamps(target, [MANIFEST, FOLDS]) != expected:
        raise VaecfError(
            f"another process has written {target} meanwhile; choose another "
            "output"
        )
