"""Splits text tables into rows by the rules of Python's csv module.

polars splits a block in which every line has the same number of separators
and nothing can mean anything else. The csv module splits all other blocks: it
alone decides what a quote, a carriage return or an empty line means. Every
row's width is checked, whichever columns are read.
"""

from __future__ import annotations

import collections
import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data.text_files import TextFile
from vaecf.errors import VaecfError, short

if TYPE_CHECKING:
    import polars as pl

INNER = "\x1f"  # stands for a separator of several bytes
_SPACES = b" \t\x0b\x0c\x1c\x1d\x1e\xc2\xe1\xe2\xe3\xef"  # or their first bytes
# Characters of a field, and of a row with line breaks in its quotes.
_LONGEST_FIELD = 1 << 26
_LONGEST_OVER_LINES = 1 << 17
NUMBER = r"\s*[-+]?\d+(\.\d+)?\s*$"
NO_HEADER = (
    "without a header, pass no_header=True, user_column=1 and item_column=2, "
    "the numbers of the columns"
)


class Table(NamedTuple):
    """How a text is split into rows, and where its columns are."""

    separator: str
    quoted: bool  # a quote at the start of a field opens it
    header: list[str] | None
    width: int  # fields of every row
    skip: int  # lines before the first row
    columns: dict[str, int]  # positions from 0, by role
    # Lines that start with it are skipped, "" skips none; None refuses ids at
    # the start of a line that start with "#".
    comment: str | None = None
    pattern: str | None = None  # of every row, for a layout without a header
    alphabet: bytes | None = None  # all bytes that the pattern allows


class Fields(NamedTuple):
    """The fields of a row, and how many lines they take."""

    values: list[str]
    lines: int


def split_line(
    lines: Sequence[str], separator: str, quoted: bool
) -> Fields | None:
    """Splits the first of some lines; returns None if its quotes are broken."""
    rows = _reader(iter(lines), separator, quoted)
    try:
        return Fields(next(rows, []), rows.line_num)
    except csv.Error:
        return None


def split_rows(
    file: TextFile, table: Table, counts: collections.Counter[str]
) -> Iterator[tuple[pl.DataFrame, bool]]:
    """Yields rows, and whether spaces may stand around their fields.

    A frame has one string column per role, and `row`, the number of the line.

    Counts `blank_rows`, `comment_lines`, `repeated_headers` and
    `rows_over_lines`.

    Raises:
      VaecfError: a row has more or fewer fields than the table, or its quotes
        are broken.
    """
    blocks = file.blocks()
    splitter = _Splitter(file, table, blocks, counts)
    above = len("".join(file.head[: table.skip]).encode())
    for line, data in blocks:
        if above:
            line, data, above = (
                table.skip + 1,
                data[above:],
                max(0, above - len(data)),
            )
        if data:
            yield splitter.split(line, data)


def _reader(lines: Iterator[str], separator: str, quoted: bool) -> Any:
    if len(separator) > 1:
        several, separator = separator, INNER
        lines = (line.replace(several, INNER) for line in lines)
    # Of the whole process: by default, a field has at most 131,072.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    return csv.reader(
        lines,
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )


class _Splitter:
    """Splits blocks; a quoted field may reach into the next ones."""

    def __init__(
        self,
        file: TextFile,
        table: Table,
        blocks: Iterator[tuple[int, bytes]],
        counts: collections.Counter[str],
    ) -> None:
        self._file, self._table = file, table
        self._blocks, self._counts = blocks, counts
        # By default a "#" below the header is an error where ids stand first.
        self._ids = table.columns["user"], table.columns["item"]
        self._comment = "#" if 0 in self._ids else ""
        if table.comment is not None:
            self._comment = table.comment
        self._mark = table.separator.encode()
        if len(self._mark) > 1:
            self._mark = INNER.encode()
        ends = self._mark + b"\n\r\x1f" + b'"' * table.quoted
        kept = {*ends, *_SPACES, *self._comment.encode()[:1]}
        self._others = bytes(set(range(256)) - kept)
        self._harmless = bytes(kept - set(ends))
        self._names: dict[
            str, str
        ] = {}  # of the columns that hold ids, in the header
        if table.header is not None:
            self._names = {
                role: table.header[table.columns[role]]
                for role in ("user", "item")
            }
        # Ids that may stand in an empty line or a header.
        self._odd = {""}
        for name in self._names.values():
            self._odd |= {name, name.lower(), name.upper(), name.capitalize()}

    def split(self, line: int, data: bytes) -> tuple[pl.DataFrame, bool]:
        """Returns the rows, and whether spaces may stand around fields."""
        plain, padded = self._prepare(data)
        frame = None if plain is None else self._parse(plain)
        if frame is None:
            return self._split_exactly(line, data), True
        return frame.with_row_index("row", offset=line), padded

    def _prepare(self, data: bytes) -> tuple[bytes | None, bool]:
        """Returns the block for polars, None if anything in it is unusual."""
        table = self._table
        if table.alphabet and data.translate(None, table.alphabet):
            return None, True
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if not data.endswith(b"\n"):
            data += b"\n"
        if len(table.separator.encode()) > 1:
            if INNER.encode() in data:
                return None, True
            data = data.replace(table.separator.encode(), self._mark)
        row = self._mark * (table.width - 1) + b"\n"
        if table.quoted and b'"' in data:
            data = self._unquote(data, row)
        # All that is left are separators and ends of lines, in their order.
        marks = data.translate(None, self._others)
        padded = marks != row * (len(marks) // table.width)
        if padded:
            marks = marks.translate(None, self._harmless)
            if marks != row * (len(marks) // table.width):
                return None, True
            start = self._comment.encode()
            commented = start and (
                data.startswith(start) or b"\n" + start in data
            )
            if commented or b"\xef\xbb\xbf" in data:
                return None, True
        return data, padded

    def _unquote(self, data: bytes, row: bytes) -> bytes:
        """Removes quotes that every row has around the same plain fields.

        Returns the block as it is if a quoted field holds a separator, a line
        end or a quote, or if a quote does not stand at the edge of a field.
        """
        marks = data.translate(None, self._others + self._harmless)
        first = marks[: marks.index(b"\n") + 1]
        if first.replace(b'""', b"") != row:
            return data
        if marks != first * (len(marks) // len(first)):
            return data
        mark, pairs = self._mark, data.count(b'"') // 2
        starts = data.count(mark + b'"') + data.count(b'\n"')
        ends = data.count(b'"' + mark) + data.count(b'"\n')
        if starts + data.startswith(b'"') == ends == pairs:
            return data.replace(b'"', b"")
        return data

    def _parse(self, data: bytes) -> pl.DataFrame | None:
        """Returns None if a row may be empty or a header."""
        import polars as pl

        table = self._table
        names = [str(i) for i in range(table.width)]
        frame = pl.read_csv(
            data,
            has_header=False,
            schema=dict.fromkeys(names, pl.String),
            columns=sorted(table.columns.values()),
            separator=self._mark.decode(),
            quote_char=None,
        ).select(
            pl.col(str(i)).fill_null("").alias(role)
            for role, i in table.columns.items()
        )
        odd = list(self._odd)
        doubtful = [pl.col(role).is_in(odd) for role in ("user", "item")]
        if frame.select(pl.any_horizontal(doubtful).any()).item():
            return None
        return frame

    def _split_exactly(self, line: int, data: bytes) -> pl.DataFrame:
        import polars as pl

        table = self._table
        self._number = line - 1  # of the last line that csv has read
        self._raw: list[str] = []  # lines of the row that csv reads
        places: list[int] = []
        found: dict[str, list[str]] = {role: [] for role in table.columns}
        columns = [(found[role], i) for role, i in table.columns.items()]
        user, item = self._ids
        odd = self._odd
        rows = _reader(self._lines(data), table.separator, table.quoted)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise self._broken_quotes(error) from None
            if row is None:
                break
            start = self._number + 1 - len(self._raw)
            usual = (
                len(row) == table.width
                and len(self._raw) == 1
                and row[user] not in odd
                and row[item] not in odd
                and row[user][0] > " " < row[item][0]
                and table.pattern is None
            )
            is_data = usual or self._is_data(row, start)
            self._raw = []
            if is_data:
                places.append(start)
                for values, position in columns:
                    values.append(row[position])
        if len(table.separator) > 1:
            for values in found.values():
                values[:] = [v.replace(INNER, table.separator) for v in values]
        return pl.DataFrame(
            {"row": pl.Series(places, dtype=pl.UInt32)}
            | {k: pl.Series(v, dtype=pl.String) for k, v in found.items()}
        )

    def _lines(self, data: bytes) -> Iterator[str]:
        """Yields lines; those of later blocks only within a quoted field."""
        while True:
            for text in io.StringIO(data.decode(), newline=""):
                self._number += 1
                if not self._raw:
                    self._length = 0
                    text = text.removeprefix("\ufeff")
                    if self._comment and text.startswith(self._comment):
                        self._skip_comment()
                        continue
                if len(self._table.separator) > 1 and INNER in text:
                    raise self._error("holds the control character 0x1f")
                self._raw.append(text)
                self._length += len(text)
                if self._length > _LONGEST_OVER_LINES and len(self._raw) > 1:
                    raise self._broken_quotes("a row of many lines")
                yield text
            following = next(self._blocks, None) if self._raw else None
            if following is None:
                return
            data = following[1]

    def _skip_comment(self) -> None:
        if self._table.comment is None:
            raise self._error(
                "starts with '#'; pass comment='#' to skip such lines, or "
                "comment='' if it is a row"
            )
        self._counts["comment_lines"] += 1

    def _is_data(self, row: list[str], line: int) -> bool:
        """Returns False for an empty line or a header; raises for neither."""
        table = self._table
        is_blank = not any(field.strip() for field in row)
        if is_blank and len(row) in (0, 1, table.width):
            self._counts["blank_rows"] += 1
            return False
        if table.pattern is not None:
            text = table.separator.join(row)
            if not re.fullmatch(table.pattern, text):
                raise self._file.error(
                    line,
                    f"{short(text)} does not have the layout of the first "
                    f"line; name the columns: {NO_HEADER}",
                )
        if len(row) != table.width:
            first = "header" if table.header else "first row"
            advice = f"put quotes around a field that holds {table.separator!r}"
            if self._raw and self._raw[0].startswith("#"):
                advice = "pass comment='#' if it is a comment"
            raise self._file.error(
                line,
                f"{len(row)} fields instead of the {table.width} of the "
                f"{first}; {advice}, or correct the line",
            )
        if len(self._raw) > 1:
            self._check_row_over_lines(line)
            self._counts["rows_over_lines"] += 1
        for position in self._ids:
            self._check_space(row[position], line)
        if self._odd & {row[position].strip() for position in self._ids}:
            return self._is_no_header(row, line)
        return True

    def _is_no_header(self, row: list[str], line: int) -> bool:
        """Tells a repeated header from a row whose id is the column's name."""
        header = self._table.header
        if header is None:
            return True
        fields = [field.strip() for field in row]
        if [f.lower() for f in fields] == [name.lower() for name in header]:
            self._counts["repeated_headers"] += 1
            return False
        if sorted(map(str.lower, fields)) == sorted(map(str.lower, header)):
            raise self._file.error(
                line,
                "a header with the columns in another order: give each file "
                "by itself, or as part of a folder",
            )
        # An item may have the name of its column, unless that is a row itself.
        numbers = any(re.match(NUMBER, name) for name in header)
        for role in ("user", "item") if numbers else ("user",):
            name = self._names[role]
            if fields[self._table.columns[role]] == name:
                raise self._file.error(
                    line,
                    f"the {role} is {short(name)}, as the column's name: "
                    f"is it another header? {NO_HEADER}",
                )
        return True

    def _check_row_over_lines(self, line: int) -> None:
        """Raises if every line of a row would be a row without its quotes."""
        table = self._table
        ids = [table.columns[role] for role in ("user", "item")]
        rows = [
            text.rstrip("\r\n").split(table.separator)
            for text in self._raw
            if text.strip()
        ]
        if any(len(row) != table.width for row in rows):
            return
        spaces = any(" " in rows[0][i].strip() for i in ids)
        foreign = r"^$|^\s|\s$" if spaces else r"^$|\s"
        if any(re.search(foreign, row[i]) for row in rows[1:] for i in ids):
            return  # a text with commas
        raise self._file.error(
            line,
            f"a quote that opens here takes in {len(self._raw) - 1} more rows; "
            "close it, or pass quoted=False if quotes are plain characters",
        )

    def _check_space(self, field: str, line: int) -> None:
        padded = field.startswith(" ") and field.lstrip().startswith('"')
        if padded and self._table.quoted:
            raise self._file.error(
                line,
                f"{short(field)} has a space before its quote, so that the "
                "quote opens no field; remove the space",
            )

    def _broken_quotes(self, error: object) -> VaecfError:
        start = self._number + 1 - len(self._raw)
        return self._file.error(
            start,
            f"a quoted field that opens here is not closed before a separator "
            f"({error}); correct it, or pass quoted=False if quotes are plain "
            "characters",
        )

    def _error(self, reason: str) -> VaecfError:
        return self._file.error(self._number, reason)
