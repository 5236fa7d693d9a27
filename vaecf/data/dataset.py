"""The dataset: split interactions, id tables and a manifest, on disk.

A dataset is a directory::

  manifest.json                    name, protocol, counts, digests
  items.parquet                    item, index
  users.parquet                    user, index, split
  train.indptr.npy                 int64 [train users + 1]
  train.indices.npy                int32 [interactions]
  validation.fold_in.indptr.npy    and so on for validation.held_out,
  ...                              test.fold_in and test.held_out

The indices are memory-mapped. A directory is written atomically, and
`manifest.json` holds a digest of every file and of itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import vaecf
from vaecf import files
from vaecf import workdir as workdir_lib
from vaecf.data import external_formats, integrity, manifests, outputs
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.data.manifests import FOLDS, MANIFEST, TABLES
from vaecf.errors import VaecfError
from vaecf.reporting import html

RECIPE_DATA_DIR = "/data"  # default of NVIDIA's recipe, a volume of its image


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions split under a protocol.

    Raises:
      VaecfError: the sizes of the parts differ.
    """

    name: str  # of the data, such as "ml-1m"
    protocol: str  # how the users were split
    train: Interactions
    validation: HeldOut  # users for choosing a model
    test: HeldOut  # users for reporting
    items: IdTable  # raw ids of the columns
    # Raw ids of the rows: train, then validation, then test. The users of
    # validation and test may be training users, too (`known_users`).
    users: IdTable
    manifest: dict[str, Any]  # see `make_dataset`
    path: pathlib.Path | None = None  # directory; None for data in memory
    # Arrays of the distribution that generated the data; None for real data.
    oracle: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        for part, matrix in self.matrices.items():
            if matrix.n_items != len(self.items):
                raise VaecfError(
                    f"{part} has {matrix.n_items} items, the item table has "
                    f"{len(self.items)}"
                )
        for name in ("validation", "test"):
            n_fold_in, n_held_out = (part.n_users for part in self.split(name))
            if n_fold_in != n_held_out:
                raise VaecfError(
                    f"{name} has {n_fold_in} fold-in users and {n_held_out} "
                    "held-out users"
                )
        if (n_users := sum(self.split_sizes)) != len(self.users):
            raise VaecfError(
                f"the splits have {n_users} users, the user table has "
                f"{len(self.users)}"
            )

    def _repr_html_(self) -> str:
        """Returns the card that a notebook shows."""
        n_train, n_validation, n_test = self.split_sizes
        counts = self.manifest.get("counts", {})
        facts = {
            "protocol": self.protocol.replace("vaecf", "vaecf (strong)"),
            "training users": n_train,
            "validation users": n_validation,
            "test users": n_test,
            "items": self.n_items,
            "interactions": counts.get("interactions"),
            "directory": self.path,
        }
        return html.card(f"Dataset {self.name}", facts)

    def __repr__(self) -> str:
        users = " + ".join(f"{n:,}" for n in self.split_sizes)
        name = f"{self.name}, protocol {self.protocol}"
        return f"Dataset({name}, {users} users, {self.n_items:,} items)"

    @property
    def about(self) -> str:
        """Name and protocol, without which no result means anything."""
        return f"dataset {self.name}, protocol {self.protocol}"

    @property
    def n_items(self) -> int:
        """Size of the item vocabulary."""
        return len(self.items)

    @property
    def split_sizes(self) -> tuple[int, int, int]:
        """Training, validation and test users."""
        return (
            self.train.n_users,
            self.validation.fold_in.n_users,
            self.test.fold_in.n_users,
        )

    @property
    def matrices(self) -> dict[str, Interactions]:
        """The five matrices by their names on disk."""
        return {
            "train": self.train,
            "validation.fold_in": self.validation.fold_in,
            "validation.held_out": self.validation.held_out,
            "test.fold_in": self.test.fold_in,
            "test.held_out": self.test.held_out,
        }

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by their file names without ``.npy``, C-contiguous."""
        arrays = {
            f"{part}.{kind}": getattr(matrix, kind)
            for part, matrix in self.matrices.items()
            for kind in ("indptr", "indices")
        }
        for name, array in (self.oracle or {}).items():
            arrays[f"oracle.{name}"] = array
        return {k: np.ascontiguousarray(array) for k, array in arrays.items()}

    @functools.cached_property
    def manifest_hash(self) -> str:
        """SHA-256 (hex) of the manifest as canonical JSON."""
        return files.json_sha256(self.manifest)

    def split(self, name: str) -> HeldOut:
        """Returns the ``"validation"`` or the ``"test"`` users.

        Raises:
          VaecfError: any other name.
        """
        if name in ("validation", "test"):
            return self.validation if name == "validation" else self.test
        raise VaecfError(f"unknown split {name!r}: use 'validation' or 'test'")

    def everything(self) -> Interactions:
        """Returns all interactions known before the test, in memory.

        The rows are the training users, with what is held out of their
        histories for validation, and then the validation users who are no
        training users.
        """
        import pandas as pd

        if not (n_validation := self.validation.fold_in.n_users):
            return self.train
        n_train = self.train.n_users
        ids = self.users.ids[: n_train + n_validation]
        row, users = pd.factorize(ids)  # in order of first appearance
        parts = [(self.train, row[:n_train])]
        parts += [(part, row[n_train:]) for part in self.validation]
        user = [np.repeat(rows, part.counts) for part, rows in parts]
        item = np.concatenate([part.indices for part, _ in parts])
        n_users = len(users)
        return Interactions.from_pairs(
            np.concatenate(user), item, n_users, self.n_items
        )[0]


def make_dataset(
    *,
    name: str,
    protocol: str,
    train: Interactions,
    validation: HeldOut,
    test: HeldOut,
    items: IdTable,
    users: IdTable,
    constants: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    oracle: Mapping[str, np.ndarray] | None = None,
    oracle_facts: Mapping[str, Any] | None = None,
) -> Dataset:
    """Builds a dataset in memory, with its manifest. See `Dataset`.

    Equal input gives an equal manifest: it holds no time and no path.

    Args:
      constants: the protocol's seed, thresholds and proportions.
      counts: rows read, dropped and so on; sizes of the matrices are added.
      source: ``{"file", "sha256", "bytes"}``, or None if there is no file.
      oracle_facts: parameters of the generator of `oracle`.
    """
    parts = (train, validation, test, items, users)
    dataset = Dataset(name, protocol, *parts, manifest={}, oracle=oracle)
    n_train, n_validation, n_test = dataset.split_sizes
    sizes = {
        "users": len(users),
        "items": len(items),
        "interactions": sum(m.nnz for m in dataset.matrices.values()),
        "train_users": n_train,
        "validation_users": n_validation,
        "test_users": n_test,
        "train_interactions": train.nnz,
        "validation_fold_in": validation.fold_in.nnz,
        "validation_held_out": validation.held_out.nnz,
        "test_fold_in": test.fold_in.nnz,
        "test_held_out": test.held_out.nnz,
    }
    manifest = {
        "schema_version": manifests.SCHEMA_VERSION,
        "vaecf_version": vaecf.__version__,
        "name": name,
        "protocol": protocol,
        "protocol_constants": constants or {},
        "counts": {**sizes, **(counts or {})},
        "source": source,
        "ids": {
            which: {
                "type": table.type,
                "count": len(table),
                "sha256": table.sha256(),
            }
            for which, table in zip(TABLES, (items, users))
        },
    }
    if oracle_facts is not None:
        manifest["oracle"] = oracle_facts
    manifest["arrays"] = {
        key: integrity.describe(array) for key, array in dataset.arrays.items()
    }
    # What a reader of the file gets: no tuples, no NumPy scalars.
    text = json.dumps(manifest, default=lambda scalar: scalar.item())
    dataset.manifest.update(json.loads(text))
    return dataset


def write_dataset(
    directory: str | pathlib.Path,
    dataset: Dataset,
    *,
    overwrite: bool = False,
    expected: integrity.Stamps | None = None,
) -> Dataset:
    """Writes a dataset atomically; returns the dataset opened from there.

    Args:
      expected: result of an earlier `outputs.check`. A dataset that has been
        written there since then is not replaced.

    Raises:
      VaecfError: the directory is taken (see `outputs.check`) or cannot be
        written.
    """
    target = files.user_path(directory)
    before = outputs.check(target, overwrite=overwrite)
    with workdir_lib.atomic_directory(target, replace=overwrite) as fresh:
        # No other process writes the dataset now.
        outputs.require_unchanged(
            target, before if expected is None else expected
        )
        for name, array in dataset.arrays.items():
            np.save(fresh / f"{name}.npy", array)
        splits = np.repeat(["train", "validation", "test"], dataset.split_sizes)
        dataset.items.write(fresh / "items.parquet", "item")
        dataset.users.write(fresh / "users.parquet", "user", split=splits)
        tables = [f"{name}.parquet" for name in TABLES]
        digests = {name: files.file_sha256(fresh / name) for name in tables}
        value = {**dataset.manifest, "tables": digests}
        workdir_lib.write_json(fresh / MANIFEST, value, digest=True)
    return open_dataset(target)


def open_dataset(
    directory: str | pathlib.Path, *, verify: bool = False
) -> Dataset:
    """Opens a dataset; the indices stay on disk, memory-mapped.

    >>> from vaecf.data.dataset import write_dataset
    >>> path = write_dataset(folder / "data", split).path
    >>> vaecf.open_dataset(path).split_sizes  # training, validation, test users
    (48, 6, 6)

    Directories written by the paper's notebook (``pro_sg``) and by the
    recipe's preparation script are read too.

    The structure is always checked: the files' shapes, dtypes and sizes, and
    that the indices are in range and ascending. With `verify`, all files are
    also compared with the digests in the manifest.

    Raises:
      VaecfError: no dataset, or a damaged one (names the file).
    """
    return _open(files.user_path(directory), "all" if verify else "structure")


def _open(path: pathlib.Path, checks: str) -> Dataset:
    """Opens a dataset; checks its 'structure', 'all', or 'all once'.

    'all once' trusts files that have not changed since they were checked.
    """
    began = time.time()
    files.recover(path)
    if not (path / MANIFEST).is_file():
        contents = external_formats.read(path)
        if contents is None:
            raise _no_dataset(path)
        made = make_dataset(name=path.resolve().name, **contents)
        return dataclasses.replace(made, path=path)
    manifest, tables = manifests.read(path)
    names = [*(f"{name}.npy" for name in manifest["arrays"])]
    names += [MANIFEST, *(f"{name}.parquet" for name in TABLES)]
    stamps = integrity.stamps(path, names)
    verified = checks != "all" and integrity.is_verified(path, stamps)
    arrays = {
        name: integrity.map_array(path / f"{name}.npy", entry, manifests.AGAIN)
        for name, entry in manifest["arrays"].items()
    }
    items, users = (
        IdTable.read(path / file, column, tables.get(file))
        for file, column in (
            ("items.parquet", "item"),
            ("users.parquet", "user"),
        )
    )

    def matrix(part: str) -> Interactions:
        indptr = np.array(arrays[f"{part}.indptr"])  # in memory
        return Interactions(indptr, arrays[f"{part}.indices"], len(items))

    def held_out(split: str) -> HeldOut:
        return HeldOut(matrix(f"{split}.fold_in"), matrix(f"{split}.held_out"))

    oracle = {
        name.removeprefix("oracle."): array
        for name, array in arrays.items()
        if name.startswith("oracle.")
    }
    try:
        dataset = Dataset(
            manifest["name"],
            manifest["protocol"],
            matrix("train"),
            held_out("validation"),
            held_out("test"),
            items,
            users,
            manifest,
            path,
            oracle or None,
        )
        if not verified:
            for part, interactions in dataset.matrices.items():
                try:
                    interactions.check()
                except VaecfError as error:
                    raise VaecfError(f"{part}: {error}") from None
        if checks != "structure" and not verified:
            _verify(dataset)
            integrity.remember(path, stamps, began)
    except VaecfError as error:
        raise VaecfError(
            f"the dataset in {path} is damaged: {error}; prepare it again"
        ) from None
    return dataset


def _verify(dataset: Dataset) -> None:
    """Compares all values and ids with the manifest's digests."""
    expected = dataset.manifest["arrays"]
    for name, array in dataset.arrays.items():
        if integrity.describe(array) != expected[name]:
            raise VaecfError(f"{name}.npy has another SHA-256 than listed")
    for name, table in zip(TABLES, (dataset.items, dataset.users)):
        if table.sha256() != dataset.manifest["ids"][name].get("sha256"):
            raise VaecfError(f"{name}.parquet has another SHA-256 than listed")


def find_dataset(data_dir: str | pathlib.Path) -> Dataset:
    """Opens the dataset of a data directory as the recipe's users know it.

    Tries `data_dir` itself, then ``ml-20m/preprocessed`` and ``ml-20m`` below
    it, in any layout that `open_dataset` reads. All digests are checked,
    unless they were and the files have not changed since then.

    Raises:
      VaecfError: there is no dataset (names the places), or a damaged one.
    """
    place = _find(data_dir)
    if place is None:
        also = " (nor in its ml-20m/preprocessed and ml-20m)"
        raise _no_dataset(files.user_path(data_dir), also)
    return _open(place, "all once")


def holds_dataset(data_dir: str | pathlib.Path) -> bool:
    """Returns whether `find_dataset` finds a dataset."""
    return _find(data_dir) is not None


def _find(data_dir: str | pathlib.Path) -> pathlib.Path | None:
    root = files.user_path(data_dir)
    for place in (root, root / "ml-20m" / "preprocessed", root / "ml-20m"):
        files.recover(place)
        if (place / MANIFEST).is_file() or external_formats.layout_of(place):
            return place
    return None


def _no_dataset(path: pathlib.Path, also: str = "") -> VaecfError:
    if (path / FOLDS).is_file():
        return VaecfError(
            f"{path} holds folds: name one of them, such as {path / 'fold1'}"
        )
    return VaecfError(
        f"no dataset in {path}{also}; make one with `vaecf prepare`, or name "
        "the directory of another"
    )
