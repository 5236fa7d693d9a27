"""Reads ratings from files and frames as pairs of user and item."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import layouts
from vaecf.data.interactions import Interactions
from vaecf.data.layouts import Dialect
from vaecf.data.row_batches import Batch, file_batches, frame_batches
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import polars as pl

# An integer as str() writes it: one text for one number.
_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"


class Ratings(NamedTuple):
    """Interactions as pairs of codes, in the order of the source.

    Int64 ids are used only if every id is an integer in its usual form: one
    ``007`` makes all ids strings, in the order of their code points.
    """

    user: np.ndarray  # int32 [n], indices into user_ids
    item: np.ndarray  # int32 [n], indices into item_ids
    user_ids: np.ndarray  # ascending raw ids, int64 or object of str
    item_ids: np.ndarray
    # For the manifest: `rows_read`, `blank_rows` (not part of the rows),
    # `below_min_rating`, and the distinct `users_read` and `items_read` before
    # the threshold, None if they were not counted.
    counts: dict[str, Any]

    @property
    def n(self) -> int:
        """Number of rows; ``len`` is the length of the tuple."""
        return len(self.user)

    def where(self, keep: np.ndarray) -> Ratings:
        """Returns the rows of a boolean mask or of positions; same codes."""
        return self._replace(user=self.user[keep], item=self.item[keep])


def read_ratings(
    source: Any,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    min_rating: float | None = None,
    separator: str | None = None,
    dialect: Dialect | None = None,
    count_all: bool = False,
) -> Ratings:
    """Reads interactions from a file, a folder or a DataFrame.

    A file is streamed: memory holds a batch of a million rows and 8 bytes for
    each pair that remains. Repeated pairs are kept (see
    `collapse_duplicates`).

    Args:
      source: path of a CSV, TSV (plain or gzipped) or Parquet file, of a file
        or folder in one of `layouts.LAYOUTS`, or a pandas or polars DataFrame.
      user_column: user column of a table; if this or `item_column` is given,
        a file is read as a table with a header, whatever its layout.
      min_rating: keep rows with ``rating >= min_rating``; None keeps all.
      separator: separator of a text table; None guesses by name and header.
      dialect: how to split a text file in none of the known layouts.
      count_all: also count users and items before the threshold.

    Raises:
      VaecfError: missing or empty file, missing column, a rating that is not
        a number, a missing id, or a threshold without ratings. The message
        names the file and, where there is one, the row and the column.
    """
    layout, path = None, None
    if isinstance(source, (str, os.PathLike)):
        path = pathlib.Path(source)
        if user_column is None and item_column is None:
            layout = layouts.detect(path) or dialect
    _check_threshold(path, layout, rating_column, min_rating)
    columns = {"user": user_column or "user", "item": item_column or "item"}
    if min_rating is not None:
        columns["rating"] = rating_column or "rating"
    if path is None:
        batches = frame_batches(source, columns)
    else:
        batches = file_batches(path, layout, columns, separator)
    name = "the DataFrame" if path is None else str(path)
    return _collect(batches, name, min_rating, count_all)


def collapse_duplicates(ratings: Ratings) -> tuple[Ratings, int]:
    """Keeps the first row of every (user, item) pair.

    Returns:
      The remaining rows in their order, and the number of dropped rows.
    """
    shape = len(ratings.user_ids), len(ratings.item_ids)
    # Counting is linear; sort only if there is something to collapse.
    _, duplicates = Interactions.from_pairs(ratings.user, ratings.item, *shape)
    if not duplicates:
        return ratings, 0
    keys = ratings.user.astype(np.int64) * shape[1] + ratings.item
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return ratings.where(first), duplicates


def _check_threshold(
    path: pathlib.Path | None,
    layout: str | Dialect | None,
    rating_column: str | None,
    min_rating: float | None,
) -> None:
    if layout is None and (min_rating is None) != (rating_column is None):
        raise VaecfError(
            f"min_rating={min_rating} and rating_column={rating_column} need "
            "each other: rows with at least that rating are interactions"
        )
    without = layout in ("lightgcn_txt", "interactions_parquet")
    if isinstance(layout, Dialect):
        without = "rating" not in layout.columns
    if min_rating is not None and without:
        raise VaecfError(
            f"{path} holds no ratings: leave out min_rating, or name the "
            "columns with user_column, item_column and rating_column"
        )


def _collect(
    batches: Iterator[Batch],
    name: str,
    min_rating: float | None,
    count_all: bool,
) -> Ratings:
    """Converts, thresholds and encodes the rows batch by batch."""
    import polars as pl

    # Dictionaries of our own, which are freed together with the columns.
    kinds = {
        role: pl.Categorical(pl.Categories.random())
        for role in ("user", "item")
    }
    seen = {role: np.zeros(0, np.int64) for role in kinds}  # rows per code
    kept: list[pl.DataFrame] = []
    rows = blank = 0
    for batch in batches:
        checked = convert_ids(batch)
        ids = checked.frame.select("user", "item")
        blank += batch.frame.height - ids.height
        rows += ids.height
        if min_rating is not None:
            enough = convert_ratings(checked) >= min_rating
            if not count_all:
                ids = ids.filter(enough)
        coded = ids.with_columns(
            pl.col(role).cast(kind) for role, kind in kinds.items()
        )
        if min_rating is not None and count_all:
            for role, total in seen.items():
                codes = coded[role].to_physical().to_numpy()
                seen[role] = np.bincount(codes, minlength=len(total))
                seen[role][: len(total)] += total
            coded = coded.filter(enough)
        kept.append(coded)
    if not rows:
        raise VaecfError(f"{name} holds no rows; give a file with ratings")
    frame = pl.concat(kept)
    kept.clear()
    if not frame.height:
        raise VaecfError(
            f"{name}: none of {rows:,} rows has a rating of at least "
            f"{min_rating:g}; lower min_rating"
        )
    user, user_ids = encode_ids(frame["user"])
    item, item_ids = encode_ids(frame["item"])
    counts: dict[str, int | None] = {
        "rows_read": rows,
        "blank_rows": blank,
        "below_min_rating": rows - frame.height,
        "users_read": len(user_ids),
        "items_read": len(item_ids),
    }
    if min_rating is not None:
        for role, total in seen.items():
            n = int(np.count_nonzero(total)) if count_all else None
            counts[f"{role}s_read"] = n
    return Ratings(user, item, user_ids, item_ids, counts)


def convert_ids(batch: Batch) -> Batch:
    """Converts users and items to strings and drops the blank lines of a text.

    Raises:
      VaecfError: an id is missing, or spelt ``nan`` or ``NaN``.
    """
    import polars as pl

    frame = batch.frame.with_columns(
        _as_text(batch.frame[role], batch, role) for role in ("user", "item")
    )
    missing = {
        role: frame[role].is_in(["", "nan", "NaN"]).fill_null(True)
        for role in ("user", "item")
    }
    batch = batch._replace(frame=frame)
    if not (missing["user"].any() or missing["item"].any()):
        return batch
    blank = pl.repeat(False, frame.height, eager=True)
    if batch.first_line is not None:  # only a text has blank lines
        values = pl.all().exclude("row")
        blank = frame.select(pl.all_horizontal(values.is_null())).to_series()
    for role, mask in missing.items():
        bad = mask & ~blank
        if bad.any():
            raise VaecfError(
                f"{batch.place(int(bad.arg_true()[0]))}: "
                f"{batch.names[role]} has no {role} id (empty or NaN); fill "
                "it in, or drop such rows"
            )
    return batch._replace(frame=frame.filter(~blank))


def convert_ratings(batch: Batch) -> pl.Series:
    """Returns the ratings as float64 ``[rows]``.

    Raises:
      VaecfError: a rating is missing, not a number, or not finite.
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


def encode_ids(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a categorical ``[n]`` as positions in its ascending ids.

    Returns:
      Codes int32 ``[n]`` and ids ``[distinct]``, int64 or ``str`` as in
      `Ratings`.
    """
    import polars as pl

    distinct = column.unique()
    physical = distinct.to_physical().to_numpy()
    texts = distinct.cast(pl.String)
    numbers = texts.cast(pl.Int64, strict=False)
    all_integers = (
        texts.str.contains(_CANONICAL_INTEGER).all()
        and not numbers.null_count()
    )
    ids: pl.Series = numbers if all_integers else texts
    order = ids.arg_sort().to_numpy()
    codes = np.empty(int(physical.max()) + 1, np.int32)
    codes[physical[order]] = np.arange(len(order), dtype=np.int32)
    ids = ids.gather(order)
    raw = ids.to_numpy() if all_integers else np.array(ids.to_list(), object)
    return codes[column.to_physical().to_numpy()], raw


def _as_text(series: pl.Series, batch: Batch, role: str) -> pl.Series:
    import polars as pl

    if series.dtype == pl.String:
        return series
    if series.dtype.is_float():
        series = series.fill_nan(None)
        # A column of integers with gaps turns to floats in pandas.
        whole = series.cast(pl.Int64, strict=False)
        if (whole.cast(series.dtype) == series).all():
            series = whole
    if series.dtype.is_nested() or series.dtype == pl.Binary:
        raise VaecfError(
            f"{batch.source}: the {role} column has type {series.dtype}; ids "
            "are integers or strings"
        )
    return series.cast(pl.String)
