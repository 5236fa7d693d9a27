"""Raw ids and their positions in the arrays."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import functools
import hashlib
import io
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.data import layouts
from vaecf.errors import VaecfError, short

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

_INT64_MAX = np.iinfo(np.int64).max
# An integer as str() writes it: one text for one number.
CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
WHOLE_FLOAT = r"^(0|-?[1-9][0-9]{0,18})\.0+$"  # as pandas writes it with gaps
_DEFAULT_TEXT = object.__str__, object.__repr__  # the address of an object


class IdTable:
    """Raw ids in index order: ``ids[i]`` is the id of item (or user) ``i``.

    The ids are int64, or object ``[n]`` of ``str``. Read-only by contract.

    Raises:
      VaecfError: the ids are neither all integers within int64 nor all
        strings.
    """

    def __init__(self, ids: np.ndarray | Sequence[Any]) -> None:
        # NumPy would cut "a\\0" and make strings of [1, "a"].
        array = ids if isinstance(ids, np.ndarray) else as_array(ids)
        if array.ndim != 1:
            raise VaecfError(f"ids must be one-dimensional, got {array.ndim}-d")
        if array.size == 0 and array is not ids:
            array = array.astype(np.int64)
        if array.dtype.kind in "iu":
            if array.size and int(array.max()) > _INT64_MAX:
                raise VaecfError(
                    f"id {int(array.max())} does not fit into int64; "
                    "pass such ids as strings"
                )
            array = array.astype(np.int64, copy=False)
        elif array.dtype.kind in "UT":
            array = array.astype(object)
        elif array.dtype.kind != "O" or not all(
            isinstance(value, str) for value in array
        ):
            raise VaecfError(
                f"ids must be all integers or all strings, got {array.dtype}"
            )
        self.ids = array

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def type(self) -> str:
        """``"int64"`` or ``"string"``."""
        return "string" if self.ids.dtype == object else "int64"

    def sha256(self) -> str:
        """Returns the digest of the ids in order, independent of storage."""
        digest = hashlib.sha256(self.type.encode())
        if self.type == "int64":
            digest.update(self.ids.astype("<i8").tobytes())
        else:
            encoded = [value.encode() for value in self.ids]
            # The lengths first: ["ab", "c"] and ["a", "bc"] must differ.
            lengths = np.fromiter(map(len, encoded), "<i8", len(encoded))
            digest.update(lengths.tobytes())
            digest.update(b"".join(encoded))
        return digest.hexdigest()

    def index_of(self, raw_ids: Any) -> np.ndarray:
        """Returns the indices of raw ids.

        Types may differ from the table's if the ids have the same text (see
        `text_of`): ``"12"`` finds 12, and 12 finds ``"12"``. 12.0 and
        ``"12.0"`` find 12 too, since pandas turns a column of integers with
        gaps into floats.

        Returns:
          int32 ``[n]``, -1 where the id is unknown or missing.

        Raises:
          VaecfError: see `as_array` and `text_of`; or the table holds an id
            twice.
        """
        import pandas as pd

        query = as_array(raw_ids)
        if query.size == 0:
            return np.zeros(0, np.int32)
        if self.type == "int64" and query.dtype.kind == "i":
            return self._index.get_indexer(pd.Index(query)).astype(np.int32)
        # str(int("12")) == "12" for every integer id of a table, so "012" is
        # not found.
        missing = pd.isna(query)
        texts = [
            value if type(value) is str else None if gone else text_of(value)
            for value, gone in zip(query, missing, strict=True)
        ]
        found = self._text_index.get_indexer(pd.Index(texts, dtype=object))
        found = np.where(missing, -1, found).astype(np.int32)
        # Texts such as "12.0" make an integer table if all ids are whole.
        whole = {
            i: match[1]
            for i in np.flatnonzero((found < 0) & ~missing)
            if (match := re.match(WHOLE_FLOAT, texts[i] or ""))
        }
        if whole:
            found[list(whole)] = self.index_of(list(whole.values()))
        return found

    def write(self, path: pathlib.Path, column: str, **more: Any) -> None:
        """Writes ids, their indices and more string columns ``[n]`` as Parquet.

        The id column is called `column`: 'item' or 'user'.
        """
        import polars as pl

        kind = pl.Int64 if self.type == "int64" else pl.String
        frame = pl.DataFrame(
            {
                column: pl.Series(self.ids.tolist(), dtype=kind),
                "index": np.arange(len(self), dtype=np.int64),
                **{k: pl.Series(v, dtype=pl.String) for k, v in more.items()},
            }
        )
        frame.write_parquet(path)

    @classmethod
    def read(
        cls, path: pathlib.Path, column: str, sha256: str | None = None
    ) -> IdTable:
        """Reads a file that `write` has written.

        Args:
          sha256: digest of the file. It is checked before the file is parsed.

        Raises:
          VaecfError: the file is missing, damaged, or lacks the column.
        """
        import polars as pl

        try:
            data = layouts.require(path).read_bytes()
        except OSError as error:
            raise VaecfError(f"{path}: {error.strerror}") from None
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise VaecfError(f"{path}: damaged (it has another SHA-256)")
        if sha256 is None:
            layouts.probe_parquet(path, (column, "index"))
        with layouts.polars_errors(path):
            frame = pl.read_parquet(io.BytesIO(data), columns=[column, "index"])
            frame = frame.sort("index")
        if not frame.height:
            return cls([])
        numbers = frame["index"].to_numpy()
        is_whole = np.array_equal(numbers, np.arange(frame.height))
        if not is_whole or frame[column].null_count():
            raise VaecfError(f"{path}: damaged (ids or indices are missing)")
        try:
            return cls(frame[column].to_numpy())
        except VaecfError as error:
            raise VaecfError(f"{path}: {error}") from None

    @functools.cached_property
    def _index(self) -> pd.Index:
        import pandas as pd

        index = pd.Index(self.ids, dtype=self.ids.dtype)
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise VaecfError(f"id {twice!r} occurs twice in the id table")
        return index

    @functools.cached_property
    def _text_index(self) -> pd.Index:
        import pandas as pd

        if self.type == "string":
            return self._index
        return pd.Index(list(map(str, self.ids.tolist())), dtype=object)


def text_of(value: Any) -> str:
    """Returns the text of an id: two ids with one text are the same id.

    A whole number of any type is written as an integer, a decimal without
    zeros at its end, and midnight without a time zone as its day. Other values
    are written as by `str`.

    Raises:
      VaecfError: bytes, a collection, or an object without a text of its own.
    """
    if isinstance(value, (str, int)):
        return str(value)
    import pandas as pd

    if isinstance(value, (np.datetime64, np.timedelta64)):
        value = pd.Series([value]).iloc[0]
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (float, decimal.Decimal)):
        if -(2**63) <= value < 2**63 and value == int(value):
            return str(int(value))
        if isinstance(value, decimal.Decimal):
            value = value.normalize()  # 1.50 is 1.5
    if isinstance(value, datetime.datetime):
        return str(value).removesuffix(" 00:00:00")
    if (
        isinstance(value, (bytes, bytearray, memoryview))
        or pd.api.types.is_list_like(value)
        or (type(value).__str__, type(value).__repr__) == _DEFAULT_TEXT
    ):
        raise VaecfError(
            f"id {short(value)} is of type {type(value).__name__}: use "
            "integers or strings as ids"
        )
    return str(value)


def as_array(ids: Any) -> np.ndarray:
    """Returns a column or a list of ids as [n] that keeps every value.

    The dtype is int64 if all ids are integers in its range, else object.

    Raises:
      VaecfError: a single id, or an array of two dimensions.
    """
    library = type(ids).__module__.partition(".")[0]
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__"):
        raise VaecfError(
            f"expected a sequence of ids, got {type(ids).__name__} "
            f"{short(ids)}; wrap a single id into a list"
        )
    if getattr(ids, "ndim", 1) != 1:
        raise VaecfError(f"ids must be one-dimensional, got {ids.ndim}-d")
    if hasattr(ids, "to_pylist"):  # Arrow
        ids = ids.to_pylist()
    elif library == "polars":
        # As an array, integers with gaps would be rounded to floats.
        is_narrow = ids.dtype.is_integer() and "128" not in str(ids.dtype)
        exact = is_narrow and not ids.null_count()
        ids = ids.to_numpy() if exact else ids.to_list()
    elif isinstance(ids, np.ma.MaskedArray):
        ids = ids.tolist()
    elif hasattr(ids, "dtype"):
        ids = np.asarray(ids)
        if ids.dtype.kind in "mM":  # NumPy would make integers of dates
            import pandas as pd

            try:
                ids = pd.Series(ids).astype(object).to_numpy()
            except (TypeError, ValueError):  # no unit, or beyond pandas' years
                ids = list(ids)
    if isinstance(ids, np.ndarray):
        fits = ids.dtype.kind == "i" or (
            ids.dtype.kind == "u" and int(ids.max(initial=0)) <= _INT64_MAX
        )
        return ids.astype(np.int64 if fits else object, copy=False)
    values: list[Any] = list(ids)
    if values and all(map(is_integer, values)):
        with contextlib.suppress(OverflowError):
            return np.array(values, np.int64)
    return np.fromiter(values, object, len(values))


def is_integer(value: Any) -> bool:
    """Returns whether a value is an int of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def encode_ids(column: pl.Series) -> tuple[np.ndarray, np.ndarray, int]:
    """Encodes a categorical ``[n]`` as positions in its ascending ids.

    If all ids are whole numbers, those such as 12.0 are integers too.

    Returns:
      Codes int32 ``[n]``; ids ``[distinct]``, int64 or ``str`` as in
      `readers.Ratings`; and how many ids such as 12.0 are now integers.
    """
    import polars as pl

    text = pl.col("id").cast(pl.String)
    distinct = (
        column.unique()
        .to_frame("id")
        .select(
            text.alias("text"),
            code=pl.col("id").to_physical(),
            is_float=text.str.contains(WHOLE_FLOAT),
            is_integer=text.str.contains(CANONICAL_INTEGER),
        )
    )
    texts, physical = distinct["text"], distinct["code"].to_numpy()
    is_whole = (distinct["is_float"] | distinct["is_integer"]).all()
    n_floats = int(distinct["is_float"].sum()) if is_whole else 0
    if n_floats:
        texts = texts.str.replace(r"\.0+$", "")
    numbers = texts.cast(pl.Int64, strict=False)
    if is_whole and not numbers.null_count():
        ids = numbers.to_numpy()
        order = np.argsort(ids)
    else:
        ids = np.array(texts.to_list(), object)
        order = texts.arg_sort().to_numpy()
    ids = ids[order]
    codes = np.zeros(int(physical.max()) + 1, np.int32)
    codes[physical[order]] = np.arange(len(order), dtype=np.int32)
    if n_floats:  # 12 and 12.0 are one id
        is_first = np.r_[True, ids[1:] != ids[:-1]]
        codes = (np.cumsum(is_first) - 1).astype(np.int32)[codes]
        ids = ids[is_first]
    return codes[column.to_physical().to_numpy()], ids, n_floats
