"""Users' histories in the forms people have them, as CSR over known items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from vaecf.data import dataset as dataset_lib
from vaecf.data import ratings as ratings_lib
from vaecf.data import splits
from vaecf.data.ids import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError


def as_histories(
    histories: Any, items: IdTable, user_column: str, item_column: str
) -> tuple[np.ndarray, Interactions, int]:
    """Histories as (users [U], Interactions over `items`, unknown items).

    Args:
      histories: DataFrame, mapping user -> items, sequence of item sequences,
        or scipy.sparse users x items in the order of `items`.
      items: the model's items.
      user_column: of a DataFrame.
      item_column: of a DataFrame.

    Raises:
      VaecfError: a column is missing or a matrix has another width.
    """
    if scipy.sparse.issparse(histories):
        if histories.shape[1] != len(items):
            raise VaecfError(
                "the histories matrix is users x items with "
                f"{histories.shape[1]} columns, and the model has "
                f"{len(items)} items: use the model's item order "
                "(Recommender.items), or pass raw ids"
            )
        matrix = Interactions.from_scipy(histories)
        return np.arange(matrix.n_users), matrix, 0
    if hasattr(histories, "columns"):
        users, rows, raw_items = _from_frame(
            histories, user_column, item_column
        )
    elif isinstance(histories, Mapping):
        users, rows, raw_items = _from_lists(
            list(histories.keys()), list(histories.values())
        )
    elif isinstance(histories, Sequence) and not isinstance(histories, str):
        users, rows, raw_items = _from_lists(
            range(len(histories)), list(histories)
        )
    else:
        raise VaecfError(
            f"histories of type {type(histories).__name__}: pass a DataFrame, "
            "a mapping user -> items, a sequence of item sequences or a sparse "
            "matrix"
        )
    index = items.index_of(raw_items) if len(raw_items) else np.zeros(0, int)
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
    table = np.empty(len(users), object)
    table[:] = list(users)
    # Plain numbers stay numbers in the result.
    ids = np.array(list(users)) if len(users) else table
    users_array = ids if ids.ndim == 1 and ids.dtype.kind in "iu" else table
    return users_array, rows, [item for values in lists for item in values]


def training_dataset(
    interactions: Any,
    *,
    user_column: str,
    item_column: str,
    validation_users: int | float,
    seed: int,
) -> dataset_lib.Dataset:
    """A dataset in memory for `Recommender.fit`: no test users.

    Args:
      interactions: DataFrame with the two columns, or scipy.sparse users x
        items, all of whose columns become items.
      user_column: of a DataFrame.
      item_column: of a DataFrame.
      validation_users: users to hold out, a number, or a share if a float.
      seed: of the choice.

    Raises:
      VaecfError: a missing column or id, or too few users.
    """
    is_matrix = scipy.sparse.issparse(interactions)
    if is_matrix:
        pairs = _matrix_pairs(interactions)
    elif hasattr(interactions, "columns"):
        pairs = ratings_lib.read_ratings(
            interactions, user_column=user_column, item_column=item_column
        )
    else:
        raise VaecfError(
            f"fit() takes a DataFrame with columns {user_column!r} and "
            f"{item_column!r}, or a scipy.sparse matrix users x items, not a "
            f"{type(interactions).__name__}"
        )
    n_users = len(np.unique(pairs.user))
    if isinstance(validation_users, float):
        if not 0 <= validation_users < 1:
            raise VaecfError(
                f"validation_users={validation_users} must be a number of "
                "users, or a share in [0, 1)"
            )
        validation_users = int(validation_users * n_users)
    split = splits.vaecf(pairs, validation_users, 0, seed=seed)
    parts = [split.train, *split.validation, *split.test]
    item_ids = pairs.item_ids[split.item_codes]
    if is_matrix:
        # A matrix keeps its width: its columns are the items, seen or not.
        item_ids = pairs.item_ids
        parts = [
            Interactions(m.indptr, split.item_codes[m.indices], len(item_ids))
            for m in parts
        ]
    return dataset_lib.make_dataset(
        name="(in memory)",
        protocol="vaecf",
        train=parts[0],
        validation=dataset_lib.HeldOut(parts[1], parts[2]),
        test=dataset_lib.HeldOut(parts[3], parts[4]),
        items=IdTable(item_ids),
        users=IdTable(pairs.user_ids[split.user_codes]),
        constants={"seed": seed, "validation_users": validation_users},
        counts={"duplicates_collapsed": split.duplicates},
    )


def _matrix_pairs(matrix: Any) -> ratings_lib.Ratings:
    """A sparse matrix as ratings whose raw ids are rows and columns."""
    interactions = Interactions.from_scipy(matrix)
    n_users, n_items = interactions.n_users, interactions.n_items
    report = ratings_lib.ReadReport(interactions.nnz, 0, 0, None, None, None)
    return ratings_lib.Ratings(
        np.repeat(np.arange(n_users, dtype=np.int32), interactions.counts),
        np.asarray(interactions.indices),
        np.arange(n_users),
        np.arange(n_items),
        None,
        report,
    )
