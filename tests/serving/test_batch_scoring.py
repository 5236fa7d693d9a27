"""Scoring of files, compared with `Recommender.recommend`."""

import dataclasses
import datetime
import gzip

import numpy as np
import pandas as pd
import polars as pl
import pytest
from oracles import refuses

from vaecf.data.file_settings import FileSettings
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.data.readers import read_ids
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
        separator = ";" if path.suffix == ".txt" else ","
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
    ("name", "rows"),
    [("h.csv", 42), ("h.txt", 2**22), ("h.csv.gz", 7), ("h.parquet", 42)],
)
def test_the_lists_of_recommend(
    shop, scattered, tmp_path, monkeypatch, name, rows
):
    """With 7 users per partition, all in one, and 1 user per partition."""
    monkeypatch.setattr(batch_scoring, "_ROWS_PER_PARTITION", rows)
    monkeypatch.setattr("vaecf.data.text_files.BLOCK_BYTES", 160)
    path = write(scattered, tmp_path / name)
    done = []
    scored, lists = score(
        shop, path, k=6, batch_size=5, progress=lambda *n: done.append(n)
    )
    expected = shop.recommender.recommend(scattered, k=6)
    assert len(expected) == 360
    check(lists, expected)
    assert scored[:3] == (61, 360, 0)
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
    monkeypatch.setattr(batch_scoring, "_USERS_PER_PARTITION", 8)
    sizes = []
    make = Interactions.from_pairs

    def record(user, item, n_users, n_items):
        sizes.append(n_users)
        return make(user, item, n_users, n_items)

    monkeypatch.setattr(Interactions, "from_pairs", record)
    score(shop, write(scattered, tmp_path / "h.csv"), k=3)
    assert sizes == [8] * 7 + [5]


def test_settings_reach_the_lists(shop, scattered, tmp_path):
    frame = scattered.rename(columns={"user": "who", "item": "what"})
    frame["stars"] = 5
    path = write(frame, tmp_path / "h.csv")
    columns = {"user_column": "who", "item_column": "what"}
    for settings in ({"k": 2}, {"k": 500, "exclude_seen": False}):
        _, lists = score(shop, path, **columns, **settings)
        check(lists, shop.recommender.recommend(frame, **columns, **settings))


def test_unknown_items_are_counted_and_their_users_served(shop, tmp_path):
    users = ["ann", "bob", "ann", "bob", "eve"]
    items = ["sku-01", "sku-88", "sku-77", "sku-88", "sku-02"]
    frame = pd.DataFrame({"user": users, "item": items})
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"), k=5)
    assert scored[:3] == (3, 15, 3)
    check(lists, shop.recommender.recommend(frame, 5))


def test_no_item_of_the_file_is_known(shop, tmp_path):
    """The error is that of `recommend`."""
    frame = pd.DataFrame({"user": ["ann", "bob"], "item": ["sku-88", "12"]})
    message = refused(shop, write(frame, tmp_path / "h.csv"))
    with pytest.raises(VaecfError, match="none of the 2 items") as error:
        shop.recommender.recommend(frame)
    assert message == str(error.value)


def test_nobody_has_items_left(shop, tmp_path):
    frame = shop.frame[shop.frame["user"] == "customer all"]
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"))
    assert scored[:3] == (1, 0, 0) and lists.height == 0
    assert lists.columns == ["user", "rank", "item", "score"]


@pytest.mark.parametrize(
    ("name", "form"), [("h.csv", int), ("h.parquet", int), ("h.csv", "{:03d}".format)]
)  # fmt: skip
def test_ids_keep_their_type(shop, tmp_path, name, form):
    """Integers stay integers; ids with leading zeros are not numbers."""
    rng = np.random.default_rng(4)
    frame = pd.DataFrame(
        [(form(u), form(i)) for u in range(40) for i in rng.permutation(30)[:5]],
        columns=["user", "item"],
    )  # fmt: skip
    model = shop.recommender._model
    items = IdTable([form(i) for i in range(30)])
    ids = {"items": {"sha256": items.sha256()}}
    folder = dataclasses.replace(
        model, items=items, manifest={**model.manifest, "ids": ids}
    ).save(tmp_path / "saved")
    output = tmp_path / "o.parquet"
    assert score_file(folder, write(frame, tmp_path / name), output).users == 40
    lists = pl.read_parquet(output)
    expected = pl.Int64 if form is int else pl.String
    assert lists.schema["user"] == lists.schema["item"] == expected
    check(lists, Recommender.load(folder).recommend(frame))


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


def test_dates_and_booleans_of_a_parquet_file_come_back_as_texts(
    shop, tmp_path
):
    noon = datetime.datetime(2024, 2, 29, 12)
    for users in ([True, False], [noon.date()], [noon, noon.replace(hour=0)]):
        frame = pl.DataFrame({"user": users, "item": ["sku-01"] * len(users)})
        frame.write_parquet(tmp_path / "h.parquet")
        _, lists = score(shop, tmp_path / "h.parquet", k=1)
        texts = [str(user).removesuffix(" 00:00:00") for user in users]
        assert lists["user"].to_list() == texts


def test_a_text_whose_ids_turn_to_letters_late(shop, tmp_path):
    users = [*map(str, range(12_000)), "x1"]
    frame = pd.DataFrame({"user": users, "item": "sku-03"})
    scored, lists = score(shop, write(frame, tmp_path / "h.csv"), k=1)
    assert scored.users == 12_001
    assert lists["user"].to_list() == users


def refused(shop, path, output=None, **settings):
    output = output or path.parent / "out" / "lists.parquet"
    with refuses() as error:
        score_file(shop.workdir, path, output, **settings)
    assert not output.is_file()
    if output.parent.is_dir():
        left = {p.name for p in output.parent.iterdir()}
        assert left <= {path.name, output.name, "out"}
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("user,item\nann,sku-01\n,sku-02\n", ["line 3", "'user' has no"]),
        ("user,item\nann,sku-01\nann,\n", ["line 3", "'item' has no"]),
        ("usr,item\nann,sku-01\n", ["'user'", "did you mean usr"]),
        ("user,item\n", ["no rows"]),
        (
            "user,item\nann,sku-01\nbob,sku-02,x,y\n",
            ["line 3: 4 fields instead of the 2"],
        ),
        ({"user": [1, 2], "item": [None, 3]}, ["row 1", "'item' has no"]),
        ({"user": [[1], [2]], "item": [1, 3]}, ["the user column has type"]),
    ],
)
def test_bad_rows(shop, tmp_path, content, messages):
    if isinstance(content, str):
        path = tmp_path / "h.csv"
        path.write_text(content)
    else:
        path = tmp_path / "h.parquet"
        pl.DataFrame(content).write_parquet(path)
    found = refused(shop, path)
    assert all(message in found for message in messages)


def test_bad_arguments(shop, scattered, tmp_path):
    path = write(scattered, tmp_path / "h.csv")
    assert ".parquet or .csv" in refused(shop, path, tmp_path / "o.xlsx")
    assert "k=0" in refused(shop, path, k=0)
    assert "batch_size=0" in refused(shop, path, batch_size=0)
    (tmp_path / "folder").mkdir()
    assert "is a folder: name a" in refused(shop, path, tmp_path / "folder")
    assert "cannot write" in refused(shop, path, path / "o.parquet")
    with refuses(r"config\.json: no such file"):
        score_file(tmp_path / "run", path, tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


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

    with pytest.raises(VaecfError if error is OSError else error):
        score_file(shop.workdir, path, output, k=5, progress=fail)
    assert [p.name for p in output.parent.iterdir()] == ["lists.parquet"]
    assert output.read_bytes() == before


# --- The reader of preparation ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("q.csv", 'title,user,item\n7" x,ann,sku-01\n"a, b",bob,sku-02\n', {}),
        ("p.csv", "user;item\n ann;sku-01 \nbob ;sku-02\n", {}),
        ("n.csv", "sku-01|ann\nsku-02|bob\n",
         {"no_header": True, "user_column": "2", "item_column": "1"}),
        ("r.csv", "user,item,r\nann,sku-01,4\nbob,sku-02,5\nann,sku-03,1\n",
         {"rating_column": "r", "min_rating": 3}),
        ("j", '{"user": "ann", "item": "sku-01"}\n'
         '{"user": "bob", "item": "sku-02"}\n', {}),
        ("e.csv", "user,item\nann,sku-01\nNULL,sku-02\nbob,sku-02\n",
         {"missing_ids": "drop"}),
    ],
)  # fmt: skip
def test_histories_are_read_as_ratings_are(
    shop, tmp_path, name, text, settings
):
    (tmp_path / name).write_text(text)
    scored, lists = score(shop, tmp_path / name, k=4, **settings)
    assert scored.users == 2 and scored.unknown_items == 0
    expected = {"ann": ["sku-01"], "bob": ["sku-02"]}
    check(lists, shop.recommender.recommend(expected, 4))


def test_a_folder_of_histories(shop, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "_SUCCESS").touch()
    for part, row in enumerate(("ann,sku-01", "bob,sku-02", "ann,sku-03")):
        (tmp_path / "in" / f"p{part}.csv").write_text(f"user,item\n{row}\n")
    scored, lists = score(shop, tmp_path / "in", k=4)
    histories = {"ann": ["sku-01", "sku-03"], "bob": ["sku-02"]}
    check(lists, shop.recommender.recommend(histories, 4))
    assert scored.counts["files_read"] == 3


def test_a_row_of_another_width_is_refused(shop, tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("user,title,item\nann,a,sku-01\nbob,a, b,sku-02\n")
    assert "line 3: 4 fields" in refused(shop, path)


def test_users_written_as_floats(shop, tmp_path):
    """12 and 12.0 are one user if all users are whole numbers."""
    path = tmp_path / "h.csv"
    path.write_text("user,item\n1.0,sku-01\n2,sku-02\n1,sku-03\n")
    _, lists = score(shop, path, k=2)
    assert lists["user"].to_list() == [1, 1, 2, 2]
    path.write_text("user,item\n1.0,sku-01\nx,sku-02\n")
    _, lists = score(shop, path, k=1)
    assert lists["user"].to_list() == ["1.0", "x"]
    path.write_text("user,item\n1.0,sku-01\nx,sku-02\n1,sku-01\n")
    output = tmp_path / "o.csv"
    assert "user 1 is also written as 1.0" in refused(shop, path, output)


def test_allowed_and_denied_items(shop, scattered, tmp_path):
    path = write(scattered, tmp_path / "h.csv")
    items = shop.recommender.items
    (tmp_path / "some.txt").write_text("item\nsku-03\nsku-04\n")
    _, lists = score(shop, path, k=3, allow_items=tmp_path / "some.txt")
    assert set(lists["item"]) == {"sku-03", "sku-04"}
    (tmp_path / "some.txt").unlink()
    for names in (
        {"allow_items": items[:9]},
        {"deny_items": [*items[:5], "none"]},
        {"allow_items": items[:9], "deny_items": items[2:4]},
    ):
        _, lists = score(shop, path, k=3, **names)
        check(lists, shop.recommender.recommend(scattered, 3, **names))
    assert "knows none" in refused(
        shop, path, tmp_path / "o.csv", allow_items=["none"]
    )


def test_ids_of_a_file(tmp_path):
    settings = FileSettings(item_column="sku")
    for text in ("sku\n a\n\nb\n", "a\r\nb", '"sku"\n"a"\n"b"\n'):
        (tmp_path / "ids").write_bytes(gzip.compress(text.encode()))
        assert read_ids(tmp_path / "ids", settings) == ["a", "b"]
    for text, words in (("n;sku\n0;a\n", "several columns"), ("PAR1", "Parq")):
        (tmp_path / "ids").write_text(text)
        with pytest.raises(VaecfError, match=words):
            read_ids(tmp_path / "ids", settings)
