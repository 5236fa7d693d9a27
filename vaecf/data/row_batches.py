"""Streams the rows of files and frames, in order and in bounded memory.

This module splits tables into columns. `vaecf.data.readers` decides what the
values mean.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data import layouts
from vaecf.data.layouts import Columns, Dialect, polars_errors
from vaecf.errors import VaecfError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

# Enough rows to keep all cores busy; with string ids still below 200 MB.
BATCH_ROWS = 1 << 20


class Batch(NamedTuple):
    """Consecutive rows of a file."""

    # Columns `user`, `item` and, if asked for, `rating`, with the types of the
    # source, and `row`, the row's number from 0.
    frame: pl.DataFrame
    source: str  # name of the file, for messages
    first_line: int | None  # line of row 0; None if the file is not a text
    names: dict[str, str]  # of the columns in the source, for messages

    def place(self, index: int) -> str:
        """Returns where a row of `frame` stands in the file, for a message."""
        row = int(self.frame["row"][index])
        text = f"{self.source}, row {row + 1:,}"
        if self.first_line is None:
            return text
        return f"{text} (line {row + self.first_line:,})"


def file_batches(
    path: pathlib.Path,
    layout: str | Dialect | None,
    columns: Columns,
    separator: str | None = None,
) -> Iterator[Batch]:
    """Yields the rows of a file, or of all files of a folder.

    Args:
      layout: one of `layouts.LAYOUTS`; the dialect of a text file; or None
        for a table with a header.
      columns: a table's names of ``user``, ``item`` and possibly ``rating``.
      separator: of a text table; None guesses.

    Raises:
      VaecfError: missing, empty or damaged file, or a missing column.
    """
    for file in layouts.files_of(path):
        with polars_errors(file):
            if layout == "netflix":
                yield from _netflix_batches(file)
            elif layout == "lightgcn_txt":
                yield from _lightgcn_batches(file)
            else:
                yield from _table_batches(file, layout, columns, separator)


def frame_batches(frame: Any, columns: Columns) -> Iterator[Batch]:
    """Yields the rows of a pandas or polars (lazy) frame.

    Raises:
      VaecfError: another type, or a missing column.
    """
    import polars as pl

    source = "the DataFrame"
    if not isinstance(frame, (pl.DataFrame, pl.LazyFrame)):
        if not hasattr(frame, "columns") and hasattr(frame, "to_pandas"):
            frame = frame.to_pandas()
        if type(frame).__module__.split(".")[0] != "pandas":
            raise VaecfError(
                f"cannot read ratings from {type(frame).__name__}; pass a "
                "file, or a pandas or polars DataFrame"
            )
        names = [str(name) for name in frame.columns]
        frame = pl.LazyFrame(
            {
                name: _from_pandas(frame.iloc[:, names.index(name)])
                for name in _pick_columns(source, names, columns).values()
            }
        )
    with polars_errors(source):
        yield from _lazy_batches(frame.lazy(), source, columns)


def _table_batches(
    path: pathlib.Path,
    layout: str | Dialect | None,
    columns: Columns,
    separator: str | None,
) -> Iterator[Batch]:
    import polars as pl

    if layouts.is_parquet(path):
        lazy = pl.scan_parquet(path, glob=False)
        return _lazy_batches(lazy, str(path), columns)
    dialect = layouts.dialect_of(path, layout, columns, separator)
    lazy = _scan_text(
        path,
        separator=dialect.separator,
        has_header=dialect.header,
        quote_char='"' if dialect.header else None,
    )
    wanted = {role: dialect.columns[role] for role in columns}
    first_line = 2 if dialect.header else 1
    return _lazy_batches(lazy, str(path), wanted, first_line)


def _netflix_batches(path: pathlib.Path) -> Iterator[Batch]:
    import polars as pl

    movie = layouts.first_line(path).rstrip(":")
    # polars expects as many fields as the first line it reads has, and a
    # movie's line has only one.
    lazy = _scan_text(path, skip_rows=1)
    if (width := len(lazy.collect_schema())) != 3:
        raise VaecfError(
            f"{path}: line 2 has {width} fields instead of user,rating,date; "
            "is this a Netflix Prize file?"
        )
    for batch in _lazy_batches(lazy, str(path), {"user": 0, "rating": 1}, 2):
        is_movie = (
            pl.col("user").str.ends_with(":") & pl.col("rating").is_null()
        )
        frame = batch.frame.with_columns(
            item=pl.when(is_movie)
            .then(pl.col("user").str.strip_chars_end(":"))
            .forward_fill()
            .fill_null(movie)
        )
        if frame.height:
            movie = frame["item"][-1]
        names = batch.names | {"item": "field 1"}
        yield batch._replace(frame=frame.filter(~is_movie), names=names)


def _lightgcn_batches(path: pathlib.Path) -> Iterator[Batch]:
    import polars as pl

    lines = _scan_text(path, separator="\n")
    words = pl.col("line").str.strip_chars(" ").str.split(" ")
    for batch in _lazy_batches(lines, str(path), {"line": 0}, 1):
        frame = (
            batch.frame.select(
                "row", user=words.list.first(), item=words.list.slice(1)
            )
            .filter(pl.col("item").list.len() > 0)  # a user without items
            .explode("item")
        )
        names = {"user": "field 1", "item": "field 2"}
        yield batch._replace(frame=frame, names=names)


def _scan_text(path: pathlib.Path, **options: Any) -> pl.LazyFrame:
    """Opens a plain or gzipped text file with all columns as strings.

    Ids stay strings on purpose: read as numbers, ``007`` and ``7`` would be
    one item, and a column that turns to letters at row 20,000 would fail.
    """
    import polars as pl

    options = {"has_header": False, "quote_char": None, **options}
    return pl.scan_csv(path, infer_schema=False, glob=False, **options)


def _pick_columns(
    source: str, names: Sequence[str], columns: Columns
) -> dict[str, str]:
    """Returns the table's own name of each column."""
    picked: dict[str, str] = {}
    for role, wanted in columns.items():
        if isinstance(wanted, int):
            if wanted >= len(names):
                raise VaecfError(
                    f"{source}: a line has {len(names)} fields, {role} would "
                    f"be number {wanted + 1}; is this the right file?"
                )
            wanted = names[wanted]
        elif wanted not in names:
            raise VaecfError(
                f"{source} has no column {wanted!r}"
                f"{did_you_mean(wanted, names)} (it has {', '.join(names)}; "
                f"choose with {role}_column)"
            )
        picked[role] = wanted
    if len(set(picked.values())) < len(picked):
        raise VaecfError(
            f"{source}: one column cannot be two things ({picked})"
        )
    return picked


def _lazy_batches(
    lazy: pl.LazyFrame,
    source: str,
    columns: Columns,
    first_line: int | None = None,
) -> Iterator[Batch]:
    """Streams the chosen columns, renamed to their roles."""
    import polars as pl

    picked = _pick_columns(source, lazy.collect_schema().names(), columns)
    names = {
        role: f"field {name + 1}"
        if isinstance(name, int)
        else f"column {name!r}"
        for role, name in columns.items()
    }
    chosen = lazy.select(
        pl.col(name).alias(role) for role, name in picked.items()
    )
    rows = 0
    for frame in chosen.collect_batches(
        chunk_size=BATCH_ROWS, maintain_order=True
    ):
        numbered = frame.with_row_index("row", offset=rows)
        yield Batch(numbered, source, first_line, names)
        rows += frame.height


def _from_pandas(series: Any) -> pl.Series:
    """Converts a pandas column without pyarrow, which is not a dependency."""
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
