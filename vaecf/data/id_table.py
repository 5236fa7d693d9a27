"""Raw ids and their positions in the arrays."""

from __future__ import annotations

import functools
import hashlib
import io
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.data import layouts
from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import pandas as pd

_INT64_MAX = np.iinfo(np.int64).max


class IdTable:
    """Raw ids in index order: ``ids[i]`` is the id of item (or user) ``i``.

    The ids are int64, or object ``[n]`` of ``str``. Read-only by contract.

    Raises:
      VaecfError: the ids are neither all integers within int64 nor all
        strings.
    """

    def __init__(self, ids: np.ndarray | Sequence[Any]) -> None:
        array = np.asarray(ids)
        if array.ndim != 1:
            raise VaecfError(f"ids must be one-dimensional, got {array.ndim}-d")
        if array.size == 0 and array.dtype.kind == "f":
            array = array.astype(np.int64)  # np.asarray([]) is float64
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

        Types may differ from the table's if the ids read the same: ``"12"``
        finds 12, and 12 finds ``"12"``. 12.0 finds 12 too, since pandas turns
        a column of integers with gaps into floats.

        Returns:
          int32 ``[n]``, -1 where the id is unknown or missing.

        Raises:
          VaecfError: the table holds an id twice.
        """
        import pandas as pd

        query = _as_query(raw_ids)
        if query.size == 0:
            return np.zeros(0, np.int32)
        if self.type == "int64" and query.dtype.kind == "i":
            return self._index.get_indexer(pd.Index(query)).astype(np.int32)
        # str(int("12")) == "12" for every integer id of a table, so "012" is
        # not found.
        texts = np.empty(len(query), object)
        texts[:] = [_as_text(value) for value in query]
        found = self._text_index.get_indexer(pd.Index(texts, dtype=object))
        return np.where(pd.isna(query), -1, found).astype(np.int32)

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


def _as_query(raw_ids: Any) -> np.ndarray:
    """Converts ids to int64 or object ``[n]``."""
    if isinstance(raw_ids, (str, bytes)) or not hasattr(raw_ids, "__len__"):
        raise VaecfError(
            f"expected a sequence of ids, got {type(raw_ids).__name__} "
            f"{raw_ids!r}; wrap a single id into a list"
        )
    if isinstance(raw_ids, (list, tuple)):
        # np.asarray([1, "a"]) would convert everything to strings.
        array = np.empty(len(raw_ids), object)
        array[:] = raw_ids
        if raw_ids and all(type(value) is int for value in raw_ids):
            array = np.asarray(raw_ids)
    elif hasattr(raw_ids, "to_numpy"):
        array = raw_ids.to_numpy()
    else:
        array = np.asarray(raw_ids)
    if array.ndim != 1:
        raise VaecfError(f"ids must be one-dimensional, got {array.ndim}-d")
    fits = array.dtype.kind == "i" or (
        array.dtype.kind == "u"
        and (array.size == 0 or int(array.max()) <= _INT64_MAX)
    )
    return array.astype(np.int64 if fits else object, copy=False)


def _as_text(value: Any) -> str:
    if isinstance(value, (float, np.floating)) and value.is_integer():
        return str(int(value))
    return str(value)
