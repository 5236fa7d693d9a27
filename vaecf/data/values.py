"""Converts the columns of a batch: ids, ratings, times, parts of a split."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.data.id_table import text_of
from vaecf.data.row_batches import Batch
from vaecf.errors import VaecfError, short

if TYPE_CHECKING:
    import polars as pl

# The parts of a split, by their codes, and the words for them in data.
PARTS = ("train", "validation", "test")
_WORDS = {
    **dict.fromkeys(("train", "training", "false", "0", "0.0"), 0),
    **dict.fromkeys(("validation", "valid", "val"), 1),
    **dict.fromkeys(("test", "testing", "true", "1", "1.0"), 2),
}
_DATE = r"^\d{4}-\d\d-\d\d"
_A_TIME = "a time: a number, or a date such as 2024-02-29 or 2024-02-29 13:45"


def refuse_lists(batch: Batch) -> None:
    """Raises if all items are lists that were written as texts."""
    items = batch.frame["item"]
    is_list = len(items) > 0 and str(items[0]).startswith("[")
    is_list = is_list and items.str.contains(r"^\[.*\]$").all()
    if is_list and items.str.contains(",").any():
        raise VaecfError(
            f"{batch.place(0)}: {batch.names['item']} holds "
            f"{short(items[0])}, a list as a text; write one row for each item"
        )


def id_texts(series: pl.Series, batch: Batch, role: str) -> pl.Series:
    """Returns the texts of ids, as `id_table.text_of` defines them."""
    import polars as pl

    dtype = series.dtype
    if dtype.is_float():
        series = series.fill_nan(None)
        # A column of integers with gaps turns to floats in pandas.
        whole = series.cast(pl.Int64, strict=False)
        if whole.cast(dtype).eq_missing(series).all():
            return whole.cast(pl.String)
    if dtype.is_nested():
        raise VaecfError(
            f"{batch.source}: the {role} column has type {dtype}; ids "
            "are integers or strings"
        )
    if dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum):
        return series.cast(pl.String)
    distinct = series.drop_nulls().unique()
    try:
        texts = pl.Series(map(text_of, distinct.to_list()), dtype=pl.String)
    except VaecfError as error:
        raise VaecfError(
            f"{batch.source}: {batch.names[role]}: {error}"
        ) from None
    return series.replace_strict(
        distinct, texts, default=None, return_dtype=pl.String
    )


def convert_ratings(batch: Batch) -> tuple[pl.Series, int]:
    """Returns the ratings as float64 ``[rows]``, and the decimal commas.

    Raises:
      VaecfError: a rating is missing, not a number, or not finite.
    """
    import polars as pl

    ratings = batch.frame["rating"]
    if isinstance(ratings.dtype, (pl.Categorical, pl.Enum)):
        ratings = ratings.cast(pl.String)  # polars would take their codes
    kind = ratings.dtype
    if not (kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Null)):
        raise VaecfError(
            f"{batch.source}: {batch.names['rating']} has type {short(kind)}; "
            "ratings are numbers"
        )
    if ratings.dtype == pl.String and batch.padded:
        ratings = ratings.str.strip_chars()
    numbers = ratings.cast(pl.Float64, strict=False)
    good = numbers.is_finite().fill_null(False)
    if good.all():
        return numbers, 0
    commas = 0
    if ratings.dtype == pl.String and batch.first_line is not None:
        # With three digits, a comma could separate thousands.
        is_comma = ratings.str.contains(r"^-?\d+,\d{1,2}$")
        commas = int(is_comma.sum())
        numbers = ratings.str.replace(",", ".", literal=True)
        numbers = numbers.cast(pl.Float64, strict=False)
        good = (good | is_comma) & numbers.is_finite().fill_null(False)
    if not good.all():
        row = int((~good).arg_true()[0])
        value = "" if ratings[row] is None else ratings[row]
        raise VaecfError(
            f"{batch.place(row)}: {batch.names['rating']} holds {short(value)}"
            ", which is not a number; correct it, or drop such rows"
        )
    return numbers, commas


def convert_times(batch: Batch) -> pl.Series:
    """Returns the times as Int64, Float64, or UTC datetimes in microseconds.

    Texts are numbers, or dates and times in ISO 8601. Times without a zone
    are taken for UTC.

    Raises:
      VaecfError: a time is missing, or is none of these.
    """
    import polars as pl

    times = _plain(batch, "time")
    kind = times.dtype
    if isinstance(kind, pl.Datetime) and kind.time_zone is not None:
        times = times.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if kind == pl.Date or isinstance(kind, pl.Datetime):
        dates = times.cast(pl.Datetime("us"))
        return _all_there(dates, dates.is_not_null(), batch, "time", _A_TIME)
    if kind.is_integer() or kind == pl.String:
        whole = times.cast(pl.Int64, strict=False)
        if whole.null_count() == 0:
            return whole
    if kind.is_numeric() or kind in (pl.String, pl.Null):
        numbers = times.cast(pl.Float64, strict=False)
        good = numbers.is_finite().fill_null(False)
        if kind != pl.String or not times.str.contains(_DATE).any():
            return _all_there(numbers, good, batch, "time", _A_TIME)
        distinct = times.drop_nulls().unique()
        dates = times.replace_strict(
            distinct,
            pl.Series(map(_date, distinct), dtype=pl.Datetime("us")),
            default=None,
            return_dtype=pl.Datetime("us"),
        )
        return _all_there(dates, dates.is_not_null(), batch, "time", _A_TIME)
    raise VaecfError(
        f"{batch.source}: {batch.names['time']} has type {short(kind)}; times "
        "are numbers or dates"
    )


def parse_time(value: Any) -> np.generic:
    """Returns one time as NumPy's int64, float64 or datetime64[us], in UTC.

    Raises:
      VaecfError: it is neither a number nor a date.
    """
    import polars as pl

    frame = pl.DataFrame({"time": [text_of(value)]}).with_row_index("row")
    try:
        return convert_times(Batch(frame, "", None, {"time": ""})).to_numpy()[0]
    except VaecfError:
        raise VaecfError(f"test_time={short(value)} is not {_A_TIME}") from None


def convert_parts(batch: Batch) -> pl.Series:
    """Returns the part of the split that each row is in, Int8 codes of `PARTS`.

    Raises:
      VaecfError: a value is missing, or no word for a part.
    """
    import polars as pl

    texts = _plain(batch, "split").cast(pl.String).str.to_lowercase()
    parts = texts.replace_strict(_WORDS, default=None, return_dtype=pl.Int8)
    what = f"one of {', '.join(PARTS)}, nor true or false for test or train"
    return _all_there(parts, parts.is_not_null(), batch, "split", what)


def _plain(batch: Batch, role: str) -> pl.Series:
    """Returns a column whose texts are stripped and no categories."""
    import polars as pl

    values = batch.frame[role]
    if isinstance(values.dtype, (pl.Categorical, pl.Enum)):
        values = values.cast(pl.String)  # polars would take their codes
    if values.dtype == pl.String and batch.padded:
        values = values.str.strip_chars()
    return values


def _date(text: str) -> datetime.datetime | None:
    """Returns a date in ISO 8601 as a datetime in UTC without a zone."""
    if not re.match(_DATE, text):
        return None
    try:
        time = datetime.datetime.fromisoformat(text)
        if time.tzinfo is None:
            return time
        return time.astimezone(datetime.UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):  # in UTC, it may be in the year 0
        return None


def _all_there(
    converted: pl.Series, good: pl.Series, batch: Batch, role: str, what: str
) -> pl.Series:
    """Returns the converted values; raises for the first that is not good."""
    if good.all():
        return converted
    row = int((~good).arg_true()[0])
    value = batch.frame[role][row]
    found = "nothing" if value is None or value == "" else short(value)
    raise VaecfError(
        f"{batch.place(row)}: {batch.names[role]} holds {found}, which is not "
        f"{what}; correct it, or drop such rows"
    )
