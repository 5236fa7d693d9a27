"""Released layouts of ratings, and how to know one by sight.

==================== ==========================================================
movielens_csv        ``userId,movieId,rating[,timestamp]`` with a header
movielens_dat        ``user::item::rating::timestamp``
movielens_tab        ``user<TAB>item<TAB>rating<TAB>timestamp`` (ml-100k u.data)
netflix              ``item:`` lines followed by ``user,rating,date`` lines;
                     one file, or a folder of ``combined_data_*.txt``
msd                  ``user<TAB>song<TAB>plays`` (train_triplets.txt)
lightgcn_txt         ``user item item ...``, one user a line; one file, or a
                     folder with ``train.txt`` and ``test.txt``
interactions_parquet Parquet with columns ``user`` and ``item``
==================== ==========================================================
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from vaecf.errors import VaecfError


class Columns(NamedTuple):
    """Names (or, without a header, positions) of the columns of a table."""

    user: str | int
    item: str | int
    rating: str | int | None = None
    timestamp: str | int | None = None


class Text(NamedTuple):
    """Shape of a released text file."""

    separator: str
    header: bool
    columns: Columns


TEXT_LAYOUTS = {
    "movielens_csv": Text(
        ",", True, Columns("userId", "movieId", "rating", "timestamp")
    ),
    # Two colons are one separator with an empty field in between.
    "movielens_dat": Text(":", False, Columns(0, 2, 4, 6)),
    "movielens_tab": Text("\t", False, Columns(0, 1, 2, 3)),
    "msd": Text("\t", False, Columns(0, 1, 2)),
}
LAYOUTS = (
    *TEXT_LAYOUTS,
    "netflix",
    "lightgcn_txt",
    "interactions_parquet",
)
_FIRST_LINES = (
    ("movielens_csv", r"\ufeff?userId,movieId,rating(,timestamp)?$"),
    ("netflix", r"\d+:$"),
    ("movielens_dat", r"\d+::\d+::[\d.]+(::\d+)?$"),
    ("movielens_tab", r"\d+\t\d+\t[\d.]+\t\d+$"),
    ("msd", r"[0-9a-f]{40}\tSO[0-9A-Z]{16}\t\d+$"),
    ("lightgcn_txt", r"\d+( \d+)+ ?$"),
)
_FOLDERS = (
    ("netflix", "combined_data_*.txt"),
    ("movielens_csv", "ratings.csv"),
    ("movielens_dat", "ratings.dat"),
    ("movielens_tab", "u.data"),
    ("msd", "train_triplets.txt"),
    ("lightgcn_txt", "train.txt"),
)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def polars_errors(path: pathlib.Path | str) -> Iterator[None]:
    """Polars' errors as one line of ours."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, OSError, UnicodeError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "more fields" in text:
            text = (
                "a row has more fields than the first line; check the quotes, "
                "or give the right --separator"
            )
        elif "utf-8" in text.lower() or "utf8" in text.lower():
            text = "not UTF-8 text; save it as UTF-8 CSV or as Parquet"
        elif isinstance(error, pl.exceptions.NoDataError):
            text = "empty; give a file with ratings"
        raise VaecfError(f"{path}: {text}") from None


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, if there is something to read.

    Raises:
      VaecfError: no such file (names a near one), or an empty one.
    """
    if not path.exists():
        names = []
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
        raise VaecfError(f"no such file: {path}{nearest(path.name, names)}")
    if path.is_file() and path.stat().st_size == 0:
        raise VaecfError(f"{path} is empty; give a file with ratings")
    return path


def detect(path: pathlib.Path) -> str | None:
    """The layout of a file or folder by what is in it, or None.

    Raises:
      VaecfError: missing, empty, or an archive that has to be unpacked.
    """
    existing(path)
    if path.is_dir():
        for layout, pattern in _FOLDERS:
            if any(path.glob(pattern)):
                return layout
        return None
    if is_parquet(path):
        import polars as pl

        with polars_errors(path):
            names = pl.scan_parquet(path, glob=False).collect_schema().names()
        released = {"user", "item"} <= set(names)
        return "interactions_parquet" if released else None
    line = first_line(path)
    for layout, pattern in _FIRST_LINES:
        if re.match(pattern, line):
            return layout
    return None


def files_of(path: pathlib.Path, layout: str | None) -> list[pathlib.Path]:
    """The files to read, in order, where ``path`` is a file or a folder.

    Raises:
      VaecfError: if the folder has none of the layout.
    """
    existing(path)
    if path.is_file():
        return [path]
    patterns = [name for kind, name in _FOLDERS if kind == layout]
    files = sorted(path.glob(patterns[0])) if patterns else []
    if layout == "lightgcn_txt":
        # The known train and test parts together are all the interactions.
        files += [path / "test.txt"] * (path / "test.txt").is_file()
    if not files:
        raise VaecfError(
            f"{path} is a folder without "
            f"{' or '.join(patterns or [n for _, n in _FOLDERS])}; name the "
            "ratings file"
        )
    return [existing(file) for file in files]


def is_parquet(path: pathlib.Path) -> bool:
    """Whether a file is Parquet, whatever it is called."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def first_line(path: pathlib.Path) -> str:
    """The first line of a text file, without its end.

    Raises:
      VaecfError: if the file is an archive, or not text.
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
        text = line.decode("utf-8").rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise VaecfError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise VaecfError(
            f"{path} is not UTF-8 text; save it as UTF-8 CSV or as Parquet"
        ) from None
    if not line:
        raise VaecfError(f"{path} is empty; give a file with ratings")
    return text


def guess_separator(path: pathlib.Path) -> str:
    """Comma or tab after the file's name, else what its header uses."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    line = first_line(path)
    wanted = "\t" if {".tsv", ".tab"} & set(suffixes) else ","
    if wanted in line:
        return wanted
    counts = {mark: line.count(mark) for mark in ("\t", ";", "|", ",")}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else wanted
