"""Streams the rows of files, in order and in bounded memory.

This module splits tables into columns. `vaecf.data.readers` decides what the
values mean.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data import headers, layouts, text_tables
from vaecf.data.file_settings import Columns, Dialect, FileSettings
from vaecf.data.layouts import polars_errors
from vaecf.data.text_files import TextFile
from vaecf.errors import VaecfError, short

if TYPE_CHECKING:
    import polars as pl

# Enough rows to keep all cores busy; with string ids still below 200 MB.
BATCH_ROWS = 1 << 20
Counts = collections.Counter[str]

_JSON_LINES = 'JSON lines are one object a line, such as {"user": 1, ...}'
_NETFLIX_LINE = r"\d+:|\d+,[\d.]+,\d{4}-\d\d-\d\d|\s*"


class Batch(NamedTuple):
    """Consecutive rows of a file."""

    # Columns `user`, `item` and, if asked for, `rating`, `time` and `split`,
    # with the types of the source, and `row`, the row's number from 0.
    frame: pl.DataFrame
    source: str  # name of the file, for messages
    first_line: int | None  # line of row 0; None if the file is not a text
    names: dict[str, str]  # of the columns in the source, for messages
    padded: bool = True  # spaces may stand around the values

    def place(self, index: int) -> str:
        """Returns where a row of `frame` stands in the file, for a message."""
        row = int(self.frame["row"][index])
        if self.first_line is None:
            return f"{self.source}, row {row + 1:,}"
        return f"{self.source}, line {row + self.first_line:,}"


def file_batches(
    path: pathlib.Path,
    settings: FileSettings,
    layout: str | Dialect | None,
    roles: Sequence[str],
    counts: Counts,
) -> Iterator[Batch]:
    """Yields the rows of a file, a folder or a glob.

    Args:
      layout: one of `file_settings.LAYOUTS`; the dialect of a text file; or
        None for a table with a header.
      roles: ``user``, ``item`` and possibly ``rating``, ``time``, ``split``.
      counts: receives the numbers of skipped lines, by their names in the
        manifest.

    Raises:
      VaecfError: missing, empty or damaged file, a missing column, or a row
        that does not fit.
    """
    import polars as pl

    files = layouts.files_of(path)
    if len(files) > 1:
        counts["files_read"] = len(files)
    may_be_json = not settings.no_header and settings.separator is None
    columns = headers.names_of(settings, None)
    wanted = {role: columns[role] for role in roles}
    for file in files:
        with polars_errors(file):
            if layouts.is_parquet(layouts.require(file)):
                yield from _parquet_batches(file, wanted)
                continue
            text = TextFile(file, settings.encoding)
            if layout == "netflix":
                yield from _netflix_batches(text, counts)
            elif layout == "lightgcn_txt":
                trusted = path.is_dir() or settings.layout is not None
                part = "test" if file.name == "test.txt" else "train"
                for batch in _lightgcn_batches(text, trusted, counts):
                    whole = batch.frame.with_columns(split=pl.lit(part))
                    yield batch._replace(frame=whole)
            elif may_be_json and _first_word(text).startswith(("{", "[")):
                yield from _json_batches(text, wanted, counts)
            else:
                table = headers.table_of(text, settings, layout, roles, counts)
                yield from _table_batches(text, table, counts)


def _table_batches(
    text: TextFile, table: text_tables.Table, counts: Counts
) -> Iterator[Batch]:
    names = {
        role: f"column {i + 1}" if table.header is None
        else f"column {short(table.header[i])}"
        for role, i in table.columns.items()
    }  # fmt: skip
    for frame, padded in text_tables.split_rows(text, table, counts):
        yield Batch(frame, str(text.path), 0, names, padded)


def _netflix_batches(text: TextFile, counts: Counts) -> Iterator[Batch]:
    import polars as pl

    movie = None
    for line, lines in _lines(text, b"0123456789.,:-", _NETFLIX_LINE):
        fields = lines.str.split(",").list
        frame = pl.DataFrame(
            {
                "row": pl.int_range(line, line + len(lines), eager=True),
                "user": fields.first(),
                "rating": fields.get(1, null_on_oob=True),
                "time": fields.get(2, null_on_oob=True),
                "item": lines.str.extract(r"^(\d+):$"),
            }
        ).filter(lines != "")
        counts["blank_rows"] += len(lines) - frame.height
        is_movie = frame["item"].is_not_null()
        frame = frame.with_columns(pl.col("item").forward_fill())
        if movie is not None:
            frame = frame.with_columns(pl.col("item").fill_null(movie))
        if frame.height:
            movie = frame["item"][-1]
        names = {"user": "field 1", "rating": "field 2", "item": "the movie"}
        names["time"] = "field 3"
        yield Batch(frame.filter(~is_movie), str(text.path), 0, names)


def _lightgcn_batches(
    text: TextFile, trusted: bool, counts: Counts
) -> Iterator[Batch]:
    import polars as pl

    seen: set[str] = set()
    widths: set[int] = set()
    either = (
        "pass separator=' ', no_header=True, user_column=1 and item_column=2 "
        "for rows such as user item rating, or layout='lightgcn_txt'"
    )
    for line, lines in _lines(text, b"0123456789 ", r"( *\d+)* *"):
        frame = pl.DataFrame(
            {
                "row": pl.int_range(line, line + len(lines), eager=True),
                "word": lines.str.extract_all(r"\d+"),
            }
        ).filter(lines.str.strip_chars(" ") != "")
        counts["blank_rows"] += len(lines) - frame.height
        words = pl.col("word").list
        widths |= set(frame.select(words.len())["word"].unique())
        frame = frame.with_columns(user=words.first(), item=words.slice(1))
        for row, user in zip(frame["row"], frame["user"], strict=True):
            if user in seen and not trusted:
                raise text.error(
                    row,
                    f"user {short(user)} has another line above, so that these "
                    f"seem to be no lists of items; {either} for lists",
                )
            seen.add(user)
        frame = frame.filter(pl.col("item").list.len() > 0).explode("item")
        names = {"user": "field 1", "item": "field 2", "split": "the file"}
        yield Batch(frame.drop("word"), str(text.path), 0, names)
    if not trusted and len(widths) == 1 and widths & {3, 4}:
        raise VaecfError(
            f"{text.path}: every line has {widths.pop()} numbers; {either} for "
            "lists of items"
        )


def _lines(
    text: TextFile, alphabet: bytes, pattern: str
) -> Iterator[tuple[int, pl.Series]]:
    """Yields (number of the first line, lines) of a layout of numbers.

    Raises:
      VaecfError: a line does not match the pattern.
    """
    import polars as pl

    for line, data in text.blocks():
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = pl.Series(data.decode().removesuffix("\n").split("\n"))
        fits = lines.str.contains(f"^({pattern})$")
        if not fits.all() or data.translate(None, alphabet + b"\n"):
            bad = (~fits).arg_max() or 0
            raise text.error(
                line + bad,
                f"{short(lines[bad])} does not have the layout of the first "
                "line; name the columns with user_column and item_column, or "
                "correct the line",
            )
        yield line, lines


def _json_batches(
    text: TextFile, columns: Columns, counts: Counts
) -> Iterator[Batch]:
    import polars as pl

    if _first_word(text).startswith("["):
        raise VaecfError(f"{text.path} is one JSON list; {_JSON_LINES}")
    names = {role: f"field {short(name)}" for role, name in columns.items()}
    first = True
    for line, data in text.blocks():
        found: dict[str, list[Any]] = {role: [] for role in ("row", *columns)}
        for row, raw in enumerate(data.splitlines(), line):
            if not raw.strip():
                counts["blank_rows"] += 1
                continue
            record = _json_record(text, row, raw)
            if first:
                headers.pick_columns(text.path, list(record), columns)
                first = False
            found["row"].append(row)
            for role, name in columns.items():
                value = record.get(str(name), "")
                if isinstance(value, (dict, list)):
                    kind = type(value).__name__
                    raise text.error(
                        row, f"{names[role]} is a {kind}; give one {role}"
                    )
                missing = value is None or value != value
                found[role].append("" if missing else str(value))
        frame = pl.DataFrame(
            {
                name: pl.Series(
                    values, dtype=pl.UInt32 if name == "row" else pl.String
                )
                for name, values in found.items()
            }
        )
        yield Batch(frame, str(text.path), 0, names)


def _first_word(text: TextFile) -> str:
    return next((line.strip() for line in text.head if line.strip()), "")


def _json_record(text: TextFile, row: int, raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = f"no JSON object ({short(str(error))}); {_JSON_LINES}"
        raise text.error(row, reason) from None
    if not isinstance(record, dict):
        raise text.error(row, f"no JSON object; {_JSON_LINES}")
    return record


def _parquet_batches(path: pathlib.Path, columns: Columns) -> Iterator[Batch]:
    import polars as pl

    layouts.probe_parquet(path, map(str, columns.values()))
    lazy = pl.scan_parquet(path, glob=False)
    header = lazy.collect_schema().names()
    picked = headers.pick_columns(path, header, columns)
    chosen = lazy.select(
        pl.col(header[place]).alias(role) for role, place in picked.items()
    )
    names = {role: f"column {name!r}" for role, name in columns.items()}
    rows = 0
    for frame in chosen.collect_batches(
        chunk_size=BATCH_ROWS, maintain_order=True
    ):
        numbered = frame.with_row_index("row", offset=rows)
        yield Batch(numbered, str(path), None, names)
        rows += frame.height
