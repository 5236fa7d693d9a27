"""Datasets that others' scripts have left behind, read as they are.

``pro_sg``: what the notebook of Liang et al. (2018) writes: five CSV files
of ``uid,sid`` index pairs and ``unique_sid.txt``.

``recipe``: what NVIDIA's preparation writes: five ``.npz`` files and two
JSON files of id maps. There ``*_true`` is folded in and ``*_test`` held out.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    from vaecf.data.dataset import Dataset, HeldOut

_PRO_SG = {
    "validation": ("validation_tr.csv", "validation_te.csv"),
    "test": ("test_tr.csv", "test_te.csv"),
}
_RECIPE = {
    "validation": ("vad_data_true.npz", "vad_data_test.npz"),
    "test": ("test_data_true.npz", "test_data_test.npz"),
}


def layout_of(path: pathlib.Path) -> str | None:
    """``"pro_sg"``, ``"recipe"`` or None, by the training file."""
    if (path / "train.csv").is_file() and (path / "unique_sid.txt").is_file():
        return "pro_sg"
    if (path / "train_data.npz").is_file():
        return "recipe"
    return None


def open_foreign(path: pathlib.Path) -> Dataset | None:
    """Reads such a directory into memory; None if it is neither kind.

    Raises:
      VaecfError: if a file of it is missing or damaged.
    """
    layout = layout_of(path)
    if layout == "pro_sg":
        return _open_pro_sg(path)
    if layout == "recipe":
        return _open_recipe(path)
    return None


def _dataset(
    path: pathlib.Path,
    protocol: str,
    layout: str,
    train: Interactions,
    splits: list[HeldOut],
    items: IdTable,
    users: IdTable | None,
) -> Dataset:
    from vaecf.data import dataset

    n_users = train.n_users + sum(s.fold_in.n_users for s in splits)
    known = users is not None and len(users) == n_users
    made = dataset.make_dataset(
        name=path.resolve().name,
        protocol=protocol,
        train=train,
        validation=splits[0],
        test=splits[1],
        items=items,
        # Without a complete map users go by their row numbers.
        users=users
        if known and users is not None
        else IdTable(np.arange(n_users, dtype=np.int64)),
        constants={"layout": layout, "user_ids_known": known},
    )
    import dataclasses

    return dataclasses.replace(made, path=path)


def _open_pro_sg(path: pathlib.Path) -> Dataset:
    """The notebook's own reading of its files: see load_tr_te_data there."""
    from vaecf.data.dataset import HeldOut

    items = _read_ids(path / "unique_sid.txt")
    uid, sid = _read_pairs(path / "train.csv", len(items))
    n_train = int(uid.max(initial=-1)) + 1
    train, _ = Interactions.from_pairs(uid, sid, n_train, len(items))
    splits = []
    for names in _PRO_SG.values():
        pairs = [_read_pairs(path / name, len(items)) for name in names]
        uids = np.concatenate([pairs[0][0], pairs[1][0]])
        first = int(uids.min()) if len(uids) else 0
        n_users = int(uids.max()) + 1 - first if len(uids) else 0
        splits.append(
            HeldOut(
                *(
                    Interactions.from_pairs(u - first, s, n_users, len(items))[
                        0
                    ]
                    for u, s in pairs
                )
            )
        )
    users = None
    if (path / "unique_uid.txt").is_file():
        users = _read_ids(path / "unique_uid.txt")
    return _dataset(path, "paper", "pro_sg", train, splits, items, users)


def _read_pairs(
    path: pathlib.Path, n_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns uid and sid of one CSV."""
    import polars as pl

    try:
        frame = pl.read_csv(
            path,
            columns=["uid", "sid"],
            schema_overrides={"uid": pl.Int64, "sid": pl.Int64},
        )
    except FileNotFoundError:
        raise VaecfError(
            f"{path} is missing; run the notebook's preparation again"
        ) from None
    except pl.exceptions.PolarsError as error:
        raise VaecfError(
            f"{path}: {str(error).splitlines()[0]} (expected columns uid,sid "
            "of integers)"
        ) from None
    uid, sid = frame["uid"], frame["sid"]
    if frame.null_count().sum_horizontal()[0]:
        raise VaecfError(f"{path}: a uid or sid is missing")
    if frame.height and not 0 <= sid.min() <= sid.max() < n_items:  # type: ignore[operator]
        raise VaecfError(
            f"{path}: a sid is outside the {n_items} lines of unique_sid.txt"
        )
    return uid.to_numpy(), sid.to_numpy()


def _read_ids(path: pathlib.Path) -> IdTable:
    """One id a line."""
    return as_ids(path.read_text(encoding="utf-8").splitlines())


def as_ids(texts: Iterable[str]) -> IdTable:
    """Ids from text: integers if every one is written as one."""
    names = list(texts)
    try:
        numbers = [int(name) for name in names]
        if [str(number) for number in numbers] == names:
            return IdTable(np.array(numbers, np.int64))
    except (ValueError, OverflowError):
        pass  # then they are strings, which is all that this asked
    ids = np.empty(len(names), object)
    ids[:] = names
    return IdTable(ids)


def _open_recipe(path: pathlib.Path) -> Dataset:
    from vaecf.data.dataset import HeldOut

    train = _read_npz(path / "train_data.npz")
    splits = []
    for names in _RECIPE.values():
        fold_in, held_out = (_read_npz(path / name) for name in names)
        for name, matrix in zip(names, (fold_in, held_out), strict=True):
            if matrix.n_items != train.n_items:
                raise VaecfError(
                    f"{path / name} has {matrix.n_items} items, "
                    f"train_data.npz has {train.n_items}"
                )
        splits.append(HeldOut(fold_in, held_out))
    items = _read_map(path / "show2id.json")
    if items is None or len(items) != train.n_items:
        items = IdTable(np.arange(train.n_items, dtype=np.int64))
    users = _read_map(path / "profile2id.json")
    return _dataset(path, "recipe", "recipe", train, splits, items, users)


def _read_npz(path: pathlib.Path) -> Interactions:
    import scipy.sparse

    try:
        return Interactions.from_scipy(scipy.sparse.load_npz(path))
    except FileNotFoundError:
        raise VaecfError(
            f"{path} is missing; prepare the dataset again"
        ) from None
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise VaecfError(
            f"{path} is truncated or no sparse matrix ({e}); prepare the "
            "dataset again"
        ) from None


def _read_map(path: pathlib.Path) -> IdTable | None:
    """Raw ids in the order of their indices, from ``{id: index}``."""
    if not path.is_file():
        return None
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(places, key=lambda name: places[name])
    except (ValueError, TypeError, AttributeError) as error:
        raise VaecfError(f"{path} is no map of ids ({error})") from None
    if sorted(places.values()) != list(range(len(names))):
        raise VaecfError(f"{path} does not number its ids 0, 1, 2 ...")
    return as_ids(names)
