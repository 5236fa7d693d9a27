"""Reads datasets that other projects' scripts have written.

``pro_sg``: the notebook of Liang et al. (2018): five CSV files of ``uid,sid``
index pairs and ``unique_sid.txt``.

``recipe``: NVIDIA's preparation script: five ``.npz`` files and two JSON files
with id maps. There ``*_true`` is folded in and ``*_test`` is held out.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from vaecf.data import layouts
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.errors import VaecfError


class Parts(NamedTuple):
    """Contents of such a directory; `users` is None without an id map."""

    layout: str
    protocol: str
    train: Interactions
    validation: HeldOut
    test: HeldOut
    items: IdTable
    users: IdTable | None


def layout_of(path: pathlib.Path) -> str | None:
    """Returns ``"pro_sg"``, ``"recipe"`` or None."""
    if (path / "train.csv").is_file() and (path / "unique_sid.txt").is_file():
        return "pro_sg"
    return "recipe" if (path / "train_data.npz").is_file() else None


def read(path: pathlib.Path) -> Parts | None:
    """Reads a directory of either layout into memory; None if it has neither.

    Raises:
      VaecfError: a file is missing or damaged.
    """
    readers = {"pro_sg": _read_pro_sg, "recipe": _read_recipe, None: None}
    reader = readers[layout_of(path)]
    return None if reader is None else reader(path)


def _read_pro_sg(path: pathlib.Path) -> Parts:
    """Reads as the notebook's load_train_data and load_tr_te_data do."""
    items = _read_lines(path / "unique_sid.txt")
    n_items = len(items)
    uid, sid = _read_pairs(path / "train.csv", n_items)
    n_train = int(uid.max(initial=-1)) + 1
    train, _ = Interactions.from_pairs(uid, sid, n_train, n_items)

    def held_out(split: str) -> HeldOut:
        pairs = [
            _read_pairs(path / f"{split}_{part}.csv", n_items)
            for part in ("tr", "te")
        ]
        uids = np.concatenate([uid for uid, _ in pairs])
        first, n_users = 0, 0
        if len(uids):
            first = int(uids.min())
            n_users = int(uids.max()) + 1 - first
        fold_in, held = (
            Interactions.from_pairs(uid - first, sid, n_users, n_items)[0]
            for uid, sid in pairs
        )
        return HeldOut(fold_in, held)

    users = path / "unique_uid.txt"
    user_ids = _read_lines(users) if users.is_file() else None
    splits = held_out("validation"), held_out("test")
    return Parts("pro_sg", "paper", train, *splits, items, user_ids)


def _read_pairs(
    path: pathlib.Path, n_items: int
) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl

    with layouts.polars_errors(layouts.require(path)):
        frame = pl.read_csv(
            path,
            columns=["uid", "sid"],
            schema_overrides={"uid": pl.Int64, "sid": pl.Int64},
        )
    if frame.null_count().sum_horizontal()[0]:
        raise VaecfError(f"{path}: a uid or sid is missing")
    uid, sid = frame["uid"].to_numpy(), frame["sid"].to_numpy()
    if len(sid) and not 0 <= sid.min() <= sid.max() < n_items:
        raise VaecfError(
            f"{path}: a sid is outside the {n_items} lines of unique_sid.txt"
        )
    return uid, sid


def _read_recipe(path: pathlib.Path) -> Parts:
    train = _read_npz(path / "train_data.npz")

    def held_out(split: str) -> HeldOut:
        names = (f"{split}_data_true.npz", f"{split}_data_test.npz")
        fold_in, held = (_read_npz(path / name) for name in names)
        for name, matrix in zip(names, (fold_in, held), strict=True):
            if matrix.n_items != train.n_items:
                raise VaecfError(
                    f"{path / name} has {matrix.n_items} items, "
                    f"train_data.npz has {train.n_items}"
                )
        return HeldOut(fold_in, held)

    items = _read_id_map(path / "show2id.json")
    if items is None or len(items) != train.n_items:
        items = IdTable(np.arange(train.n_items))
    users = _read_id_map(path / "profile2id.json")
    splits = held_out("vad"), held_out("test")
    return Parts("recipe", "recipe", train, *splits, items, users)


def _read_npz(path: pathlib.Path) -> Interactions:
    import scipy.sparse

    layouts.require(path)
    try:
        return Interactions.from_scipy(scipy.sparse.load_npz(path))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise VaecfError(
            f"{path} is truncated or no sparse matrix ({e}); prepare the "
            "dataset again"
        ) from None


def _read_id_map(path: pathlib.Path) -> IdTable | None:
    """Reads ``{id: index}``; returns the ids in the order of their indices."""
    if not path.is_file():
        return None
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(places, key=lambda name: places[name])
    except (ValueError, TypeError, AttributeError) as error:
        raise VaecfError(f"{path} is no map of ids ({error})") from None
    if sorted(places.values()) != list(range(len(names))):
        raise VaecfError(f"{path} does not number its ids 0, 1, 2 ...")
    return _as_ids(names)


def _read_lines(path: pathlib.Path) -> IdTable:
    return _as_ids(path.read_text(encoding="utf-8").splitlines())


def _as_ids(texts: list[str]) -> IdTable:
    """Returns integer ids if all texts are integers in their usual form."""
    try:
        numbers = np.array([int(text) for text in texts], np.int64)
    except (ValueError, OverflowError):
        return IdTable(np.array(texts, object))
    if list(map(str, numbers.tolist())) == texts:
        return IdTable(numbers)
    return IdTable(np.array(texts, object))
