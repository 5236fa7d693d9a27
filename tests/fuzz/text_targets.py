"""Targets of text files: Python's csv module is the reference.

`reference` states apart from the product what a table means: rows are those of
csv.reader, ids are stripped, and a row of another width than the header makes
the file unreadable.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import pathlib
import random
import re

from vaecf.data import text_files
from vaecf.data.readers import MISSING, read_ratings
from vaecf.errors import VaecfError

TITLES = (
    "plain", "two words", '7" vinyl', 'say "hi"', "a;b", "naïve", "#1 hit", "-",
    "O'Neil", "x\ty", "100%", "日本", "", "a|b",
)  # fmt: skip


def pairs(ratings):
    users = ratings.user_ids[ratings.user].tolist()
    return list(zip(map(str, users), map(str, ratings.item_ids[ratings.item])))


def reference(text, separator, user, item, header=True, quoted=True):
    """Returns the pairs of a table, None if it should be refused."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(text.removeprefix("\ufeff"), newline="")
    try:
        rows = list(csv.reader(lines, delimiter=separator, quoting=quoting))
    except csv.Error:
        return None
    rows = [row for row in rows if any(field.strip() for field in row)]
    if not rows:
        return None
    names = [name.strip() for name in rows[0]]
    if header:
        if names.count(user) != 1 or names.count(item) != 1:
            return None
        user, item = names.index(user), names.index(item)
        lower = [name.lower() for name in names]
        rows = [r for r in rows[1:] if [f.strip().lower() for f in r] != lower]
    if not rows or any(len(row) != len(names) for row in rows):
        return None
    found = [(row[user].strip(), row[item].strip()) for row in rows]
    if any(word in {"", *MISSING} for pair in found for word in pair):
        return None
    columns = [plain_numbers(column) for column in zip(*found)]
    return list(zip(*columns))


def plain_numbers(ids):
    """Returns 12 for 12.0 if all ids are whole numbers."""
    if all(re.fullmatch(r"(0|-?[1-9][0-9]{0,18})(\.0+)?", i) for i in ids):
        return [re.sub(r"\.0+$", "", i) for i in ids]
    return list(ids)


def table(rng, separator=",", quoted=True, n_rows=None):
    """Returns (rows of fields with the header, positions of user and item)."""
    columns = ["user", "item", "title", "rating", "note"][: rng.randint(2, 5)]
    rng.shuffle(columns)
    kind = rng.choice(["number", "word", "spaces"])
    rows = [columns]
    for _ in range(n_rows or rng.randint(1, rng.choice([3, 6, 12, 40]))):
        row = []
        for column in columns:
            if column in ("user", "item"):
                number = rng.randint(0, 30)
                row.append(
                    {
                        "number": str(number),
                        "word": f"{column[0]}{number}",
                        "spaces": f"{column} no {number}",
                    }[kind]
                )
            elif column == "rating":
                row.append(str(rng.randint(1, 10) / 2))
            else:
                title = rng.choice(TITLES)
                row.append(
                    title.replace("\t", " ") if separator == "\t" else title
                )
        rows.append(row)
    return rows


def write(rng, rows, separator, quoted=True):
    """Writes rows by hand: bare quotes stay bare where csv allows it."""

    often = rng.choice([0, 0.1, 1])

    def field(value):
        must = separator in value or value.startswith('"') or "\n" in value
        if quoted and (must or rng.random() < often):
            return '"' + value.replace('"', '""') + '"'
        return value

    return [separator.join(map(field, row)) for row in rows]


# Each takes (rng, fields of a row, its line, separator), and returns the line.
MALFORMED = {
    "one more field before": lambda r, f, t, s: f"x{s}{t}",
    "one more field behind": lambda r, f, t, s: f"{t}{s}x",
    "one field less": lambda r, f, t, s: s.join(f[:-1]),
    "unquoted separator": lambda r, f, t, s: s.join(
        [*f[: (k := r.randrange(len(f)))], f"{f[k]}{s} The", *f[k + 1 :]]
    ),
    "return in a row": lambda r, f, t, s: t[: (k := r.randrange(len(t) + 1))]
    + "\r" + t[k:],
    "feed in a row": lambda r, f, t, s: t[: (k := r.randrange(len(t) + 1))]
    + "\n" + t[k:],
    "quote opens": lambda r, f, t, s: s.join(
        [*f[: (k := r.randrange(len(f)))], f'"{f[k]}', *f[k + 1 :]]
    ),
    "quote in a field": lambda r, f, t, s: s.join(
        [*f[: (k := r.randrange(len(f)))], f'{f[k]}"', *f[k + 1 :]]
    ),
    "text after a quote": lambda r, f, t, s: s.join(
        [*f[: (k := r.randrange(len(f)))], f'"{f[k]}"z', *f[k + 1 :]]
    ),
    "NUL": lambda r, f, t, s: t[: (k := r.randrange(len(t) + 1))] + "\0" + t[k:],
    "comment": lambda r, f, t, s: f"# {t}",
    "empty id": lambda r, f, t, s: s.join([""] * (len(f) - 1) + ["x"]),
    "two rows in one": lambda r, f, t, s: t + t,
    "a header": lambda r, f, t, s: s.join(["user", *f[1:]]),
    "separators only": lambda r, f, t, s: s * (len(f) - 1),
    "not UTF-8": lambda r, f, t, s: t + "\udcff",
}  # fmt: skip


def malformed_row(rng: random.Random, folder: pathlib.Path) -> str:
    """One malformed row: the rows of csv, or an error, and no other rows."""
    kind = rng.choice(list(MALFORMED))
    separator = rng.choice(",,;\t|")
    quoted = separator != "\t"
    rows = table(rng, separator, quoted)
    lines = write(rng, rows, separator, quoted)
    at = rng.randrange(1, len(rows))
    fields = [f.replace(separator, " ") for f in rows[at]]
    if lines[at].startswith('"') and rng.random() < 0.7:  # all in quotes
        fields = [f'"{f}"' for f in fields if '"' not in f]
    lines[at] = MALFORMED[kind](rng, fields, separator.join(fields), separator)
    end = rng.choice(["\n", "\n", "\r\n"])
    text = end.join(lines) + rng.choice(["", end])
    path = folder / f"ratings.{'tsv' if separator == chr(9) else 'csv'}"
    path.write_bytes(text.encode(errors="surrogateescape"))
    text_files.BLOCK_BYTES = rng.choice([7, 64, 256, 1 << 24])
    found = pairs(read_ratings(path))  # VaecfError: refused
    expected = reference(text, separator, "user", "item", quoted=quoted)
    assert found == expected, (kind, text, found, expected)
    # csv joins rows between two quotes: then it is no reference.
    original = [
        (r[rows[0].index("user")], r[rows[0].index("item")]) for r in rows[1:]
    ]
    others = [pair for i, pair in enumerate(original, 1) if i != at]
    lost = len(others) - sum(pair in found for pair in others)
    assert not lost, (kind, text, found)
    return f"read {kind}"


def tables(rng: random.Random, folder: pathlib.Path) -> str:
    """A well-formed table of any dialect is read, and read right."""
    separator = rng.choice([",", ",", ";", "\t", "|", " ", "::", "§"])
    quoted = separator != "\t" and len(separator) == 1
    rows = table(rng, separator, quoted)
    if separator in (" ", "::", "§"):
        rows = [
            [f.replace(separator, "_").replace('"', "") for f in r]
            for r in rows
        ]
        rows = [[f or "-" for f in row] for row in rows]
    user, item = rows[0].index("user"), rows[0].index("item")
    expected = [(row[user], row[item]) for row in rows[1:]]
    lines = write(rng, rows, separator, quoted)
    header = rng.random() < 0.7
    settings = {"separator": separator}
    if not header:
        lines = lines[1:]
        settings |= {
            "no_header": True,
            "user_column": str(user + 1),
            "item_column": str(item + 1),
        }
    end = rng.choice(["\n", "\r\n", "\r"])
    for _ in range(rng.choice([0, 0, 1, 3])):
        lines.insert(rng.randint(0, len(lines)), "")
    if header and rng.random() < 0.2:
        position = next(i for i, line in enumerate(lines) if line)
        lines.insert(rng.randint(position + 1, len(lines)), lines[position])
    if header and rng.random() < 0.2 and separator in ",;\t|":
        del settings["separator"]
    hashes = any(line.startswith("#") for line in lines)
    if hashes and not header:
        settings["comment"] = ""
    elif rng.random() < 0.2 and lines[0]:
        lines.insert(0, "# a comment")
        if not header:
            settings["comment"] = "#"
    text = end.join(lines) + rng.choice(["", end])
    data = encoded(rng, text, settings)
    name, pack = rng.choice(
        [("r.csv", bytes), ("r.csv.gz", gzip.compress),
         ("r.csv", gzip.compress), ("r.bz2", bz2.compress),
         ("r.xz", functools.partial(lzma.compress, preset=0))]
    )  # fmt: skip
    path = folder / name
    path.write_bytes(pack(data))
    text_files.BLOCK_BYTES = rng.choice([5, 50, 250, 1 << 24])
    try:
        found = pairs(read_ratings(path, **settings))
    except VaecfError as error:
        raise AssertionError((str(error), text, settings)) from None
    columns = [plain_numbers(column) for column in zip(*expected)]
    assert found == list(zip(*columns)), (text, found)
    return f"read {name}"


def encoded(rng, text, settings):
    encoding = rng.choice(
        ["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"]
    )
    if encoding in ("cp1252", "utf-16-le"):
        settings["encoding"] = encoding
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        settings.pop("encoding", None)
        return text.encode()


def layout_reference(text):
    """Returns the pairs of a layout without a header or of JSON lines.

    None stands for a file that should be refused, and "" for other formats.
    """
    lines = [line.rstrip("\r\n") for line in io.StringIO(text, newline="")]
    full = [line for line in lines if line]
    if full and full[0].strip().startswith("{"):
        try:
            rows = [json.loads(line) for line in full if line.strip()]
            found = [(row["user"], row["item"]) for row in rows]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if any(isinstance(i, (dict, list)) for pair in found for i in pair):
            return None
        found = [
            tuple("" if i is None else str(i).strip() for i in p) for p in found
        ]
    elif re.fullmatch(r"\d+:", lines[0]):
        found, movie = [], None
        for line in full:
            if re.fullmatch(r"\d+:", line):
                movie = line[:-1]
            elif re.fullmatch(r"\d+,[\d.]+,\d{4}-\d\d-\d\d", line):
                found.append((line.split(",")[0], movie))
            elif line.strip():
                return None
    elif re.fullmatch(r"\d+( \d+)+ ?", lines[0]):
        rows = [line.split() for line in full if line.strip(" ")]
        if not all(re.fullmatch(r"[\d ]*", line) for line in full):
            return None
        users, widths = [row[0] for row in rows], {len(row) for row in rows}
        if len(set(users)) < len(users) or (
            len(widths) == 1 and widths & {3, 4}
        ):
            return None
        found = [(row[0], item) for row in rows for item in row[1:]]
    else:
        for pattern, mark in (
            (r"\d+::\d+::[\d.]+(::\d+)?", "::"),
            (r"\d+\t\d+\t[\d.]+\t\d+", "\t"),
            (r"[0-9a-f]{40}\tSO[0-9A-Z]{16}\t\d+", "\t"),
        ):
            if re.fullmatch(pattern, lines[0]):
                rows = [line.split(mark) for line in full]
                rows = [row for row in rows if "".join(row).strip()]
                if len({len(row) for row in rows}) > 1:
                    return None
                found = [(row[0], row[1]) for row in rows]
                break
        else:
            return ""
    if not found or any(
        word in {"", *MISSING} for pair in found for word in pair
    ):
        return None
    return list(zip(*[plain_numbers(column) for column in zip(*found)]))


SEEDS = (
    b"user,item\n1,2\n3,4\n", b"user\titem\ttitle\n1\t2\ta, b\n3\t4\tc\n",
    b"userId,movieId,rating,timestamp\n1,2,3.5,9\n2,2,4,9\n",
    b"1::2::3::4\n2::3::4::5\n", b"1\t2\t3\t4\n2\t3\t4\t5\n",
    b"0 3 1\n1 2 \n2 4 5 6\n", b"1:\n2,3,2005-01-01\n3,4,2005-01-02\n2:\n",
    b'{"user": 1, "item": "a"}\n{"user": 2, "item": "b"}\n',
    b"sep=;\nuser;item;rating\n1;2;3,5\n2;3;4\n",
    b'"user","item","text"\n"1","2","a ""b"" c"\n"3","4","x\ny"\n',
    b"# comment\nuser,item\n1,2\n", b"a" * 40 + b"\tSO" + b"A" * 16 + b"\t3\n",
    gzip.compress(b"user,item\n1,2\n3,4\n", mtime=0), lzma.compress(b"user,item\n1,2\n"),
    bz2.compress(b"user,item\n1,2\n"), "user,item\n1,é\n".encode("utf-16"),
    b"PK\x03\x04user", b"\x80\x04\x95", b"\x93NUMPY\x01\x00", b"PAR0",
    b"(\xb5/\xfd", b"user,item\r1,2\r3,4\r", b"\n\n\nuser,item\n1,2\n",
)  # fmt: skip
PIECES = (
    b",", b"\t", b";", b'"', b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf",
    b" ", b"NULL", b"1.0", b"nan", b"::", b":", b"{", b"}", b"[1]", b"#", b"user",
    b"item", b"1e999", b"9" * 30, b"\\N", b"\x1f", b"\xc2\xa0", b"-", b"sep=,",
)  # fmt: skip


def any_bytes(rng: random.Random, folder: pathlib.Path) -> str:
    """Mutated files of all kinds, with any settings: read, or VaecfError."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])):
        at = rng.randint(0, len(data))
        action = rng.randrange(5)
        if action == 0:
            data[at:at] = rng.choice(PIECES)
        elif action == 1:
            del data[at : at + rng.randint(1, 8)]
        elif action == 2:
            data[at:at] = data[max(0, at - rng.randint(1, 30)) : at]
        elif action == 3 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        else:
            data[at : at + 1] = rng.choice(PIECES)
    path = folder / rng.choice(["r.csv", "r.tsv", "r.txt", "r", "r.parquet"])
    path.write_bytes(data)
    choices = {
        "separator": [",", ";", "\t", "::", "", '"', "§", "\\t", "ab"],
        "encoding": [
            "latin-1",
            "utf-16",
            "utf-7",
            "hex",
            "nope",
            "cp037",
            "\0",
        ],
        "quoted": [True, False],
        "no_header": [True],
        "user_column": ["1", "user", "2", "-1", "x" * 300],
        "item_column": ["2", "item", "1", "0"],
        "rating_column": ["3", "rating"],
        "min_rating": [4.0, float("nan")],
        "comment": ["#", "", "%", '"', "user"],
        "layout": ["netflix", "lightgcn_txt", "msd", "movielens_dat", "x"],
        "missing_ids": ["drop", "keep", "refuse"],
        "time_column": ["4", "timestamp", "3"],
        "split_column": ["rating", "4"],
    }
    often = rng.choice([0, 0, 0.05, 0.15])
    settings = {
        name: rng.choice(values)
        for name, values in choices.items()
        if rng.random() < often
    }
    text_files.BLOCK_BYTES = rng.choice([5, 50, 1 << 24])
    more = [role for role in ("time", "split") if f"{role}_column" in settings]
    ratings = read_ratings(path, more=more, **settings)
    if settings or b"\x1f\x8b" in data[:2] or not data.isascii():
        return "read"
    text = bytes(data).decode()
    expected = layout_reference(text)
    if expected == "":
        lines = io.StringIO(text, newline="").readlines()
        if not text.startswith("user,item"):
            return "read"
        if any(line.startswith(("#", "\ufeff")) for line in lines):
            return "read"
        expected = reference(text, ",", "user", "item")
    assert pairs(ratings) == expected, (text, pairs(ratings), expected)
    return "compared"
