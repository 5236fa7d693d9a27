"""Anyone's ratings as implicit interactions, in file order, raw ids kept."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import batches as batches_lib
from vaecf.data import layouts, values
from vaecf.data.batches import Batch
from vaecf.data.layouts import Columns
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import polars as pl


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

    @property
    def n(self) -> int:
        """Number of rows (``len`` is that of the tuple)."""
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
            f"unknown layout {layout!r}"
            f"{layouts.nearest(layout, layouts.LAYOUTS)} (there are "
            f"{', '.join(layouts.LAYOUTS)})"
        )
    wants_rating = min_rating is not None
    if layout is None and wants_rating != (rating_column is not None):
        raise VaecfError(
            "--min_rating needs --rating_column to name the column it compares"
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
            return batches_lib.frame_batches(source, columns)
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
            yield from batches_lib.netflix_batches(file, wants_time)
        elif layout == "lightgcn_txt":
            yield from batches_lib.lightgcn_batches(file)
        elif layout in layouts.TEXT_LAYOUTS:
            shape = layouts.TEXT_LAYOUTS[layout]
            picked = shape.columns._replace(
                rating=None if columns.rating is None else shape.columns.rating,
                timestamp=shape.columns.timestamp if wants_time else None,
            )
            yield from batches_lib.text_batches(
                file, shape.separator, shape.header, picked
            )
        elif layouts.is_parquet(file):
            yield from batches_lib.parquet_batches(file, columns)
        else:
            mark = _separator(separator) or layouts.guess_separator(file)
            yield from batches_lib.text_batches(file, mark, True, columns)


def _separator(text: str | None) -> str | None:
    """The character that was meant; a shell leaves backslash-t as it is."""
    mark = "\t" if text == r"\t" else text
    if mark is not None and len(mark.encode()) != 1:
        raise VaecfError(
            f"--separator={text!r} must be one character, such as ';' or a tab"
        )
    return mark


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
        batch = values.check_ids(unchecked)
        ids = batch.frame
        blank += unchecked.frame.height - ids.height
        rows += ids.height
        if min_rating is not None:
            enough = values.numbers_of(batch) >= min_rating
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
            coded = coded.with_columns(
                timestamp=values.seconds_of(batch, coded)
            )
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
    user, user_ids = values.encode(frame["user"])
    item, item_ids = values.encode(frame["item"])
    for role, ids_of_role in (("user", user_ids), ("item", item_ids)):
        values.refuse_nan(batches, role, ids_of_role)
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


def collapse_duplicates(ratings: Ratings) -> tuple[Ratings, int]:
    """Keeps the first row of every (user, item) pair.

    Returns:
      The rows that remain, in their order, and how many were left out.
    """
    from vaecf.data.interactions import Interactions

    shape = len(ratings.user_ids), len(ratings.item_ids)
    # Counting is linear; sorting is only paid for where there is something.
    _, duplicates = Interactions.from_pairs(ratings.user, ratings.item, *shape)
    if not duplicates:
        return ratings, 0
    keys = ratings.user.astype(np.int64) * shape[1] + ratings.item
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return ratings.where(first), duplicates
