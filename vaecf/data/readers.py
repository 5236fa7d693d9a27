"""Reads ratings from files and frames as pairs of user and item."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import headers, layouts
from vaecf.data.file_settings import (
    TEXT_LAYOUTS,
    Dialect,
    FileSettings,
    RatingsSettings,
)
from vaecf.data.frames import frame_batches
from vaecf.data.id_table import encode_ids
from vaecf.data.interactions import Interactions
from vaecf.data.row_batches import Batch, Counts, file_batches
from vaecf.data.text_files import TextFile
from vaecf.data.values import (
    PARTS,
    convert_parts,
    convert_ratings,
    convert_times,
    id_texts,
    refuse_lists,
)
from vaecf.errors import VaecfError
from vaecf.files import user_path

if TYPE_CHECKING:
    import polars as pl

# What pandas reads as missing, and what databases and JavaScript write.
MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
    "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    "\\N", "(null)", "NAN", "NONE", "NaT", "Null", "none", "undefined",
)  # fmt: skip
# What Python strips (polars keeps the separators 0x1c to 0x1f), and the mark
# at the start of UTF-8 files.
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"
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
    # If they were asked for: int64, float64 or datetime64[us] [n], and int8
    # [n], positions in `values.PARTS`.
    time: np.ndarray | None = None
    part: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of rows; ``len`` is the length of the tuple."""
        return len(self.user)

    def where(self, keep: np.ndarray) -> Ratings:
        """Returns the rows of a boolean mask or of positions; same codes."""
        return self._replace(
            user=self.user[keep],
            item=self.item[keep],
            time=None if self.time is None else self.time[keep],
            part=None if self.part is None else self.part[keep],
        )


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
        more: Sequence[str] = (),
    ) -> None:
        """Recognises the source; `more` may ask for 'time' and 'split'."""
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
        roles = ["user", "item"]
        roles += ["rating"] * (settings.min_rating is not None)
        roles += more
        _check_columns(path, layout, settings, roles)
        self._is_file, self._roles = path is not None, roles
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
        import polars as pl

        ids = {
            role: id_texts(batch.frame[role], batch, role)
            for role in ("user", "item")
        }
        frame = batch.frame.select(
            "row", *(ids.get(role, role) for role in self._roles)
        )
        words = ["", "nan", "NaN"]
        if self._is_file:
            if batch.padded:
                frame = self._strip(frame)
            keep = self._settings.missing_ids == "keep"
            words = [""] if keep else ["", *MISSING]
        missing = frame.select(
            pl.col("user", "item").is_in(words).fill_null(True)
        )
        batch = batch._replace(frame=frame)
        refuse_lists(batch)
        if not (missing["user"].any() or missing["item"].any()):
            return batch
        if self._settings.missing_ids == "drop":
            kept = frame.filter(~(missing["user"] | missing["item"]))
            self.counts["missing_ids"] += frame.height - kept.height
            return batch._replace(frame=kept)
        row, role = min(
            (int(mask.arg_true()[0]), role)
            for role, mask in missing.to_dict().items()
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
        stripped = frame.with_columns(ids.strip_chars(_SPACES))
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
    more: Sequence[str] = (),
    parts: Mapping[str, Any] | None = None,
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
      more: columns to read besides: 'time' and 'split'.
      parts: sources of other `values.PARTS` than 'train', by their names. With
        them, `source` is the training part.
      **settings: fields of `file_settings.RatingsSettings`.

    Raises:
      VaecfError: missing, empty or damaged file, missing column, a row of
        another width than the first, a rating that is not a number, a missing
        id, or a threshold without ratings. The message names the file and,
        where there is one, the line and the column.
    """
    reading = RatingsSettings(**settings)
    names = ("train", *parts) if parts else (None,)
    sources = (source, *(parts or {}).values())
    rows = [Rows(each, reading, dialect, more) for each in sources]
    return _collect(dict(zip(names, rows)), reading, count_all)


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

    With times or parts, this is the row of the earliest part, and of the
    earliest time.

    Returns:
      The remaining rows in their order, and the number of dropped rows.
    """
    shape = len(ratings.user_ids), len(ratings.item_ids)
    # Counting is linear; sort only if there is something to collapse.
    _, duplicates = Interactions.from_pairs(ratings.user, ratings.item, *shape)
    if not duplicates:
        return ratings, 0
    keys = [ratings.user.astype(np.int64) * shape[1] + ratings.item]
    keys += [key for key in (ratings.part, ratings.time) if key is not None]
    order = np.lexsort(keys[::-1])  # a stable sort
    is_first = np.diff(keys[0][order], prepend=-1) > 0
    return ratings.where(np.sort(order[is_first])), duplicates


def _check_columns(
    path: pathlib.Path | None,
    layout: str | Dialect | None,
    settings: FileSettings,
    roles: Sequence[str],
) -> None:
    """Raises if a role has no column in the layout."""
    least, column = settings.min_rating, settings.rating_column
    if layout is None and (least is None) != (column is None):
        raise VaecfError(
            f"min_rating={least} and rating_column={column} need "
            "each other: rows with at least that rating are interactions"
        )
    dialect = TEXT_LAYOUTS.get(layout) if isinstance(layout, str) else layout
    if layout is None or (dialect is not None and dialect.header):
        return
    there = {"user", "item", *(dialect.columns if dialect else ())}
    if layout == "netflix":
        there |= {"rating", "time"}
    if layout == "lightgcn_txt" and path is not None and path.is_dir():
        there.add("split")  # train.txt and test.txt
    instead = {
        "rating": "leave out min_rating",
        "time": "choose another protocol",
        "split": "pass the test as test_ratings",
    }
    for role in roles:
        if role not in there:
            raise VaecfError(
                f"{path} holds no {role}s: {instead[role]}, or name the "
                f"columns with user_column, item_column and {role}_column"
            )


def _collect(
    sources: Mapping[str | None, Rows],
    settings: FileSettings,
    count_all: bool,
) -> Ratings:
    """Thresholds and encodes the rows batch by batch.

    The keys of `sources` are parts; None takes the part from the rows, if it
    was asked for.
    """
    import polars as pl

    # Dictionaries of our own, which are freed together with the columns.
    kinds = {
        role: pl.Categorical(pl.Categories.random())
        for role in ("user", "item")
    }
    seen = {role: np.zeros(0, np.int64) for role in kinds}  # rows per code
    kept: list[pl.DataFrame] = []
    changes: Counts = Counts()
    total = 0
    for part, rows in sources.items():
        before = total
        for batch in rows:
            total += batch.frame.height
            enough = rows.enough(batch)
            if enough is not None and not count_all:
                batch = batch._replace(frame=batch.frame.filter(enough))
            coded = _chosen(batch, part).with_columns(
                pl.col(role).cast(kind) for role, kind in kinds.items()
            )
            if enough is not None and count_all:
                for role, numbers in seen.items():
                    codes = coded[role].to_physical().to_numpy()
                    seen[role] = np.bincount(codes, minlength=len(numbers))
                    seen[role][: len(numbers)] += numbers
                coded = coded.filter(enough)
            kept.append(coded)
        if total == before:
            raise VaecfError(
                f"{rows.name} holds no rows; give a file with ratings"
            )
        changes.update(rows.counts)
    name = next(iter(sources.values())).name
    frame = _joined(kept, name)
    if not frame.height:
        raise VaecfError(
            f"{name}: none of {total:,} rows has a rating of at least "
            f"{settings.min_rating:g}; lower min_rating"
        )
    user, user_ids, user_floats = encode_ids(frame["user"])
    item, item_ids, item_floats = encode_ids(frame["item"])
    changes["float_ids"] += user_floats + item_floats
    counts: dict[str, int | None] = {
        "rows_read": total,
        "users_read": len(user_ids),
        "items_read": len(item_ids),
        "blank_rows": 0,
        "below_min_rating": 0,
        **{key: n for key, n in changes.items() if n},
    }
    if settings.min_rating is not None:
        for role, numbers in seen.items():
            n = int(np.count_nonzero(numbers)) if count_all else None
            counts[f"{role}s_read"] = n
    time, split = (
        frame[column].to_numpy() if column in frame.columns else None
        for column in ("time", "split")
    )
    return Ratings(user, item, user_ids, item_ids, counts, time, split)


def _chosen(batch: Batch, part: str | None) -> pl.DataFrame:
    """Returns users, items, and times and parts if there are any."""
    import polars as pl

    chosen = batch.frame.select("user", "item")
    if "time" in batch.frame.columns:
        chosen = chosen.with_columns(time=convert_times(batch))
    if part is not None:
        code = pl.lit(PARTS.index(part), dtype=pl.Int8)
        chosen = chosen.with_columns(split=code)
    elif "split" in batch.frame.columns:
        chosen = chosen.with_columns(split=convert_parts(batch))
    return chosen


def _joined(frames: list[pl.DataFrame], name: str) -> pl.DataFrame:
    """Returns all rows; empties the list, so that they are freed."""
    import polars as pl

    kinds = {frame["time"].dtype for frame in frames if "time" in frame.columns}
    if pl.Datetime("us") in kinds and len(kinds) > 1:
        raise VaecfError(
            f"{name}: some times are numbers and others are dates; write all "
            "alike"
        )
    frame = pl.concat(frames, how="vertical_relaxed")
    frames.clear()
    return frame
