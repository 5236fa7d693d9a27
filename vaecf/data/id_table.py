"""Raw ids, the only ones a person sees, and their places in the arrays."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.errors import VaecfError

if TYPE_CHECKING:
    import pandas as pd

_INT64 = np.iinfo(np.int64)


class IdTable:
    """Raw ids in index order: the id of item (or user) ``i`` is ``ids[i]``.

    Attributes:
      ids: int64 ``[n]``, or object ``[n]`` of ``str``. Not to be changed.

    Raises:
      VaecfError: if the ids are neither all integers within int64 nor all
        strings.
    """

    def __init__(self, ids: np.ndarray | Sequence[Any]) -> None:
        """Takes integers of any width, or strings."""
        array = np.asarray(ids)
        if array.ndim != 1:
            raise VaecfError(f"ids must be one-dimensional, got {array.ndim}-d")
        if array.size == 0 and array.dtype.kind == "f":
            array = array.astype(np.int64)  # np.asarray([]) is float64
        if array.dtype.kind in "iu":
            if array.size and int(array.max()) > _INT64.max:
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
        """Number of ids."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Length and type."""
        return f"IdTable({len(self):,} ids, {self.type})"

    @property
    def type(self) -> str:
        """``"int64"`` or ``"string"``."""
        return "string" if self.ids.dtype == object else "int64"

    def sha256(self) -> str:
        """Digest of the ids in order, the same wherever they are stored."""
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
        """Indices of raw ids.

        Args:
          raw_ids: a sequence, array or Series ``[n]`` of ids; types may
            differ from the table's as long as they read the same: ``"12"``
            finds 12, and 12 finds ``"12"``. 12.0 finds 12 too, since a
            column with gaps turns to floats on its way through pandas.

        Returns:
          int32 ``[n]``, -1 where the id is not known (or missing).

        Raises:
          VaecfError: if the table holds an id twice.
        """
        import pandas as pd

        query = _as_query(raw_ids)
        if query.size == 0:
            return np.zeros(0, np.int32)
        if self.type == "int64" and query.dtype.kind == "i":
            return self._index.get_indexer(pd.Index(query)).astype(np.int32)
        missing = pd.isna(query)
        # As strings only where the types differ. The ids of a table are
        # canonical: str(int("12")) == "12", so that "012" finds nothing.
        text = np.empty(len(query), object)
        text[:] = [value if isinstance(value, str) else _as_text(value)
                   for value in query]  # fmt: skip
        found = self._text_index.get_indexer(pd.Index(text, dtype=object))
        return np.where(missing, -1, found).astype(np.int32)

    @functools.cached_property
    def _index(self) -> pd.Index:
        """Hash table of the ids as they are."""
        import pandas as pd

        index = pd.Index(self.ids, dtype=self.ids.dtype)
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise VaecfError(f"id {twice!r} stands twice in the id table")
        return index

    @functools.cached_property
    def _text_index(self) -> pd.Index:
        """Hash table of the ids as strings."""
        import pandas as pd

        if self.type == "string":
            return self._index
        text = np.empty(len(self), object)
        text[:] = list(map(str, self.ids.tolist()))
        return pd.Index(text, dtype=object)


def _as_query(raw_ids: Any) -> np.ndarray:
    """Ids asked for as int64 or object ``[n]``."""
    if isinstance(raw_ids, (str, bytes)) or not hasattr(raw_ids, "__len__"):
        raise VaecfError(
            f"expected a sequence of ids, got {type(raw_ids).__name__} "
            f"{raw_ids!r}; wrap a single id into a list"
        )
    if isinstance(raw_ids, (list, tuple)):
        # np.asarray([1, "a"]) would make strings of everything.
        array = np.empty(len(raw_ids), object)
        array[:] = raw_ids
        if all(type(value) is int for value in raw_ids):
            kind = np.asarray(raw_ids, None if raw_ids else np.int64)
            array = kind if kind.dtype.kind == "i" else array
    elif hasattr(raw_ids, "to_numpy"):
        array = raw_ids.to_numpy()
    else:
        array = np.asarray(raw_ids)
    if array.ndim != 1:
        raise VaecfError(f"ids must be one-dimensional, got {array.ndim}-d")
    if array.dtype.kind == "u":
        fits = array.size == 0 or int(array.max()) <= _INT64.max
        return array.astype(np.int64 if fits else object)
    if array.dtype.kind == "i":
        return array.astype(np.int64, copy=False)
    return array.astype(object)


def _as_text(value: Any) -> str:
    """An id as a string; a whole float as the integer that it was."""
    if isinstance(value, (float, np.floating)) and value.is_integer():
        return str(int(value))
    return str(value)
