"""On disk and back, damage found, nothing half-written."""

import hashlib
import json
import os

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.data import external_formats, integrity, outputs
from vaecf.data.dataset import (
    find_dataset,
    make_dataset,
    open_dataset,
    write_dataset,
)
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.errors import VaecfError


def matrix(rng, n_users, n_items, density=0.4):
    return Interactions.from_scipy(
        scipy.sparse.csr_matrix(rng.random((n_users, n_items)) < density)
    )


def example(seed=0, sizes=(5, 2, 3), n_items=7, items=None, users=None, **more):
    rng = np.random.default_rng(seed)
    train, validation, test = sizes

    def held_out(n):
        return HeldOut(matrix(rng, n, n_items), matrix(rng, n, n_items, 0.1))

    return make_dataset(
        name="example",
        protocol="vaecf",
        train=matrix(rng, train, n_items),
        validation=held_out(validation),
        test=held_out(test),
        items=IdTable(np.arange(n_items) if items is None else items),
        users=IdTable(np.arange(sum(sizes)) if users is None else users),
        constants={"seed": np.int64(3), "min_rating": None},
        counts={"dropped_users": np.int64(1)},
        source={"file": "x.csv", "sha256": "00", "bytes": 1},
        **more,
    )


def assert_equal(a, b):
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name])
    for x, y in ((a.items, b.items), (a.users, b.users)):
        assert (x.type, x.ids.tolist()) == (y.type, y.ids.tolist())
    assert a.manifest == b.manifest
    assert a.manifest_hash == b.manifest_hash


WIDE = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from([(WIDE, TEXT), (TEXT, WIDE), (WIDE, WIDE), (TEXT, TEXT)]),
    st.data(),
)
def test_round_trip(tmp_path_factory, seed, sizes, kinds, data):
    n_users = sum(sizes)
    items = data.draw(st.lists(kinds[0], max_size=6, unique=True))
    users = data.draw(
        st.lists(kinds[1], min_size=n_users, max_size=n_users, unique=True)
    )
    made = example(seed, sizes, len(items), items, users)
    path = tmp_path_factory.mktemp("d") / "a"
    written = write_dataset(path, made)
    assert written.path == path and made.path is None
    assert not written.train.nnz or isinstance(written.train.indices, np.memmap)
    assert_equal(made, written)
    assert_equal(made, open_dataset(path, verify=True))
    if items:
        np.testing.assert_array_equal(
            written.items.index_of(items), range(len(items))
        )


def test_files_are_as_described(tmp_path):
    """Read without our own code, as somebody else would."""
    made = example(users=[f"u{i}" for i in range(10)])
    write_dataset(tmp_path / "a", made)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    arrays = {f"{name}.npy" for name in manifest["arrays"]}
    tables = {"items.parquet", "users.parquet"}
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == arrays | tables | {"manifest.json"} and len(arrays) == 10
    for name in arrays:
        file = tmp_path / "a" / name
        array = np.load(file, allow_pickle=False)
        assert manifest["arrays"][name.removesuffix(".npy")] == {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
        }
        assert array.dtype == (np.int64 if "indptr" in name else np.int32)
    np.testing.assert_array_equal(
        np.load(tmp_path / "a" / "test.fold_in.indices.npy"),
        made.test.fold_in.indices,
    )
    users = pl.read_parquet(tmp_path / "a" / "users.parquet")
    assert users.columns == ["user", "index", "split"]
    assert users["user"].to_list() == [f"u{i}" for i in range(10)]
    assert users["split"].to_list() == (
        ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    )
    items = pl.read_parquet(tmp_path / "a" / "items.parquet")
    assert items.columns == ["item", "index"]
    assert manifest["schema_version"] == 1
    assert manifest["protocol_constants"] == {"seed": 3, "min_rating": None}
    counts = manifest["counts"]
    assert (counts["train_users"], counts["dropped_users"]) == (5, 1)
    assert counts["interactions"] == sum(m.nnz for m in made.matrices.values())
    digest, tables = manifest.pop("sha256"), manifest.pop("tables")
    for name in ("items.parquet", "users.parquet"):
        content = (tmp_path / "a" / name).read_bytes()
        assert tables[name] == hashlib.sha256(content).hexdigest()
    whole = {**manifest, "tables": tables}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert made.manifest_hash == (
        hashlib.sha256(canonical.encode()).hexdigest()
    )


def test_the_hash_knows_every_part():
    hashes = [
        made.manifest_hash
        for made in (
            example(),
            example(seed=1),
            example(items=[*range(6), 9]),
            example(items=list("0123456")),
            example(users=[*range(9), 99]),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == example().manifest_hash


@pytest.mark.parametrize("cut", [1, 4, 10_000])
def test_arrays_of_another_length_are_refused(tmp_path, cut):
    write_dataset(tmp_path / "a", example(n_items=50))
    for file in sorted((tmp_path / "a").glob("*.npy")):
        whole = file.read_bytes()
        file.write_bytes(whole[: max(len(whole) - cut, 0)])
        with refuses(file.name) as error:
            open_dataset(tmp_path / "a")
        assert "prepare the dataset again" in str(error.value)
        file.write_bytes(whole + bytes(cut))
        with refuses(f"{file.name} has bytes after"):
            open_dataset(tmp_path / "a")
        file.unlink()
        with refuses(f"{file.name} is missing"):
            open_dataset(tmp_path / "a")
        file.write_bytes(whole)
    open_dataset(tmp_path / "a", verify=True)


def test_changed_values_are_found_by_verify(tmp_path):
    write_dataset(tmp_path / "a", example())
    file = tmp_path / "a" / "train.indices.npy"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    open_dataset(tmp_path / "a")
    with refuses(r"train\.indices\.npy has another SHA"):
        open_dataset(tmp_path / "a", verify=True)


NEWER = json.dumps({**example().manifest, "schema_version": 2}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "not JSON"),
        ("manifest.json", b"[]", "not the manifest"),
        ("manifest.json", b'{"schema_version": 1}', "does not list 'name'"),
        ("manifest.json", NEWER, "schema version 2"),
        ("items.parquet", b"PAR1", r"items\.parquet"),
        ("users.parquet", None, r"users\.parquet"),
        ("train.indptr.npy", b"", r"train\.indptr\.npy is truncated"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    write_dataset(tmp_path / "a", example())
    if content is None:
        (tmp_path / "a" / name).unlink()
    else:
        (tmp_path / "a" / name).write_bytes(content)
    with refuses(message):
        open_dataset(tmp_path / "a")


def tree(folder):
    return sorted(
        (str(p.relative_to(folder)), p.read_bytes() if p.is_file() else None)
        for p in folder.rglob("*")
    )


@pytest.mark.parametrize(("overwrite", "fail_at"), [(False, 9), (True, 0)])
@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(28, "No space left on device"), VaecfError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failing_write_leaves_nothing(
    tmp_path, monkeypatch, fail_at, overwrite, raised, seen
):
    target = tmp_path / "deep" / "a"
    if overwrite:
        write_dataset(target, example())
    else:
        target.parent.mkdir()
    before = tree(tmp_path)
    saved = []

    def save(path, array, original=np.save):
        saved.append(path)
        if len(saved) > fail_at:
            raise raised
        original(path, array)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(seen, match=r"cannot write .*No space left|^$"):
        write_dataset(target, example(seed=1), overwrite=overwrite)
    assert tree(tmp_path) == before


def test_existing_directories(tmp_path):
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", example())
    with refuses("overwrite=True"):
        write_dataset(tmp_path / "empty", example(seed=1))
    opened = open_dataset(tmp_path / "empty")
    other = write_dataset(tmp_path / "empty", example(seed=1), overwrite=True)
    assert_equal(other, example(seed=1))
    # A process that has the old dataset open keeps its arrays.
    assert opened.train.indices.tolist() == example().train.indices.tolist()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with refuses("is no vaecf dataset"):
            write_dataset(tmp_path / "mine", example(), overwrite=overwrite)
    with refuses("is a file"):
        write_dataset(tmp_path / "mine" / "thesis.tex", example())
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "mine"}


def test_parts_must_fit():
    good = example()
    names = [
        "name",
        "protocol",
        "train",
        "validation",
        "test",
        "items",
        "users",
    ]
    fields = {name: getattr(good, name) for name in names}
    for name, value, message in (
        ("items", IdTable([1, 2]), "item table has 2"),
        ("users", IdTable([1, 2]), "user table has 2"),
        ("test", HeldOut(good.test[0], good.train), "3 fold-in users and 5"),
    ):
        with refuses(message):
            make_dataset(**{**fields, name: value})
    with refuses("'validation' or 'test'"):
        good.split("train")


def test_id_lookup_across_types():
    ints = IdTable([10, -3, 2**40])
    assert ints.index_of([2**40, 5, -3]).tolist() == [2, -1, 1]
    assert ints.index_of(["10", "010", "x", "-3"]).tolist() == [0, -1, -1, 1]
    assert ints.index_of([10, "10", None, 10.0]).tolist()[:3] == [0, 0, -1]
    assert ints.index_of(np.array([10.0, np.nan, 10.5])).tolist() == [0, -1, -1]
    assert ints.index_of(np.array([10, 2**63], np.uint64)).tolist() == [0, -1]
    nullable = pd.Series([10, None], dtype="Int64")
    assert ints.index_of(nullable).tolist() == [0, -1]
    texts = IdTable(["10", "x", "é"])
    assert texts.index_of([10, "x", "é", "é "]).tolist() == [0, 1, 2, -1]
    assert texts.index_of(pd.Series(["x", None])).tolist() == [1, -1]
    assert texts.index_of([]).tolist() == []
    assert texts.index_of(np.array([10, 11], np.int32)).tolist() == [0, -1]
    assert texts.index_of(["x"]).dtype == np.int32
    with refuses("wrap a single id"):
        texts.index_of("x")
    with refuses("twice"):
        IdTable(["a", "a"]).index_of(["a"])
    with refuses("all integers or all strings"):
        IdTable([1.5])


def test_find_dataset(tmp_path):
    with refuses("ml-20m/preprocessed"):
        find_dataset(tmp_path)
    write_dataset(tmp_path / "ml-20m" / "preprocessed", example())
    assert_equal(find_dataset(tmp_path), example())
    write_dataset(tmp_path / "direct", example(seed=2))
    assert_equal(find_dataset(tmp_path / "direct"), example(seed=2))
    with refuses(r"no dataset in .*vaecf prepare"):
        open_dataset(tmp_path / "nowhere")


RECIPE_FILES = (
    "train_data", "vad_data_true", "vad_data_test", "test_data_true",
    "test_data_test",
)  # fmt: skip


def test_the_recipes_directory(tmp_path):
    made = example(items=[5, 3, 9, 1, 0, 7, 8])
    folder = tmp_path / "ml-20m" / "preprocessed"
    folder.mkdir(parents=True)
    expected = [part.to_scipy() for part in made.matrices.values()]
    for name, part in zip(RECIPE_FILES, expected, strict=True):
        scipy.sparse.save_npz(folder / f"{name}.npz", part.astype("float64"))
    for name, table in (("show2id", made.items), ("profile2id", made.users)):
        ids = {str(raw): i for i, raw in enumerate(table.ids.tolist())}
        (folder / f"{name}.json").write_text(json.dumps(ids))
    for opened in (open_dataset(folder), find_dataset(tmp_path)):
        for x, y in zip(opened.matrices.values(), expected, strict=True):
            assert (x.to_scipy() != y).nnz == 0
        assert opened.items.ids.tolist() == [5, 3, 9, 1, 0, 7, 8]
        assert opened.users.ids.tolist() == list(range(10))
        assert opened.protocol == "recipe"
        assert opened.path == folder
    (folder / "show2id.json").unlink()
    assert open_dataset(folder).items.ids.tolist() == list(range(7))
    cut = (folder / "vad_data_true.npz").read_bytes()[:-60]
    (folder / "vad_data_true.npz").write_bytes(cut)
    with refuses(r"vad_data_true\.npz"):
        open_dataset(folder)


def test_the_papers_directory(tmp_path):
    """Rows counted as the notebook's load_tr_te_data counts them."""
    files = {
        "unique_sid.txt": "11\n7\n30\n",
        "train.csv": "uid,sid\n0,0\n1,2\n0,1\n",
        # Users 2 and 5 are missing: the rows run from 3 to 4.
        "validation_tr.csv": "uid,sid\n4,0\n3,1\n",
        "validation_te.csv": "uid,sid\n3,2\n",
        "test_tr.csv": "uid,sid\n6,0\n8,2\n",
        "test_te.csv": "uid,sid\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    opened = open_dataset(tmp_path)
    expected = (
        [[1, 1, 0], [0, 0, 1]],
        [[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]],
        [[1, 0, 0], [0, 0, 0], [0, 0, 1]], np.zeros((3, 3)),
    )  # fmt: skip
    for part, want in zip(opened.matrices.values(), expected, strict=True):
        np.testing.assert_array_equal(part.to_scipy().toarray(), want)
    assert opened.items.ids.tolist() == [11, 7, 30]
    assert opened.protocol == "paper"
    (tmp_path / "test_te.csv").write_text("uid,sid\n6,3\n")
    with refuses("outside the 3 lines"):
        open_dataset(tmp_path)
    (tmp_path / "test_te.csv").unlink()
    with refuses(r"no such file: .*test_te\.csv"):
        open_dataset(tmp_path)


# --- Damage; tests/fuzz/damage.py and foreign.py have the campaigns ----------


def flip(path, at=-4):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_dataset_is_checked_once(tmp_path, monkeypatch):
    """Until a file changes, even if its size and time stay."""
    folder = tmp_path / "a"
    write_dataset(folder, example(n_items=200))
    described = []
    describe = integrity.describe
    monkeypatch.setattr(
        integrity, "describe", lambda a: described.append(1) or describe(a)
    )
    monkeypatch.setattr(integrity, "_CLOCK_SECONDS", 1e6)
    find_dataset(folder)
    find_dataset(folder)
    assert len(described) == 20  # a file that has just changed is not trusted
    monkeypatch.setattr(integrity, "_CLOCK_SECONDS", -1e6)
    find_dataset(folder)
    described.clear()
    opened = find_dataset(folder)
    assert not described
    assert_equal(opened, example(n_items=200))
    file = folder / "train.indices.npy"
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with refuses(r"train"):
        find_dataset(folder)
    flip(file)
    (folder / ".verified.json").write_text("{")
    find_dataset(folder)
    with refuses(r"train\.indices\.npy has another SHA|train: "):
        flip(file)
        open_dataset(folder, verify=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.indptr", lambda a: a[::-1], "starts and ends|decreases"),
        ("train.indptr", lambda a: a[[0, 2, 1, 3, 4, 5]], "decreases"),
        ("train.indices", lambda a: a[::-1], "not ascending"),
        ("test.fold_in.indices", lambda a: a + 1, "outside .0, 7."),
        ("validation.held_out.indices", lambda a: a - 9, "has item index -"),
    ],
)
def test_the_structure_is_always_checked(tmp_path, name, change, message):
    write_dataset(tmp_path / "a", example(seed=4))
    file = tmp_path / "a" / f"{name}.npy"
    np.save(file, change(np.load(file)))
    with refuses(message):
        open_dataset(tmp_path / "a")


def test_two_preparations_of_one_output(tmp_path):
    """Only one says that it has written, whoever may replace a dataset."""
    path = tmp_path / "a"
    states = [outputs.check(path, overwrite=True) for _ in range(2)]
    write_dataset(path, example(), overwrite=True, expected=states[0])
    with refuses("another process has written"):
        write_dataset(path, example(1), overwrite=True, expected=states[1])
    with refuses("overwrite=True"):
        write_dataset(path, example(1), expected=states[1])
    assert_equal(open_dataset(path), example())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
def test_npz_of_another_project(tmp_path, kind):
    """Read as SciPy reads it; refused where SciPy would end the process."""
    rows, columns = [0, 2, 2, 1, 0], [1, 0, 0, 2, 3]
    values = [3.0, 1.0, 1.0, 0.5, 0.0]
    csr = scipy.sparse.coo_array((values, (rows, columns)), shape=(3, 4))
    whole = csr.asformat(kind)
    path = tmp_path / "m.npz"
    scipy.sparse.save_npz(path, whole)
    read = external_formats._read_npz(path)
    expected = np.zeros((3, 4))
    expected[[0, 1, 2], [1, 2, 0]] = 1
    np.testing.assert_array_equal(read.to_scipy().toarray(), expected)
    members = dict(np.load(path))
    indices = "row" if kind == "coo" else "indices"
    bad = members[indices].copy()
    bad[0] = 2**30
    for change in (
        {indices: bad},
        {indices: members[indices].astype(float)},
        {"data": members["data"][:-1]},
        {"data": members["data"] * np.nan},
        {"shape": np.array([3, 2])},
        {"format": np.array(b"bsr")},
    ):
        np.savez(path, **{**members, **change})
        with refuses(r"m\.npz is truncated or no sparse matrix"):
            external_formats._read_npz(path)


def test_ids_twice_in_the_papers_files(tmp_path):
    for name in ("train", *(f"{a}_{b}" for a in ("validation", "test")
                            for b in ("tr", "te"))):  # fmt: skip
        (tmp_path / f"{name}.csv").write_text("uid,sid\n0,0\n")
    (tmp_path / "unique_sid.txt").write_text("7\n9\n7\n")
    with refuses(r"unique_sid\.txt, line 3: the id '7'"):
        open_dataset(tmp_path)
    (tmp_path / "unique_sid.txt").write_text("7\n9\n")
    (tmp_path / "train.csv").write_text("uid,sid\n2000000000,0\n")
    with refuses(r"train\.csv: uids up to 2000000000"):
        open_dataset(tmp_path)
