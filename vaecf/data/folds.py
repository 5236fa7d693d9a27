"""k-fold strong generalisation: every user is a test user of one fold.

A folder of folds holds one dataset per fold, ``fold1`` to ``foldK``, and
``folds.json``:

  name, protocol   of the data; protocol such as 'vaecf, 5 folds'
  folds            `Dataset.manifest_hash` of each fold
  counts           what is the same in all folds
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vaecf import files
from vaecf.data import dataset as dataset_lib
from vaecf.data import integrity, outputs, splits
from vaecf.data.dataset import Dataset
from vaecf.data.manifests import FOLDS
from vaecf.data.readers import Ratings
from vaecf.errors import VaecfError


def split(
    ratings: Ratings,
    n_folds: int,
    validation_users: int,
    *,
    seed: int,
    test_proportion: float,
) -> Iterator[splits.Split]:
    """Yields the split of each fold; each is made as `splits.vaecf` makes it.

    The users are permuted once and cut into `n_folds` blocks whose sizes
    differ by one at most. Block i has the test users of fold i. The
    `validation_users` before it, cyclically, validate, and all others are
    trained on. Each fold draws its held-out items anew.

    Raises:
      VaecfError: there are too few users.
    """
    present = np.flatnonzero(np.bincount(ratings.user))
    n = len(present)
    largest = -(-n // n_folds)
    if n_folds > n or validation_users + largest >= n:
        raise VaecfError(
            f"{n:,} users remain, too few for {n_folds} folds with "
            f"{validation_users:,} validation and {largest:,} test users "
            f"besides training users; lower folds={n_folds} or held_out_users"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(present)
    ends = [n * fold // n_folds for fold in range(n_folds + 1)]
    for fold in range(1, n_folds + 1):
        start, end = ends[fold - 1 : fold + 1]
        made = splits.in_order(
            ratings,
            np.roll(order, n - end),  # the test users come last
            validation_users,
            end - start,
            np.random.Generator(np.random.PCG64([seed, fold])),
            test_proportion=test_proportion,
        )
        yield made._replace(constants={"fold": fold, "folds": n_folds})


def protocol(name: str, constants: Mapping[str, Any]) -> str:
    """Returns the name of a protocol, for a fold such as 'vaecf, fold 1 of 5'.

    `constants` are those of the split.
    """
    if "fold" not in constants:
        return name
    return f"{name}, fold {constants['fold']} of {constants['folds']}"


def write(
    directory: pathlib.Path,
    folds: Sequence[Dataset],
    *,
    overwrite: bool,
    expected: integrity.Stamps,
) -> list[Dataset]:
    """Writes all folds atomically; see `dataset.write_dataset`."""
    counts = folds[0].manifest["counts"].items()
    manifest = {
        "name": folds[0].name,
        "protocol": f"vaecf, {len(folds)} folds",
        "folds": [fold.manifest_hash for fold in folds],
        "counts": {
            key: value
            for key, value in counts
            if not key.startswith(("train", "validation", "test", "held_out"))
            and all(fold.manifest["counts"][key] == value for fold in folds)
        },
    }
    outputs.check(directory, overwrite=overwrite)
    with files.atomic_directory(directory, replace=overwrite) as fresh:
        outputs.require_unchanged(directory, expected)
        for number, fold in enumerate(folds, 1):
            dataset_lib.write_dataset(fresh / f"fold{number}", fold)
        files.write_json(fresh / FOLDS, manifest, digest=True)
    return open_all(directory)


def are_in(directory: pathlib.Path) -> bool:
    """Returns whether a directory is a folder of folds."""
    files.recover(directory)
    return (directory / FOLDS).is_file()


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the content of folds.json.

    Raises:
      VaecfError: the file is missing or damaged.
    """
    path = directory / FOLDS
    manifest = files.read_json(path)
    wanted = {"name": str, "protocol": str, "folds": list, "counts": dict}
    for key, kind in wanted.items():
        if not isinstance(manifest, dict) or not isinstance(
            manifest.get(key), kind
        ):
            raise VaecfError(
                f"{path} does not list {key!r}; prepare the folds again"
            )
    return manifest


def open_all(directory: pathlib.Path, *, verify: bool = False) -> list[Dataset]:
    """Opens the folds of a folder, or its dataset.

    Raises:
      VaecfError: see `dataset.open_dataset`; or a fold is not that of
        folds.json.
    """
    if not are_in(directory):
        return [dataset_lib.open_dataset(directory, verify=verify)]
    found = []
    for number, expected in enumerate(read_manifest(directory)["folds"], 1):
        place = directory / f"fold{number}"
        fold = dataset_lib.open_dataset(place, verify=verify)
        if fold.manifest_hash != expected:
            raise VaecfError(
                f"{place} holds another dataset than {directory / FOLDS} says: "
                "prepare the folds again"
            )
        found.append(fold)
    return found
