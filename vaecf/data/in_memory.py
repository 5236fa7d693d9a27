"""Datasets from Python: of frames and matrices, known names, directories."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np

from vaecf.data import catalog, prepare, splits, synthetic
from vaecf.data import dataset as datasets
from vaecf.data.dataset import Dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions, entries
from vaecf.data.prepare import Sizes
from vaecf.data.prepare_settings import (
    STRONG,
    Settings,
    resolve_entry,
    seed_of,
)
from vaecf.data.readers import Ratings, read_ratings
from vaecf.errors import VaecfError, did_you_mean, short
from vaecf.files import user_path

# Settings of `prepare` that `split` and `load_dataset` have no use for.
_OF_FILES = {
    *("dataset", "data_dir", "ratings"),
    *("output", "overwrite", "cache_dir", "folds"),
}

_logger = logging.getLogger("vaecf")


def load_dataset(source: Any, **settings: Any) -> Dataset:
    """Returns a dataset: from a directory, a known name, or interactions.

    >>> data = vaecf.load_dataset(frame)
    >>> data.protocol, data.split_sizes  # training, validation, test users
    ('vaecf', (48, 6, 6))

    Args:
      source: directory of a prepared dataset, in the layout of vaecf, of the
        paper's notebook or of NVIDIA's recipe (its digests are checked); name
        of a dataset of `vaecf.data.catalog`, such as 'ml-1m' or 'synthetic',
        which is downloaded once, or generated, and split as its paper does;
        or what `split` takes. A dataset is returned unchanged.
      **settings: settings of `split` that differ from the defaults. A prepared
        dataset takes none. For a known name also `ratings`, the path of your
        own copy, which is read instead of downloading.

    Returns:
      The dataset: memory-mapped if `source` is a directory, else in memory.

    Raises:
      TypeError: a setting is unknown.
      VaecfError: there is no dataset, it is damaged, it cannot be downloaded,
        or the interactions or a setting cannot be used.
    """
    is_path = isinstance(source, (str, os.PathLike))
    is_directory = is_path and datasets.holds_dataset(source)
    if isinstance(source, Dataset) or is_directory:
        for name in settings:
            raise VaecfError(
                f"{name} has no effect: the dataset is prepared; leave it out, "
                "or pass the interactions"
            )
        return datasets.find_dataset(source) if is_directory else source
    if not (isinstance(source, str) and source in catalog.CATALOG):
        if is_path and not user_path(source).is_file():
            if user_path(source).is_dir():
                return datasets.find_dataset(source)  # raises
            raise VaecfError(
                f"{short(source)} is no directory, no file and no known "
                f"dataset{did_you_mean(str(source).lower(), catalog.CATALOG)} "
                f"(known are {', '.join(catalog.CATALOG)})"
            )
        return split(source, **settings)
    ratings = settings.pop("ratings", None)
    chosen, sizes = _settings(ratings, {"dataset": source, **settings})
    entry = resolve_entry(chosen)
    if entry.generated:
        if sizes:
            raise VaecfError(
                f"{source} is generated with its split: use held_out_users "
                "instead of validation_users and test_users"
            )
        seed, n = seed_of(chosen, entry), entry.held_out_users
        return synthetic.make(entry.name, seed, n_held_out_users=n)
    if (path := chosen.ratings) is None:
        # A copy in the cache needs no network. The licence is worth a warning.
        if entry.urls and not catalog.is_fetched(entry.name):
            _logger.warning(
                "downloading %s; licence: %s", entry.title, entry.licence
            )
        path = catalog.fetch(entry.name)
    [made] = prepare.from_source(chosen, entry, path, sizes)
    return made


def split(
    interactions: Any,
    protocol: str = STRONG,
    *,
    test_users: int | float | None = None,
    validation_users: int | float | None = None,
    **settings: Any,
) -> Dataset:
    """Splits interactions in memory into training, validation and test.

    >>> split = vaecf.split(frame, test_users=0.2, seed=1)
    >>> split.split_sizes  # training, validation, test users
    (42, 6, 12)
    >>> split.test.held_out  # what a model has to find, row by row
    Interactions(12 users x 30 items, 12 interactions)

    Args:
      interactions: frame, mapping or lists as for `Recommender.fit`; file or
        folder of ratings; SciPy sparse matrix users x items or
        `Interactions`, whose ids are the row and column numbers; or a
        `Dataset`, whose pairs are split anew.
      protocol: 'strong' (default): strong generalisation, the held-out users
        are never trained on (manifests call it 'vaecf'); 'paper' and 'recipe'
        are published splits of the same kind; 'weak', 'leave_last',
        'temporal' and 'given' hold out interactions of known users.
      test_users: 'strong': number of test users, or share in [0, 1) of the
        users; None is a tenth, at most 10,000.
      validation_users: the same for the validation users.
      **settings: other fields of `vaecf.data.prepare_settings.Settings`, but
        for those of files to write: user_column, item_column, rating_column,
        min_rating, time_column, split_column, validation_ratings,
        test_ratings, test_share, test_items, test_time, held_out_users,
        fold_in_proportion (0.8), min_items_per_user (5), seed (0) and so on.

    Returns:
      A dataset in memory. The items are those of the training users.

    Raises:
      TypeError: a setting is unknown, or has no effect here.
      VaecfError: bad input.
    """
    if isinstance(interactions, Dataset):
        settings = {"name": interactions.name, **settings}
    sizes = {"test_users": test_users, "validation_users": validation_users}
    chosen, given = _settings(
        _as_table(interactions), {"protocol": protocol, **sizes, **settings}
    )
    entry = resolve_entry(chosen)
    [made] = prepare.from_source(chosen, entry, chosen.ratings, given)
    return made


def _settings(
    ratings: Any, values: dict[str, Any]
) -> tuple[Settings, Sizes | None]:
    """Returns the settings of a preparation, and the sizes if any is given."""
    sizes = Sizes(*(values.pop(name, None) for name in Sizes._fields))
    known = {*vars(Settings()), *Sizes._fields} - _OF_FILES
    for name in values.keys() - {"dataset"}:
        if name not in known:
            raise TypeError(
                f"split has no setting {name!r}{did_you_mean(name, known)}"
            )
    chosen = prepare.plain_settings(Settings(ratings=ratings, **values))
    return chosen, None if sizes == (None, None) else sizes


def _as_table(interactions: Any) -> Any:
    """Returns a matrix or a dataset as a frame of pairs, others unchanged."""
    import polars as pl

    if isinstance(interactions, Dataset):
        return pl.DataFrame(_pairs(interactions)).unique(maintain_order=True)
    if isinstance(interactions, Interactions):
        interactions = interactions.to_scipy()
    if hasattr(interactions, "tocsr"):
        row, column = entries(interactions)
        return pl.DataFrame({"user": row, "item": column})
    return interactions


def _pairs(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns raw ids of the users and items of all matrices."""
    n_train, n_validation, _ = dataset.split_sizes
    first = {"train": 0, "validation": n_train, "test": n_train + n_validation}
    rows, columns = [], []
    for part, matrix in dataset.matrices.items():
        row = first[part.partition(".")[0]] + np.arange(matrix.n_users)
        rows.append(np.repeat(row, matrix.counts))
        columns.append(matrix.indices)
    return {
        "user": dataset.users.ids[np.concatenate(rows)],
        "item": dataset.items.ids[np.concatenate(columns)],
    }


def without_test(
    interactions: Any,
    *,
    validation_users: int | float = 0.1,
    user_column: str = "user",
    item_column: str = "item",
    seed: int = 0,
    keep_all_items: bool = False,
    known_items: IdTable | None = None,
) -> Dataset:
    """Prepares a dataset in memory: ``vaecf`` protocol, no test users.

    Args:
      interactions: see `frames.read_rows`; or a SciPy sparse matrix users x
        items. The ids of a matrix are its row and column numbers, and every
        column is an item, seen or not.
      validation_users: number of users, or (float) share in [0, 1) of them.
      keep_all_items: keep the items that only validation users have.
      known_items: items that come first in the vocabulary, in their order,
        whether they occur or not; all other items are kept, too.

    Raises:
      VaecfError: see `read_ratings`; or no training user would remain.
    """
    if isinstance(interactions, Interactions):
        interactions = interactions.to_scipy()
    is_matrix = hasattr(interactions, "tocsr")
    if is_matrix:
        row, column = entries(interactions)
        user_ids, user = np.unique(row, return_inverse=True)
        item_ids = np.arange(interactions.shape[1])
        user, item = user.astype(np.int32), column.astype(np.int32)
        ratings = Ratings(user, item, user_ids, item_ids, counts={})
        if not ratings.n:
            raise VaecfError("the matrix has no interactions")
    elif isinstance(interactions, (str, os.PathLike)):
        raise VaecfError(
            f"interactions of type {type(interactions).__name__}: pass a "
            "DataFrame, such as pandas.read_csv(path), or "
            "vaecf.load_dataset(path)"
        )
    else:
        ratings = read_ratings(
            interactions, user_column=user_column, item_column=item_column
        )
    if known_items is not None:
        ratings = _with_known_items(ratings, known_items, is_matrix)
    n_users = int(np.unique(ratings.user).size)
    n = prepare.number_of("validation_users", validation_users, n_users)
    keep = is_matrix or keep_all_items or known_items is not None
    made = splits.vaecf(ratings, n, 0, seed=seed, keep_all_items=keep)
    return prepare.assemble(
        "(in memory)",
        "vaecf",
        ratings,
        made,
        constants={"seed": seed, "validation_users": n},
        counts={"duplicates_collapsed": made.duplicates},
    )


def _with_known_items(
    ratings: Ratings, known: IdTable, is_matrix: bool
) -> Ratings:
    """Returns the ratings with codes of the known items first."""
    in_order = np.arange(len(known))
    if is_matrix and not np.array_equal(known.ids, in_order):
        raise VaecfError(
            "the columns of a matrix do not name the known items: pass a frame "
            "with their ids"
        )
    new_ids = IdTable(ratings.item_ids)
    place = known.index_of(new_ids.ids)
    is_new = place < 0
    place[is_new] = len(known) + np.arange(is_new.sum())
    more = new_ids.ids[is_new]
    if known.type != new_ids.type:
        if known.type == "int64" and len(more):
            raise VaecfError(
                f"item {short(more[0])}: the known items are integers; use "
                "integers for new ones, too"
            )
        more = more.astype(known.ids.dtype)
        more[:] = [str(value) for value in more]
    ids = np.concatenate([known.ids, more])
    return ratings._replace(item=place[ratings.item], item_ids=ids)
