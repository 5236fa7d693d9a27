"""Opens text files of any compression and encoding, in blocks of whole lines.

A file's kind is recognised by its first bytes, never by its name. Plain, gzip,
bz2 and xz files are read; for every other kind, the error names the kind and
what to do.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vaecf.errors import VaecfError

# Bytes per block: enough rows to keep polars' threads busy.
BLOCK_BYTES = 1 << 24
_LONGEST_LINE = 1 << 26
_HEAD_BYTES = 1 << 18

_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNPACK = "unpack it, and name the ratings file"
_AS_PARQUET = "write it as Parquet or CSV"
_KINDS = {
    b"\\(\xb5/\xfd": ("compressed with zstd", "unpack it: zstd -d FILE"),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!": ("a rar archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "unpack it: lz4 -d FILE"),
    b"\x1f\x9d": ("compressed with compress", "unpack it: gunzip FILE"),
    b".{257}ustar": ("a tar archive", _UNPACK),
    b"\x93NUMPY": ("a NumPy array", _AS_PARQUET),
    # The protocols from 2 start with their number; 0 and 1 are lines of text.
    b"\x80[\x02-\x09]|c(copy_?reg|__builtin__|builtins|collections|numpy|pandas"
    b"|scipy)[\\w.]*\n|\\([dil]p?\\d*\n": (
        "a pickle, which is never loaded because it can run any program",
        _AS_PARQUET,
    ),
    b"ARROW1\x00|FEA1[^ -~]|\xff\xff\xff\xff": ("an Arrow file", _AS_PARQUET),
    b"ORC[^ -~]": ("an ORC file", _AS_PARQUET),
    b"Obj\x01": ("an Avro file", _AS_PARQUET),
    b"SQLite format 3\x00": ("an SQLite database", _AS_PARQUET),
    b"\x89HDF": ("an HDF5 file", _AS_PARQUET),
    b"MATLAB \\d": ("a MATLAB file", _AS_PARQUET),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", "save it as CSV"),
    b"%%MatrixMarket": (
        "a Matrix Market file",
        "read it with scipy.io.mmread, and pass the matrix to Recommender.fit",
    ),
    b"(?i)\\s*<(!doctype|html|\\?xml)": (
        "a web page or XML",
        "name the ratings themselves; a download may have failed",
    ),
    b"version https://git-lfs": ("a Git LFS pointer", "run git lfs pull"),
    b"PAR1": ("a Parquet file", "unpack it, or save the column as a text"),
    b"%PDF": ("a PDF document", "name the ratings themselves"),
}


class TextFile:
    """A text file, whatever its compression and encoding.

    Attributes:
      path: its path.
      head: its first lines with their ends, of at least 128 KiB.

    Raises:
      VaecfError: the file is empty, damaged, of another kind, or its text has
        another encoding. The message names the line where there is one.
    """

    def __init__(self, path: pathlib.Path, encoding: str | None = None) -> None:
        """Recognises the file's kind and reads its first lines."""
        self.path = path
        self._encoding = encoding
        if encoding is not None:
            _check_encoding(encoding)
        with self._errors(), path.open("rb") as stream:
            start = stream.read(512)
        self._open: Callable[..., Any] = open
        for magic, opener in _COMPRESSED.items():
            if start.startswith(magic):
                self._open = opener
                with self._errors(), opener(path, "rb") as stream:
                    start = stream.read(512)
        if encoding is None:
            self._encoding = next(
                (
                    name
                    for mark, name in _BYTE_ORDER_MARKS.items()
                    if start.startswith(mark)
                ),
                None,
            )
        if self._encoding is None:
            _refuse_other_kinds(path, start)
        first = b""
        for _, data in self.blocks(_HEAD_BYTES):
            first += data
            if len(first) > _HEAD_BYTES // 2:
                break
        if not first:
            raise empty(path)
        self.head = io.StringIO(first.decode(), newline="").readlines()

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Yields (line of the first byte, UTF-8), cut after ends of lines.

        A file with carriage returns only is cut after these. The last line may
        have no end.
        """
        line, rest = 1, b""
        for lines, chunk in self._chunks(size or BLOCK_BYTES):
            if (cut := chunk.rfind(b"\n") + 1) == 0:
                # A return at the end may be the first half of a line's end.
                cut = chunk.rfind(b"\r", 0, len(chunk) - 1) + 1
            if not cut:
                rest += chunk
                if len(rest) > _LONGEST_LINE:
                    reason = f"longer than {_LONGEST_LINE:,} bytes"
                    raise self.error(line, reason)
                continue
            block, rest = b"".join((rest, memoryview(chunk)[:cut])), chunk[cut:]
            yield line, block
            line += lines  # no line ends below the cut
        if rest:
            yield line, rest

    def error(self, line: int, reason: str) -> VaecfError:
        """Returns an error at a line of this file."""
        return VaecfError(f"{self.path}, line {line:,}: {reason}")

    def _chunks(self, size: int) -> Iterator[tuple[int, bytes]]:
        """Yields (ends of lines, UTF-8), without a byte order mark."""
        decoder = codecs.getincrementaldecoder(self._encoding or "utf-8")()
        lines = 0
        pending = b""  # bytes that the decoder keeps for the next character
        start = True
        with self._errors(), self._open(self.path, "rb") as stream:
            while raw := stream.read(size):
                data = raw
                if self._encoding or pending or not raw.isascii():
                    data = self._decode(decoder, raw, pending, lines)
                    pending = decoder.getstate()[0]
                if start:
                    data = data.removeprefix(codecs.BOM_UTF8)
                start = start and not data
                if b"\0" in data:
                    line = lines + _lines(data[: data.index(b"\0")]) + 1
                    raise self.error(
                        line,
                        "holds a NUL byte: the file is damaged, or not UTF-8 "
                        "(pass encoding='utf-16' for UTF-16)",
                    )
                if data:
                    n_lines = _lines(data)
                    yield n_lines, data
                    lines += n_lines
        self._decode(decoder, b"", pending, lines)

    def _decode(
        self, decoder: Any, raw: bytes, pending: bytes, lines: int
    ) -> bytes:
        """Returns UTF-8; without `raw`, checks that no bytes are pending."""
        try:
            return bytes(decoder.decode(raw, final=not raw).encode())
        except UnicodeError as error:
            before = (pending + raw)[: getattr(error, "start", 0)]
            line = lines + _lines(before) + 1
            reason = f"not {self._encoding} text: pass another encoding"
            if self._encoding is None:
                reason = (
                    "not UTF-8 text: pass encoding='latin-1' (or the encoding "
                    "it has), or save the file as UTF-8 or Parquet"
                )
            raise self.error(line, reason) from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = str(error)[:150] or type(error).__name__
            raise VaecfError(f"{self.path} cannot be read: {reason}") from None


def _lines(data: bytes) -> int:
    """Returns the number of ends of lines: feeds, else returns."""
    codes = np.frombuffer(data, np.uint8)  # bytes.count takes ten times as long
    return int(np.count_nonzero(codes == 10) or np.count_nonzero(codes == 13))


def empty(path: pathlib.Path | str) -> VaecfError:
    """Returns the error of a file without content."""
    return VaecfError(f"{path} is empty; give a file with ratings")


def _check_encoding(name: str) -> None:
    with contextlib.suppress(LookupError, ValueError, UnicodeError):
        info = codecs.lookup(name)
        if info._is_text_encoding and info.incrementaldecoder:  # type: ignore
            return
    raise VaecfError(
        f"encoding={name!r} is not known; use a name such as 'latin-1', "
        "'cp1252' or 'utf-16'"
    )


def _refuse_other_kinds(path: pathlib.Path, start: bytes) -> None:
    if start.startswith(b"PK\x03\x04") or start.startswith(b"PK\x05\x06"):
        raise VaecfError(f"{path} is {_kind_of_zip(path)}")
    for pattern, (kind, advice) in _KINDS.items():
        if re.match(pattern, start, re.DOTALL):
            raise VaecfError(f"{path} is {kind}; {advice}")


def _kind_of_zip(path: pathlib.Path) -> str:
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook; save it as CSV"
    if names and all(name.endswith(".npy") for name in names):
        return (
            "a NumPy archive (npz); read it with scipy.sparse.load_npz, and "
            "pass the matrix to Recommender.fit"
        )
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch file, which holds a pickle; write it as Parquet"
    return f"a zip archive; {_UNPACK}"
