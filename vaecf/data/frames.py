"""Reads users and their items from the forms that people have them in.

A frame has one row per (user, item), or one row per user with a list of items.
Lists may also come as a mapping from users, as a Series, or without users.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import id_table
from vaecf.data.file_settings import Columns
from vaecf.data.layouts import polars_errors
from vaecf.data.row_batches import BATCH_ROWS, Batch
from vaecf.errors import VaecfError, did_you_mean, listed, short

if TYPE_CHECKING:
    import polars as pl


class Rows(NamedTuple):
    """Users, and one item or a list of items for each."""

    users: Any  # column of a frame [n], or a NumPy array of distinct users
    items: Any  # column or array of the items of all rows
    lengths: np.ndarray | None = None  # items per row [n]; None: one per row
    # Columns [n] of the other roles that were asked for, such as ratings.
    others: Mapping[str, Any] = {}


def read_rows(source: Any, columns: Columns, what: str) -> Rows:
    """Returns the users and items of a frame, a Series, a mapping or lists.

    Args:
      source: pandas or polars frame, lazy or not; Arrow table; pandas Series of
        lists whose index is the users; mapping from users to lists; or
        iterable of lists, whose users are 0, 1, ...
      columns: a frame's names of ``user``, ``item`` and possibly ``rating``,
        ``time`` and ``split``; a level of a pandas index counts as a column.
      what: name of the source for messages, such as "the histories".

    Raises:
      VaecfError: another form, a missing or ambiguous column, or something
        else than a list where others have a list.
    """
    import pandas as pd

    for role, name in columns.items():
        if not _is_name(name):
            raise VaecfError(f"{role}_column={short(name)}: name one column")
    if len(set(columns.values())) < len(columns):
        raise VaecfError(f"{what}: one column cannot be two things ({columns})")
    if isinstance(source, Mapping):
        if set(source) == set(columns.values()):
            raise VaecfError(
                f"{what} are a mapping of columns: pass pandas.DataFrame(...)"
            )
        users = id_table.as_array(list(source))
        return Rows(users, *_join(source, source.values()))
    source = _as_frame(source, columns, what)
    if isinstance(source, pd.DataFrame) or (
        _library(source) == "polars" and hasattr(source, "columns")
    ):
        return _from_frame(source, columns, what)
    if isinstance(source, pd.Series) and (holds_lists(source) or source.empty):
        return Rows(source.index, *_join(source.index, source))
    if (
        not _is_iterable(source)
        or isinstance(source, Set)  # no order to number its users by
        or hasattr(source, "columns")
        or _library(source) == "pandas"
        or (hasattr(source, "dtype") and not holds_lists(source))
    ):
        raise VaecfError(
            f"{what} of type {type(source).__name__}: pass a DataFrame with "
            f"columns {columns['user']!r} and {columns['item']!r}, a mapping "
            "user -> items, a sequence of item sequences, or a scipy.sparse "
            "matrix users x items"
        )
    lists = list(source)
    return Rows(np.arange(len(lists)), *_join(range(len(lists)), lists))


def number(rows: Rows, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (users in order of first appearance, number of each item's user).

    Raises:
      VaecfError: a user is missing; names the row, from 1.
    """
    import pandas as pd

    users = rows.users
    number_R = np.arange(len(users))
    if not isinstance(users, np.ndarray):
        if _library(users) == "polars":
            users = id_table.as_array(users)
        with _hashable(what, "user"):
            number_R, users = pd.factorize(users)
        if (number_R < 0).any():
            row = int(np.argmax(number_R < 0)) + 1
            raise VaecfError(
                f"{what}, row {row:,}, have no user id (empty or NaN); fill "
                "it in, or drop such rows"
            )
    if rows.lengths is not None:
        number_R = np.repeat(number_R, rows.lengths)
    return np.asarray(users), number_R


def frame_batches(source: Any, columns: Columns) -> Iterator[Batch]:
    """Yields the (user, item) rows of everything that `read_rows` reads.

    Raises:
      VaecfError: see `read_rows`.
    """
    import polars as pl

    what = "the interactions"
    if isinstance(source, list) and len(source) > 1:
        # Histories of one length are rare, and pairs are common.
        widths = {len(row) if type(row) is tuple else 0 for row in source}
        if widths in ({2}, {3}):
            raise VaecfError(
                f"{what} are tuples of {len(source[0])}: pass pandas.DataFrame("
                "..., columns=...) for pairs, or a list of lists for histories"
            )
    rows = read_rows(source, columns, what)
    with polars_errors(what):
        given = {"user": _to_polars(rows.users, what, "user")}
        for role, column in rows.others.items():
            given[role] = _to_polars(column, what, role)
        frame = pl.DataFrame(given).with_row_index("row")
        if rows.lengths is not None:
            frame = frame[np.repeat(np.arange(frame.height), rows.lengths)]
        item = _to_polars(rows.items, what, "item")
        frame = frame.with_columns(item.alias("item"))
    names = {role: f"column {name!r}" for role, name in columns.items()}
    for start in range(0, frame.height, BATCH_ROWS):
        yield Batch(frame[start : start + BATCH_ROWS], what, None, names)


def id_list(values: Any, name: str) -> list[Any]:
    """Returns an iterable of ids as a list.

    Args:
      name: begins the message, such as 'deny_items='.

    Raises:
      VaecfError: a table, a mapping, a text, one id, or a mask of booleans.
    """
    is_one = not _is_iterable(values) or getattr(values, "ndim", 1) != 1
    if is_one or hasattr(values, "columns"):
        raise VaecfError(f"{name}{short(values)}: pass a list of items")
    if hasattr(values, "to_pylist"):  # Arrow
        return values.to_pylist()
    if not hasattr(values, "dtype"):
        return list(values)
    if str(values.dtype).lower().startswith("bool"):
        raise VaecfError(
            f"{name}{short(values)}: pass items and not a mask of them, such "
            "as recommender.items[mask]"
        )
    return id_table.as_array(values).tolist()


def holds_lists(column: Any) -> bool:
    """Returns whether the first value of a column or an array is a list."""
    import pandas as pd

    if _library(column) == "polars":
        return str(column.dtype).startswith(("List", "Array"))
    if getattr(column.dtype, "kind", "O") != "O" or column.ndim > 1:
        return False
    there = column[pd.notna(column)]
    return pd.api.types.is_list_like(next(iter(there), None))


def _as_frame(source: Any, columns: Columns, what: str) -> Any:
    """Returns tables as pandas or polars frames, other things unchanged."""
    import pandas as pd

    if isinstance(source, (pd.DataFrame, pd.Series)):
        return source
    is_arrow = hasattr(source, "__arrow_c_stream__") or hasattr(
        source, "__arrow_c_array__"
    )
    if (
        is_arrow
        and hasattr(source, "to_pylist")
        and not hasattr(source, "schema")
    ):
        return source.to_pylist()  # an array
    if not is_arrow and _library(source) != "polars":
        return source.to_pandas() if hasattr(source, "to_pandas") else source
    import polars as pl

    with polars_errors(what):
        if isinstance(source, pl.LazyFrame):
            schema = source.collect_schema()
            wanted = [name for name in columns.values() if name in schema]
            if len(wanted) < len(columns):
                return pl.DataFrame(schema=schema)  # names for the message
            return source.select(wanted).collect()
        is_polars = isinstance(source, (pl.DataFrame, pl.Series))
        return source if is_polars else pl.DataFrame(source)


def _from_frame(frame: Any, columns: Columns, what: str) -> Rows:
    import polars as pl

    found = {
        role: _column(frame, role, name, what) for role, name in columns.items()
    }
    users, items = found.pop("user"), found.pop("item")
    if not holds_lists(items):
        return Rows(users, items, None, found)
    if found:
        raise VaecfError(
            f"{what} have lists of items, but {' and '.join(found)} need a row "
            "for each item"
        )
    if _library(items) == "pandas":
        return Rows(users, *_join(users, items))
    if items.null_count():
        row = int(items.is_null().to_numpy().argmax()) + 1
        raise VaecfError(f"{what}, row {row:,}, have no list of items")
    with polars_errors(what):
        lists = items.cast(pl.List(items.dtype.inner))
        lengths = lists.list.len()
        flat = lists.filter(lengths > 0).explode()
    return Rows(users, flat, lengths.to_numpy())


def _column(frame: Any, role: str, name: Any, what: str) -> Any:
    names = list(frame.columns)
    if isinstance(name, str) and name not in names:
        # Settings are texts, but pandas numbers columns without names.
        name = next((n for n in names if str(n) == name), name)
    if names.count(name) > 1:
        raise VaecfError(f"{what} have several columns {name!r}: rename one")
    if name in names:
        return frame[name]
    index = getattr(frame, "index", None)
    if index is not None and name is not None and name in index.names:
        return index.get_level_values(name)
    raise VaecfError(
        f"{what} have no column {short(name)}"
        f"{did_you_mean(str(name), map(str, names))} (they have "
        f"{listed(names)}; choose with {role}_column)"
    )


def _join(users: Iterable[Any], lists: Iterable[Any]) -> tuple[Any, Any]:
    """Returns (items of all lists, lengths of the lists)."""
    parts = [
        id_list(values, f"history of user {short(user)} is ")
        for user, values in zip(users, lists, strict=True)
    ]
    items = id_table.as_array(list(itertools.chain.from_iterable(parts)))
    return items, np.array([len(part) for part in parts], np.int64)


def _to_polars(column: Any, what: str, role: str) -> pl.Series:
    """Converts a column without pyarrow, which is not a dependency."""
    import pandas as pd
    import polars as pl

    if _library(column) == "polars":
        if column.dtype != pl.Object:
            return column
        column = id_table.as_array(column)
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        is_float = column.dtype.kind == "f"
        return pl.Series(np.asarray(column, np.float64 if is_float else None))
    # Strings, nullable types, categories, mixtures: once per distinct value.
    with _hashable(what, role):
        codes, values = pd.factorize(column)
    texts = [id_table.text_of(value) for value in id_table.as_array(values)]
    places = pl.Series(codes, dtype=pl.Int64)
    places = places.set(places < 0, None)
    return pl.Series(texts, dtype=pl.String).gather(places)


@contextlib.contextmanager
def _hashable(what: str, role: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:  # unhashable type: 'list'
        raise VaecfError(
            f"{what}: the {role} column holds something that is no id: {error}"
        ) from None


def _is_name(value: Any) -> bool:
    try:
        return isinstance(hash(value), int) and bool(value == value)
    except (TypeError, ValueError):  # a list, a frame, pandas.NA
        return False


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _is_iterable(values: Any) -> bool:
    """Returns whether lists or ids can be taken from `values` one by one."""
    return isinstance(values, Iterable) and not isinstance(
        values, (str, bytes, Mapping)
    )
