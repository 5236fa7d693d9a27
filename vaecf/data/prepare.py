"""Prepares datasets: reads, filters, splits and writes ratings."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vaecf.data import (
    catalog,
    filters,
    folds,
    known_users,
    layouts,
    outputs,
    reports,
    splits,
    synthetic,
)
from vaecf.data import dataset as datasets
from vaecf.data.dataset import Dataset
from vaecf.data.file_settings import RatingsSettings
from vaecf.data.id_table import IdTable, is_integer
from vaecf.data.prepare_settings import (
    SOURCES,
    STRONG,
    Settings,
    resolve_entry,
    seed_of,
)
from vaecf.data.readers import Ratings, collapse_duplicates, read_ratings
from vaecf.errors import VaecfError, listed, short
from vaecf.files import user_path
from vaecf.setting import plain


class Sizes(NamedTuple):
    """Numbers of held-out users, or shares of all; None for the usual one."""

    validation_users: int | float | None
    test_users: int | float | None

    def numbers(self, n_users: int, *, usual: int) -> dict[str, int]:
        """Returns the numbers by the names of the fields."""
        return {
            name: usual if value is None else number_of(name, value, n_users)
            for name, value in self._asdict().items()
        }


def number_of(name: str, value: Any, n_users: int) -> int:
    """Returns a number of held-out users that may be given as a share.

    Raises:
      VaecfError: it is no share in [0, 1), and no number below all users.
    """
    value = plain(value)
    is_share = isinstance(value, float)
    limit = 1 if is_share else n_users
    if not (is_share or is_integer(value)) or not 0 <= value < limit:
        raise VaecfError(
            f"{name}={short(value)} must be a share in [0, 1), or a number of "
            f"users below all {n_users:,}"
        )
    return int(value * n_users if is_share else value)


def prepare(
    settings: Settings, *, log: Callable[[str], None] = print
) -> Dataset:
    """Prepares a dataset, writes it, and logs a report line by line.

    Returns:
      The dataset, opened from the directory that was written. Its manifest
      holds the counts of the report. With `folds`, the first of them.

    Raises:
      VaecfError: bad input; nothing is written.
    """
    settings = plain_settings(settings)
    if settings.ratings is not None and settings.data_dir is not None:
        raise VaecfError("give ratings=FILE or data_dir=DIR, not both")
    has_files = settings.ratings is not None or settings.data_dir is not None
    if settings.cache_dir is not None and has_files:
        raise VaecfError(
            f"cache_dir={settings.cache_dir} has no effect: nothing is "
            "downloaded if ratings or data_dir is given"
        )
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
    entry = resolve_entry(settings)
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
    before = outputs.check(output, overwrite=settings.overwrite)
    if entry.generated:
        made = [
            synthetic.make(
                entry.name,
                seed_of(settings, entry),
                n_held_out_users=entry.held_out_users,
            )
        ]
    else:
        if source is None:
            log(f"downloading {entry.title}; licence: {entry.licence}")
            source = catalog.fetch(entry.name, settings.cache_dir)
        made = from_source(settings, entry, source)
    known: Any = {"overwrite": settings.overwrite, "expected": before}
    if settings.folds is None:
        written = [datasets.write_dataset(output, made[0], **known)]
    else:
        written = folds.write(output, made, **known)
    for line in reports.describe(written, output):
        log(line)
    return written[0]


def plain_settings(settings: Settings) -> Settings:
    """Returns the settings without NumPy's numbers and with whole paths."""
    unchanged = (*SOURCES, "test_time")  # frames, and dates of NumPy
    values: dict[str, Any] = {
        name: value if name in unchanged else plain(value)
        for name, value in vars(settings).items()
    }
    for key in (*SOURCES, "data_dir", "output", "cache_dir"):
        if isinstance(values[key], (str, os.PathLike)):
            values[key] = user_path(values[key])
    has_parts = any(values[key] is not None for key in SOURCES[1:])
    if values["ratings"] is None and has_parts:
        raise VaecfError(
            "validation_ratings and test_ratings go with ratings, the training "
            "part: pass ratings, too"
        )
    return Settings(**values)


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


def from_source(
    settings: Settings,
    entry: catalog.Entry,
    source: Any,
    sizes: Sizes | None = None,
) -> list[Dataset]:
    """Reads, filters and splits ratings; returns a dataset, or the folds.

    Args:
      source: what `readers.read_ratings` reads.
      sizes: numbers of held-out users other than `settings.held_out_users`,
        for protocol vaecf.

    Raises:
      VaecfError: the ratings or a setting cannot be used.
    """
    protocol = entry.protocol
    if sizes is not None and protocol != "vaecf":
        name = next(k for k, v in sizes._asdict().items() if v is not None)
        raise VaecfError(
            f"{name} has no effect with protocol={protocol}: use "
            f"held_out_users, or choose protocol={STRONG}"
        )
    parts = {
        name: getattr(settings, f"{name}_ratings")
        for name in ("validation", "test")
        if getattr(settings, f"{name}_ratings") is not None
    }
    if parts and settings.split_column is not None:
        raise VaecfError(
            f"split_column={settings.split_column} and test_ratings both say "
            "what the test is: give one of them"
        )
    column = None if parts else known_users.COLUMNS.get(protocol)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Hashing takes a third of the time of reading, on another core.
        origin = pool.submit(_describe_sources, [source, *parts.values()])
        fields = (field.name for field in dataclasses.fields(RatingsSettings))
        reading = {name: getattr(settings, name) for name in fields}
        ratings = read_ratings(
            source,
            dialect=entry.dialect,
            count_all=bool(entry.counts) and entry.digest is None,
            more=() if column is None else (column,),
            parts=parts,
            **reading | {"min_rating": entry.min_rating},
        )
    catalog.check_counts(
        entry,
        ratings=ratings.counts["rows_read"],
        users=ratings.counts["users_read"],
        items=ratings.counts["items_read"],
    )
    return _filter_and_split(settings, entry, ratings, origin.result(), sizes)


def _filter_and_split(
    settings: Settings,
    entry: catalog.Entry,
    ratings: Ratings,
    source: dict[str, Any] | None,
    sizes: Sizes | None,
) -> list[Dataset]:
    """Returns the dataset, or one for each of the folds."""
    is_known = entry.protocol in known_users.PROTOCOLS
    counts = dict(ratings.counts)
    repeated = 0
    if is_known or entry.protocol == "vaecf":
        rows = ratings
        ratings, repeated = collapse_duplicates(rows)
        counts |= known_users.count_pairs(rows, repeated)
    ratings, filtered = filters.filter_ratings(
        ratings,
        min_items_per_user=entry.min_items_per_user,
        min_users_per_item=entry.min_users_per_item,
        iterate=settings.iterate_filters,
    )
    seed = seed_of(settings, entry)
    # 1 - 0.8 is 0.19999999999999996
    test_proportion = round(1 - settings.fold_in_proportion, 12)
    drawing: Any = {"seed": seed, "test_proportion": test_proportion}
    if is_known:
        names = ("test_share", "test_items", "test_time")
        made = [
            known_users.split(
                ratings,
                entry.protocol,
                settings.held_out_users,
                **{name: getattr(settings, name) for name in names},
                **drawing,
            )
        ]
        constants: dict[str, Any] = {"seed": seed}
    else:
        n, by_default = entry.held_out_users, False
        n_users = filtered["users_after_filters"]
        has_default = settings.dataset is None or settings.folds is not None
        if has_default and settings.held_out_users is None:
            n, by_default = splits.default_held_out_users(n_users), True
        constants = {
            "seed": seed,
            "held_out_users": n,
            "held_out_users_by_default": by_default,
            "test_proportion": test_proportion,
        }
        if settings.folds is not None:
            made = [*folds.split(ratings, settings.folds, n, **drawing)]
        elif sizes is not None:
            numbers = sizes.numbers(n_users, usual=n)
            made = [splits.vaecf(ratings, *numbers.values(), **drawing)]
            constants |= {"held_out_users_by_default": False, **numbers}
        else:
            made = [getattr(splits, entry.protocol)(ratings, n, **drawing)]
    return [
        assemble(
            settings.name or entry.name,
            folds.protocol(entry.protocol, split.constants),
            ratings,
            split,
            constants={
                **constants,
                **split.constants,
                "min_rating": entry.min_rating,
                "min_items_per_user": entry.min_items_per_user,
                "min_users_per_item": entry.min_users_per_item,
                "iterate_filters": settings.iterate_filters,
            },
            counts={
                **counts,
                **filtered,
                **split.counts,
                "duplicates_collapsed": repeated + split.duplicates,
            },
            source=source,
        )
        for split in made
    ]


def assemble(
    name: str,
    protocol: str,
    ratings: Ratings,
    split: splits.Split,
    **facts: Any,
) -> Dataset:
    """Returns the dataset of a split, with its raw ids."""
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


def _describe_sources(sources: Sequence[Any]) -> dict[str, Any] | None:
    """Returns names, joint digest and size of the files; None for a frame."""
    if not all(isinstance(source, (str, os.PathLike)) for source in sources):
        return None
    digest = hashlib.sha256()
    paths = map(pathlib.Path, sources)
    files = [file for path in paths for file in layouts.files_of(path)]
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return {
        "file": listed(file.name for file in files),
        "sha256": digest.hexdigest(),
        "bytes": sum(file.stat().st_size for file in files),
    }
