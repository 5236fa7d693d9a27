"""Every layout, every kind of id, every bad row."""

import gzip

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.data import layouts, text_files
from vaecf.data.file_settings import Dialect
from vaecf.data.readers import MISSING, collapse_duplicates, read_ratings

SONG = ["SO" + c * 16 for c in "ABC"]
LISTENER = [c * 40 for c in "ab"]


def pairs_of(ratings):
    return list(
        zip(
            ratings.user_ids[ratings.user].tolist(),
            ratings.item_ids[ratings.item].tolist(),
        )
    )


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


EVERYTHING, LIKED = [(2, 9), (1, 7), (1, 9)], [(2, 9), (1, 9)]
# name -> (files, layout, pairs with rating >= 4, all pairs)
RELEASED = {
    "ml-20m": (
        {"ratings.csv": "userId,movieId,rating,timestamp\n"
                        "2,9,4.0,11\n1,7,3.5,12\n1,9,5.0,13\n"},
        "movielens_csv", LIKED, EVERYTHING,
    ),
    "ml-1m": (
        {"ratings.dat": "2::9::4::11\n1::7::3::12\n1::9::5::13\n"},
        "movielens_dat", LIKED, EVERYTHING,
    ),
    "ml-100k": (
        {"u.data": "2\t9\t4\t11\n1\t7\t3\t12\n1\t9\t5\t13\n"},
        "movielens_tab", LIKED, EVERYTHING,
    ),
    "netflix": (
        {
            "combined_data_1.txt": "9:\n2,4,2005-01-02\n1,5,2005-01-03\n7:\n"
                                   "1,3,2005-01-04\n",
            "combined_data_2.txt": "11:\n1,4,2005-01-05\n12:\n",
        },
        "netflix", [(2, 9), (1, 9), (1, 11)],
        [(2, 9), (1, 9), (1, 7), (1, 11)],
    ),
    "msd": (
        {"train_triplets.txt": f"{LISTENER[1]}\t{SONG[2]}\t1\n"
         f"{LISTENER[0]}\t{SONG[0]}\t7\n{LISTENER[0]}\t{SONG[2]}\t2\n"},
        "msd", [(LISTENER[0], SONG[0])],
        [(LISTENER[1], SONG[2]), (LISTENER[0], SONG[0]),
         (LISTENER[0], SONG[2])],
    ),
    "gowalla": (
        {"train.txt": "0 3 1\n1 2 \n2\n", "test.txt": "0 2\n1 0 1\n"},
        "lightgcn_txt", None,
        [(0, 3), (0, 1), (1, 2), (0, 2), (1, 0), (1, 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("batch_rows", [1, 2, 3, 1 << 20])
def test_released_layouts(tmp_path, monkeypatch, name, batch_rows):
    files, layout, liked, everything = RELEASED[name]
    for file, text in files.items():
        write(tmp_path / file, text)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10 * batch_rows)
    first = tmp_path / next(iter(files))
    assert layouts.detect(tmp_path) == layouts.detect(first) == layout
    assert pairs_of(read_ratings(tmp_path)) == everything
    if len(files) == 1:
        assert pairs_of(read_ratings(first)) == everything
    if liked is None:
        with refuses("holds no ratings"):
            read_ratings(tmp_path, min_rating=4)
        return
    for count_all in (False, True):
        ratings = read_ratings(tmp_path, min_rating=4, count_all=count_all)
        assert pairs_of(ratings) == liked
        counts = ratings.counts
        assert counts["rows_read"] == len(everything)
        assert counts["below_min_rating"] == len(everything) - len(liked)
        users = len({u for u, _ in everything}) if count_all else None
        items = len({i for _, i in everything}) if count_all else None
        assert (counts["users_read"], counts["items_read"]) == (users, items)


def test_detection_by_sight(tmp_path):
    frame = pl.DataFrame({"user": [1], "item": [2], "is_test": [False]})
    frame.write_parquet(tmp_path / "pairs.bin")
    assert pairs_of(read_ratings(tmp_path / "pairs.bin")) == [(1, 2)]
    path = write(tmp_path / "mine.csv", "user,item\n1,2\n")
    assert layouts.detect(path) is None
    zipped = tmp_path / "ratings.csv.gz"
    zipped.write_bytes(gzip.compress(b"userId,movieId,rating\n1,2,5\n"))
    assert layouts.detect(zipped) == "movielens_csv"
    assert pairs_of(read_ratings(zipped, min_rating=4)) == [(1, 2)]


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]),
    min_size=1,
    max_size=5,
).filter(lambda text: text == text.strip() and text not in MISSING)
INT64 = st.integers(-(2**63), 2**63 - 1)
IDS = st.one_of(
    st.lists(kind, min_size=1, max_size=30) for kind in (INT64, TEXT)
)


@settings(max_examples=60, deadline=None)
@given(IDS, st.data())
def test_ids_of_every_kind_from_every_source(tmp_path_factory, users, data):
    """Ints (negative, wide) and Unicode, from frames, CSV, gzip, Parquet."""
    n, kinds = len(users), ["007", "7", "a,b", 'q"q', "é", "-0"]
    items = data.draw(st.lists(st.sampled_from(kinds), min_size=n, max_size=n))
    folder = tmp_path_factory.mktemp("ids")
    frame = pl.DataFrame({"who": users, "what": items})
    frame.write_csv(folder / "a.csv", quote_style="always")
    frame.write_csv(folder / "a.tsv", separator="\t", quote_style="always")
    frame.write_parquet(folder / "a.parquet")
    (folder / "b.csv.gz").write_bytes(
        gzip.compress((folder / "a.csv").read_bytes())
    )
    pandas = pd.DataFrame({"who": users, "what": items}, index=users)
    # The rule for integers, stated apart: all of them plain int64.
    texts = [str(u) for u in users]
    as_int = all(
        t.lstrip("-").isascii()
        and t.lstrip("-").isdigit()
        and str(int(t)) == t
        and -(2**63) <= int(t) < 2**63
        for t in texts
    )
    expected = [int(t) if as_int else t for t in texts]
    frames = [frame, frame.lazy(), pandas, pandas.astype("category")]
    files = ["a.csv", "a.tsv", "a.parquet", "b.csv.gz"]
    for source in (*frames, *(folder / file for file in files)):
        with pytest.MonkeyPatch.context() as patch:  # the files are whole
            patch.setattr(layouts, "probe_parquet", lambda *_: None)
            got = read_ratings(source, user_column="who", item_column="what")
        assert got.user_ids[got.user].tolist() == expected
        wanted_items = [7] * n if set(items) == {"7"} else items
        assert got.item_ids[got.item].tolist() == wanted_items
        assert got.user_ids.tolist() == sorted(set(expected))
        assert got.user_ids.dtype == (np.int64 if as_int else object)
        assert got.user.dtype == got.item.dtype == np.int32


def test_frames_with_floats_gaps_and_nullable_types():
    """Integers that pandas made floats are integers again."""
    frame = pd.DataFrame(
        {
            "user": [3.0, 1.0, 1.0],
            "item": pd.array([10, 20, 10], dtype="Int64"),
            "stars": pd.array([4, 5, 3], dtype="Int64"),
            "score": ["4.0", "4.5", "1"],
        }
    )
    for column in ("stars", "score"):
        got = read_ratings(frame, rating_column=column, min_rating=4)
        assert pairs_of(got) == [(3, 10), (1, 20)]
    mixed = pd.DataFrame({"user": [1, "a", 2], "item": [True, False, True]})
    got = read_ratings(mixed)
    assert pairs_of(got) == [("1", "True"), ("a", "False"), ("2", "True")]


def test_duplicates_keep_the_first_row():
    frame = pd.DataFrame({"user": [2, 1, 2, 2, 1], "item": [5, 5, 5, 6, 5]})
    ratings = read_ratings(frame)
    assert ratings.n == 5
    kept, dropped = collapse_duplicates(ratings)
    assert dropped == 2
    assert pairs_of(kept) == [(2, 5), (1, 5), (2, 6)]
    again, dropped = collapse_duplicates(kept)
    assert dropped == 0 and again is kept


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header", ["user{}item", "\ufeffuser{}item", '"user"{}"item"']
)
def test_separators(tmp_path, header, mark):
    name, header = "a.tsv" if mark == "\t" else "a.csv", header.format(mark)
    path = write(tmp_path / name, f"{header}\r\nu 1{mark}i 1\r\n")
    assert pairs_of(read_ratings(path)) == [("u 1", "i 1")]


def test_separator_by_hand(tmp_path):
    path = write(tmp_path / "a.csv", "user:item,x\n1:2,3\n")
    names = {"user_column": "user", "item_column": "item,x"}
    got = read_ratings(path, **names, separator=":")
    assert pairs_of(got) == [(1, "2,3")]
    path = write(tmp_path / "a.txt", "user\titem\n1\t2\n3\t4\n")
    got = read_ratings(path, separator=r"\t")  # as a shell passes a tab
    assert pairs_of(got) == [(1, 2), (3, 4)]
    with refuses("separator='' must be one"):
        read_ratings(path, separator="")


def test_empty_lines_are_skipped_and_counted(tmp_path):
    path = write(
        tmp_path / "r.csv", "user,item,stars\n1,2,5\n\n1,3,4\n\n\n1,4,x\n"
    )
    with refuses(r"line 7: .*'x'"):
        read_ratings(path, rating_column="stars", min_rating=4)
    got = read_ratings(path)
    assert pairs_of(got) == [(1, 2), (1, 3), (1, 4)]
    assert (got.counts["rows_read"], got.counts["blank_rows"]) == (3, 3)


TABLE = "customer,sku,stars\nann,s1,5\nbob,s2,{}\n{},{},4\n"


BAD_ROWS = [
    (TABLE.format("good", "c", "s3"),
     r"shop\.csv, line 3: column 'stars' holds 'good'"),
    (TABLE.format("", "c", "s3"), r"line 3.*'stars' holds ''"),
    (TABLE.format("nan", "c", "s3"), r"line 3: .*'stars' holds 'nan'"),
    (TABLE.format("inf", "c", "s3"), r"line 3: .*'stars' holds 'inf'"),
    (TABLE.format(1, "", "s3"), r"line 4: .*'customer' has no user"),
    (TABLE.format(1, "c", ""), r"line 4: .*'sku' has no item id"),
    (TABLE.format(1, "c", '""'), r"line 4: .*'sku' has no item id"),
    (TABLE.format(1, "c", "NaN"), r"line 4: .*'sku' has no item id"),
    ("customer,sku,stras\na,b,5\n",
     r"no column 'stars'; did you mean stras\? .*choose with rating_column"),
    ("customer,sku,stars\n", r"shop\.csv holds no rows"),
    ("", r"shop\.csv is empty"),
    ("\n", r"shop\.csv"),
    ("customer,sku,stars\na,b,5,6\n", "line 2: 4 fields instead of the 3 of the header"),
    ("customer,sku,stars\na,b,1\n", "none of 1 rows.*lower min_rating"),
    ("customer,sku,stars\na,b\n", "line 2: 2 fields instead of the 3 of the header"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path, text, message):
    path = write(tmp_path / "shop.csv", text)
    with refuses(message):
        read_ratings(
            path,
            user_column="customer",
            item_column="sku",
            rating_column="stars",
            min_rating=4,
        )


def test_bad_rows_of_frames_and_parquet(tmp_path):
    frame = pd.DataFrame({"user": [1, None, 3], "item": ["a", "b", None]})
    pl.DataFrame({"user": [1, None], "item": ["a", "b"]}).write_parquet(
        tmp_path / "x.parquet"
    )
    rated = pd.DataFrame({"user": [1, 2], "item": [1, 2], "r": [5, "x"]})
    for source, message in (
        (frame, "row 2: column 'user' has no"),
        (tmp_path / "x.parquet", "row 2: column 'user' has no"),
        (frame.assign(user=1), "row 3: column 'item'"),
        (pd.DataFrame({"user": [1]}), "have no column 'item'"),
        (pl.DataFrame({"user": [[1]], "item": [1]}), "type List"),
        (rated, r"row 2: column 'r' holds 'x'"),
    ):
        how = {"rating_column": "r", "min_rating": 1} if source is rated else {}
        with refuses(message):
            read_ratings(source, **how)


BAD_FILES = {
    "x.zip": (b"PK\x03\x04", "unpack it"),
    "latin.csv": ("user,item\né,1\n".encode("latin-1"), "not UTF-8"),
    "cut.csv.gz": (
        gzip.compress(b"user,item\n" + b"1,2\n" * 9999)[:40],
        r"cut\.csv\.gz",
    ),
    "cut.parquet": (b"PAR1 and no more", r"cut\.parquet"),
    "folder": (None, "name the ratings file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with refuses(message):
        read_ratings(tmp_path / name)
    with refuses(f"no such file.*did you mean {name}"):
        read_ratings(tmp_path / f"{name}x")


def test_flags_that_need_each_other(tmp_path):
    path = write(tmp_path / "a.csv", "user,item,r\n1,2,3\n")
    for how, message in (
        ({"min_rating": 3}, "min_rating=3 and rating_column"),
        ({"rating_column": "r"}, "need each other"),
        ({"item_column": "user"}, "cannot be two things"),
    ):
        with refuses(message):
            read_ratings(path, **how)
    path = write(tmp_path / "pairs.txt", "1|2\n")
    dialect = Dialect("|", False, {"user": 0, "item": 1})
    with refuses("holds no ratings"):
        read_ratings(path, dialect=dialect, min_rating=1)


FOUND = [
    # polars would take a category's code and a date's day for a rating.
    (pl.Series(["9", "3"], dtype=pl.Categorical), None),
    (pl.Series(["9", "3"], dtype=pl.Enum(["3", "9"])), None),
    (pl.Series([0, 1]).cast(pl.Date), "type Date; ratings are numbers"),
    (pl.Series([[9], [3]]), "type List.*; ratings are numbers"),
]


@pytest.mark.parametrize(("stars", "message"), FOUND)
def test_ratings_of_every_type(tmp_path, stars, message):
    frame = pl.DataFrame({"user": [1, 2], "item": [3, 4], "stars": stars})
    frame.write_parquet(tmp_path / "r.parquet")
    how = {"rating_column": "stars", "min_rating": 4}
    for source in (frame, tmp_path / "r.parquet"):
        if message is None:
            assert pairs_of(read_ratings(source, **how)) == [(1, 3)]
        else:
            with refuses(message):
                read_ratings(source, **how)


def test_ids_beyond_integers_are_not_missing():
    frame = pd.DataFrame({"user": [1e300, 1.0], "item": [1, 2]})
    assert pairs_of(read_ratings(frame)) == [("1e+300", 1), ("1", 2)]


def test_pairs_and_written_lists_are_no_histories(tmp_path):
    frame = pd.DataFrame({"user": ["a", "b"], "item": [["x", "y"], ["z"]]})
    frame.to_csv(tmp_path / "lists.csv", index=False)
    with refuses("line 2: column 'item' holds .*a list as a text"):
        read_ratings(tmp_path / "lists.csv")
    with refuses("tuples of 2: pass pandas.DataFrame"):
        read_ratings([("a", "x"), ("b", "z")])


def test_long_fields_and_headers_in_another_order(tmp_path):
    path = tmp_path / "r.csv"
    write(path, "user,item,text\n" + f'1,2,"{"so, " * 70_000}"\n' * 3)
    assert pairs_of(read_ratings(path)) == [(1, 2)] * 3
    write(path, 'user,item,text\n1,2,"a\n' + "3,4,no, yes\n" * 20_000 + '"\n')
    with refuses("line 2: a quoted field .*many lines"):
        read_ratings(path)
    write(path, "user,item,r\n1,2,3\nItem,user,r\n2,1,3\n")
    with refuses("line 3: a header with the columns in another order"):
        read_ratings(path)
    write(path, "user::item::r\nu1::i:2::3\n")
    assert pairs_of(read_ratings(path)) == [("u1", "i:2")]


def test_rows_that_quotes_or_settings_would_hide(tmp_path):
    """Two stray quotes around an empty line, and a header as a row."""
    path = tmp_path / "r.csv"
    write(path, 'user,item,t\n1,2,"a\n\n3,4,b\n5,6,c"\n')
    with refuses("line 2: .*takes in 3 more"):
        read_ratings(path)
    write(path, 'user,item,t\n1,2,"One.\n\nTwo, and\n"\n3,4,b\n')
    assert pairs_of(read_ratings(path)) == [(1, 2), (3, 4)]
    write(path, "User_ID,sku\n1,2\n")
    with refuses("line 1: 'User_ID' looks like the name.*no_header=False"):
        read_ratings(path, no_header=True)


def test_ids_in_brackets(tmp_path):
    path = write(tmp_path / "parts" / "a.csv", "{1-a},[x]\n{2-b},[y]\n")
    write(tmp_path / "parts" / "b.CSV", "{1-a},[y]\n")
    pairs = [("{1-a}", "[x]"), ("{2-b}", "[y]"), ("{1-a}", "[y]")]
    assert pairs_of(read_ratings(path.parent, no_header=True)) == pairs
