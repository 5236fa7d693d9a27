"""Prepares datasets: reads, filters, splits and writes ratings."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vaecf.data import catalog, filters, layouts, reports, splits, synthetic
from vaecf.data import dataset as datasets
from vaecf.data.dataset import Dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.data.readers import Ratings, collapse_duplicates, read_ratings
from vaecf.errors import VaecfError, did_you_mean

_RECIPE_DATA_DIR = "/data"
_HELD_OUT_SHARE = 0.1  # default, for validation and test users each
_MAX_HELD_OUT = 10_000  # limit of that default; the paper's for ML-20M
_OWN_DATA = catalog.Entry("", "", "", 0, default_protocol="vaecf")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of `prepare`. None means the default.

    Attributes:
      dataset: name in the catalog; None for your own data.
      ratings: file, folder or DataFrame; None downloads ``dataset``.
      data_dir: folder laid out like the recipe's, instead of ``ratings``.
        Without ``dataset`` and ``ratings``, prepares MovieLens 20M under the
        recipe's protocol.
      output: directory to write; default ``data/<name>``, with ``data_dir``
        ``<data_dir>/<name>/preprocessed``.
      name: name of the data; default the catalog's, or the file's stem.
      cache_dir: directory for downloads.
      user_column: user column of a table; default ``user``.
      item_column: item column of a table; default ``item``.
      rating_column: rating column of a table.
      separator: separator of a text table.
      protocol: ``paper``, ``recipe`` or ``vaecf``; default the catalog's,
        ``recipe`` with ``data_dir`` alone, else ``vaecf``.
      held_out_users: validation users, and as many test users; default the
        catalog's, else a tenth of the users, at most 10,000.
      fold_in_proportion: share of a held-out user's items that a model sees.
      min_rating: rows with at least this rating are interactions; default the
        catalog's, else all rows are.
      min_items_per_user: default the catalog's, else 5.
      min_users_per_item: default the catalog's, else 0.
      iterate_filters: repeat both filters until nothing changes.
      seed: seed of the split; default 98765 for ``paper``, else 0.
      overwrite: replace an existing dataset at ``output``.
    """

    dataset: str | None = None
    ratings: Any = None
    data_dir: str | None = None
    output: str | os.PathLike[str] | None = None
    name: str | None = None
    cache_dir: str | None = None
    user_column: str | None = None
    item_column: str | None = None
    rating_column: str | None = None
    separator: str | None = None
    protocol: str | None = None
    held_out_users: int | None = None
    fold_in_proportion: float = 0.8
    min_rating: float | None = None
    min_items_per_user: int | None = None
    min_users_per_item: int | None = None
    iterate_filters: bool = False
    seed: int | None = None
    overwrite: bool = False


def prepare(
    settings: Settings, *, log: Callable[[str], None] = print
) -> Dataset:
    """Prepares a dataset and writes it.

    Args:
      settings: what to prepare.
      log: receives the report line by line.

    Returns:
      The dataset, opened from the directory that was written. Its manifest
      holds the counts of the report.

    Raises:
      VaecfError: bad input; nothing is written.
    """
    if settings.ratings is not None and settings.data_dir is not None:
        raise VaecfError("give ratings=FILE or data_dir=DIR, not both")
    guessed = settings.data_dir is None
    if settings.dataset is None and settings.ratings is None:
        # The recipe's command: its data directory, its protocol.
        settings = dataclasses.replace(
            settings,
            dataset="ml-20m",
            data_dir=settings.data_dir or _RECIPE_DATA_DIR,
            protocol=settings.protocol or "recipe",
        )
    entry = _resolve_entry(settings)
    source, output = settings.ratings, settings.output
    if settings.data_dir is not None:
        root = pathlib.Path(settings.data_dir)
        if not entry.generated:
            source = _find_ratings(root, entry, guessed=guessed)
        output = output or root / (settings.name or entry.name) / "preprocessed"
    output = pathlib.Path(output or f"data/{settings.name or entry.name}")
    datasets.check_output(output, overwrite=settings.overwrite)
    if entry.generated:
        made = _generate(settings, entry)
    else:
        if source is None:
            log(f"downloading {entry.title}; licence: {entry.licence}")
            source = catalog.fetch(entry.name, settings.cache_dir)
        made = _from_source(settings, entry, source)
    written = datasets.write_dataset(output, made, overwrite=settings.overwrite)
    for line in reports.describe(written):
        log(line)
    return written


def in_memory(
    interactions: Any,
    *,
    validation_users: int | float = 0.1,
    user_column: str = "user",
    item_column: str = "item",
    seed: int = 0,
) -> Dataset:
    """Prepares a dataset in memory: ``vaecf`` protocol, no test users.

    Args:
      interactions: pandas or polars DataFrame, or a SciPy sparse matrix users
        x items. The ids of a matrix are its row and column numbers, and every
        column is an item, seen or not.
      validation_users: number of users, or (float) share in [0, 1) of them.
      user_column: user column of a DataFrame.
      item_column: item column of a DataFrame.
      seed: seed of the split.

    Raises:
      VaecfError: see `read_ratings`; or no training user would remain.
    """
    is_matrix = hasattr(interactions, "tocsr")
    if is_matrix:
        ratings = _from_matrix(interactions)
    elif hasattr(interactions, "columns"):
        ratings = read_ratings(
            interactions, user_column=user_column, item_column=item_column
        )
    else:
        raise VaecfError(
            f"interactions of type {type(interactions).__name__}: pass a "
            f"DataFrame with columns {user_column!r} and {item_column!r}, or a "
            "scipy.sparse matrix users x items"
        )
    n_users = int(np.unique(ratings.user).size)
    is_share = isinstance(validation_users, float)
    if not 0 <= validation_users < (1 if is_share else n_users):
        raise VaecfError(
            f"validation_users={validation_users} must be a share in [0, 1), "
            f"or a number of users below all {n_users:,}"
        )
    n_held_out = int(
        validation_users * n_users if is_share else validation_users
    )
    split = splits.vaecf(ratings, n_held_out, 0, seed=seed)
    if is_matrix:
        split = _with_all_columns(split, len(ratings.item_ids))
    return _dataset(
        "(in memory)",
        "vaecf",
        ratings,
        split,
        constants={"seed": seed, "validation_users": n_held_out},
        counts={"duplicates_collapsed": split.duplicates},
    )


def _from_matrix(matrix: Any) -> Ratings:
    rows = Interactions.from_scipy(matrix)
    if not rows.nnz:
        raise VaecfError("the matrix has no interactions")
    return Ratings(
        np.repeat(np.arange(rows.n_users, dtype=np.int32), rows.counts),
        rows.indices,
        np.arange(rows.n_users),
        np.arange(rows.n_items),
        counts={},
    )


def _with_all_columns(split: splits.Split, n_items: int) -> splits.Split:
    """Widens the vocabulary to all columns of the matrix, in their order."""

    def widen(matrix: Interactions) -> Interactions:
        return Interactions(
            matrix.indptr, split.item_codes[matrix.indices], n_items
        )

    return split._replace(
        train=widen(split.train),
        validation=HeldOut(*map(widen, split.validation)),
        test=HeldOut(*map(widen, split.test)),
        item_codes=np.arange(n_items, dtype=np.int32),
    )


# --- Defaults ---------------------------------------------------------------


def _resolve_entry(settings: Settings) -> catalog.Entry:
    """Returns the dataset's entry with the settings that differ from it."""
    if settings.dataset is not None:
        entry = catalog.get(settings.dataset)
    else:
        name = "interactions"
        if isinstance(settings.ratings, (str, os.PathLike)):
            file = pathlib.Path(settings.ratings).resolve().name
            name = file.split(".")[0] or "ratings"
        entry = dataclasses.replace(_OWN_DATA, name=name)
    changes: dict[str, Any] = {
        "default_protocol": settings.protocol,
        "held_out_users": settings.held_out_users,
        "min_rating": settings.min_rating,
        "min_items_per_user": settings.min_items_per_user,
        "min_users_per_item": settings.min_users_per_item,
    }
    changes = {k: v for k, v in changes.items() if v is not None}
    entry = dataclasses.replace(entry, **changes)
    protocol = entry.default_protocol
    if protocol not in splits.PROTOCOLS:
        raise VaecfError(
            f"unknown protocol={protocol}"
            f"{did_you_mean(protocol, splits.PROTOCOLS)} (there are "
            f"{', '.join(splits.PROTOCOLS)})"
        )
    for key in ("min_items_per_user", "min_users_per_item"):
        if getattr(entry, key) < 0:
            raise VaecfError(
                f"{key}={getattr(entry, key)} must not be negative"
            )
    splits.check_settings(
        _seed(settings, entry), 1 - settings.fold_in_proportion
    )
    return entry


def _seed(settings: Settings, entry: catalog.Entry) -> int:
    if settings.seed is not None:
        return settings.seed
    return splits.PAPER_SEED if entry.default_protocol == "paper" else 0


def _find_ratings(
    data_dir: pathlib.Path, entry: catalog.Entry, *, guessed: bool
) -> pathlib.Path:
    """Returns the ratings of a known dataset below a data directory.

    The recipe unpacks the archive into ``<data_dir>/<name>/extracted``.
    """
    member = pathlib.PurePosixPath(entry.ratings_member or entry.files[0])
    folders = (
        data_dir / entry.name / "extracted",
        data_dir / entry.name,
        data_dir,
    )
    for folder in folders:
        for path in (folder / member, folder / member.name):
            if any(path.parent.glob(member.name)):
                several = entry.files or "*" in member.name
                return path.parent if several else path
    hint = "dataset=NAME, ratings=FILE or data_dir=DIR"
    if not guessed:
        hint = "ratings=FILE, or unpack it there"
    raise VaecfError(f"no such file: {folders[0] / member}; give {hint}")


# --- Steps ------------------------------------------------------------------


def _generate(settings: Settings, entry: catalog.Entry) -> Dataset:
    """Generates a dataset, whose split and filters are fixed."""
    for key in (
        "ratings",
        "protocol",
        "min_rating",
        "min_items_per_user",
        "min_users_per_item",
    ):
        value = getattr(settings, key)
        own = key == "protocol" and value == entry.default_protocol == "vaecf"
        if value is not None and not own:
            raise VaecfError(
                f"{key}={value} does not go with dataset={entry.name}, which "
                "is generated; leave it out"
            )
    return synthetic.make(
        entry.name,
        _seed(settings, entry),
        n_held_out_users=entry.held_out_users,
    )


def _from_source(
    settings: Settings, entry: catalog.Entry, source: Any
) -> Dataset:
    """Reads, filters and splits ratings."""
    layout = _layout(settings, entry, source)
    protocol, seed = entry.default_protocol, _seed(settings, entry)
    # 1 - 0.8 is 0.19999999999999996
    test_proportion = round(1 - settings.fold_in_proportion, 12)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Hashing takes a third of the time of reading, on another core.
        origin = pool.submit(_describe_source, source, layout)
        ratings = read_ratings(
            source,
            layout=layout,
            user_column=settings.user_column,
            item_column=settings.item_column,
            rating_column=settings.rating_column,
            min_rating=entry.min_rating,
            separator=settings.separator,
            count_all=bool(entry.counts) and entry.digest is None,
        )
        counts = dict(ratings.counts)
        catalog.check_counts(
            entry,
            ratings=counts["rows_read"],
            users=counts["users_read"],
            items=counts["items_read"],
        )
        repeated = 0
        if protocol == "vaecf":
            ratings, repeated = collapse_duplicates(ratings)
        ratings, filtered = filters.filter_ratings(
            ratings,
            min_items_per_user=entry.min_items_per_user,
            min_users_per_item=entry.min_users_per_item,
            iterate=settings.iterate_filters,
        )
        held_out_users = entry.held_out_users
        by_default = (
            settings.dataset is None and settings.held_out_users is None
        )
        if by_default:
            tenth = int(filtered["users_after_filters"] * _HELD_OUT_SHARE)
            held_out_users = max(1, min(_MAX_HELD_OUT, tenth))
        split: splits.Split = getattr(splits, protocol)(
            ratings,
            held_out_users,
            seed=seed,
            test_proportion=test_proportion,
        )
        counts |= filtered | split.counts
        counts["duplicates_collapsed"] = repeated + split.duplicates
        return _dataset(
            settings.name or entry.name,
            protocol,
            ratings,
            split,
            constants={
                "seed": seed,
                "held_out_users": held_out_users,
                "held_out_users_by_default": by_default,
                "test_proportion": test_proportion,
                "min_rating": entry.min_rating,
                "min_items_per_user": entry.min_items_per_user,
                "min_users_per_item": entry.min_users_per_item,
                "iterate_filters": settings.iterate_filters,
            },
            counts=counts,
            source=origin.result(),
        )


def _layout(
    settings: Settings, entry: catalog.Entry, source: Any
) -> str | layouts.Dialect | None:
    """Returns the layout of a file, or None for a table or a frame.

    The file decides, not what the publisher's archive holds: many people have
    the ratings of a known dataset as CSV.
    """
    if settings.user_column or settings.item_column:
        if entry.min_rating is not None and not settings.rating_column:
            raise VaecfError(
                f"ratings of at least {entry.min_rating:g} are interactions: "
                "name their column with rating_column"
            )
        return None
    if not isinstance(source, (str, os.PathLike)):
        return None
    layout = layouts.detect(pathlib.Path(source)) or entry.dialect
    if layout is None and settings.dataset is not None:
        raise VaecfError(
            f"{source} has none of the known layouts ("
            f"{', '.join(layouts.LAYOUTS)}); name its columns with user_column "
            "and item_column"
        )
    return layout


def _dataset(
    name: str,
    protocol: str,
    ratings: Ratings,
    split: splits.Split,
    **facts: Any,
) -> Dataset:
    return datasets.make_dataset(
        name=name,
        protocol=protocol,
        train=split.train,
        validation=split.validation,
        test=split.test,
        items=IdTable(ratings.item_ids[split.item_codes]),
        users=IdTable(ratings.user_ids[split.user_codes]),
        **facts,
    )


def _describe_source(
    source: Any, layout: str | layouts.Dialect | None
) -> dict[str, Any] | None:
    """Returns names, joint digest and size of the files; None for a frame."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    digest, size = hashlib.sha256(), 0
    files = layouts.files_of(pathlib.Path(source), layout)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                size += len(block)
    return {
        "file": ", ".join(file.name for file in files),
        "sha256": digest.hexdigest(),
        "bytes": size,
    }
