"""Recognises the files and the layout of a path.

Without a header the first line suggests a layout, and every line has to have
it: `text_tables` and `row_batches` check that while they read.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from vaecf.data import headers
from vaecf.data.file_settings import MOVIELENS, PATTERNS, FileSettings
from vaecf.data.text_files import TextFile, empty
from vaecf.errors import VaecfError, did_you_mean, listed, short

_FILES_IN_FOLDER = {
    "combined_data_*.txt": "netflix",
    "mv_*.txt": "netflix",
    "ratings.csv": "movielens_csv",
    "ratings.dat": "movielens_dat",
    "u.data": "movielens_tab",
    "train_triplets.txt": "msd",
    "train.txt": "lightgcn_txt",
}

# Reads a file, and prints why that is not possible. Damaged Parquet can end
# the process that reads it, or lose rows after a panic of a thread.
_PARQUET_PROBE = """
import sys, polars as pl
try:
    table = pl.scan_parquet(sys.argv[1], glob=False)
    names = set(table.collect_schema().names()) & set(sys.argv[2:])
    batches = table.select(sorted(names)).collect_batches()
    rows = sum(batch.height for batch in batches)
    if names and rows != table.select(pl.len()).collect().item():
        raise ValueError("rows are missing")
except BaseException as error:
    sys.exit(print((str(error).splitlines() or [""])[0]) or 1)
"""


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
    for layout, pattern in PATTERNS.items():
        if re.fullmatch(pattern, line):
            return layout
    skip, mark = headers.before_header(text, settings)
    found = headers.find_header(text.head[skip:], settings, mark, [MOVIELENS])
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


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that a path, a folder or a glob names, in order.

    A folder without one of the known layouts holds part files: all its files
    but for those whose names begin with ``_`` or ``.``, and for empty ones.

    Raises:
      VaecfError: a file is missing, empty or in a folder of the folder, or
        there are none.
    """
    if not os.path.exists(path) and glob.has_magic(str(path)):
        root = path
        while glob.has_magic(str(root)):
            root = root.parent
        found = map(pathlib.Path, glob.glob(str(path), recursive=True))
        return _parts(path, root, (file for file in found if not file.is_dir()))
    if require(path).is_file():
        return [path]
    if known := _known_files(path):
        layout = known[0][1]
        files = [file for file, kind in known if kind == layout]
        if layout == "lightgcn_txt" and (path / "test.txt").is_file():
            files.append(path / "test.txt")  # all interactions: train and test
        return [require(file) for file in files]
    try:
        files = _parts(path, path, path.iterdir())
    except OSError as error:
        raise VaecfError(f"{path} cannot be read: {error}") from None
    if folders := [file for file in files if file.is_dir()]:
        raise VaecfError(
            f"{path} holds the folder {folders[0].name}: name a pattern, such "
            f"as {path / '**' / '*.csv'}"
        )
    if len({file.suffix.lower() for file in files}) > 1:
        largest = max(files, key=os.path.getsize)
        raise VaecfError(
            f"{path} holds files of several kinds: name the ratings file, or a "
            f"pattern such as {path / ('*' + largest.suffix)} (it has "
            f"{listed(file.name for file in files)})"
        )
    return files


def require(path: pathlib.Path) -> pathlib.Path:
    """Returns `path`; raises if the file is missing (with a hint) or empty."""
    if not os.path.exists(path):  # pathlib raises for names that are too long
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


def probe_parquet(path: pathlib.Path, columns: Iterable[str]) -> None:
    """Lets another process read columns of a file first.

    Raises:
      VaecfError: it cannot.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _PARQUET_PROBE, path, *columns],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as probe:
        reason = ""
        for line in probe.stdout or ():
            reason = reason or line.strip()
            if "panicked at" in line:
                reason = "its content is not valid"
                probe.kill()  # it may wait for ever
    if probe.returncode:
        raise VaecfError(
            f"{path} is damaged or no Parquet file: {short(reason)}; get it "
            "again"
        )


def _known_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Returns the files of a folder that a layout knows by their names."""
    for pattern, layout in _FILES_IN_FOLDER.items():
        if files := sorted(folder.glob(pattern)):
            return [(file, layout) for file in files if file.is_file()]
    return []


def _parts(
    path: pathlib.Path, root: pathlib.Path, found: Iterable[pathlib.Path]
) -> list[pathlib.Path]:
    """Returns the files that are not hidden below the root, nor empty."""
    files = []
    for file in sorted(found):
        parts = file.relative_to(root).parts
        if not any(part.startswith(("_", ".")) for part in parts) and (
            not os.path.exists(file) or os.path.getsize(file)
        ):
            files.append(file)  # a broken link is an error of its reader
    if not files:
        raise VaecfError(
            f"{path} holds no files with ratings; name the ratings file, or a "
            "pattern such as DIR/*.csv"
        )
    return files
