"""Reads ratings from files and frames as pairs of user and item."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import headers, layouts
from vaecf.data.file_settings import Dialect, FileSettings
from vaecf.data.frames import frame_batches
from vaecf.data.id_table import encode_ids, text_of
from vaecf.data.interactions import Interactions
from vaecf.data.row_batches import Batch, Counts, file_batches
from vaecf.data.text_files import TextFile
from vaecf.errors import VaecfError, short
from vaecf.files import user_path

if TYPE_CHECKING:
    import polars as pl

# What pandas reads as missing, and what databases and JavaScript write.
MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
    "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    "\\N", "(null)", "NAN", "NONE", "NaT", "Null", "none", "undefined",
)  # fmt: skip
_NOTES = {
    "files_read": "files, in the order of their names",
    "blank_rows": "empty lines skipped",
    "comment_lines": "comment lines skipped",
    "repeated_headers": "repeated headers skipped",
    "rows_over_lines": "rows with line breaks within quotes",
    "stripped_ids": "ids with spaces around them stripped",
    "float_ids": "ids such as 12.0 read as whole numbers",
    "decimal_commas": "ratings such as 3,5 read as 3.5",
    "missing_ids": "rows without a user or an item dropped",
    "below_min_rating": "rows with a lower rating dropped",
}


class Ratings(NamedTuple):
    """Interactions as pairs of codes, in the order of the source.

    Int64 ids are used only if every id is an integer in its usual form: one
    ``007`` makes all ids strings, in the order of their code points.
    """

    user: np.ndarray  # int32 [n], indices into user_ids
    item: np.ndarray  # int32 [n], indices into item_ids
    user_ids: np.ndarray  # ascending raw ids, int64 or object of str
    item_ids: np.ndarray
    # For the manifest: `rows_read`, the distinct `users_read` and `items_read`
    # before the threshold (None if they were not counted), `blank_rows`,
    # `below_min_rating`, and those of `notes` that are not 0.
    counts: dict[str, Any]

    @property
    def n(self) -> int:
        """Number of rows; ``len`` is the length of the tuple."""
        return len(self.user)

    def where(self, keep: np.ndarray) -> Ratings:
        """Returns the rows of a boolean mask or of positions; same codes."""
        return self._replace(user=self.user[keep], item=self.item[keep])


class Rows:
    """The rows of a file, a folder, a glob or a DataFrame, with clean ids.

    Attributes:
      name: of the source, for messages.
      counts: what was changed, skipped or dropped so far (see `notes`).
      user_type: polars' dtype of the users in the source.

    Raises:
      VaecfError: the source is missing or empty, or settings contradict each
        other.
    """

    def __init__(
        self,
        source: Any,
        settings: FileSettings,
        dialect: Dialect | None = None,
    ) -> None:
        """Recognises the source."""
        self.counts: Counts = Counts()
        self.user_type: Any = None
        self._settings = settings
        path: pathlib.Path | None = None
        layout: str | Dialect | None = None
        if isinstance(source, (str, os.PathLike)):
            path = user_path(source)
            files = layouts.files_of(path)
            layout = layouts.layout_of(path, files, settings)
            if layout is None and not settings.is_table:
                layout = dialect
        _check_threshold(path, layout, settings)
        roles = ["user", "item"]
        roles += ["rating"] * (settings.min_rating is not None)
        self._is_file = path is not None
        if path is None:
            self.name = "the table"
            names = headers.names_of(settings, None)
            columns = {role: names[role] for role in roles}
            self._batches = frame_batches(source, columns)
        else:
            self.name = str(path)
            self._batches = file_batches(
                path, settings, layout, roles, self.counts
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches with users and items as strings.

        Raises:
          VaecfError: see `read_ratings`.
        """
        for batch in self._batches:
            self.user_type = batch.frame["user"].dtype
            yield self._clean(batch)

    def enough(self, batch: Batch) -> pl.Series | None:
        """Returns which ratings reach `min_rating`, None without a minimum."""
        if self._settings.min_rating is None:
            return None
        ratings, commas = convert_ratings(batch)
        if commas:
            self.counts["decimal_commas"] += commas
        enough = ratings >= self._settings.min_rating
        if below := int((~enough).sum()):
            self.counts["below_min_rating"] += below
        return enough

    def _clean(self, batch: Batch) -> Batch:
        frame = batch.frame.with_columns(
            _as_text(batch.frame[role], batch, role)
            for role in ("user", "item")
        )
        words = ["", "nan", "NaN"]
        if self._is_file:
            if batch.padded:
                frame = self._strip(frame)
            keep = self._settings.missing_ids == "keep"
            words = [""] if keep else ["", *MISSING]
        missing = {
            role: frame[role].is_in(words).fill_null(True)
            for role in ("user", "item")
        }
        batch = batch._replace(frame=frame)
        _refuse_lists(batch)
        if not (missing["user"].any() or missing["item"].any()):
            return batch
        if self._settings.missing_ids == "drop":
            kept = frame.filter(~(missing["user"] | missing["item"]))
            self.counts["missing_ids"] += frame.height - kept.height
            return batch._replace(frame=kept)
        row, role = min(
            (int(mask.arg_true()[0]), role)
            for role, mask in missing.items()
            if mask.any()
        )
        word = frame[role][row]
        found = f"the word {word!r}" if word else "empty or NaN"
        how = "pass missing_ids='drop' to drop" if self._is_file else "drop"
        raise VaecfError(
            f"{batch.place(row)}: {batch.names[role]} has no {role} id "
            f"({found}); fill it in, or {how} such rows"
        )

    def _strip(self, frame: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        ids = pl.col("user", "item").str
        stripped = frame.with_columns(
            ids.strip_chars().str.strip_chars("\ufeff").str.strip_chars()
        )
        for role in ("user", "item"):
            self.counts["stripped_ids"] += int(
                (frame[role] != stripped[role]).sum()
            )
        return stripped


def notes(counts: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Returns (number, what happened) for what a reader changed or dropped."""
    return [(n, text) for key, text in _NOTES.items() if (n := counts.get(key))]


def read_ratings(
    source: Any,
    *,
    dialect: Dialect | None = None,
    count_all: bool = False,
    **settings: Any,
) -> Ratings:
    """Reads interactions from a file, a folder, a glob or a DataFrame.

    A file is streamed: memory holds a batch of a million rows and 8 bytes for
    each pair that remains. Repeated pairs are kept (see
    `collapse_duplicates`).

    Args:
      source: path of a text table (CSV, TSV and the like), JSON lines, Parquet
        or a file in one of `file_settings.LAYOUTS`; a folder of such files,
        or a glob; or anything that `frames.read_rows` reads.
      dialect: how to split a text file in none of the known layouts.
      count_all: also count users and items before the threshold.
      **settings: fields of `file_settings.FileSettings`.

    Raises:
      VaecfError: missing, empty or damaged file, missing column, a row of
        another width than the first, a rating that is not a number, a missing
        id, or a threshold without ratings. The message names the file and,
        where there is one, the line and the column.
    """
    reading = FileSettings(**settings)
    return _collect(Rows(source, reading, dialect), reading, count_all)


def read_ids(path: pathlib.Path, settings: FileSettings) -> list[str]:
    """Reads a text file with one id a line, in quotes or not.

    The column's name may be above.

    Raises:
      VaecfError: the file is missing, empty, or no text.
    """
    text = TextFile(layouts.require(path), settings.encoding)
    lines = [
        line.strip()
        for _, data in text.blocks()
        for line in data.decode().splitlines()
    ]
    ids = [
        line[1:-1].replace('""', '"') if re.fullmatch('".+"', line) else line
        for line in lines
        if line
    ]
    header = headers.names_of(settings, None)["item"]
    if ids and header in re.split("[,;\t|]", lines[0].replace('"', ""))[:20]:
        if ids[0] != header:
            raise VaecfError(
                f"{path} has several columns; keep only the column {header!r}"
            )
        return ids[1:]
    return ids


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
    settings: FileSettings,
) -> None:
    least, column = settings.min_rating, settings.rating_column
    if layout is None and (least is None) != (column is None):
        raise VaecfError(
            f"min_rating={least} and rating_column={column} need "
            "each other: rows with at least that rating are interactions"
        )
    without = layout == "lightgcn_txt"
    if isinstance(layout, Dialect):
        without = "rating" not in layout.columns
    if least is not None and without:
        raise VaecfError(
            f"{path} holds no ratings: leave out min_rating, or name the "
            "columns with user_column, item_column and rating_column"
        )


def _collect(rows: Rows, settings: FileSettings, count_all: bool) -> Ratings:
    """Thresholds and encodes the rows batch by batch."""
    import polars as pl

    # Dictionaries of our own, which are freed together with the columns.
    kinds = {
        role: pl.Categorical(pl.Categories.random())
        for role in ("user", "item")
    }
    seen = {role: np.zeros(0, np.int64) for role in kinds}  # rows per code
    kept: list[pl.DataFrame] = []
    total = 0
    for batch in rows:
        ids = batch.frame.select("user", "item")
        total += ids.height
        enough = rows.enough(batch)
        if enough is not None and not count_all:
            ids = ids.filter(enough)
        coded = ids.with_columns(
            pl.col(role).cast(kind) for role, kind in kinds.items()
        )
        if enough is not None and count_all:
            for role, numbers in seen.items():
                codes = coded[role].to_physical().to_numpy()
                seen[role] = np.bincount(codes, minlength=len(numbers))
                seen[role][: len(numbers)] += numbers
            coded = coded.filter(enough)
        kept.append(coded)
    if not total:
        raise VaecfError(f"{rows.name} holds no rows; give a file with ratings")
    frame = pl.concat(kept)
    kept.clear()
    if not frame.height:
        raise VaecfError(
            f"{rows.name}: none of {total:,} rows has a rating of at least "
            f"{settings.min_rating:g}; lower min_rating"
        )
    user, user_ids, user_floats = encode_ids(frame["user"])
    item, item_ids, item_floats = encode_ids(frame["item"])
    rows.counts["float_ids"] += user_floats + item_floats
    counts: dict[str, int | None] = {
        "rows_read": total,
        "users_read": len(user_ids),
        "items_read": len(item_ids),
        "blank_rows": 0,
        "below_min_rating": 0,
        **{key: n for key, n in rows.counts.items() if n},
    }
    if settings.min_rating is not None:
        for role, numbers in seen.items():
            n = int(np.count_nonzero(numbers)) if count_all else None
            counts[f"{role}s_read"] = n
    return Ratings(user, item, user_ids, item_ids, counts)


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


def _refuse_lists(batch: Batch) -> None:
    """Raises if all items are lists that were written as texts."""
    items = batch.frame["item"]
    is_list = items.head(1).str.starts_with("[").any()
    is_list = is_list and items.str.contains(r"^\[.*\]$").all()
    if is_list and items.str.contains(",").any():
        raise VaecfError(
            f"{batch.place(0)}: {batch.names['item']} holds "
            f"{short(items[0])}, a list as a text; write one row for each item"
        )


def _as_text(series: pl.Series, batch: Batch, role: str) -> pl.Series:
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
