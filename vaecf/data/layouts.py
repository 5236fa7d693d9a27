"""Formats of rating files, and how a file's format is recognised.

==================== ==========================================================
movielens_csv        ``userId,movieId,rating[,timestamp]`` with a header
movielens_dat        ``user::item::rating::timestamp``
movielens_tab        ``user<TAB>item<TAB>rating<TAB>timestamp`` (ml-100k u.data)
netflix              ``item:`` lines followed by ``user,rating,date`` lines;
                     one file, or a folder of ``combined_data_*.txt`` or
                     ``mv_*.txt``
msd                  ``user<TAB>song<TAB>plays`` (train_triplets.txt)
lightgcn_txt         ``user item item ...``, one user per line; one file, or a
                     folder with ``train.txt`` and ``test.txt``
==================== ==========================================================

Without a header the first line suggests a layout, and every line has to have
it: `text_tables` and `row_batches` check that while they read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vaecf.data import text_tables
from vaecf.data.text_files import TextFile, empty
from vaecf.data.text_tables import Table
from vaecf.errors import VaecfError, did_you_mean, listed

# Names of a table's columns, or their positions from 0, by ``user``, ``item``
# and ``rating``.
Columns = Mapping[str, str | int]


class Dialect(NamedTuple):
    """How a delimited text file without quotes is split into columns."""

    separator: str
    header: bool
    columns: Columns


_IN_ORDER = {"user": 0, "item": 1, "rating": 2}
_MOVIELENS = {"user": "userId", "item": "movieId", "rating": "rating"}
TEXT_LAYOUTS = {
    "movielens_csv": Dialect(",", True, _MOVIELENS),
    "movielens_dat": Dialect("::", False, _IN_ORDER),
    "movielens_tab": Dialect("\t", False, _IN_ORDER),
    "msd": Dialect("\t", False, _IN_ORDER),
}
LAYOUTS = (*TEXT_LAYOUTS, "netflix", "lightgcn_txt")
# Of the first line, and of all rows.
_PATTERNS = {
    "netflix": r"\d+:",
    "movielens_dat": r"\d+::\d+::[\d.]+(::\d+)?",
    "movielens_tab": r"\d+\t\d+\t[\d.]+\t\d+",
    "msd": r"[0-9a-f]{40}\tSO[0-9A-Z]{16}\t\d+",
    "lightgcn_txt": r"\d+( \d+)+ ?",
}
_ALPHABETS = {
    "movielens_dat": b"0123456789.:\r\n",
    "movielens_tab": b"0123456789.\t\r\n",
    "msd": b"0123456789abcdefABCDEFGHIJKLMNOPQRSTUVWXYZ\t\r\n",
}
_FILES_IN_FOLDER = {
    "combined_data_*.txt": "netflix",
    "mv_*.txt": "netflix",
    "ratings.csv": "movielens_csv",
    "ratings.dat": "movielens_dat",
    "u.data": "movielens_tab",
    "train_triplets.txt": "msd",
    "train.txt": "lightgcn_txt",
}
_MISSING_IDS = ("refuse", "drop", "keep")


def _setting(meaning: str, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How to read ratings or histories; None recognises it from the file.

    Raises:
      VaecfError: a value is unknown.
    """

    user_column: str | None = _setting(
        "Column of the users (user): its name, or with no_header its number "
        "from 1."
    )
    item_column: str | None = _setting("Column of the items (item), likewise.")
    rating_column: str | None = _setting(
        "Column of the ratings that min_rating is for."
    )
    min_rating: float | None = _setting("Lowest rating that counts (any).")
    separator: str | None = _setting(
        "What separates the columns of a text table (by the header)."
    )
    no_header: bool = _setting(
        "The first line of a text table is a row.", default=False
    )
    quoted: bool | None = _setting(
        "A quote at the start of a field opens it (True, but for tables "
        "separated by tabs)."
    )
    encoding: str | None = _setting("Encoding of a text (utf-8).")
    comment: str | None = _setting(
        "Skip the lines of a text that start with this ('#', above the header)."
    )
    layout: str | None = _setting(f"One of {', '.join(LAYOUTS)}.")
    missing_ids: str = _setting(
        "What to do with rows whose id is empty, NULL, NaN and the like: "
        "refuse, drop, or keep (but for empty ones).",
        default="refuse",
    )

    def __post_init__(self) -> None:
        choices = {"layout": LAYOUTS, "missing_ids": _MISSING_IDS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise VaecfError(
                    f"{name}={value}{did_you_mean(str(value), known)} (there "
                    f"are {', '.join(known)})"
                )

    @property
    def is_table(self) -> bool:
        """Whether a setting says that a text is a table with columns."""
        return (
            self.user_column is not None
            or self.item_column is not None
            or self.separator is not None
            or self.no_header
        )


def detect(
    path: pathlib.Path, settings: FileSettings | None = None
) -> str | None:
    """Returns the layout that a file or folder seems to have, or None.

    Raises:
      VaecfError: the file is missing, empty, or of a kind that is not read.
    """
    settings = settings or FileSettings()
    require(path)
    if path.is_dir():
        return next((layout for _, layout in _known_files(path)), None)
    if is_parquet(path):
        return None
    text = TextFile(path, settings.encoding)
    line = text.head[0].rstrip("\r\n")
    for layout, pattern in _PATTERNS.items():
        if re.fullmatch(pattern, line):
            return layout
    skip, mark = _before_header(text, settings)
    found = _find_header(text.head[skip:], settings, mark, [_MOVIELENS])
    return "movielens_csv" if found else None


def layout_of(
    path: pathlib.Path, files: list[pathlib.Path], settings: FileSettings
) -> str | None:
    """Returns the layout of all files of a path, None for tables."""
    if settings.layout is not None or settings.is_table:
        return settings.layout
    if path.is_dir() and detect(path) in ("netflix", "lightgcn_txt"):
        return detect(path)
    return detect(files[0], settings)


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
        positions = text_tables.pick_columns(text.path, [""] * width, columns)
        # Without a request, every row has to have the layout.
        recognised = name if name != settings.layout else ""
        return Table(
            dialect.separator, False, None, width, 0, positions, "",
            _PATTERNS.get(recognised), _ALPHABETS.get(recognised),
        )  # fmt: skip
    skip, mark = _before_header(text, settings)
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
        choices.append(_MOVIELENS)
    header = _find_header(lines, settings, mark, choices) or _best_header(
        text, lines, settings, mark
    )
    names = next(
        (n for n in choices if {n["user"], n["item"]} <= {*header.names}), names
    )
    positions = text_tables.pick_columns(
        text.path, header.names, {role: names[role] for role in roles}
    )
    text_tables.check_header(text.path, header.names, positions)
    return Table(
        header.separator, header.quoted, header.names, len(header.names),
        skip + header.lines, positions, settings.comment,
    )  # fmt: skip


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that a path, a folder or a glob names, in order.

    A folder without one of the known layouts holds part files: all its files
    but for those whose names begin with ``_`` or ``.``, and for empty ones.

    Raises:
      VaecfError: a file is missing or empty, or there are none.
    """
    if not path.exists() and glob.has_magic(str(path)):
        found = map(pathlib.Path, glob.glob(str(path), recursive=True))
        return _parts(path, found)
    if require(path).is_file():
        return [path]
    if known := _known_files(path):
        layout = known[0][1]
        files = [file for file, kind in known if kind == layout]
        if layout == "lightgcn_txt" and (path / "test.txt").is_file():
            files.append(path / "test.txt")  # all interactions: train and test
        return [require(file) for file in files]
    files = _parts(path, path.iterdir())
    if len({file.suffix for file in files}) > 1:
        raise VaecfError(
            f"{path} holds files of several kinds: name the ratings file, or a "
            f"pattern such as {path / ('*' + files[0].suffix)} (it has "
            f"{listed(file.name for file in files)})"
        )
    return files


def require(path: pathlib.Path) -> pathlib.Path:
    """Returns `path`; raises if the file is missing (with a hint) or empty."""
    try:
        exists = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if not exists:
        names = []
        with contextlib.suppress(OSError, ValueError):
            names = [entry.name for entry in path.parent.iterdir()]
        raise VaecfError(
            f"no such file: {path}{did_you_mean(path.name, names)}"
        )
    if not (path.is_file() or path.is_dir()):
        raise VaecfError(f"{path} is neither a file nor a folder; save a file")
    if path.is_file() and path.stat().st_size == 0:
        raise empty(path)
    return path


def is_parquet(path: pathlib.Path) -> bool:
    """Returns whether a file is Parquet, whatever its name is."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError as error:
        raise VaecfError(f"{path} cannot be read: {error}") from None


@contextlib.contextmanager
def polars_errors(path: pathlib.Path | str) -> Iterator[None]:
    """Raises polars' errors and panics as a `VaecfError` of one line."""
    import polars as pl

    try:
        yield
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,  # no Exception
        OSError,
        UnicodeError,
    ) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pl.exceptions.NoDataError):
            raise empty(path) from None
        raise VaecfError(f"{path}: {text[:200]}") from None


class _Header(NamedTuple):
    names: list[str]
    separator: str
    quoted: bool
    lines: int


def _known_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Returns the files of a folder that a layout knows by their names."""
    for pattern, layout in _FILES_IN_FOLDER.items():
        if files := sorted(folder.glob(pattern)):
            return [(file, layout) for file in files if file.is_file()]
    return []


def _parts(
    path: pathlib.Path, found: Iterable[pathlib.Path]
) -> list[pathlib.Path]:
    files = [
        file
        for file in sorted(found)
        if file.is_file()
        and not file.name.startswith(("_", "."))
        and file.stat().st_size
    ]
    if not files:
        raise VaecfError(
            f"{path} holds no files with ratings; name the ratings file, or a "
            "pattern such as DIR/*.csv"
        )
    return files


def _before_header(
    text: TextFile, settings: FileSettings
) -> tuple[int, str | None]:
    """Returns the number of lines above the header, and the separator."""
    mark, skip = settings.separator, 0
    if given := re.match(r'"?sep=(.)"?[\r\n]*$', text.head[0], re.IGNORECASE):
        mark, skip = mark or given[1], 1
    mark = None if mark is None else text_tables.check_separator(mark)
    comment = "#" if settings.comment is None else settings.comment
    while skip < len(text.head):
        line = text.head[skip]
        is_comment = bool(comment) and line.startswith(comment)
        if is_comment and settings.comment is None:
            # It may be the header, or a row of a table without one.
            is_comment = not _find_header([line], settings, mark, None)
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
    marks = text_tables.GUESSED if mark is None else (mark,)
    return any(0 < line.count(m) == other.count(m) for m in marks)


def names_of(settings: FileSettings, dialect: Dialect | None) -> Columns:
    """Returns the names of the columns of a table with a header."""
    given = {
        "user": settings.user_column,
        "item": settings.item_column,
        "rating": settings.rating_column,
    }
    usual: dict[str, str | int] = {role: role for role in given}
    if dialect is not None:
        usual |= dialect.columns
    return {role: name or usual[role] for role, name in given.items()}


def _find_header(
    lines: list[str],
    settings: FileSettings,
    mark: str | None,
    choices: list[Columns] | None,
) -> _Header | None:
    """Returns the header if a separator splits it into the wanted names."""
    if settings.no_header or not lines:
        return None
    choices = choices or [names_of(settings, None), _MOVIELENS]
    for names in choices:
        for separator in text_tables.GUESSED if mark is None else (mark,):
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
            usual = text_tables.guess_separator(lines, text.path)
        best = max(text_tables.GUESSED, key=lines[0].count)
        mark = usual if usual in lines[0] or best not in lines[0] else best
    header = _split_header(lines, mark, settings)
    if header is None:
        raise VaecfError(
            f"{text.path}, line 1: the quotes of the header are not closed; "
            "pass quoted=False if quotes are plain characters"
        )
    return header


def _split_header(
    lines: list[str], separator: str, settings: FileSettings
) -> _Header | None:
    lines = [lines[0].removeprefix("#").lstrip(" "), *lines[1:]]
    quoted = settings.quoted
    if quoted is None:
        # What R writes: a table separated by tabs with everything in quotes.
        all_quoted = text_tables.is_quoted(lines[0], separator)
        quoted = separator != "\t" or all_quoted
    fields = text_tables.split_line(lines, separator, quoted)
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
        value = getattr(settings, f"{role}_column") or str(_IN_ORDER[role] + 1)
        if not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise VaecfError(
                f"{role}_column={value} must be a number from 1: without a "
                "header, columns have no names"
            )
        columns[role] = int(value) - 1
    lines = text.head[skip:]
    mark = mark or text_tables.guess_separator(lines, text.path)
    quoted = settings.quoted
    if quoted is None:
        quoted = mark != "\t" or text_tables.is_quoted(lines[0], mark)
    fields = text_tables.split_line(lines, mark, quoted)
    if fields is None:
        raise text.error(
            skip + 1,
            "a quote is not closed; pass quoted=False if quotes are plain "
            "characters",
        )
    positions = text_tables.pick_columns(text.path, fields.values, columns)
    return Table(
        mark, quoted, None, len(fields.values), skip, positions,
        settings.comment,
    )  # fmt: skip
