"""Prepares datasets: reads, filters, splits and writes ratings."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vaecf.data import catalog, filters, layouts, reports, splits, synthetic
from vaecf.data import dataset as datasets
from vaecf.data.dataset import Dataset
from vaecf.data.file_settings import FileSettings
from vaecf.data.id_table import IdTable, is_integer
from vaecf.data.interactions import entries
from vaecf.data.readers import Ratings, collapse_duplicates, read_ratings
from vaecf.errors import VaecfError, did_you_mean, listed, short
from vaecf.files import user_path
from vaecf.setting import plain

_HELD_OUT_SHARE = 0.1  # default, for validation and test users each
_MAX_HELD_OUT = 10_000  # limit of that default; the paper's for ML-20M
# Settings that replace the values of a catalog entry.
_OF_THE_ENTRY = (
    "protocol",
    "held_out_users",
    "min_rating",
    "min_items_per_user",
    "min_users_per_item",
)


@dataclasses.dataclass(frozen=True)
class Settings(FileSettings):
    """Settings of `prepare`. None means the default, given in brackets.

    A known dataset's protocol, number of held-out users and thresholds are the
    catalog's by default.
    """

    dataset: str | None = None  # name in the catalog (your own data)
    # File, folder, glob or DataFrame (downloads `dataset`).
    ratings: Any = None
    # Folder laid out like the recipe's, instead of `ratings`. Without
    # `dataset`: MovieLens 20M under the recipe's protocol.
    data_dir: str | None = None
    # Directory to write (data/<name>, or <data_dir>/<name>/preprocessed).
    output: str | os.PathLike[str] | None = None
    name: str | None = None  # of the data (the catalog's, or the file's)
    cache_dir: str | None = None  # for downloads (see `catalog.fetch`)
    protocol: str | None = None  # paper, recipe or vaecf (vaecf)
    # Validation users, and as many test users (a tenth, at most 10,000).
    held_out_users: int | None = None
    fold_in_proportion: float = 0.8  # of a held-out user's items
    min_items_per_user: int | None = None  # (5)
    min_users_per_item: int | None = None  # (0)
    iterate_filters: bool = False  # repeat both filters until nothing changes
    seed: int | None = None  # of the split (98765 for paper, else 0)
    overwrite: bool = False  # replace an existing dataset


def prepare(
    settings: Settings, *, log: Callable[[str], None] = print
) -> Dataset:
    """Prepares a dataset, writes it, and logs a report line by line.

    Returns:
      The dataset, opened from the directory that was written. Its manifest
      holds the counts of the report.

    Raises:
      VaecfError: bad input; nothing is written.
    """
    settings = dataclasses.replace(
        settings,
        **{
            name: plain(value)
            for name, value in vars(settings).items()
            if name != "ratings"
        },
    )
    if settings.ratings is not None and settings.data_dir is not None:
        raise VaecfError("give ratings=FILE or data_dir=DIR, not both")
    has_files = settings.ratings is not None or settings.data_dir is not None
    if settings.cache_dir is not None and has_files:
        raise VaecfError(
            f"cache_dir={settings.cache_dir} has no effect: nothing is "
            "downloaded if ratings or data_dir is given"
        )
    paths: dict[str, Any] = {
        key: user_path(value)
        for key in ("ratings", "data_dir", "output", "cache_dir")
        if isinstance(value := getattr(settings, key), (str, os.PathLike))
    }
    settings = dataclasses.replace(settings, **paths)
    is_recipe = settings.dataset is None and settings.ratings is None
    only_its_flags = is_recipe and settings == Settings(
        data_dir=settings.data_dir
    )
    if is_recipe:
        # The recipe's command: its data directory, its protocol.
        settings = dataclasses.replace(
            settings,
            dataset="ml-20m",
            data_dir=settings.data_dir or datasets.RECIPE_DATA_DIR,
            protocol=settings.protocol or "recipe",
        )
    entry = _resolve_entry(settings)
    source, output = settings.ratings, settings.output
    if settings.data_dir is not None:
        root = pathlib.Path(settings.data_dir)
        if not entry.generated:
            source = _find_ratings(root, entry)
        output = output or root / (settings.name or entry.name) / "preprocessed"
    output = pathlib.Path(output or f"data/{settings.name or entry.name}")
    if only_its_flags and datasets.holds_dataset(output):
        log(f"prepared before: {output} (overwrite=True prepares it again)")
        return datasets.open_dataset(output)
    before = datasets.check_output(output, overwrite=settings.overwrite)
    if entry.generated:
        made = synthetic.make(
            entry.name,
            _seed(settings, entry),
            n_held_out_users=entry.held_out_users,
        )
    else:
        if source is None:
            log(f"downloading {entry.title}; licence: {entry.licence}")
            source = catalog.fetch(entry.name, settings.cache_dir)
        made = _from_source(settings, entry, source)
    written = datasets.write_dataset(
        output, made, overwrite=settings.overwrite, expected=before
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
    """Prepares a dataset in memory: ``vaecf`` protocol, no test users.

    Args:
      interactions: see `frames.read_rows`; or a SciPy sparse matrix users x
        items. The ids of a matrix are its row and column numbers, and every
        column is an item, seen or not.
      validation_users: number of users, or (float) share in [0, 1) of them.

    Raises:
      VaecfError: see `read_ratings`; or no training user would remain.
    """
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
            "DataFrame, such as pandas.read_csv(path)"
        )
    else:
        ratings = read_ratings(
            interactions, user_column=user_column, item_column=item_column
        )
    n_users = int(np.unique(ratings.user).size)
    validation_users = plain(validation_users)
    is_share = isinstance(validation_users, float)
    is_number = is_share or is_integer(validation_users)
    limit = 1 if is_share else n_users
    if not is_number or not 0 <= validation_users < limit:
        raise VaecfError(
            f"validation_users={short(validation_users)} must be a share in "
            f"[0, 1), or a number of users below all {n_users:,}"
        )
    n_held_out = int(
        validation_users * n_users if is_share else validation_users
    )
    split = splits.vaecf(
        ratings, n_held_out, 0, seed=seed, keep_all_items=is_matrix
    )
    return _dataset(
        "(in memory)",
        "vaecf",
        ratings,
        split,
        constants={"seed": seed, "validation_users": n_held_out},
        counts={"duplicates_collapsed": split.duplicates},
    )


def _resolve_entry(settings: Settings) -> catalog.Entry:
    """Returns the dataset's entry with the settings that differ from it."""
    if settings.dataset is not None:
        entry = catalog.get(settings.dataset)
    else:
        name = "interactions"
        if isinstance(settings.ratings, (str, os.PathLike)):
            path = pathlib.Path(settings.ratings).resolve()
            while glob.has_magic(path.name) and not path.exists():
                path = path.parent  # of a pattern: the folder
            name = path.name.split(".")[0] or "ratings"
        entry = catalog.Entry(name, "", "", 0, protocol="vaecf")
    given = {key: getattr(settings, key) for key in _OF_THE_ENTRY}
    given = {k: value for k, value in given.items() if value is not None}
    if entry.generated:
        _check_generated(settings, given)
    entry = dataclasses.replace(entry, **given)
    if entry.protocol not in splits.PROTOCOLS:
        raise VaecfError(
            f"unknown protocol={entry.protocol}"
            f"{did_you_mean(entry.protocol, splits.PROTOCOLS)} (there are "
            f"{', '.join(splits.PROTOCOLS)})"
        )
    for key in ("held_out_users", "min_items_per_user", "min_users_per_item"):
        value = getattr(entry, key)
        if not is_integer(value) or value < 0:
            raise VaecfError(
                f"{key}={short(value)} must not be negative, and whole"
            )
    splits.check_settings(
        _seed(settings, entry), 1 - settings.fold_in_proportion
    )
    return entry


def _check_generated(settings: Settings, given: dict[str, Any]) -> None:
    """Raises if a setting would change the split of generated data."""
    if settings.ratings is not None:
        given = {"ratings": settings.ratings, **given}
    for key, value in given.items():
        if key != "held_out_users" and (key, value) != ("protocol", "vaecf"):
            raise VaecfError(
                f"{key}={value} does not go with dataset={settings.dataset}, "
                "which is generated; leave it out"
            )


def _seed(settings: Settings, entry: catalog.Entry) -> int:
    if settings.seed is not None:
        return settings.seed
    return splits.PAPER_SEED if entry.protocol == "paper" else 0


def _find_ratings(data_dir: pathlib.Path, entry: catalog.Entry) -> pathlib.Path:
    """Returns the ratings of a known dataset below a data directory.

    The recipe unpacks the archive into ``<data_dir>/<name>/extracted``.
    """
    member = pathlib.PurePosixPath(entry.ratings_member or entry.files[0])
    below = data_dir / entry.name
    folders = (below / "extracted", below, data_dir)
    for folder in folders:
        for path in (folder / member, folder / member.name):
            if any(path.parent.glob(member.name)):
                several = entry.files or "*" in member.name
                return path.parent if several else path
    raise VaecfError(
        f"no such file: {folders[0] / member}; give ratings=FILE or "
        f"data_dir=DIR, or dataset={entry.name} alone to download it"
    )


def _from_source(
    settings: Settings, entry: catalog.Entry, source: Any
) -> Dataset:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Hashing takes a third of the time of reading, on another core.
        origin = pool.submit(_describe_source, source)
        fields = (field.name for field in dataclasses.fields(FileSettings))
        reading = {name: getattr(settings, name) for name in fields}
        ratings = read_ratings(
            source,
            dialect=entry.dialect,
            count_all=bool(entry.counts) and entry.digest is None,
            **reading | {"min_rating": entry.min_rating},
        )
    counts = dict(ratings.counts)
    catalog.check_counts(
        entry,
        ratings=counts["rows_read"],
        users=counts["users_read"],
        items=counts["items_read"],
    )
    repeated = 0
    if entry.protocol == "vaecf":
        ratings, repeated = collapse_duplicates(ratings)
    ratings, filtered = filters.filter_ratings(
        ratings,
        min_items_per_user=entry.min_items_per_user,
        min_users_per_item=entry.min_users_per_item,
        iterate=settings.iterate_filters,
    )
    held_out_users = entry.held_out_users
    by_default = settings.dataset is None and settings.held_out_users is None
    if by_default:
        tenth = int(filtered["users_after_filters"] * _HELD_OUT_SHARE)
        held_out_users = max(1, min(_MAX_HELD_OUT, tenth))
    seed = _seed(settings, entry)
    # 1 - 0.8 is 0.19999999999999996
    test_proportion = round(1 - settings.fold_in_proportion, 12)
    split: splits.Split = getattr(splits, entry.protocol)(
        ratings, held_out_users, seed=seed, test_proportion=test_proportion
    )
    counts |= filtered | split.counts
    counts["duplicates_collapsed"] = repeated + split.duplicates
    return _dataset(
        settings.name or entry.name,
        entry.protocol,
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


def _describe_source(source: Any) -> dict[str, Any] | None:
    """Returns names, joint digest and size of the files; None for a frame."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    digest, files = hashlib.sha256(), layouts.files_of(pathlib.Path(source))
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return {
        "file": listed(file.name for file in files),
        "sha256": digest.hexdigest(),
        "bytes": sum(file.stat().st_size for file in files),
    }
