"""Converts users' histories from the forms that people have them in."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from vaecf.data import frames
from vaecf.data.id_table import IdTable, as_array
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError, listed, short
from vaecf.setting import plain

_logger = logging.getLogger("vaecf")


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
        examples = as_array(rows.items[:3]).tolist()
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


def allowed_items(
    items: IdTable, allow: Any | None, deny: Any | None
) -> np.ndarray | None:
    """Returns the items that may be recommended, bool [items]; None for all."""
    if allow is None and deny is None:
        return None
    mask = np.full(len(items), allow is None)
    if allow is not None:
        mask[_known(items, allow, "allow_items")] = True
    if deny is not None:
        mask[_known(items, deny, "deny_items")] = False
    return mask


def _known(items: IdTable, ids: Any, name: str) -> np.ndarray:
    """Returns the indices of the items that the model knows."""
    given = frames.id_list(ids, f"{name}=")
    index = items.index_of(given)
    unknown = int((index < 0).sum())
    if unknown and unknown == len(index) and name == "allow_items":
        raise all_unknown(unknown, given[:3], name, items)
    if unknown:
        _logger.warning("ignored %d unknown items of %s", unknown, name)
    return index[index >= 0]


def count(name: str, value: Any) -> int:
    """Returns an argument such as `k` as an int.

    Raises:
      VaecfError: the value is no integer of Python or NumPy, or below 1.
    """
    value = plain(value)
    if type(value) is not int or value < 1:
        raise VaecfError(
            f"{name}={short(value)} must be a whole number of at least 1"
        )
    return value
