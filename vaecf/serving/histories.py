"""Converts users' histories from the forms that people have them in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vaecf.data import frames
from vaecf.data.id_table import IdTable, as_array
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError, listed, short


def as_histories(
    histories: Any, items: IdTable, user_column: str, item_column: str
) -> tuple[np.ndarray, Interactions, int]:
    """Returns (users [U], interactions with `items`, number of unknown items).

    `Recommender.recommend` describes the accepted forms. Unknown items are
    history items that are not in `items`.

    Raises:
      VaecfError: the histories have another form, a column is missing, no item
        is known, or a matrix has another width or cannot be used.
    """
    if hasattr(histories, "tocsr"):
        matrix = Interactions.from_scipy(histories)
        if matrix.n_items != len(items):
            raise VaecfError(
                f"the histories matrix is users x items with {matrix.n_items} "
                f"columns, and the model has {len(items)} items: use the "
                "model's item order (Recommender.items), or pass raw ids"
            )
        return np.arange(matrix.n_users), matrix, 0
    what = "the histories"
    columns = {"user": user_column, "item": item_column}
    rows = frames.read_rows(histories, columns, what)
    users, row = frames.number(rows, what)
    index = items.index_of(rows.items)
    known = index >= 0
    if len(known) and not known.any():
        examples = as_array(rows.items[:3])
        raise all_unknown(len(known), examples, what, items)
    matrix, _ = Interactions.from_pairs(
        row[known], index[known], len(users), len(items)
    )
    return users, matrix, int((~known).sum())


def all_unknown(
    count: int, examples: Iterable[Any], what: str, items: IdTable
) -> VaecfError:
    """Returns the error for ids of which the model knows none."""
    return VaecfError(
        f"the model knows none of the {count:,} items of {what}, such as "
        f"{listed(map(short, examples))}; it knows items such as "
        f"{listed(map(short, items.ids[:3].tolist()))}"
    )
