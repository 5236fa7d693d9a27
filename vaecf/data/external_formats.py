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
from typing import Any, NamedTuple

import numpy as np

from vaecf.data import layouts
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.errors import VaecfError


class _Parts(NamedTuple):
    train: Interactions
    validation: HeldOut
    test: HeldOut
    items: IdTable
    users: IdTable | None  # without an id map


def layout_of(path: pathlib.Path) -> str | None:
    """Returns ``"pro_sg"``, ``"recipe"`` or None."""
    if (path / "train.csv").is_file() and (path / "unique_sid.txt").is_file():
        return "pro_sg"
    return "recipe" if (path / "train_data.npz").is_file() else None


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads a directory of either layout into arguments of `make_dataset`.

    Users without known ids are numbered. Returns None for other directories.

    Raises:
      VaecfError: a file is missing or damaged.
    """
    layout = layout_of(path)
    if layout is None:
        return None
    parts = _read_pro_sg(path) if layout == "pro_sg" else _read_recipe(path)
    splits = parts.train, parts.validation.fold_in, parts.test.fold_in
    n_users = sum(split.n_users for split in splits)
    known = parts.users is not None and len(parts.users) == n_users
    users = parts.users if known else IdTable(np.arange(n_users))
    return {
        **parts._replace(users=users)._asdict(),
        "protocol": "paper" if layout == "pro_sg" else "recipe",
        "constants": {"layout": layout, "user_ids_known": known},
    }


def _read_pro_sg(path: pathlib.Path) -> _Parts:
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
        first = int(uids.min()) if len(uids) else 0
        n_users = int(uids.max(initial=first - 1)) + 1 - first
        matrices = (
            Interactions.from_pairs(uid - first, sid, n_users, n_items)[0]
            for uid, sid in pairs
        )
        return HeldOut(*matrices)

    users = path / "unique_uid.txt"
    user_ids = _read_lines(users) if users.is_file() else None
    return _Parts(
        train, held_out("validation"), held_out("test"), items, user_ids
    )


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


def _read_recipe(path: pathlib.Path) -> _Parts:
    train = _read_npz(path / "train_data.npz")

    def held_out(split: str) -> HeldOut:
        names = (f"{split}_data_true.npz", f"{split}_data_test.npz")
        return HeldOut(*(_read_npz(path / name) for name in names))

    items = _read_id_map(path / "show2id.json")
    if items is None or len(items) != train.n_items:
        items = IdTable(np.arange(train.n_items))
    users = _read_id_map(path / "profile2id.json")
    return _Parts(train, held_out("vad"), held_out("test"), items, users)


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
