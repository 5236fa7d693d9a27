"""Formats of rating files, and how a file's format is recognised.

==================== ==========================================================
movielens_csv        ``userId,movieId,rating[,timestamp]`` with a header
movielens_dat        ``user::item::rating::timestamp``
movielens_tab        ``user<TAB>item<TAB>rating<TAB>timestamp`` (ml-100k u.data)
netflix              ``item:`` lines followed by ``user,rating,date`` lines;
                     one file, or a folder of ``combined_data_*.txt``
msd                  ``user<TAB>song<TAB>plays`` (train_triplets.txt)
lightgcn_txt         ``user item item ...``, one user per line; one file, or a
                     folder with ``train.txt`` and ``test.txt``
interactions_parquet Parquet with columns ``user`` and ``item``
==================== ==========================================================
"""

from __future__ import annotations

import contextlib
import gzip
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vaecf.errors import VaecfError, did_you_mean

# Names of a table's columns, or their positions from 0, by ``user``, ``item``
# and ``rating``.
Columns = Mapping[str, str | int]


class Dialect(NamedTuple):
    """How a delimited text file is split into columns."""

    separator: str
    header: bool
    columns: Columns


TEXT_LAYOUTS = {
    "movielens_csv": Dialect(
        ",", True, {"user": "userId", "item": "movieId", "rating": "rating"}
    ),
    # Two colons are one separator with an empty column in between.
    "movielens_dat": Dialect(":", False, {"user": 0, "item": 2, "rating": 4}),
    "movielens_tab": Dialect("\t", False, {"user": 0, "item": 1, "rating": 2}),
    "msd": Dialect("\t", False, {"user": 0, "item": 1, "rating": 2}),
}
LAYOUTS = (*TEXT_LAYOUTS, "netflix", "lightgcn_txt", "interactions_parquet")
_FIRST_LINES = (
    ("movielens_csv", r"\ufeff?userId,movieId,rating(,timestamp)?$"),
    ("netflix", r"\d+:$"),
    ("movielens_dat", r"\d+::\d+::[\d.]+(::\d+)?$"),
    ("movielens_tab", r"\d+\t\d+\t[\d.]+\t\d+$"),
    ("msd", r"[0-9a-f]{40}\tSO[0-9A-Z]{16}\t\d+$"),
    ("lightgcn_txt", r"\d+( \d+)+ ?$"),
)
_FILES_IN_FOLDER = {
    "netflix": "combined_data_*.txt",
    "movielens_csv": "ratings.csv",
    "movielens_dat": "ratings.dat",
    "movielens_tab": "u.data",
    "msd": "train_triplets.txt",
    "lightgcn_txt": "train.txt",
}


def detect(path: pathlib.Path) -> str | None:
    """Returns the layout of a file or folder, or None for an unknown one.

    Raises:
      VaecfError: the file is missing, empty, or a zip archive.
    """
    require(path)
    if path.is_dir():
        for layout, pattern in _FILES_IN_FOLDER.items():
            if any(path.glob(pattern)):
                return layout
        return None
    if is_parquet(path):
        import polars as pl

        with polars_errors(path):
            names = pl.scan_parquet(path, glob=False).collect_schema().names()
        return "interactions_parquet" if {"user", "item"} <= {*names} else None
    line = first_line(path)
    for layout, pattern in _FIRST_LINES:
        if re.match(pattern, line):
            return layout
    return None


def dialect_of(
    path: pathlib.Path,
    layout: str | Dialect | None,
    columns: Columns,
    separator: str | None = None,
) -> Dialect:
    """Returns how to split a text file; without a layout, it is a table.

    Raises:
      VaecfError: the separator is not one character, or the file cannot be
        read.
    """
    if isinstance(layout, Dialect):
        return layout
    if layout is not None:
        return TEXT_LAYOUTS[layout]
    mark = _guess_separator(path) if separator is None else separator
    if mark == r"\t":  # as a shell passes a tab
        mark = "\t"
    if len(mark.encode()) != 1:
        raise VaecfError(
            f"separator={separator!r} must be one character, such as ';' or a "
            "tab"
        )
    return Dialect(mark, True, columns)


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files to read, in order.

    Raises:
      VaecfError: a file is missing or empty, or a folder has no known layout.
    """
    if require(path).is_file():
        return [path]
    layout = detect(path)
    if layout is None:
        raise VaecfError(
            f"{path} is a folder without "
            f"{' or '.join(_FILES_IN_FOLDER.values())}; name the ratings file"
        )
    files = sorted(path.glob(_FILES_IN_FOLDER[layout]))
    if layout == "lightgcn_txt" and (path / "test.txt").is_file():
        files.append(path / "test.txt")  # all interactions: train and test
    return [require(file) for file in files]


def require(path: pathlib.Path) -> pathlib.Path:
    """Returns `path`; raises if the file is missing (with a hint) or empty."""
    if not path.exists():
        names = []
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
        raise VaecfError(
            f"no such file: {path}{did_you_mean(path.name, names)}"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise _empty(path)
    return path


def is_parquet(path: pathlib.Path) -> bool:
    """Returns whether a file is Parquet, whatever its name is."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def first_line(path: pathlib.Path) -> str:
    """Returns the first line of a plain or gzipped text file, without its end.

    Raises:
      VaecfError: the file is a zip archive, damaged, or not UTF-8 text.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        raise VaecfError(
            f"{path} is a zip archive; unpack it and name the ratings file"
        )
    opener: Callable[..., Any] = gzip.open if start[:2] == b"\x1f\x8b" else open
    try:
        with opener(path, "rb") as stream:
            line = stream.readline(1 << 16)
        text = line.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise VaecfError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise VaecfError(f"{path}: {_NOT_UTF8}") from None
    if not text:
        raise _empty(path)
    return str(text.rstrip("\r\n"))


@contextlib.contextmanager
def polars_errors(path: pathlib.Path | str) -> Iterator[None]:
    """Raises polars' errors as a `VaecfError` of one line."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, OSError, UnicodeError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "more fields" in text:
            text = (
                "a row has more fields than the first line; check the quotes, "
                "or pass the right separator"
            )
        elif "utf-8" in text.lower() or "utf8" in text.lower():
            text = _NOT_UTF8
        elif isinstance(error, pl.exceptions.NoDataError):
            raise _empty(path) from None
        raise VaecfError(f"{path}: {text}") from None


_NOT_UTF8 = "not UTF-8 text; save it as UTF-8 CSV or as Parquet"


def _empty(path: pathlib.Path | str) -> VaecfError:
    return VaecfError(f"{path} is empty; give a file with ratings")


def _guess_separator(path: pathlib.Path) -> str:
    line = first_line(path)
    suffixes = {suffix.lower() for suffix in path.suffixes}
    usual = "\t" if suffixes & {".tsv", ".tab"} else ","
    if usual in line:
        return usual
    best = max("\t;|,", key=line.count)
    return best if best in line else usual
