"""Where a table's rows come from: files of every layout, and frames.

A reader hands over batches of rows in file order, so that a file larger than
memory is never held whole. What the batches mean (thresholds, ids, errors in
rows) is the business of ``vaecf.data.ratings``.

Layouts that we know by sight:

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

# Rows handed over at once: enough to keep every core busy, few enough that a
# batch with string ids stays below 200 MB.
BATCH_ROWS = 1 << 20


class Columns(NamedTuple):
    """Names (or, without a header, positions) of the columns of a table."""

    user: str | int
    item: str | int
    rating: str | int | None = None
    timestamp: str | int | None = None


class Batch(NamedTuple):
    """Some consecutive rows of a file.

    Attributes:
      frame: columns ``user``, ``item`` and, where asked for, ``rating`` and
        ``timestamp``, of whatever type the source has.
      source: the file's name, for messages.
      row: number of the first row in that file, counted from 1.
      line: line of that row in the file, or None where lines do not matter.
      names: what the source calls the columns, for messages.
      positions: int ``[height]``, where the frame's rows stood in the batch
        before some were left out; None if none were.
    """

    frame: pl.DataFrame
    source: str
    row: int
    line: int | None
    names: dict[str, str]
    positions: np.ndarray | None = None

    def place(self, index: int) -> str:
        """Where a row of the frame stands in the file, for a message."""
        at = index if self.positions is None else int(self.positions[index])
        text = f"{self.source}, row {self.row + at:,}"
        return text if self.line is None else f"{text} (line {self.line + at:,})"

    def where(self, keep: pl.Series) -> Batch:
        """The rows of a boolean mask, which remember where they stood."""
        positions = keep.arg_true().to_numpy()
        if self.positions is not None:
            positions = self.positions[positions]
        return self._replace(
            frame=self.frame.filter(keep), positions=positions
        )


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
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


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

        with _errors(path):
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


@contextlib.contextmanager
def _errors(path: pathlib.Path | str) -> Iterator[None]:
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


def pick_columns(
    source: object,
    names: Sequence[str],
    columns: Columns,
) -> dict[str, str]:
    """Maps ``user``, ``item`` ... to the table's own column names.

    Raises:
      VaecfError: a column is not there; names those that are, the nearest,
        and the flag.
    """
    picked: dict[str, str] = {}
    for role, wanted in columns._asdict().items():
        if wanted is None:
            continue
        if isinstance(wanted, int):
            if wanted >= len(names):
                raise VaecfError(
                    f"{source}: a line has {len(names)} fields, {role} would "
                    f"be number {wanted + 1}; is this the right file?"
                )
            picked[role] = names[wanted]
        elif wanted not in names:
            raise VaecfError(
                f"{source} has no column {wanted!r}{nearest(wanted, names)} "
                f"(it has {', '.join(names)}; choose with --{role}_column)"
            )
        else:
            picked[role] = wanted
    used = list(picked.values())
    if len(set(used)) < len(used):
        raise VaecfError(
            f"{source}: one column cannot be two things ({picked})"
        )
    return picked


def text_batches(
    path: pathlib.Path, separator: str, header: bool, columns: Columns
) -> Iterator[Batch]:
    """Rows of a delimited text file, plain or gzipped, all as strings.

    Ids stay strings on purpose: read as numbers, ``007`` and ``7`` would be
    one item, and a column that turns to letters at row 20,000 would fail.
    """
    import polars as pl

    with _errors(path):
        lazy = pl.scan_csv(
            path,
            separator=separator,
            has_header=header,
            infer_schema=False,
            quote_char='"' if header else None,
            glob=False,
        )
        names = lazy.collect_schema().names()
    picked = pick_columns(path, names, columns)
    fields = None
    if not header:
        fields = {role: names.index(name) for role, name in picked.items()}
    yield from _lazy_batches(
        lazy, picked, str(path), 2 if header else 1, fields
    )


def parquet_batches(path: pathlib.Path, columns: Columns) -> Iterator[Batch]:
    """Rows of a Parquet file."""
    import polars as pl

    with _errors(path):
        lazy = pl.scan_parquet(path, glob=False)
        names = lazy.collect_schema().names()
    picked = pick_columns(path, names, columns)
    yield from _lazy_batches(lazy, picked, str(path), None)


def frame_batches(frame: Any, columns: Columns) -> Iterator[Batch]:
    """Rows of a pandas or polars frame, or of anything with to_pandas().

    Raises:
      VaecfError: if it is none of these, or lacks a column.
    """
    import polars as pl

    source = "the DataFrame"
    if isinstance(frame, (pl.DataFrame, pl.LazyFrame)):
        lazy = frame.lazy()
    else:
        if not hasattr(frame, "columns") and hasattr(frame, "to_pandas"):
            frame = frame.to_pandas()
        if type(frame).__module__.split(".")[0] != "pandas":
            raise VaecfError(
                f"cannot read ratings from {type(frame).__name__}; pass a "
                "file, or a pandas or polars DataFrame"
            )
        names = [str(name) for name in frame.columns]
        picked = pick_columns(source, names, columns)
        lazy = pl.LazyFrame(
            {
                name: _from_pandas(frame.iloc[:, names.index(name)])
                for name in picked.values()
            }
        )
    names = lazy.collect_schema().names()
    picked = pick_columns(source, names, columns)
    yield from _lazy_batches(lazy, picked, source, None)


def _from_pandas(series: Any) -> pl.Series:
    """A polars column of a pandas one, without pyarrow in between."""
    import numpy as np
    import pandas as pd
    import polars as pl

    if series.dtype.kind in "iufM" and isinstance(series.dtype, np.dtype):
        return pl.Series(series.to_numpy())
    # Strings, nullable types, categories, mixtures: once per distinct value.
    codes, values = pd.factorize(series, use_na_sentinel=True)
    texts = pl.Series([str(value) for value in values], dtype=pl.String)
    places = pl.Series(codes, dtype=pl.Int64)
    return texts.gather(places.set(places < 0, None))


def _lazy_batches(
    lazy: pl.LazyFrame,
    picked: dict[str, str],
    source: str,
    line: int | None,
    fields: dict[str, int] | None = None,
) -> Iterator[Batch]:
    """Streams the picked columns under the names of their roles.

    Messages call a column by its name, or by its place in ``fields``.
    """
    import polars as pl

    chosen = lazy.select(
        pl.col(name).alias(role) for role, name in picked.items()
    )
    if fields is None:
        labels = {role: f"column {name!r}" for role, name in picked.items()}
    else:
        labels = {role: f"field {at + 1}" for role, at in fields.items()}
    row = 0
    with _errors(source):
        for frame in chosen.collect_batches(
            chunk_size=BATCH_ROWS, maintain_order=True
        ):
            at = None if line is None else line + row
            yield Batch(frame, source, row + 1, at, labels)
            row += frame.height


def netflix_batches(path: pathlib.Path, timestamps: bool) -> Iterator[Batch]:
    """Rows of a Netflix Prize file: a movie's line, then its ratings."""
    import polars as pl

    movie = first_line(path).rstrip(":")
    with _errors(path):
        lazy = pl.scan_csv(
            path,
            has_header=False,
            skip_rows=1,  # the first movie's line has but one field
            infer_schema=False,
            quote_char=None,
            glob=False,
        )
        names = lazy.collect_schema().names()
    if len(names) != 3:
        raise VaecfError(
            f"{path}: line 2 has {len(names)} fields instead of user,rating,"
            "date; is this a Netflix Prize file?"
        )
    picked = {"user": names[0], "rating": names[1]}
    if timestamps:
        picked["timestamp"] = names[2]
    fields = {"user": 0, "item": 0, "rating": 1, "timestamp": 2}
    for batch in _lazy_batches(lazy, picked, str(path), 2, fields):
        is_movie = batch.frame.select(
            pl.col("user").str.ends_with(":") & pl.col("rating").is_null()
        ).to_series()
        frame = batch.frame.with_columns(
            item=pl.when(is_movie)
            .then(pl.col("user").str.strip_chars_end(":"))
            .forward_fill()
            .fill_null(movie)
        )
        if frame.height:
            movie = frame["item"][-1]
        yield batch._replace(frame=frame).where(~is_movie)


def lightgcn_batches(path: pathlib.Path) -> Iterator[Batch]:
    """Rows of ``user item item ...`` lines; a user alone has no items."""
    import polars as pl

    with _errors(path):
        lines = pl.scan_csv(
            path,
            separator="\n",
            has_header=False,
            infer_schema=False,
            quote_char=None,
            glob=False,
        )
        name = lines.collect_schema().names()[0]
    words = pl.col("line").str.strip_chars(" ").str.split(" ")
    for batch in _lazy_batches(
        lines, {"line": name}, str(path), 1, {"user": 0, "item": 1}
    ):
        frame = (
            batch.frame.select(user=words.list.first(), item=words.list.slice(1))
            .filter(pl.col("item").list.len() > 0)
            .explode("item")
        )
        yield batch._replace(frame=frame, line=None)
