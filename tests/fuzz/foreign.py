"""Damages the files of other projects' datasets, and of manifests and arrays.

All that comes out of the readers is a sound dataset or a `VaecfError`. Such
files have no digests: another number in them is another dataset.
"""

from __future__ import annotations

import functools
import io
import json
import pathlib
import random
import zipfile
from typing import Any

import damage
import numpy as np
import scipy.sparse

from vaecf.data import dataset as datasets
from vaecf.data.id_table import IdTable

_NPZ = (
    *("train_data", "vad_data_true", "vad_data_test"),
    *("test_data_true", "test_data_test"),
)


def _sound(folder: pathlib.Path) -> str:
    """Opens a dataset and checks that one can compute with it."""
    opened = datasets.open_dataset(folder)
    for matrix in opened.matrices.values():
        matrix.check()
        matrix.to_scipy().check_format()
        assert matrix.n_items == opened.n_items
    assert len(opened.users) == sum(opened.split_sizes)
    opened.items.index_of(opened.items.ids[:3])  # unique
    return "opened"


@functools.cache
def _recipe() -> pathlib.Path:
    made, folder = damage.original_dataset(), damage.scratch() / "recipe"
    folder.mkdir()
    for name, matrix in zip(_NPZ, made.matrices.values(), strict=True):
        csr = matrix.to_scipy()
        scipy.sparse.save_npz(folder / f"{name}.npz", csr, compressed=False)
    for name, table in (("show2id", made.items), ("profile2id", made.users)):
        ids = {str(raw): i for i, raw in enumerate(table.ids.tolist())}
        (folder / f"{name}.json").write_text(json.dumps(ids))
    return folder


@functools.cache
def _pro_sg() -> pathlib.Path:
    made, folder = damage.original_dataset(), damage.scratch() / "pro_sg"
    folder.mkdir()
    names = ("train", "validation_tr", "validation_te", "test_tr", "test_te")
    first = dict(zip(names, (0, 60, 60, 76, 76)))
    for name, matrix in zip(names, made.matrices.values(), strict=True):
        rows, columns = matrix.to_scipy().nonzero()
        pairs = (f"{u + first[name]},{i}" for u, i in zip(rows, columns))
        (folder / f"{name}.csv").write_text("\n".join(["uid,sid", *pairs]))
    lines = "".join(f"{raw}\n" for raw in made.items.ids.tolist())
    (folder / "unique_sid.txt").write_text(lines)
    return folder


def recipe(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages a file of the recipe's preparation script."""
    copy, _ = damage.damaged_copy(_recipe(), rng, folder)
    return _sound(copy)


def pro_sg(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages a file of the paper's notebook."""
    copy, _ = damage.damaged_copy(_pro_sg(), rng, folder)
    return _sound(copy)


# --- Whole files with wrong contents ----------------------------------------


def _wrong(rng: random.Random, value: Any) -> Any:
    """Returns a JSON value with something exchanged, at any depth."""
    others = [None, -1, 1e308, 2**70, "", "x", [], {}, True, [[1]], {"a": 1}]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _wrong(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _wrong(rng, value[at]), *value[at + 1 :]]
    return rng.choice(others)


def manifest(rng: random.Random, folder: pathlib.Path) -> str:
    """Exchanges values of a manifest, which has no digest then."""
    copy, _ = damage.damaged_copy(
        damage.original_dataset().path, rng, folder, "nothing"
    )
    file = copy / "manifest.json"
    value = json.loads(file.read_text())
    del value["sha256"]
    for _ in range(rng.randrange(1, 4)):
        value = _wrong(rng, value)
    file.write_text(json.dumps(value))
    return _sound(copy)


def _npy(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Returns an array with other values, another dtype or shape."""
    kind = rng.randrange(5)
    with np.errstate(all="ignore"):
        if kind == 0 and array.size:
            array = array.copy()
            bad = rng.choice([-1, -(2**31), 2**31 - 1, 33, 0])
            array.flat[rng.randrange(array.size)] = np.array(bad).astype(
                array.dtype
            )
        elif kind == 1:
            dtypes = ("<f4", "<i8", "<i2", ">i4", "<u8", "<U3", "?", "<c8")
            array = array.astype(rng.choice(dtypes))
        elif kind == 2:
            array = array[: rng.randrange(array.size + 1)]
        elif kind == 3:
            array = array.reshape(rng.choice([(-1, 1), (1, -1)]))
        else:
            array = np.concatenate([np.ravel(array)] * 2)
    return array


def arrays(rng: random.Random, folder: pathlib.Path) -> str:
    """Replaces an array of an npz or npy file by another sound array."""
    if rng.random() < 0.3:
        original = damage.original_dataset().path
        copy, _ = damage.damaged_copy(original, rng, folder, "nothing")
        file = rng.choice(sorted(copy.glob("t*.npy")))
        np.save(file, _npy(rng, np.load(file)))
        return _sound(copy)
    copy, _ = damage.damaged_copy(_recipe(), rng, folder, "nothing")
    file = rng.choice(sorted(copy.glob("*.npz")))
    members = dict(np.load(file))
    name = rng.choice(sorted(members))
    if name == "format":
        kinds = [b"csc", b"coo", b"bsr", b"dia", b"x", "csr", 3, b"\xff"]
        members[name] = np.array(rng.choice(kinds))
    elif rng.random() < 0.1:
        del members[name]
    else:
        members[name] = _npy(rng, np.atleast_1d(members[name]))
    np.savez(file, **members)
    if rng.random() < 0.2:  # a member that is no array
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("more.npy", rng.randbytes(rng.randrange(200)))
    return _sound(copy)


def id_table(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages an id table that has no digest."""
    path, table = folder / "items.parquet", damage.original_dataset().items
    table.write(path, "item")
    generator = np.random.default_rng(rng.getrandbits(64))
    path.write_bytes(damage.damaged(path.read_bytes(), generator))
    read = IdTable.read(path, "item")
    assert read.ids.dtype in (np.int64, object) and read.ids.ndim == 1
    return "read"


def npy_bytes(rng: random.Random, folder: pathlib.Path) -> str:
    """Replaces an array by a file with a strange header."""
    original = damage.original_dataset().path
    copy, _ = damage.damaged_copy(original, rng, folder, "nothing")
    header = rng.choice(
        [
            "{'descr': '<i4', 'fortran_order': False, 'shape': (%d,), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }",
            "{'descr': '<i4', 'fortran_order': 1, 'shape': (%d, 2**70), }",
            "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (%d,)}",
            "{'descr': '<i4', 'shape': (-%d,)}",
            "(" * 300 + "%d",
            "{%d: 1}",
        ]
    ) % rng.choice([0, 1, 10**6, 2**62, 2**64])
    data = io.BytesIO()
    data.write(b"\x93NUMPY" + bytes([rng.choice([1, 2, 3, 9]), 0]))
    data.write(len(header).to_bytes(2, "little") + header.encode())
    data.write(rng.randbytes(rng.randrange(64)))
    if rng.random() < 0.9:
        rng.choice(sorted(copy.glob("*.npy"))).write_bytes(data.getvalue())
    return _sound(copy)
