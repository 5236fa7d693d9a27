"""Reads datasets that other projects' scripts have written.

``pro_sg``: the notebook of Liang et al. (2018): five CSV files of ``uid,sid``
index pairs and ``unique_sid.txt``.

``recipe``: NVIDIA's preparation script: five ``.npz`` files and two JSON files
with id maps. There ``*_true`` is folded in and ``*_test`` is held out.
"""

from __future__ import annotations

import operator
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vaecf import files
from vaecf.data import layouts
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions, nonzero
from vaecf.errors import VaecfError

_USERS_PER_ROW = 10  # at most, in files of the notebook


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
    train = _matrix(path / "train.csv", uid, sid, n_items)

    def held_out(split: str) -> HeldOut:
        files = [path / f"{split}_{part}.csv" for part in ("tr", "te")]
        pairs = [_read_pairs(file, n_items) for file in files]
        uids = np.concatenate([uid for uid, _ in pairs])
        first = int(uids.min()) if len(uids) else 0
        n_users = int(uids.max(initial=first - 1)) + 1 - first
        matrices = (
            _matrix(file, uid - first, sid, n_items, n_users)
            for file, (uid, sid) in zip(files, pairs)
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
            glob=False,
        )
    if frame.null_count().sum_horizontal()[0]:
        raise VaecfError(f"{path}: a uid or sid is missing")
    uid, sid = frame["uid"].to_numpy(), frame["sid"].to_numpy()
    if len(sid) and not 0 <= sid.min() <= sid.max() < n_items:
        raise VaecfError(
            f"{path}: a sid is outside the {n_items} lines of unique_sid.txt"
        )
    if len(uid) and not 0 <= uid.min() <= uid.max() < 2**31:
        raise VaecfError(f"{path}: a uid is outside [0, 2^31)")
    return uid, sid


def _matrix(
    path: pathlib.Path,
    uid: np.ndarray,
    sid: np.ndarray,
    n_items: int,
    n_users: int | None = None,
) -> Interactions:
    """Returns the pairs as a matrix of the users up to the highest uid."""
    n_users = int(uid.max(initial=-1)) + 1 if n_users is None else n_users
    # The notebook numbers users with interactions, so few rows are empty. A
    # damaged uid must not allocate the memory of two billion users.
    if n_users > _USERS_PER_ROW * (len(uid) + 1000):
        raise VaecfError(
            f"{path}: uids up to {uid.max(initial=0)} in {len(uid)} rows; the "
            "notebook numbers users from 0 without gaps"
        )
    return Interactions.from_pairs(uid, sid, n_users, n_items)[0]


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
    """Reads what `scipy.sparse.save_npz` wrote of a CSR, CSC or COO matrix.

    SciPy's own reader ends the process if indices are out of range.
    """
    layouts.require(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return _from_arrays(arrays)
    except Exception as error:  # zip, NumPy and zlib have no common class
        # The text of a zip error can hold the rest of the file.
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise VaecfError(
            f"{path} is truncated or no sparse matrix ({reason}); prepare the "
            "dataset again"
        ) from None


def _from_arrays(arrays: dict[str, np.ndarray]) -> Interactions:
    """Returns the matrix of an archive; raises any exception if damaged."""
    kind = arrays["format"].item()
    kind = kind.decode("ascii") if isinstance(kind, bytes) else kind
    names = {"csr": "indptr indices", "csc": "indptr indices", "coo": "row col"}
    if kind not in names:
        raise ValueError(f"its format is {kind!r}, not csr, csc or coo")
    n_rows, n_columns = map(operator.index, arrays["shape"].tolist())
    places = (arrays[name] for name in names[kind].split())
    row, column = nonzero(kind, (n_rows, n_columns), arrays["data"], *places)
    return Interactions.from_pairs(row, column, n_rows, n_columns)[0]


def _read_id_map(path: pathlib.Path) -> IdTable | None:
    """Reads ``{id: index}``; returns the ids in the order of their indices."""
    if not path.is_file():
        return None
    places = files.read_json(path)
    numbers: list[Any] = (
        [*places.values()] if isinstance(places, dict) else [None]
    )
    if not all(type(number) is int for number in numbers):
        raise VaecfError(f"{path} is no map of ids to numbers")
    if sorted(numbers) != list(range(len(numbers))):
        raise VaecfError(f"{path} does not number its ids 0, 1, 2 ...")
    return _as_ids(sorted(places, key=places.__getitem__))


def _read_lines(path: pathlib.Path) -> IdTable:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VaecfError(f"{path} cannot be read: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    if len(set(lines)) < len(lines):
        first = {line: number for number, line in reversed([*enumerate(lines)])}
        twice = next(n for n, line in enumerate(lines) if first[line] < n)
        raise VaecfError(
            f"{path}, line {twice + 1}: the id {lines[twice][:100]!r} is there "
            "twice"
        )
    return _as_ids(lines)


def _as_ids(texts: list[str]) -> IdTable:
    """Returns integer ids if all texts are integers in their usual form."""
    try:
        numbers = np.array([int(text) for text in texts], np.int64)
    except (ValueError, OverflowError):
        return IdTable(np.array(texts, object))
    if list(map(str, numbers.tolist())) == texts:
        return IdTable(numbers)
    return IdTable(np.array(texts, object))
