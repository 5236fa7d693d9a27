"""Values of a batch: ids as text, ratings as numbers, times as seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vaecf.data.batches import Batch
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import polars as pl

# An integer as str() would write it: one text for one number.
_CANONICAL = r"^(0|-?[1-9][0-9]{0,18})$"


def check_ids(batch: Batch) -> Batch:
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


def refuse_nan(
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
        batch = check_ids(unchecked)
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


def numbers_of(batch: Batch) -> pl.Series:
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


def seconds_of(batch: Batch, rows: pl.DataFrame) -> pl.Series:
    """Times as int64: integers as they are, dates as seconds since 1970.

    Raises:
      VaecfError: a time is missing or of no known form.
    """
    import polars as pl

    series = rows["timestamp"]
    if series.dtype == pl.String:
        times = series.cast(pl.Int64, strict=False)
        numbers = series.cast(pl.Float64, strict=False)
        times = times.fill_null(numbers.cast(pl.Int64, strict=False))
        if times.null_count():
            dates = series.filter(times.is_null())
            try:
                dates = dates.str.to_datetime(time_zone="UTC", strict=False)
            except pl.exceptions.PolarsError:
                dates = pl.Series([None] * len(dates), dtype=pl.Datetime)
            places = times.is_null().arg_true()
            times = times.scatter(places, dates.dt.epoch("s"))
    elif series.dtype in (pl.Date, pl.Datetime):
        times = series.dt.epoch("s")
    else:
        times = series.cast(pl.Int64, strict=False)
    if times.null_count():
        value = rows["timestamp"].filter(times.is_null())[0]
        raise VaecfError(
            f"{batch.source}: timestamp {value!r} is neither a number nor a "
            "date; correct it, or leave out --timestamp_column"
        )
    return times.alias("timestamp")


def encode(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
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
