"""Scoring of files, compared with `Recommender.recommend`."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pandas as pd
import polars as pl
import pytest

from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.serving import batch_scoring
from vaecf.serving.batch_scoring import score_file
from vaecf.serving.recommender import Recommender


@pytest.fixture
def scattered(shop):
    """The shop's rows in random order, some of them twice."""
    frame = pd.concat([shop.frame, shop.frame[:40]])
    return frame.sample(frac=1, random_state=3).reset_index(drop=True)


def write(frame, path):
    frame = pl.DataFrame(frame.to_dict("list"))
    if ".parquet" in path.name:
        frame.write_parquet(path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        separator = {".tsv": "\t", ".txt": ";"}.get(path.suffix, ",")
        frame.write_csv(path, separator=separator)
    return path


def score(shop, path, **settings):
    output = path.parent / "out" / "lists.parquet"
    scored = score_file(shop.workdir, path, output, **settings)
    assert [p.name for p in output.parent.iterdir()] == ["lists.parquet"]
    return scored, pl.read_parquet(output)


def check(lists, expected):
    assert lists.columns == ["user", "rank", "item", "score"]
    for column in ("user", "rank", "item"):
        assert lists[column].to_list() == expected[column].tolist()
    np.testing.assert_allclose(
        lists["score"].to_numpy(), expected["score"], atol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["h.csv", "h.tsv", "h.txt", "h.csv.gz", "h.parquet"]
)
@pytest.mark.parametrize("users_per_partition", [7, 61, 65_536])
def test_the_lists_of_recommend(
    shop, scattered, tmp_path, monkeypatch, name, users_per_partition
):
    monkeypatch.setattr(
        batch_scoring, "_USERS_PER_PARTITION", users_per_partition
    )
    path = write(scattered, tmp_path / name)
    done = []
    scored, lists = score(
        shop, path, k=6, batch_size=5, progress=lambda *n: done.append(n)
    )
    expected = shop.recommender.recommend(scattered, k=6)
    assert len(expected) == 360
    check(lists, expected)
    assert scored == (61, 360, 0)
    assert lists.schema == {
        "user": pl.String,
        "rank": pl.Int32,
        "item": pl.String,
        "score": pl.Float32,
    }
    assert done[-1] == (61, 61)
    assert [n for n, _ in done] == sorted({n for n, _ in done})


def test_the_suffix_decides_the_format(shop, scattered, tmp_path):
    path = write(scattered, tmp_path / "h.csv")
    for name in ("out.csv", "out.parquet"):
        batch_scoring.score_file(shop.workdir, path, tmp_path / name, k=3)
    wanted = pl.read_parquet(tmp_path / "out.parquet")
    found = pl.read_csv(tmp_path / "out.csv", schema=wanted.schema)
    assert found.drop("score").equals(wanted.drop("score"))
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-5)


def test_one_partition_is_held_at_a_time(
    shop, scattered, tmp_path, monkeypatch
):
    """No matrix has more users than a partition."""
    monkeypatch.setattr(batch_scoring, "_USERS_PER_PARTITION", 8)
    sizes = []
    make = Interactions.from_pairs

    def record(user, item, n_users, n_items):
        sizes.append((n_users, len(user)))
        return make(user, item, n_users, n_items)

    monkeypatch.setattr(Interactions, "from_pairs", record)
    scored, _ = score(shop, write(scattered, tmp_path / "h.csv"), k=3)
    assert [n for n, _ in sizes] == [8] * 7 + [5]
    assert sum(n for _, n in sizes) == len(scattered)
    assert scored.users == 61


def test_many_reads_and_users_across_them(
    shop, scattered, tmp_path, monkeypatch
):
    monkeypatch.setattr("vaecf.data.row_batches.BATCH_ROWS", 16)
    monkeypatch.setattr(batch_scoring, "_USERS_PER_PARTITION", 10)
    big = pd.concat([scattered] * 30, ignore_index=True)
    _, lists = score(shop, write(big, tmp_path / "h.parquet"), k=4)
    check(lists, shop.recommender.recommend(big, k=4))


def test_settings_reach_the_lists(shop, scattered, tmp_path):
    frame = scattered.rename(columns={"user": "who", "item": "what"})
    frame["stars"] = 5
    path = write(frame, tmp_path / "h.csv")
    columns = {"user_column": "who", "item_column": "what"}
    for settings in ({"k": 2}, {"k": 500, "exclude_seen": False}, {"k": 30}):
        _, lists = score(shop, path, **columns, **settings)
        check(lists, shop.recommender.recommend(frame, **columns, **settings))


def test_unknown_items_are_counted_and_their_users_served(shop, tmp_path):
    frame = pd.DataFrame(
        {
            "user": ["ann", "bob", "ann", "bob", "eve"],
            "item": ["sku-01", "sku-88", "sku-77", "sku-88", "sku-02"],
        }
    )
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"), k=5)
    assert scored == (3, 15, 3)
    expected = shop.recommender.recommend(frame, 5)
    assert expected.attrs["unknown_items"] == 3
    check(lists, expected)
    nothing = shop.recommender.recommend({"bob": []}, 5)
    assert nothing["item"].tolist() == (
        lists.filter(pl.col("user") == "bob")["item"].to_list()
    )


def test_nobody_has_items_left(shop, tmp_path):
    frame = shop.frame[shop.frame["user"] == "customer all"]
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"))
    assert scored == (1, 0, 0) and lists.height == 0
    assert lists.columns == ["user", "rank", "item", "score"]


# --- Ids --------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(shop, tmp_path_factory):
    """The shop with integer ids, and with ids that have leading zeros."""
    rng = np.random.default_rng(4)
    rows = [(u, i) for u in range(40) for i in rng.permutation(30)[:5]]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    padded = frame.assign(item=[f"{i:03d}" for i in frame["item"]])
    model = shop.recommender._model
    folders = []
    for ids in (np.arange(30), [f"{i:03d}" for i in range(30)]):
        items = IdTable(ids)
        digest = {"items": {"sha256": items.sha256()}}
        folder = tmp_path_factory.mktemp("ids") / "saved"
        renamed = dataclasses.replace(
            model, items=items, manifest={**model.manifest, "ids": digest}
        )
        folders.append(renamed.save(folder))
    return (*folders, frame, padded)


@pytest.mark.parametrize("name", ["h.csv", "h.parquet"])
def test_integer_ids_stay_integers(numbered, tmp_path, name):
    folder, _, frame, _ = numbered
    score_file(folder, write(frame, tmp_path / name), tmp_path / "o.parquet")
    lists = pl.read_parquet(tmp_path / "o.parquet")
    assert lists.schema["user"] == lists.schema["item"] == pl.Int64
    check(lists, Recommender.load(folder).recommend(frame))


def test_ids_with_leading_zeros_are_not_numbers(numbered, tmp_path):
    _, folder, _, frame = numbered
    frame = frame.assign(user=[f"{u:02d}" for u in frame["user"]])
    path = write(frame, tmp_path / "h.csv")
    scored = score_file(folder, path, tmp_path / "o.parquet", k=4)
    assert scored == (40, 160, 0)
    lists = pl.read_parquet(tmp_path / "o.parquet")
    assert lists["user"][0] == "00" and set(lists["item"]) <= set(frame["item"])
    check(lists, Recommender.load(folder).recommend(frame, 4))


@pytest.mark.parametrize(
    "users",
    [
        pl.Series(["7", "8"]),
        pl.Series([7, 8], dtype=pl.UInt16),
        pl.Series(["b", "a"], dtype=pl.Categorical),
        pl.Series([7.0, 8.0]),
    ],
)
def test_users_of_a_parquet_file_keep_their_type(shop, tmp_path, users):
    frame = pl.DataFrame({"user": users, "item": ["sku-01", "sku-02"]})
    frame.write_parquet(tmp_path / "h.parquet")
    _, lists = score(shop, tmp_path / "h.parquet", k=1)
    assert lists["user"].dtype == users.dtype
    assert lists["user"].to_list() == users.to_list()


def test_a_text_whose_ids_turn_to_letters_late(shop, tmp_path):
    users = [*map(str, range(12_000)), "x1"]
    frame = pd.DataFrame({"user": users, "item": "sku-03"})
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"), k=1)
    assert scored.users == 12_001
    assert lists["user"].to_list() == users


# --- Refused input --------------------------------------------------------


def refused(shop, path, output=None, **settings):
    output = output or path.parent / "out" / "lists.parquet"
    with pytest.raises(VaecfError) as error:
        score_file(shop.workdir, path, output, **settings)
    assert "\n" not in str(error.value)
    assert not output.is_file()
    if output.parent.is_dir():
        left = {p.name for p in output.parent.iterdir()}
        assert left <= {path.name, output.name}
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item\nann,sku-01\n,sku-02\n", "row 2 (line 3): column 'user' has no user id"),
        ("user,item\nann,sku-01\nann,\n", "row 2 (line 3): column 'item' has no item id"),
        ("usr,item\nann,sku-01\n", "has no column 'user'; did you mean usr"),
        ("user,itm\nann,sku-01\n", "has no column 'item'; did you mean itm"),
        ("user,item\n", "holds no rows"),
        ("", "is empty"),
        ("user,item\nann,sku-01\nbob,sku-02,x,y\n", "more fields"),
    ],
)  # fmt: skip
def test_bad_text(shop, tmp_path, content, message):
    path = tmp_path / "h.csv"
    path.write_text(content)
    assert message in refused(shop, path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user": [1, None], "item": ["a", "b"]}, "row 2: column 'user' has no"),
        ({"user": [1, 2], "item": [None, 3]}, "row 1: column 'item' has no"),
        ({"user": [1, 2], "item": [float("nan"), 3]}, "row 1: column 'item'"),
        ({"user": [[1], [2]], "item": [1, 3]}, "the user column has type List"),
        ({"user": [1]}, "has no column 'item'"),
    ],
)  # fmt: skip
def test_bad_parquet(shop, tmp_path, frame, message):
    path = tmp_path / "h.parquet"
    pl.DataFrame(frame).write_parquet(path)
    assert message in refused(shop, path)


def test_other_bad_files(shop, scattered, tmp_path):
    assert "no such file" in refused(shop, tmp_path / "h.csv")
    assert "is a folder" in refused(shop, tmp_path)
    cut = write(scattered, tmp_path / "cut.parquet")
    cut.write_bytes(cut.read_bytes()[:200])
    assert "cut.parquet" in refused(shop, cut)
    text = tmp_path / "bytes.csv"
    text.write_bytes(b"user,item\nann,\xff\xfe\n")
    assert "not UTF-8 text" in refused(shop, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_settings(shop, scattered, tmp_path, settings, message):
    path = write(scattered, tmp_path / "h.csv")
    assert message in refused(shop, path, **settings)


def test_bad_output(shop, scattered, tmp_path):
    path = write(scattered, tmp_path / "h.csv")
    (tmp_path / "folder").mkdir()
    assert "is a folder: name a" in refused(shop, path, tmp_path / "folder")
    assert "cannot write" in refused(shop, path, path / "o.parquet")


def test_no_model(scattered, tmp_path):
    path = write(scattered, tmp_path / "h.csv")
    with pytest.raises(VaecfError, match=r"config\.json: no such file"):
        score_file(tmp_path / "run", path, tmp_path / "o.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["h.csv"]


@pytest.mark.parametrize("error", [VaecfError, OSError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_what_was_there(
    shop, scattered, tmp_path, monkeypatch, error
):
    """The output of an earlier call stays as it was."""
    monkeypatch.setattr(batch_scoring, "_USERS_PER_PARTITION", 8)
    path = write(scattered, tmp_path / "h.csv")
    score(shop, path, k=1)
    output = tmp_path / "out" / "lists.parquet"
    before = output.read_bytes()

    def fail(done, total):
        if done > 20:
            raise error("no more")

    # polars may wrap other errors than ours.
    known = (error, VaecfError, pl.exceptions.PolarsError)
    with pytest.raises(VaecfError if error is VaecfError else known):
        score_file(shop.workdir, path, output, k=5, progress=fail)
    assert [p.name for p in output.parent.iterdir()] == ["lists.parquet"]
    assert output.read_bytes() == before
