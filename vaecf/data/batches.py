"""Rows of a file or a frame, batch by batch, in order.

A file larger than memory is never held whole. What the rows mean
(thresholds, ids, errors in them) is the business of ``vaecf.data.values`` and
``vaecf.data.readers``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data.layouts import Columns, first_line, nearest, polars_errors
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

# Rows handed over at once: enough to keep every core busy, few enough that a
# batch with string ids stays below 200 MB.
BATCH_ROWS = 1 << 20


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
        return (
            text if self.line is None else f"{text} (line {self.line + at:,})"
        )

    def where(self, keep: pl.Series) -> Batch:
        """The rows of a boolean mask, which remember where they stood."""
        positions = keep.arg_true().to_numpy()
        if self.positions is not None:
            positions = self.positions[positions]
        return self._replace(frame=self.frame.filter(keep), positions=positions)


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

    with polars_errors(path):
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

    with polars_errors(path):
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
    with polars_errors(source):
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
    with polars_errors(path):
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

    with polars_errors(path):
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
            batch.frame.select(
                user=words.list.first(), item=words.list.slice(1)
            )
            .filter(pl.col("item").list.len() > 0)
            .explode("item")
        )
        yield batch._replace(frame=frame, line=None)
