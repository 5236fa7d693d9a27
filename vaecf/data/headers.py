"""Recognises the separator, the quotes and the columns of a text table."""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vaecf.data.file_settings import (
    ALPHABETS,
    IN_ORDER,
    MOVIELENS,
    PATTERNS,
    TEXT_LAYOUTS,
    Columns,
    Dialect,
    FileSettings,
)
from vaecf.data.text_files import TextFile
from vaecf.data.text_tables import INNER, NO_HEADER, NUMBER, Table, split_line
from vaecf.errors import VaecfError, did_you_mean, listed, short

# The separators that are tried, and then a space.
_GUESSED = (",", "\t", ";", "|", "::")


class _Header(NamedTuple):
    names: list[str]
    separator: str
    quoted: bool
    lines: int


def table_of(
    text: TextFile,
    settings: FileSettings,
    layout: str | Dialect | None,
    roles: Sequence[str],
    counts: collections.Counter[str],
) -> Table:
    """Returns how to split a text into rows; without a layout, by its header.

    Raises:
      VaecfError: a column is missing, or the separator cannot be told.
    """
    name = layout if isinstance(layout, str) else ""
    dialect = layout if isinstance(layout, Dialect) else TEXT_LAYOUTS.get(name)
    if dialect is not None and not dialect.header:
        columns = {role: dialect.columns[role] for role in roles}
        width = text.head[0].count(dialect.separator) + 1
        positions = pick_columns(text.path, [""] * width, columns)
        # Without a request, every row has to have the layout.
        recognised = name if name != settings.layout else ""
        return Table(
            dialect.separator, False, None, width, 0, positions, "",
            PATTERNS.get(recognised), ALPHABETS.get(recognised),
        )  # fmt: skip
    skip, mark = before_header(text, settings)
    counts["blank_rows"] += sum(not line.strip() for line in text.head[:skip])
    comment = settings.comment or "#"
    counts["comment_lines"] += sum(
        line.startswith(comment) for line in text.head[:skip]
    )
    lines = text.head[skip:]
    if not lines:
        raise VaecfError(f"{text.path} holds no rows; give a file with ratings")
    if settings.no_header:
        return _table_by_numbers(text, settings, roles, skip, mark)
    names = names_of(settings, dialect)
    choices = [names]
    if not settings.is_table and dialect is None:
        choices.append({**names, **MOVIELENS})
    header = find_header(lines, settings, mark, choices) or _best_header(
        text, lines, settings, mark
    )
    names = next(
        (n for n in choices if {n["user"], n["item"]} <= {*header.names}), names
    )
    positions = pick_columns(
        text.path, header.names, {role: names[role] for role in roles}
    )
    check_header(text, skip + 1, header.names, positions)
    return Table(
        header.separator, header.quoted, header.names, len(header.names),
        skip + header.lines, positions, settings.comment,
    )  # fmt: skip


def before_header(
    text: TextFile, settings: FileSettings
) -> tuple[int, str | None]:
    """Returns the number of lines above the header, and the separator."""
    mark, skip = settings.separator, 0
    if given := re.match(r'"?sep=(.)"?[\r\n]*$', text.head[0], re.IGNORECASE):
        mark, skip = mark or given[1], 1
    mark = None if mark is None else check_separator(mark)
    comment = "#" if settings.comment is None else settings.comment
    while skip < len(text.head):
        line = text.head[skip]
        is_comment = bool(comment) and line.startswith(comment)
        if is_comment and settings.comment is None:
            # It may be the header, or a row of a table without one.
            is_comment = not find_header([line], settings, mark, None)
            below = (at for at in text.head[skip:] if at.strip())
            other = next((at for at in below if not at.startswith("#")), "")
            if settings.no_header and _like(line, other, mark):
                raise text.error(
                    skip + 1,
                    "starts with '#': pass comment='#' if it is a comment, or "
                    "comment='' if it is a row",
                )
        if line.strip() and not is_comment:
            break
        skip += 1
    return skip, mark


def _like(line: str, other: str, mark: str | None) -> bool:
    """Returns whether a separator splits both lines into as many fields."""
    marks = _GUESSED if mark is None else (mark,)
    return any(0 < line.count(m) == other.count(m) for m in marks)


def names_of(settings: FileSettings, dialect: Dialect | None) -> Columns:
    """Returns the names of the columns of a table with a header."""
    given = {
        "user": settings.user_column,
        "item": settings.item_column,
        "rating": settings.rating_column,
        "time": getattr(settings, "time_column", None),
        "split": getattr(settings, "split_column", None),
    }
    usual: dict[str, str | int] = {role: role for role in given}
    if dialect is not None:
        usual |= dialect.columns
    return {
        role: usual[role] if name is None else name
        for role, name in given.items()
    }


def find_header(
    lines: list[str],
    settings: FileSettings,
    mark: str | None,
    choices: list[Columns] | None,
) -> _Header | None:
    """Returns the header if a separator splits it into the wanted names."""
    if settings.no_header or not lines:
        return None
    choices = choices or [names_of(settings, None), MOVIELENS]
    for names in choices:
        for separator in (*_GUESSED, " ") if mark is None else (mark,):
            header = _split_header(lines, separator, settings)
            if header and {names["user"], names["item"]} <= {*header.names}:
                return header
    return None


def _best_header(
    text: TextFile,
    lines: list[str],
    settings: FileSettings,
    mark: str | None,
) -> _Header:
    """Returns the header as the likeliest separator splits it."""
    if mark is None:
        suffixes = {suffix.lower() for suffix in text.path.suffixes}
        usual = "\t" if suffixes & {".tsv", ".tab"} else ","
        with contextlib.suppress(VaecfError):
            usual = guess_separator(lines, text.path)
        best = max(_GUESSED, key=lines[0].count)
        mark = usual if usual in lines[0] or best not in lines[0] else best
    header = _split_header(lines, mark, settings)
    if header is None:
        raise text.error(
            len(text.head) - len(lines) + 1,
            "the quotes of the header are not closed; pass quoted=False if "
            "quotes are plain characters",
        )
    return header


def _split_header(
    lines: list[str], separator: str, settings: FileSettings
) -> _Header | None:
    lines = [lines[0].removeprefix("#").lstrip(" "), *lines[1:]]
    quoted = settings.quoted
    if quoted is None:
        # What R writes: a table separated by tabs with everything in quotes.
        all_quoted = is_quoted(lines[0], separator)
        quoted = separator != "\t" or all_quoted
    fields = split_line(lines, separator, quoted)
    if fields is None:
        return None
    names = [name.strip() for name in fields.values]
    return _Header(names, separator, quoted, fields.lines)


def _table_by_numbers(
    text: TextFile,
    settings: FileSettings,
    roles: Sequence[str],
    skip: int,
    mark: str | None,
) -> Table:
    columns: dict[str, str | int] = {}
    for role in roles:
        value = getattr(settings, f"{role}_column")
        if value is None and role in IN_ORDER:
            value = str(IN_ORDER[role] + 1)
        if not re.fullmatch(r"[1-9]\d{0,5}", str(value)):
            raise VaecfError(
                f"{role}_column={value} must be a number from 1: without a "
                "header, columns have no names"
            )
        columns[role] = int(value) - 1
    lines = text.head[skip:]
    mark = mark or guess_separator(lines, text.path)
    quoted = settings.quoted
    if quoted is None:
        quoted = mark != "\t" or is_quoted(lines[0], mark)
    fields = split_line(lines, mark, quoted)
    if fields is None:
        raise text.error(
            skip + 1,
            "a quote is not closed; pass quoted=False if quotes are plain "
            "characters",
        )
    positions = pick_columns(text.path, fields.values, columns)
    user = fields.values[positions["user"]]
    if re.fullmatch(r"(?i)\s*user[ _-]?(id)?\s*", user):
        raise text.error(
            skip + 1,
            f"{short(user)} looks like the name of a column; pass "
            "no_header=False, and choose with user_column and item_column",
        )
    return Table(
        mark, quoted, None, len(fields.values), skip, positions,
        settings.comment,
    )  # fmt: skip


def check_separator(separator: str) -> str:
    """Returns a separator as it is in the file.

    Raises:
      VaecfError: it is empty, a quote, or holds the end of a line.
    """
    mark = "\t" if separator == r"\t" else separator  # as a shell passes it
    if not mark or set(mark) & set('"\r\n\0' + INNER) or not _encodes(mark):
        raise VaecfError(
            f"separator={separator!r} must be one or more characters, such as "
            "';' or a tab, and no quote or line end"
        )
    return mark


def is_quoted(line: str, separator: str) -> bool:
    """Returns whether every field of a line stands in quotes."""
    fields = line.rstrip("\r\n").split(separator)
    return all(re.match(r'".*"$', field, re.DOTALL) for field in fields)


def guess_separator(lines: Sequence[str], path: object) -> str:
    """Returns the separator that splits most lines like the first.

    Raises:
      VaecfError: none or several do.
    """
    fits: dict[str, float] = {}
    for mark in _GUESSED if any(m in lines[0] for m in _GUESSED) else (" ",):
        rows = [
            split_line([line], mark, mark != "\t")
            for line in lines[:200]
            if line.strip()
        ]
        widths = [len(row.values) if row else 0 for row in rows]
        share = widths.count(widths[0]) / len(widths) if widths else 0
        if widths and widths[0] > 1 and share > 0.5:
            fits[mark] = share
    if len(fits) > 1:
        fits = {mark: share for mark, share in fits.items() if share == 1}
    if len(fits) != 1:
        found = " and ".join(map(repr, fits)) or "no separator"
        raise VaecfError(
            f"{path}: {found} may separate its columns; pass separator=..."
        )
    return next(iter(fits))


def pick_columns(
    source: object, names: Sequence[str], columns: Mapping[str, str | int]
) -> dict[str, int]:
    """Returns the position of each column, given by name or position.

    Raises:
      VaecfError: a column is missing, occurs twice, or has two roles.
    """
    picked: dict[str, int] = {}
    for role, wanted in columns.items():
        if isinstance(wanted, int):
            if not 0 <= wanted < len(names):
                raise VaecfError(
                    f"{source}: a line has {len(names)} fields, {role} would "
                    f"be number {wanted + 1}; is this the right file?"
                )
            picked[role] = wanted
            continue
        if (n := list(names).count(wanted)) != 1:
            hint = "" if n else _hint(wanted, names)
            raise VaecfError(
                f"{source} has {n or 'no'} column{'s' * (n > 1)} "
                f"{short(wanted)}{hint} (it has "
                f"{listed(map(_one_line, names))}; choose with "
                f"{role}_column){'' if n else _looks_like_data(names)}"
            )
        picked[role] = list(names).index(wanted)
    if len(set(picked.values())) < len(picked):
        raise VaecfError(
            f"{source}: one column cannot be two things ({columns})"
        )
    return picked


def check_header(
    text: TextFile, line: int, header: Sequence[str], picked: dict[str, int]
) -> None:
    """Raises if a header looks like a row: a number names a column."""
    sequence = [str(i) for i in range(len(header))]
    if header == sequence or header[1:] == sequence[: len(header) - 1]:
        return  # what pandas writes for a frame without names
    numbers = [i for i, name in enumerate(header) if re.match(NUMBER, name)]
    long = [i for i in numbers if not re.match(r"\s*\d{1,4}\s*$", header[i])]
    if long or set(numbers) & set(picked.values()):
        raise text.error(
            line,
            f"the header {short(','.join(header))} looks like data; "
            f"{NO_HEADER}",
        )


def _looks_like_data(names: Sequence[str]) -> str:
    digits = any(re.search(r"\d", name) for name in names)
    return f"; {NO_HEADER}" if digits else ""


def _hint(wanted: str, names: Sequence[str]) -> str:
    return did_you_mean(wanted[:100], map(_one_line, names[:1000]))


def _one_line(name: str) -> str:
    return " ".join(name.split())[:40]


def _encodes(text: str) -> bool:
    return text.encode(errors="replace").decode() == text
