"""From ratings to a dataset: read, threshold, filter, split, write, report."""

from __future__ import annotations

import concurrent.futures
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
from vaecf.data.interactions import Interactions
from vaecf.data.plan import Plan, Settings, first, make_plan, test_proportion
from vaecf.data.readers import (
    Ratings,
    ReadReport,
    collapse_duplicates,
    read_ratings,
)
from vaecf.errors import VaecfError

__all__ = ["Settings", "in_memory", "prepare"]

_MOST_HELD_OUT = 10_000  # by default: what the paper takes of ML-20M
_HELD_OUT_SHARE = 0.1  # by default, for either of validation and test


def prepare(
    settings: Settings, *, log: Callable[[str], None] = print
) -> Dataset:
    """Prepares a dataset and writes it.

    Args:
      settings: what and how.
      log: receives the report, a line at a time.

    Returns:
      The dataset, opened from the directory that was written; the counts of
      the report are in its manifest.

    Raises:
      VaecfError: bad input, in one line. Nothing is then written.
    """
    plan = make_plan(settings)
    datasets.check_output(plan.output, overwrite=settings.overwrite)
    if plan.entry is not None and plan.entry.generated:
        made = _generate(plan, settings)
    else:
        source = plan.source
        if source is None:
            log(f"{plan.name}: fetching it, once")
            source = catalog.fetch(
                settings.dataset or plan.name, settings.cache_dir
            )
        made = _from_source(plan, settings, source)
    written = datasets.write_dataset(
        plan.output, made, overwrite=settings.overwrite
    )
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
    """A dataset that is not written: ``vaecf`` protocol, no test users.

    Args:
      interactions: pandas or polars DataFrame, or a SciPy sparse matrix users
        x items (ids are then the row and column numbers, and every column is
        an item, seen or not).
      validation_users: how many, or a share in [0, 1) of all users if a
        float.
      user_column: of a frame.
      item_column: likewise.
      seed: of the split.

    Raises:
      VaecfError: as ``read_ratings``, or no training user would be left.
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
        split = _all_columns(split, len(ratings.item_ids))
    return _dataset(
        "(in memory)",
        "vaecf",
        ratings,
        split,
        constants={"seed": seed, "validation_users": n_held_out},
        counts={"duplicates_collapsed": split.duplicates},
        source=None,
    )


def _from_matrix(matrix: Any) -> Ratings:
    """Ratings of a users x items matrix."""
    rows = Interactions.from_scipy(matrix)
    if not rows.nnz:
        raise VaecfError("the matrix has no interactions")
    report = ReadReport(rows.nnz, 0, 0, rows.n_users, rows.n_items, None)
    return Ratings(
        np.repeat(np.arange(rows.n_users, dtype=np.int32), rows.counts),
        rows.indices,
        np.arange(rows.n_users, dtype=np.int64),
        np.arange(rows.n_items, dtype=np.int64),
        report,
    )


def _all_columns(split: splits.Split, n_items: int) -> splits.Split:
    """The split with every column of the source, in its order."""

    def widen(matrix: Interactions) -> Interactions:
        return Interactions(
            matrix.indptr, split.item_codes[matrix.indices], n_items
        )

    return split._replace(
        train=widen(split.train),
        validation=datasets.HeldOut(*map(widen, split.validation)),
        test=datasets.HeldOut(*map(widen, split.test)),
        item_codes=np.arange(n_items, dtype=np.int32),
    )


def _generate(plan: Plan, settings: Settings) -> Dataset:
    """Generated data knows its own protocol; only seed and size are open."""
    fixed = {
        "ratings": settings.ratings,
        "protocol": None if plan.protocol == "vaecf" else plan.protocol,
        "min_rating": settings.min_rating,
        "min_items_per_user": settings.min_items_per_user,
        "min_users_per_item": settings.min_users_per_item,
    }
    for flag, value in fixed.items():
        if value is not None:
            raise VaecfError(
                f"--{flag}={value} does not go with --dataset={plan.name}, "
                "which is generated; leave it out"
            )
    sizes = {}
    if settings.held_out_users is not None:
        sizes["n_held_out_users"] = settings.held_out_users
    assert plan.entry is not None
    return synthetic.make(plan.entry.name, plan.seed, **sizes)


def _from_source(plan: Plan, settings: Settings, source: Any) -> Dataset:
    """Reads, filters and splits."""
    named = settings.user_column or settings.item_column
    layout = None
    is_path = isinstance(source, (str, os.PathLike))
    if is_path and plan.entry is not None and not named:
        # What the file is, not what the catalog's archive would hold.
        layout = layouts.detect(pathlib.Path(source))
        if layout is None:
            raise VaecfError(
                f"{source} has none of the known layouts ("
                f"{', '.join(layouts.LAYOUTS)}); name its columns with "
                "--user_column and --item_column"
            )
    if named and plan.min_rating is not None and not settings.rating_column:
        raise VaecfError(
            f"ratings of at least {plan.min_rating:g} count: name their column "
            "with --rating_column"
        )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Hashing takes a core for as long as a third of the reading.
        origin = pool.submit(_describe_source, source, layout)
        ratings = read_ratings(
            source,
            layout=layout,
            user_column=settings.user_column,
            item_column=settings.item_column,
            rating_column=settings.rating_column,
            min_rating=plan.min_rating,
            separator=settings.separator,
            count_all=plan.entry is not None and plan.entry.digest is None,
        )
        read = ratings.report
        if plan.entry is not None:
            catalog.check_counts(
                plan.entry.name,
                ratings=read.rows,
                users=read.users,
                items=read.items,
            )
        counts: dict[str, Any] = {
            "rows_read": read.rows,
            "blank_rows": read.blank_rows,
            "below_min_rating": read.below_min_rating,
            "users_read": read.users,
            "items_read": read.items,
        }
        repeated = 0
        if plan.protocol == "vaecf":
            ratings, repeated = collapse_duplicates(ratings)
        split = _filter_and_split(plan, settings, ratings, counts)
        counts["duplicates_collapsed"] = repeated + split.duplicates
        return _dataset(
            plan.name,
            plan.protocol,
            ratings,
            split,
            constants={
                "seed": plan.seed,
                "held_out_users": counts.pop("held_out_users"),
                "held_out_users_by_default": counts.pop("by_default"),
                "test_proportion": test_proportion(settings.fold_in_proportion),
                "min_rating": plan.min_rating,
                "min_items_per_user": plan.min_items_per_user,
                "min_users_per_item": plan.min_users_per_item,
                "iterate_filters": settings.iterate_filters,
            },
            counts=counts,
            source=origin.result(),
        )


def _filter_and_split(
    plan: Plan, settings: Settings, ratings: Ratings, counts: dict[str, Any]
) -> splits.Split:
    """Filters and splits; adds to ``counts``."""
    filtered, report = filters.filter_ratings(
        ratings,
        min_items_per_user=plan.min_items_per_user,
        min_users_per_item=plan.min_users_per_item,
        iterate=settings.iterate_filters,
    )
    held_out_users = first(
        settings.held_out_users,
        plan.entry.held_out_users if plan.entry else None,
    )
    counts["by_default"] = held_out_users is None
    if held_out_users is None:
        tenth = int(report.users * _HELD_OUT_SHARE)
        held_out_users = max(1, min(_MOST_HELD_OUT, tenth))
    proportion = test_proportion(settings.fold_in_proportion)
    split_ratings = getattr(splits, plan.protocol)
    split: splits.Split = split_ratings(
        filtered, held_out_users, seed=plan.seed, test_proportion=proportion
    )
    counts |= {
        "held_out_users": held_out_users,
        "filter_rounds": report.rounds,
        "dropped_items": report.dropped_items,
        "dropped_users": report.dropped_users,
        "dropped_interactions": report.dropped_interactions,
        "users_after_filters": report.users,
        "items_after_filters": report.items,
        "interactions_after_filters": report.interactions,
        "held_out_users_without_items": split.held_out_users_without_items,
        "interactions_outside_vocabulary": split.left_out_interactions,
    }
    return split


def _dataset(
    name: str,
    protocol: str,
    ratings: Ratings,
    split: splits.Split,
    *,
    constants: dict[str, Any],
    counts: dict[str, Any],
    source: dict[str, Any] | None,
) -> Dataset:
    """The dataset of a split."""
    return datasets.make_dataset(
        name=name,
        protocol=protocol,
        train=split.train,
        validation=split.validation,
        test=split.test,
        items=IdTable(ratings.item_ids[split.item_codes]),
        users=IdTable(ratings.user_ids[split.user_codes]),
        constants=constants,
        counts=counts,
        source=source,
    )


def _describe_source(source: Any, layout: str | None) -> dict[str, Any] | None:
    """Name, digest and size; several files count as one after the other."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = pathlib.Path(source)
    if path.is_dir() and layout is None:
        layout = layouts.detect(path)
    digest, size = hashlib.sha256(), 0
    files = layouts.files_of(path, layout)
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
