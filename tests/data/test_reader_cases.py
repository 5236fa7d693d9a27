"""Files as users have them: read right, or refused with the place and the fix.

`cases/` holds small files in the shape of public reports. All but a few hold
the same 287 pairs; `expected` makes them from one file by Python's csv alone.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import pathlib
import pickle
import sqlite3
import zipfile

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse

from vaecf.data import text_files
from vaecf.data.readers import notes, read_ratings
from vaecf.errors import VaecfError

CASES = pathlib.Path(__file__).parent / "cases"


def pairs_of(ratings):
    users = ratings.user_ids[ratings.user].tolist()
    return list(zip(users, ratings.item_ids[ratings.item].tolist()))


def read(path, **settings):
    return pairs_of(read_ratings(path, **settings))


def refused(path, *words, **settings):
    with pytest.raises(VaecfError) as error:
        read_ratings(path, **settings)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message
    return message


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture(scope="module")
def expected():
    """The pairs (0, 19) ... of all cases, from one of them."""
    with open(CASES / "quoted_header.csv", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    assert len(rows) == 287
    return [(int(user), int(item)) for user, item, *_ in rows]


def named(pairs, user="u{}", item="i{}"):
    return [(user.format(u), item.format(i)) for u, i in pairs]


# --- The files of cases/ -----------------------------------------------------


def test_cases(expected):
    words = named(expected)
    assert read(CASES / "stray_quotes.csv") == words
    assert read(CASES / "stray_quotes.csv", quoted=False) == words
    assert read(CASES / "padded_ids.csv") == words
    assert read(CASES / "excel_sep_line.csv") == words
    assert sorted(read(CASES / "parts")) == sorted(words)
    assert read(CASES / "parts") == read(CASES / "parts" / "part-*.csv")
    assert read(CASES / "float_ids.csv") == expected
    assert read(CASES / "repeated_header.csv") == expected * 2
    assert read(CASES / "quoted_header.csv") == expected
    reviews = named(expected, "A{}", "B{}")
    assert read(CASES / "reviews.jsonl") == reviews
    amazon = named(expected, "A{:05d}Q", "B{:05d}X")
    columns = {"user_column": "1", "item_column": "2"}
    assert read(CASES / "no_header.csv", no_header=True, **columns) == amazon
    triples = [(u + 1, i + 1) for u, i in expected]
    found = read(CASES / "space_triples.txt", separator=" ", no_header=True)
    assert found == triples


def test_cases_that_are_refused():
    refused(CASES / "unquoted_comma.csv", "line 4: 5 fields", "4 of the header")
    refused(
        CASES / "space_triples.txt", "line 2", "user_column=1", "separator="
    )
    refused(CASES / "no_header.csv", "no column 'user'", "no_header=True")
    refused(CASES / "null_words.csv", "line 2", "'NULL'", "missing_ids='drop'")
    refused(CASES / "damaged.parquet", "damaged.parquet is damaged")
    own = {"user_column": "User-ID", "item_column": "ISBN"}
    refused(CASES / "latin1.csv", "line 2: not UTF-8", "encoding=", **own)
    named_by_a_row = {"user_column": "A00000Q", "item_column": "B00019X"}
    refused(CASES / "no_header.csv", "looks like data", **named_by_a_row)


def test_cases_with_the_setting_that_their_message_offers(expected):
    own = {"user_column": "User-ID", "item_column": "ISBN"}
    found = read(CASES / "latin1.csv", encoding="latin-1", **own)
    assert found == named(expected, "{}", "{:09d}X") or [
        (str(u), i) for u, i in found
    ] == named(expected, "{}", "{:09d}X")
    with open(CASES / "null_words.csv", newline="") as stream:
        rows = [tuple(row) for row in csv.reader(stream)][1:]
    missing = {"NULL", "\\N", "None", "NA", "nan"}
    kept = [row for row in rows if not missing & {*row}]
    ratings = read_ratings(CASES / "null_words.csv", missing_ids="drop")
    assert [tuple(map(str, pair)) for pair in pairs_of(ratings)] == kept
    assert ratings.counts["missing_ids"] == len(rows) - len(kept) > 0


def test_what_was_changed_is_counted():
    def said(name, **settings):
        return dict(
            (text, n)
            for n, text in notes(read_ratings(CASES / name, **settings).counts)
        )

    with open(CASES / "padded_ids.csv", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    padded = sum(cell != cell.strip() for cell in cells)
    assert said("padded_ids.csv") == {
        "ids with spaces around them stripped": padded
    }
    assert said("repeated_header.csv") == {"repeated headers skipped": 1}
    assert said("float_ids.csv") == {
        "ids such as 12.0 read as whole numbers": 50
    }
    found = said("excel_sep_line.csv", rating_column="rating", min_rating=4)
    assert found["ratings such as 3,5 read as 3.5"] == 287
    assert said("parts") == {"files, in the order of their names": 3}
    assert said("quoted_header.csv") == {}


# --- Rows --------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 24, 4])
@pytest.mark.parametrize(
    ("text", "pairs", "message"),
    [
        ("user,item,title\n1,2,a\n3,4,b,c\n", None, "line 3: 4 fields"),
        ("user,item,title\n1,2,a\n3,4\n5,6,d\n", None, "line 3: 2 fields"),
        # One row too wide and one too narrow: the sum of fields is right.
        ("user,item,title\n1,2,a,b\n3,4\n", None, "line 2: 4 fields"),
        ("user,item\n1,\r2\n3,4\n", None, "line 3: 1 fields"),
        ("user,item,t\n1,2,x\ry\n3,4,z\n", None, "line 3: 1 fields"),
        ("user,item\r1,2\r3,4\r", [(1, 2), (3, 4)], None),
        ("user,item\r\n1,2\r\n3,4", [(1, 2), (3, 4)], None),
        ("user,item,t\n1,2,\"a\n\nb\"\n3,4,\n", [(1, 2), (3, 4)], None),
        ('user,item,t\n1,2,"a\n3,4,b\n', None, "line 2: a quoted field"),
        ('user,item,t\n1,2,"a"b\n3,4,c\n', None, "line 2: a quoted field"),
        # Two stray quotes would hide the rows between them.
        ('user,item,t\n1,2,"a\n3,4,b\n5,6,c"\n', None, "line 2: .*more rows"),
        ('user,item,t\n1,2,"no, but\nwell, yes"\n', [(1, 2)], None),
        ('user,item\n1,"2"\n"3",4\n', [(1, 2), (3, 4)], None),
        ('item,user\n"a,b",1\n', [(1, "a,b")], None),
        ("user,item\n1,2\n\n  \n,\n3,4\n\n", [(1, 2), (3, 4)], None),
        ("user,item\n1,2\n,4\n", None, "line 3: .*no user id"),
        ("user,item\n1,2\n3,\\N\n", None, r"line 3: .*no item id"),
        ("user,item\n1,2\0\n", None, "line 2: holds a NUL"),
        ("user,item\n1,2\nuser,item\n3,4\n", [(1, 2), (3, 4)], None),
        ("user,item\n1,2\n\ufeffuser,item\n3,4\n", [(1, 2), (3, 4)], None),
        ("user,item\n1,2\nuser,note\n", None, "line 3: .*another header"),
        ("\n# made by hand\nuser,item\n1,2\n", [(1, 2)], None),
        ("#user,item\n1,2\n", [(1, 2)], None),
        ("user,item\n1,2\n#3,4\n", None, "line 3: starts with '#'.*comment="),
        ("t,user,item\n#1 hit,1,2\n", [(1, 2)], None),
        ("user;item;t\n1;2;a,b\n", [(1, 2)], None),
        ("user\titem, or sku\titem\n1\tx\t2\n", [(1, 2)], None),
        ("user,item\n1.0,2\n3,4.00\n", [(1, 2), (3, 4)], None),
        ("user,item\n1,2\n1.0,3\n", [(1, 2), (1, 3)], None),
        ("user,item\n1.0,2\n1.5,3\n", [("1.0", 2), ("1.5", 3)], None),
        ("user,item\n\u00a0a ,2\n", [("a", 2)], None),
        ("user,item\n1,2\nUSER,Item\n3,4\n", [(1, 2), (3, 4)], None),
        ('user,item\n1, "2"\n', None, "line 2: .*space before its quote"),
        ("user item r\n1 2 3\n", [(1, 2)], None),
        ("user,item,item\n1,2,3\n", None, "2 columns 'item'"),
    ],
)  # fmt: skip
def test_rows(tmp_path, monkeypatch, block, text, pairs, message):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    path = write(tmp_path / "r.csv", text)
    if message is not None:
        with pytest.raises(VaecfError, match=message):
            read_ratings(path)
    else:
        assert read(path) == pairs


def test_tables_separated_by_tabs_have_no_quotes(tmp_path):
    path = write(tmp_path / "r.tsv", 'user\titem\tt\n1\t2\t"a\n3\t4\tb"\n')
    assert read(path) == [(1, 2), (3, 4)]
    refused(path, "line 2", "quote", quoted=True)
    r = write(tmp_path / "r.txt", '"user"\t"item"\n"a b"\t"c"\n')  # as R writes
    assert read(r) == [("a b", "c")]


def test_the_slow_path_agrees_with_the_fast_one(tmp_path):
    """A quote below the first block, and rows over two blocks."""
    rows = [(u, i) for u in range(300) for i in range(u % 7)]
    text = "".join(f"{u},{i},title\n" for u, i in rows)
    text = "user,item,title\n" + text + '7,7,"a\nb"\n' + text
    found = read_ratings(write(tmp_path / "r.csv", text))
    assert pairs_of(found) == [*rows, (7, 7), *rows]
    assert found.counts["rows_over_lines"] == 1


def test_messages_stay_short(tmp_path):
    header = ",".join(f"column {i}" for i in range(900))
    message = refused(write(tmp_path / "wide.csv", header + "\n"), "900 in all")
    assert message.count("column ") <= 15
    long = "x" * 5_000
    refused(write(tmp_path / "a.csv", f"user,item\n1,2,{long}\n"), "line 2")
    refused(write(tmp_path / "b.csv", f"{long},item\n1,2\n"), "no column")
    refused(write(tmp_path / "c.jsonl", "{" + long), "line 1", "JSON")
    rated = write(tmp_path / "d.csv", f"user,item,r\n1,2,{long}\n")
    refused(rated, "line 2", "number", rating_column="r", min_rating=1)


# --- Layouts and headers -----------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\t2\t3\t4\n1\t5\tx\t6\n", ["line 2", "user_column=1"]),
        ("1::2::3::4\n1::2::3\n", ["line 2"]),
        ("1:\n2,3,2005-01-01\n2,3\n", ["line 3", "layout"]),
        ("0 3 1\n1 a\n", ["line 2", "layout"]),
        ("1 20 1\n2 15 4\n3 16 4\n", ["3 numbers", "separator=' '"]),
    ],
)
def test_a_layout_has_to_fit_the_whole_file(tmp_path, text, words):
    refused(write(tmp_path / "r.txt", text), *words)


def test_layouts_by_request(tmp_path):
    path = write(tmp_path / "r.txt", "1 20 1\n2 15 4\n1 7 8\n")
    lists = [(1, 20), (1, 1), (2, 15), (2, 4), (1, 7), (1, 8)]
    assert read(path, layout="lightgcn_txt") == lists
    refused(path, "did you mean lightgcn_txt", layout="lightgcn")
    table = write(tmp_path / "t.txt", "a\tb\t3\n")
    assert read(table, layout="msd") == [("a", "b")]


def test_movies_of_the_netflix_prize(tmp_path):
    for movie, rows in ((2, "6,3,2005-01-02\n"), (1, "6,4,2005-01-01\n")):
        name = f"training_set/mv_{movie:07d}.txt"
        write(tmp_path / name, f"{movie}:\n{rows}7,5,2004-02-29\n")
    folder = tmp_path / "training_set"
    assert read(folder) == [(6, 1), (7, 1), (6, 2), (7, 2)]
    assert read(folder, min_rating=4) == [(6, 1), (7, 1), (7, 2)]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|", "::", "§"])
def test_columns_by_number(tmp_path, mark):
    text = f"x{mark}a{mark}5{mark}b 1\nx{mark}c{mark}3{mark}d\n"
    path = write(tmp_path / "r.txt", text)
    settings = {"no_header": True, "user_column": "4", "item_column": "2"}
    if len(mark.encode()) > 1:
        settings["separator"] = mark
    assert read(path, **settings) == [("b 1", "a"), ("d", "c")]
    rated = settings | {"rating_column": "3", "min_rating": 4}
    assert read(path, **rated) == [("b 1", "a")]
    refused(path, "number from 1", **settings | {"user_column": "who"})
    refused(path, "4 fields", **settings | {"user_column": "9"})


def test_settings_of_a_wrong_type(tmp_path):
    path = write(tmp_path / "r.csv", "7,8\n")
    assert read(path, no_header=True, user_column=2, item_column=1) == [(8, 7)]
    for name, value in (
        ("separator", 5), ("min_rating", "4"), ("no_header", "yes"),
        ("encoding", b"utf-8"), ("quoted", 1), ("missing_ids", "ignore"),
    ):  # fmt: skip
        refused(path, f"{name}=", **{name: value})


def test_a_row_named_as_the_header_is_not_lost(tmp_path):
    path = write(tmp_path / "r.csv", "ann,tea\nann,jam\nbob,tea\n")
    by_a_row = {"user_column": "ann", "item_column": "tea"}
    refused(path, "line 2", "no_header=True", **by_a_row)
    numbers = write(tmp_path / "n.csv", "7,8\n7,9\n")
    settings = {"user_column": "7", "item_column": "8"}
    refused(numbers, "looks like data", "no_header", **settings)
    frame = pd.DataFrame([[5, 6], [7, 8]])
    frame.to_csv(tmp_path / "p.csv", index=False)  # a header of 0,1
    settings = {"user_column": "0", "item_column": "1"}
    assert read(tmp_path / "p.csv", **settings) == [(5, 6), (7, 8)]


@pytest.mark.parametrize("mark", [None, ";"])
def test_movielens_with_another_header(tmp_path, mark):
    text = '"userId","movieId","rating"\n1,2,3\n4,5,4.5\n'
    text = text.replace(",", mark or ",")
    path = write(tmp_path / "r.csv", text)
    assert read(path, min_rating=4) == [(4, 5)]


# --- Folders, kinds, encodings -----------------------------------------------


def test_part_files(tmp_path):
    for name, text in {
        "_SUCCESS": "", ".part-1.csv.crc": "x", "_log": "y", "part-2.csv": "",
        "part-1.csv": "item,user\n2,1\n", "part-3.csv": "user,item\n3,4\n",
    }.items():  # fmt: skip
        write(tmp_path / "out" / name, text)
    assert read(tmp_path / "out") == [(1, 2), (3, 4)]
    assert read(tmp_path / "out" / "part-*") == [(1, 2), (3, 4)]
    write(tmp_path / "out" / "part-4.csv", "movie,title\n1,x\n")
    refused(tmp_path / "out", "part-4.csv", "no column 'user'")
    write(tmp_path / "out" / "readme.txt", "x")
    refused(tmp_path / "out", "several kinds", "*.csv")
    refused(tmp_path / "*.nothing", "no files")
    nested = tmp_path / "nested"
    write(nested / "day=1" / "p.csv", "user,item\n1,2\n")
    write(nested / "_temporary" / "p.csv", "user,item\n5,6\n")
    refused(nested, "folder day=1", "**")
    assert read(nested / "**" / "*.csv") == [(1, 2)]
    (nested / "day=1" / "q.csv").symlink_to("nowhere")
    refused(nested / "*" / "*.csv", "no such file", "q.csv")
    refused(tmp_path / ("x" * 300), "no such file")
    bracket = write(tmp_path / "a[1].csv", "user,item\n1,2\n")
    assert read(bracket) == [(1, 2)]


KINDS = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", ["zstd", "zstd -d"]),
    "pickle": (pickle.dumps({"user": [1]}), ["pickle", "Parquet"]),
    "pickle protocol 0": (pickle.dumps(np.ones(2), 0), ["pickle"]),
    "npy": (b"\x93NUMPY\x01\x00", ["NumPy"]),
    "arrow": (b"ARROW1\0\0", ["Arrow"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n", ["HDF5"]),
    "web page": (b"\n<!DOCTYPE html><html>", ["web page"]),
    "one JSON list": (b'[{"user": 1}]', ["JSON lines"]),
    "utf-16 without a mark": ("user,item\n1,2\n".encode("utf-16-le"), ["NUL", "utf-16"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_named(tmp_path, kind):
    content, words = KINDS[kind]
    path = write(tmp_path / "ratings.csv", content)
    refused(path, "ratings.csv", *words)
    write(path, gzip.compress(content))
    refused(path, "ratings.csv", *words)


def test_archives_and_databases_are_named(tmp_path):
    matrix = scipy.sparse.eye(3, format="csr")
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
    refused(tmp_path / "m.npz", "npz", "Recommender.fit")
    for name, member, word in (
        ("b.xlsx", "xl/workbook.xml", "Excel"), ("r.zip", "a.csv", "unpack"),
    ):  # fmt: skip
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, "x")
        refused(tmp_path / name, word)
    with sqlite3.connect(tmp_path / "r.db") as database:
        database.execute("create table r (user, item)")
    database.close()
    refused(tmp_path / "r.db", "SQLite")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_byte_order_marks(tmp_path, encoding):
    text = "user,item\r\né,日本\r\nb,2\r\n"
    path = write(tmp_path / "r.csv", text.encode(encoding))
    assert read(path) == [("é", "日本"), ("b", "2")]


def test_encodings(tmp_path):
    text = "user,item\nann,1\né,2\n"
    path = write(tmp_path / "r.csv", text.encode("cp1252"))
    refused(path, "line 3: not UTF-8", "encoding='latin-1'")
    assert read(path, encoding="cp1252") == [("ann", 1), ("é", 2)]
    refused(path, "line 3: not ascii", encoding="ascii")
    for name in ("nope", "hex", "\0"):
        refused(path, "encoding=", "not known", encoding=name)
    packed = write(tmp_path / "r.xz", lzma.compress(text.encode("cp1252")))
    assert read(packed, encoding="cp1252") == [("ann", 1), ("é", 2)]


@pytest.mark.parametrize("cut", [40, -9])
def test_damaged_archives(tmp_path, cut):
    text = io.StringIO()
    text.write("user,item\n")
    text.writelines(f"{u},{u % 97}\n" for u in range(5_000))
    for pack in (gzip.compress, lzma.compress):
        data = pack(text.getvalue().encode())
        path = write(tmp_path / "r.csv.gz", data[:cut])
        refused(path, "cannot be read")


def test_json_lines(tmp_path):
    path = write(
        tmp_path / "r",
        '\n{"user": 1, "item": "a", "r": 5}\n{"item": 2.0, "user": " x", "r": "3"}',
    )
    assert read(path) == [("1", "a"), ("x", "2.0")]
    assert read(path, rating_column="r", min_rating=4) == [(1, "a")]
    for text, word in (
        ('{"user": 1, "item": null}', "no item id"),
        ('{"user": 1}', "no column 'item'"),
        ('{"user": 1, "item": 2}\n{"user": 1}', "line 2"),
        ('{"user": 1, "item": [2]}', "list"),
        ('{"user": 1, "item": 2}\nuser', "line 2: no JSON object"),
        ("{'user': 1}", "line 1"),
    ):
        refused(write(tmp_path / "s.csv", text), word)


def test_parquet_ids_are_stripped_too(tmp_path):
    frame = pl.DataFrame({"user": ["a ", "b"], "item": ["NULL", "x"]})
    frame.write_parquet(tmp_path / "r.parquet")
    refused(tmp_path / "r.parquet", "row 1", "'NULL'")
    ratings = read_ratings(tmp_path / "r.parquet", missing_ids="keep")
    assert pairs_of(ratings) == [("a", "NULL"), ("b", "x")]
    assert ratings.counts["stripped_ids"] == 1


def test_ids_are_stripped_as_python_does(tmp_path):
    spaces = [chr(i) for i in range(0x3001) if chr(i).isspace()]
    inner = [space for space in spaces if space not in "\n\r"]
    rows = "".join(f"{space}u{i},i{space}\n" for i, space in enumerate(inner))
    path = write(tmp_path / "s.csv", f"user,item\n{rows}")
    expected = [(f"u{i}", "i") for i in range(len(inner))]
    assert sorted(pairs_of(read_ratings(path))) == sorted(expected)
    refused(write(tmp_path / "s.csv", "user,item\n\x1f,2\n"), "line 2")


def test_damaged_parquet(tmp_path):
    """polars' panics end with fewer rows, a deadlock or the process."""
    frame = pl.DataFrame({"user": [f"u{i % 30}" for i in range(300)]})
    frame = frame.with_columns(item=pl.int_range(300))
    path = tmp_path / "r.parquet"
    frame.write_parquet(path, compression="uncompressed")
    whole, rng = path.read_bytes(), np.random.default_rng(3)
    for size in (1, 2, 3):
        damaged = bytearray(whole)
        at = rng.integers(4, len(whole) - 300, 40 * size)
        for place in at:
            damaged[place] = rng.integers(256)
        refused(write(path, bytes(damaged)), "r.parquet is damaged")
