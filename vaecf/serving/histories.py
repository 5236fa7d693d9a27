"""Converts users' histories from the forms people have them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError


def as_histories(
    histories: Any, items: IdTable, user_column: str, item_column: str
) -> tuple[np.ndarray, Interactions, int]:
    """Returns (users [U], interactions with `items`, number of unknown items).

    `Recommender.recommend` describes the accepted forms. Unknown items are
    history items that are not in `items`.

    Raises:
      VaecfError: the histories have another form, a column is missing, or a
        matrix has another width.
    """
    if scipy.sparse.issparse(histories):
        matrix = Interactions.from_scipy(histories)
        if matrix.n_items != len(items):
            raise VaecfError(
                f"the histories matrix is users x items with {matrix.n_items} "
                f"columns, and the model has {len(items)} items: use the "
                "model's item order (Recommender.items), or pass raw ids"
            )
        return np.arange(matrix.n_users), matrix, 0
    if hasattr(histories, "columns"):
        users, rows, ids = _from_frame(histories, user_column, item_column)
    elif isinstance(histories, Mapping):
        users, rows, ids = _from_lists(
            list(histories.keys()), list(histories.values())
        )
    elif isinstance(histories, Sequence) and not isinstance(histories, str):
        users, rows, ids = _from_lists(range(len(histories)), list(histories))
    else:
        raise VaecfError(
            f"histories of type {type(histories).__name__}: pass a DataFrame, "
            "a mapping user -> items, a sequence of item sequences or a sparse "
            "matrix"
        )
    index = items.index_of(ids) if len(ids) else np.zeros(0, int)
    known = index >= 0
    matrix, _ = Interactions.from_pairs(
        rows[known], index[known], len(users), len(items)
    )
    return users, matrix, int((~known).sum())


def _from_frame(
    frame: Any, user_column: str, item_column: str
) -> tuple[np.ndarray, np.ndarray, Any]:
    for column in (user_column, item_column):
        if column not in frame.columns:
            raise VaecfError(
                f"histories have no column {column!r} (they have "
                f"{', '.join(map(str, frame.columns))}): pass user_column and "
                "item_column"
            )
    import pandas as pd

    rows, users = pd.factorize(np.asarray(frame[user_column].to_numpy()))
    if (rows < 0).any():
        raise VaecfError(
            f"histories have an empty user in row {int(np.argmax(rows < 0))}: "
            f"fill column {user_column!r} or drop the row"
        )
    return np.asarray(users), rows, frame[item_column].to_numpy()


def _from_lists(
    users: Sequence[Any], lists: Sequence[Sequence[Any]]
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    for user, values in zip(users, lists, strict=True):
        if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
            raise VaecfError(
                f"history of user {user!r} is {values!r}: pass a list of items"
            )
    lists = [list(values) for values in lists]
    rows = np.repeat(np.arange(len(lists)), [len(values) for values in lists])
    if users and all(_is_integer(user) for user in users):
        users_array = np.array(users)
    else:
        users_array = np.empty(len(users), object)
        for u, user in enumerate(users):  # a user may be a tuple
            users_array[u] = user
    return users_array, rows, [item for values in lists for item in values]


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
