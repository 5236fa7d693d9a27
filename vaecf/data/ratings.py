"""Anyone's ratings as implicit interactions, in file order, raw ids kept."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import layouts
from vaecf.data.layouts import Batch, Columns
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import polars as pl

# An integer as str() would write it: one text for one number.
_CANONICAL = r"^(0|-?[1-9][0-9]{0,18})$"


class ReadReport(NamedTuple):
    """What happened while reading.

    Attributes:
      rows: rows in the source.
      below_min_rating: rows left out by the threshold.
      blank_rows: empty lines, left out and not part of ``rows``.
      users: distinct users before the threshold, None if not counted.
      items: distinct items before the threshold, None if not counted.
      layout: the known layout, or None for a table of one's own.
    """

    rows: int
    below_min_rating: int
    blank_rows: int
    users: int | None
    items: int | None
    layout: str | None


class Ratings(NamedTuple):
    """Interactions as pairs of codes, in the order of the source.

    Attributes:
      user: int32 ``[n]``, places in ``user_ids``.
      item: int32 ``[n]``, places in ``item_ids``.
      user_ids: raw ids in ascending order, int64 or object of ``str``
        (strings in the order of their code points). Int64 only if every id
        reads as an integer written plainly: ``007`` keeps ids strings.
      item_ids: likewise.
      timestamp: int64 ``[n]``, seconds since 1970 (or whatever unit the
        source's integers have); None if not asked for.
      report: counts.
    """

    user: np.ndarray
    item: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    timestamp: np.ndarray | None
    report: ReadReport

    def __len__(self) -> int:  # type: ignore[override]
        """Number of interactions."""
        return len(self.user)

    def where(self, keep: np.ndarray) -> Ratings:
        """The rows chosen by a boolean mask or by positions; same codes."""
        stamps = self.timestamp
        return self._replace(
            user=self.user[keep],
            item=self.item[keep],
            timestamp=stamps[keep] if stamps is not None else None,
        )


def read_ratings(
    source: Any,
    *,
    layout: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    min_rating: float | None = None,
    timestamp_column: str | None = None,
    separator: str | None = None,
    count_all: bool = False,
) -> Ratings:
    """Reads interactions from a file, a folder or a DataFrame.

    A file is streamed: at most the pairs that remain are held, 8 bytes each,
    besides a batch of a million rows.

    Args:
      source: path of a CSV, TSV (both also gzipped) or Parquet file, of a
        file or folder in one of ``layouts.LAYOUTS``, or a pandas or polars
        DataFrame.
      layout: one of ``layouts.LAYOUTS``; None looks at the file.
      user_column: name of the user column; naming it (or ``item_column``)
        makes the source a table with a header, whatever it looks like.
      item_column: name of the item column.
      rating_column: name of the rating column, for tables.
      min_rating: keep rows with ``rating >= min_rating``; None keeps all.
      timestamp_column: name of the time column, or None to do without.
      separator: of a text table; None goes by the name and the header.
      count_all: also count users and items before the threshold.

    Returns:
      All rows that remain, repeated pairs included: see
      ``collapse_duplicates``.

    Raises:
      VaecfError: one line with the file, and the row and column where there
        is one: missing or empty file, missing column, a rating that is not a
        number, a missing id, a threshold without ratings.
    """
    named = user_column is not None or item_column is not None
    is_frame = not isinstance(source, (str, os.PathLike))
    path = None if is_frame else layouts.existing(pathlib.Path(source))
    if named:
        layout = None
    elif path is not None and layout is None:
        layout = layouts.detect(path)
    if layout is not None and layout not in layouts.LAYOUTS:
        raise VaecfError(
            f"unknown layout {layout!r}{layouts.nearest(layout, layouts.LAYOUTS)}"
            f" (there are {', '.join(layouts.LAYOUTS)})"
        )
    wants_rating = min_rating is not None
    if layout is None and wants_rating != (rating_column is not None):
        raise VaecfError(
            "--min_rating needs --rating_column to name the column it "
            "compares"
            if wants_rating
            else f"--rating_column={rating_column} needs --min_rating: rows "
            "with at least that rating count as interactions"
        )
    columns = Columns(
        user_column or "user",
        item_column or "item",
        (rating_column or "rating") if wants_rating else None,
        timestamp_column,
    )

    def batches() -> Iterator[Batch]:
        if path is None:
            return layouts.frame_batches(source, columns)
        return _file_batches(path, layout, columns, separator)

    name = "the DataFrame" if path is None else str(path)
    if layout in ("lightgcn_txt", "interactions_parquet") and wants_rating:
        raise VaecfError(
            f"{path} ({layout}) holds no ratings: leave out --min_rating, or "
            "name the columns with --user_column, --item_column and "
            "--rating_column"
        )
    return _collect(batches, name, min_rating, layout, count_all)


def _file_batches(
    path: pathlib.Path,
    layout: str | None,
    columns: Columns,
    separator: str | None,
) -> Iterator[Batch]:
    """Rows of every file that ``path`` stands for."""
    wants_time = columns.timestamp is not None
    for file in layouts.files_of(path, layout):
        if layout == "netflix":
            yield from layouts.netflix_batches(file, wants_time)
        elif layout == "lightgcn_txt":
            yield from layouts.lightgcn_batches(file)
        elif layout in layouts.TEXT_LAYOUTS:
            shape = layouts.TEXT_LAYOUTS[layout]
            picked = shape.columns._replace(
                rating=None if columns.rating is None else shape.columns.rating,
                timestamp=shape.columns.timestamp if wants_time else None,
            )
            yield from layouts.text_batches(
                file, shape.separator, shape.header, picked
            )
        elif layouts.is_parquet(file):
            yield from layouts.parquet_batches(file, columns)
        else:
            mark = separator or layouts.guess_separator(file)
            yield from layouts.text_batches(file, mark, True, columns)


def _collect(
    batches: Callable[[], Iterator[Batch]],
    name: str,
    min_rating: float | None,
    layout: str | None,
    count_all: bool,
) -> Ratings:
    """Checks, thresholds and encodes batch by batch."""
    import polars as pl

    # Dictionaries of our own, filled as ids turn up, freed with the columns.
    kinds = {
        role: pl.Categorical(pl.Categories.random())
        for role in ("user", "item")
    }
    seen = {"user": _Distinct(), "item": _Distinct()}
    kept: list[pl.DataFrame] = []
    rows = blank = 0
    for unchecked in batches():
        batch = _check_ids(unchecked)
        ids = batch.frame
        blank += unchecked.frame.height - ids.height
        rows += ids.height
        if min_rating is not None:
            enough = _numbers(batch) >= min_rating
            if not count_all:
                ids = ids.filter(enough)
        coded = ids.with_columns(
            pl.col(role).cast(kind) for role, kind in kinds.items()
        )
        if min_rating is not None and count_all:
            for role, distinct in seen.items():
                distinct.add(coded[role].to_physical().to_numpy())
            coded = coded.filter(enough)
        if "timestamp" in coded.columns:
            coded = coded.with_columns(timestamp=_seconds(batch, coded))
        kept.append(coded.drop("rating", strict=False))
    if not rows:
        raise VaecfError(f"{name} holds no rows; give a file with ratings")
    frame = pl.concat(kept)
    kept.clear()
    if not frame.height:
        raise VaecfError(
            f"{name}: none of {rows:,} rows has a rating of at least "
            f"{min_rating:g}; lower --min_rating"
        )
    user, user_ids = _encode(frame["user"])
    item, item_ids = _encode(frame["item"])
    for role, ids_of_role in (("user", user_ids), ("item", item_ids)):
        _refuse_nan(batches, role, ids_of_role)
    counted = {
        role: distinct.count() if min_rating is not None else len(ids)
        for (role, distinct), ids in zip(
            seen.items(), (user_ids, item_ids), strict=True
        )
    }
    known = count_all or min_rating is None
    stamps = frame["timestamp"] if "timestamp" in frame.columns else None
    report = ReadReport(
        rows,
        rows - frame.height,
        blank,
        counted["user"] if known else None,
        counted["item"] if known else None,
        layout,
    )
    return Ratings(
        user,
        item,
        user_ids,
        item_ids,
        stamps.to_numpy() if stamps is not None else None,
        report,
    )


class _Distinct:
    """How many different codes there were."""

    def __init__(self) -> None:
        self._seen = np.zeros(0, bool)

    def add(self, codes: np.ndarray) -> None:
        top = int(codes.max()) + 1 if len(codes) else 0
        if top > len(self._seen):
            grown = np.zeros(max(top, 2 * len(self._seen)), bool)
            grown[: len(self._seen)] = self._seen
            self._seen = grown
        self._seen[codes] = True

    def count(self) -> int:
        return int(self._seen.sum())


def _check_ids(batch: Batch) -> Batch:
    """The batch with ids as strings, and without the blank lines of a text.

    Raises:
      VaecfError: an id is missing.
    """
    import polars as pl

    frame = batch.frame.with_columns(
        _as_text(batch.frame[role], batch, role) for role in ("user", "item")
    )
    batch = batch._replace(frame=frame)
    missing = {
        role: frame[role].is_null() | (frame[role] == "").fill_null(False)
        for role in ("user", "item")
    }
    if not (missing["user"].any() or missing["item"].any()):
        return batch
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    if batch.line is None:  # only a text has lines
        blank = pl.repeat(False, frame.height, eager=True)
    for role, mask in missing.items():
        bad = mask & ~blank
        if bad.any():
            raise VaecfError(
                f"{batch.place(int(bad.arg_true()[0]))}: "
                f"{batch.names[role]} has no {role} id (empty or NaN); fill "
                "it in, or drop such rows"
            )
    return batch.where(~blank)


def _refuse_nan(
    batches: Callable[[], Iterator[Batch]], role: str, ids: np.ndarray
) -> None:
    """A missing value that some program has spelt out is no id.

    Raises:
      VaecfError: an id is ``NaN`` or ``nan``.
    """
    if ids.dtype != object:
        return
    spelt = {"nan", "NaN"}.intersection(ids.tolist())
    if not spelt:
        return
    for unchecked in batches():  # again, to name the row
        batch = _check_ids(unchecked)
        found = batch.frame[role].is_in(list(spelt))
        if found.any():
            raise VaecfError(
                f"{batch.place(int(found.arg_true()[0]))}: "
                f"{batch.names[role]} has no {role} id (NaN); fill it in, or "
                "drop such rows"
            )


def _as_text(series: pl.Series, batch: Batch, role: str) -> pl.Series:
    """Ids as strings; whole floats as the integers that they were."""
    import polars as pl

    if series.dtype == pl.String:
        return series
    if series.dtype.is_float():
        series = series.fill_nan(None)
        whole = series.cast(pl.Int64, strict=False)
        if (whole.cast(series.dtype) == series).all():
            series = whole
    if series.dtype.is_nested() or series.dtype == pl.Binary:
        raise VaecfError(
            f"{batch.source}: the {role} column has type {series.dtype}; ids "
            "are integers or strings"
        )
    return series.cast(pl.String)


def _numbers(batch: Batch) -> pl.Series:
    """Ratings as float64.

    Raises:
      VaecfError: one is missing, no number, or not finite.
    """
    import polars as pl

    ratings = batch.frame["rating"]
    numbers = ratings.cast(pl.Float64, strict=False)
    good = numbers.is_finite().fill_null(False)
    if not good.all():
        row = int((~good).arg_true()[0])
        value = "" if ratings[row] is None else ratings[row]
        raise VaecfError(
            f"{batch.place(row)}: {batch.names['rating']} holds {value!r}, "
            "which is not a number; correct it, or drop such rows"
        )
    return numbers


def _seconds(batch: Batch, rows: pl.DataFrame) -> pl.Series:
    """Times as int64: integers as they are, dates as seconds since 1970.

    Raises:
      VaecfError: a time is missing or of no known form.
    """
    import polars as pl

    series = rows["timestamp"]
    if series.dtype == pl.String:
        numbers = series.cast(pl.Float64, strict=False).cast(
            pl.Int64, strict=False
        )
        if numbers.null_count():
            try:
                series = series.str.to_datetime(time_zone="UTC", strict=False)
            except pl.exceptions.PolarsError:  # not one time among them
                series = pl.Series([None] * len(series), dtype=pl.Int64)
        else:
            series = numbers
    if series.dtype.is_temporal():
        series = series.cast(pl.Datetime("us")).dt.epoch("s")
    times = series.cast(pl.Int64, strict=False)
    if times.null_count():
        value = rows["timestamp"].filter(times.is_null())[0]
        raise VaecfError(
            f"{batch.source}: timestamp {value!r} is neither a number nor a "
            "date; correct it, or leave out --timestamp_column"
        )
    return times.alias("timestamp")


def _encode(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 into ascending raw ids, which are integers if all can be."""
    import polars as pl

    distinct = column.unique()
    physical = distinct.to_physical().to_numpy()
    texts = distinct.cast(pl.String)
    plain = texts.str.contains(_CANONICAL)
    numbers = texts.cast(pl.Int64, strict=False)
    ids: pl.Series = (
        numbers if plain.all() and not numbers.null_count() else texts
    )
    order = ids.arg_sort().to_numpy()
    codes = np.empty(int(physical.max()) + 1, np.int32)
    codes[physical[order]] = np.arange(len(order), dtype=np.int32)
    ids = ids.gather(order)
    if ids.dtype == pl.Int64:
        raw = ids.to_numpy()
    else:
        raw = np.empty(len(ids), object)
        raw[:] = ids.to_list()
    return codes[column.to_physical().to_numpy()], raw


def collapse_duplicates(ratings: Ratings) -> tuple[Ratings, int]:
    """Keeps the first row of every (user, item) pair.

    Returns:
      The rows that remain, in their order, and how many were left out.
    """
    from vaecf.data.interactions import Interactions

    shape = len(ratings.user_ids), len(ratings.item_ids)
    # Counting is linear; sorting is only paid for where there is something.
    _, duplicates = Interactions.from_pairs(
        ratings.user, ratings.item, *shape
    )
    if not duplicates:
        return ratings, 0
    keys = ratings.user.astype(np.int64) * shape[1] + ratings.item
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return ratings.where(first), duplicates
