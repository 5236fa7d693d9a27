"""Streams the rows of files and frames, in order and in bounded memory.

This module splits tables into columns. `vaecf.data.readers` decides what the
values mean.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data import layouts
from vaecf.data.layouts import Columns, Dialect, polars_errors
from vaecf.errors import VaecfError, did_you_mean

if TYPE_CHECKING:
    import polars as pl

# Enough rows to keep all cores busy; with string ids still below 200 MB.
BATCH_ROWS = 1 << 20


class Batch(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
      frame: columns ``user``, ``item`` and, if asked for, ``rating``, with
        the types of the source, and ``row``, the row's number from 0.
      source: name of the file, for messages.
      first_line: line of row 0 in the file, or None if lines do not matter.
      names: names of the columns in the source, for messages.
    """

    frame: pl.DataFrame
    source: str
    first_line: int | None
    names: dict[str, str]

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
      path: file or folder.
      layout: one of `layouts.LAYOUTS`; the dialect of a text file; or None
        for a table with a header.
      columns: columns of a table. With a layout only ``rating`` matters: None
        leaves the ratings out.
      separator: of a text table; None guesses.

    Raises:
      VaecfError: missing, empty or damaged file, or a missing column.
    """
    files = layouts.files_of(path, layout if isinstance(layout, str) else None)
    for file in files:
        if layout == "netflix":
            yield from _netflix_batches(file)
        elif layout == "lightgcn_txt":
            yield from _lightgcn_batches(file)
        elif layout is None or layout == "interactions_parquet":
            yield from _table_batches(file, columns, separator)
        else:
            dialect = (
                layouts.TEXT_LAYOUTS[layout]
                if isinstance(layout, str)
                else layout
            )
            if columns.rating is None:
                dialect = dialect._replace(
                    columns=dialect.columns._replace(rating=None)
                )
            yield from _text_batches(file, dialect)


def frame_batches(frame: Any, columns: Columns) -> Iterator[Batch]:
    """Yields the rows of a pandas or polars frame.

    Args:
      frame: polars DataFrame or LazyFrame, pandas DataFrame, or an object
        with a method ``to_pandas``.
      columns: names of the columns.

    Raises:
      VaecfError: another type, or a missing column.
    """
    import polars as pl

    source = "the DataFrame"
    if isinstance(frame, (pl.DataFrame, pl.LazyFrame)):
        return _lazy_batches(frame.lazy(), source, _roles(columns))
    if not hasattr(frame, "columns") and hasattr(frame, "to_pandas"):
        frame = frame.to_pandas()
    if type(frame).__module__.split(".")[0] != "pandas":
        raise VaecfError(
            f"cannot read ratings from {type(frame).__name__}; pass a file, or "
            "a pandas or polars DataFrame"
        )
    names = [str(name) for name in frame.columns]
    picked = _pick_columns(source, names, _roles(columns))
    lazy = pl.LazyFrame(
        {
            name: _from_pandas(frame.iloc[:, names.index(name)])
            for name in picked.values()
        }
    )
    return _lazy_batches(lazy, source, _roles(columns))


def _table_batches(
    path: pathlib.Path, columns: Columns, separator: str | None
) -> Iterator[Batch]:
    import polars as pl

    if not layouts.is_parquet(path):
        dialect = layouts.text_dialect(path, columns, separator)
        return _text_batches(path, dialect)
    with polars_errors(path):
        lazy = pl.scan_parquet(path, glob=False)
    return _lazy_batches(lazy, str(path), _roles(columns))


def _text_batches(path: pathlib.Path, dialect: Dialect) -> Iterator[Batch]:
    lazy = _scan_text(
        path,
        separator=dialect.separator,
        has_header=dialect.header,
        quote_char='"' if dialect.header else None,
    )
    first_line = 2 if dialect.header else 1
    return _lazy_batches(lazy, str(path), _roles(dialect.columns), first_line)


def _netflix_batches(path: pathlib.Path) -> Iterator[Batch]:
    import polars as pl

    movie = layouts.first_line(path).rstrip(":")
    # polars expects as many fields as the first line it reads has, and a
    # movie's line has only one.
    lazy = _scan_text(path, skip_rows=1)
    with polars_errors(path):
        width = len(lazy.collect_schema())
    if width != 3:
        raise VaecfError(
            f"{path}: line 2 has {width} fields instead of user,rating,date; "
            "is this a Netflix Prize file?"
        )
    roles: dict[str, str | int] = {"user": 0, "rating": 1}
    for batch in _lazy_batches(lazy, str(path), roles, 2):
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

    unquoted = {"has_header": False, "quote_char": None}
    with polars_errors(path):
        return pl.scan_csv(
            path, infer_schema=False, glob=False, **{**unquoted, **options}
        )


def _roles(columns: Columns) -> dict[str, str | int]:
    return {k: v for k, v in columns._asdict().items() if v is not None}


def _pick_columns(
    source: str, names: Sequence[str], roles: Mapping[str, str | int]
) -> dict[str, str]:
    """Returns the table's own name of each column in `roles`."""
    picked: dict[str, str] = {}
    for role, wanted in roles.items():
        if isinstance(wanted, int):
            if wanted >= len(names):
                raise VaecfError(
                    f"{source}: a line has {len(names)} fields, {role} would "
                    f"be number {wanted + 1}; is this the right file?"
                )
            picked[role] = names[wanted]
        elif wanted not in names:
            raise VaecfError(
                f"{source} has no column {wanted!r}"
                f"{did_you_mean(wanted, names)} (it has {', '.join(names)}; "
                f"choose with {role}_column)"
            )
        else:
            picked[role] = wanted
    if len(set(picked.values())) < len(picked):
        raise VaecfError(
            f"{source}: one column cannot be two things ({picked})"
        )
    return picked


def _lazy_batches(
    lazy: pl.LazyFrame,
    source: str,
    roles: Mapping[str, str | int],
    first_line: int | None = None,
) -> Iterator[Batch]:
    """Streams the chosen columns, renamed to their roles."""
    import polars as pl

    with polars_errors(source):
        picked = _pick_columns(source, lazy.collect_schema().names(), roles)
    names = {
        role: f"field {wanted + 1}"
        if isinstance(wanted, int)
        else f"column {wanted!r}"
        for role, wanted in roles.items()
    }
    chosen = lazy.select(
        pl.col(name).alias(role) for role, name in picked.items()
    )
    rows = 0
    with polars_errors(source):
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
