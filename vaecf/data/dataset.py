"""The dataset: split interactions, id tables and a manifest, on disk.

A dataset is a directory::

  manifest.json                    what it is, counts, digests
  items.parquet                    item, index
  users.parquet                    user, index, split
  train.indptr.npy                 int64 [train users + 1]
  train.indices.npy                int32 [interactions]
  validation.fold_in.indptr.npy    and so on for validation.held_out,
  ...                              test.fold_in and test.held_out

The arrays are memory-mapped. A directory appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.data import id_files, manifests, storage
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError

__all__ = [
    "Dataset",
    "HeldOut",
    "IdTable",
    "check_output",
    "find_dataset",
    "make_dataset",
    "open_dataset",
    "write_dataset",
]

MANIFEST = "manifest.json"
_PARTS = (
    "train",
    "validation.fold_in",
    "validation.held_out",
    "test.fold_in",
    "test.held_out",
)


class HeldOut(NamedTuple):
    """Users that are never trained on, row for row in both matrices.

    Attributes:
      fold_in: what the model is shown of each user.
      held_out: what it must then predict. A user may have nothing here.
    """

    fold_in: Interactions
    held_out: Interactions


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions split under a protocol.

    Attributes:
      name: of the data, such as ``"ml-1m"``.
      protocol: how it was split; printed beside every metric.
      train: training users x items.
      validation: held-out users for choosing a model.
      test: held-out users for reporting.
      items: raw ids of the columns.
      users: raw ids of the rows: train, then validation, then test.
      manifest: see ``make_dataset``.
      path: its directory, or None while only in memory.
      oracle: arrays that the generator of synthetic data knows, by name; None
        for real data.
    """

    name: str
    protocol: str
    train: Interactions
    validation: HeldOut
    test: HeldOut
    items: IdTable
    users: IdTable
    manifest: dict[str, Any]
    path: pathlib.Path | None = None
    oracle: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        """Checks that the parts fit each other."""
        for part, matrix in _matrices(self):
            if matrix.n_items != len(self.items):
                raise VaecfError(
                    f"{part} has {matrix.n_items} items, the item table has "
                    f"{len(self.items)}"
                )
        for split in ("validation", "test"):
            fold_in, held_out = self.split(split)
            if fold_in.n_users != held_out.n_users:
                raise VaecfError(
                    f"{split} has {fold_in.n_users} fold-in users and "
                    f"{held_out.n_users} held-out users"
                )
        if sum(self.split_sizes) != len(self.users):
            raise VaecfError(
                f"the splits have {sum(self.split_sizes)} users, the user "
                f"table has {len(self.users)}"
            )

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

    @functools.cached_property
    def manifest_hash(self) -> str:
        """SHA-256 (hex) of the manifest as canonical JSON."""
        text = json.dumps(self.manifest, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def write_identity(self, directory: pathlib.Path) -> None:
        """Writes the manifest and the item ids, which scoring needs."""
        write_identity(directory, self.manifest, self.items)

    def split(self, name: str) -> HeldOut:
        """``"validation"`` or ``"test"``.

        Raises:
          VaecfError: for any other name.
        """
        if name not in ("validation", "test"):
            raise VaecfError(
                f"unknown split {name!r}: it is 'validation' or 'test'"
            )
        return self.validation if name == "validation" else self.test


def _matrices(dataset: Dataset) -> Iterator[tuple[str, Interactions]]:
    """The five matrices with their names on disk."""
    yield "train", dataset.train
    for split in ("validation", "test"):
        fold_in, held_out = dataset.split(split)
        yield f"{split}.fold_in", fold_in
        yield f"{split}.held_out", held_out


def _arrays(dataset: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays with their file names less ``.npy``."""
    for part, matrix in _matrices(dataset):
        yield f"{part}.indptr", matrix.indptr
        yield f"{part}.indices", matrix.indices
    for name, array in (dataset.oracle or {}).items():
        yield f"oracle.{name}", np.asarray(array)


def write_identity(
    directory: pathlib.Path, manifest: Mapping[str, Any], items: IdTable
) -> None:
    """Writes the manifest of a dataset and its item ids into a workdir."""
    id_files.write_ids(directory / workdir_lib.ITEMS, "item", items)
    workdir_lib.write_json(directory / workdir_lib.DATASET, dict(manifest))


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
    """A dataset in memory, with its manifest.

    Args:
      name: of the data.
      protocol: how it was split.
      train: training matrix.
      validation: see ``Dataset``.
      test: see ``Dataset``.
      items: raw ids in column order.
      users: raw ids in row order: train, validation, test.
      constants: the protocol's (seed, thresholds, proportions).
      counts: what happened on the way here (rows read, dropped ...); the
        sizes of the result are added.
      source: ``{"file", "sha256", "bytes"}``, or None if there is no file.
      oracle: arrays that a generator knows, stored as ``oracle.*.npy``.
      oracle_facts: figures that a generator knows, stored in the manifest.

    Returns:
      The dataset; ``path`` is None. Equal input gives an equal manifest: it
      holds no time and no path.
    """
    manifest = manifests.build(
        name=name,
        protocol=protocol,
        matrices={
            "train": train,
            "validation_fold_in": validation.fold_in,
            "validation_held_out": validation.held_out,
            "test_fold_in": test.fold_in,
            "test_held_out": test.held_out,
        },
        tables={"items": items, "users": users},
        constants=constants or {},
        counts=counts or {},
        source=source,
        oracle_facts=oracle_facts,
    )
    dataset = Dataset(
        name,
        protocol,
        train,
        validation,
        test,
        items,
        users,
        manifest,
        oracle=oracle,
    )
    manifest["arrays"] = {
        key: storage.describe_array(array) for key, array in _arrays(dataset)
    }
    return dataset


def check_output(directory: str | pathlib.Path, *, overwrite: bool) -> None:
    """Asks whether a dataset may be written there; changes nothing.

    Raises:
      VaecfError: if it is a file, or a directory that is not empty, unless
        that is a vaecf dataset and ``overwrite`` is given.
    """
    path = pathlib.Path(directory)
    if path.exists() and not path.is_dir():
        raise VaecfError(f"{path} is a file; name a directory to write to")
    if not path.exists() or not any(path.iterdir()):
        return
    if (path / MANIFEST).is_file():
        if not overwrite:
            raise VaecfError(
                f"{path} holds a dataset already; pass --overwrite to "
                "replace it, or choose another --output"
            )
    else:
        # Never delete what we have not written, whatever the flag says.
        raise VaecfError(
            f"{path} exists, is not empty and is no vaecf dataset; choose "
            "another --output"
        )


def write_dataset(
    directory: str | pathlib.Path,
    dataset: Dataset,
    *,
    overwrite: bool = False,
) -> Dataset:
    """Writes a dataset: all of it, or nothing.

    Args:
      directory: new, empty, or (with ``overwrite``) a vaecf dataset.
      dataset: what to write.
      overwrite: replace an existing dataset.

    Returns:
      The dataset opened from ``directory``.

    Raises:
      VaecfError: if the directory is taken or cannot be written.
    """
    check_output(directory, overwrite=overwrite)
    target = pathlib.Path(directory)
    with workdir_lib.atomic_directory(target) as fresh:
        for name, array in _arrays(dataset):
            storage.save_array(fresh / f"{name}.npy", array)
        splits = np.repeat(["train", "validation", "test"], dataset.split_sizes)
        id_files.write_ids(fresh / "items.parquet", "item", dataset.items)
        id_files.write_ids(
            fresh / "users.parquet", "user", dataset.users, split=splits
        )
        with open(fresh / MANIFEST, "w", encoding="utf-8") as stream:
            json.dump(dataset.manifest, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            storage.sync(stream)
    return open_dataset(target)


def open_dataset(
    directory: str | pathlib.Path, *, verify: bool = False
) -> Dataset:
    """Opens a dataset; the indices stay on disk, memory-mapped.

    Besides our own layout it reads the directories that the paper's notebook
    (``pro_sg``) and the recipe's preparation script leave behind.

    Args:
      directory: where the dataset is.
      verify: read everything and compare with the manifest's digests. Sizes,
        dtypes and shapes are compared in any case.

    Raises:
      VaecfError: if there is no dataset, or it is damaged: the message names
        the file.
    """
    from vaecf.data import external_formats

    path = pathlib.Path(directory)
    if not (path / MANIFEST).is_file():
        opened = external_formats.open_foreign(path)
        if opened is not None:
            return opened
        raise VaecfError(
            f"no dataset in {path}; make one with: python "
            f"experiments/prepare_dataset.py --output={path} ..."
        )
    manifest = manifests.read(path / MANIFEST)
    arrays = {
        name: storage.load_array(
            path / f"{name}.npy", entry, mmap=not name.endswith(".indptr")
        )
        for name, entry in manifest["arrays"].items()
    }
    items = manifests.read_ids(path, "item", manifest)
    users = manifests.read_ids(path, "user", manifest)
    if verify:
        manifests.verify(path, manifest, {"items": items, "users": users})
    try:
        train, *rest = (
            Interactions(
                arrays[f"{part}.indptr"], arrays[f"{part}.indices"], len(items)
            )
            for part in _PARTS
        )
        oracle = {
            name.removeprefix("oracle."): array
            for name, array in arrays.items()
            if name.startswith("oracle.")
        }
        dataset = Dataset(
            manifest["name"],
            manifest["protocol"],
            train,
            HeldOut(rest[0], rest[1]),
            HeldOut(rest[2], rest[3]),
            items,
            users,
            manifest,
            path,
            oracle or None,
        )
        if verify:
            for _, matrix in _matrices(dataset):
                matrix.check()
    except KeyError as error:
        raise VaecfError(
            f"{path / MANIFEST} does not list {error}; prepare the dataset "
            "again"
        ) from None
    except VaecfError as error:
        raise VaecfError(
            f"the dataset in {path} is damaged: {error}; prepare it again"
        ) from None
    return dataset


def find_dataset(data_dir: str | pathlib.Path) -> Dataset:
    """The dataset of a ``--data_dir`` as the recipe's users know it.

    Looks at ``data_dir`` itself, then at ``ml-20m/preprocessed`` and
    ``ml-20m`` below it, in any layout that ``open_dataset`` reads.

    Raises:
      VaecfError: if there is none; the message names the places.
    """
    from vaecf.data import external_formats

    root = pathlib.Path(data_dir)
    places = (root, root / "ml-20m" / "preprocessed", root / "ml-20m")
    for place in places:
        if (place / MANIFEST).is_file() or external_formats.layout_of(place):
            return open_dataset(place)
    raise VaecfError(
        f"no dataset in {root} (nor in its ml-20m/preprocessed and ml-20m); "
        f"make one with: python experiments/prepare_dataset.py "
        f"--output={root} ... (or, as the recipe does, --data_dir={root})"
    )
