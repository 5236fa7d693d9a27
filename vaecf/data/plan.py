"""What to prepare, with the defaults of each dataset and protocol."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

from vaecf.data import catalog, splits
from vaecf.errors import VaecfError, did_you_mean

_RECIPE_DATA_DIR = "/data"
_MIN_ITEMS_PER_USER = 5  # by default: as in every paper under this protocol


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to prepare, and how. None stands for the default.

    Attributes:
      dataset: name in the catalog; None for data of one's own.
      ratings: file or folder (or DataFrame); None downloads ``dataset``.
      data_dir: folder laid out as the recipe's, instead of ``ratings``; with
        neither ``dataset`` nor ``ratings`` it is MovieLens 20M under the
        recipe's protocol.
      output: directory to write; default ``data/<name>``, with ``data_dir``
        ``<data_dir>/<name>/preprocessed``.
      name: of the data; default the catalog's, or the file's stem.
      cache_dir: of downloads.
      user_column, item_column, rating_column: of tables.
      separator: of text tables.
      protocol: ``paper``, ``recipe`` or ``vaecf``; default the catalog's,
        ``recipe`` with ``data_dir`` alone, else ``vaecf``.
      held_out_users: validation users, and as many test users; default the
        catalog's, else a tenth of the users, at most 10,000.
      fold_in_proportion: of a held-out user's items shown to the model.
      min_rating: rows with at least this rating count; default the
        catalog's, else all rows.
      min_items_per_user: default the catalog's, else 5.
      min_users_per_item: default the catalog's, else 0.
      iterate_filters: repeat the two until both hold.
      seed: default 98765 for ``paper``, else 0.
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


class Plan(NamedTuple):
    """Settings with every default filled in but the number of users."""

    name: str
    entry: catalog.Entry | None
    source: Any  # None: to be downloaded
    output: pathlib.Path
    protocol: str
    seed: int
    min_rating: float | None
    min_items_per_user: int
    min_users_per_item: int


def make_plan(settings: Settings) -> Plan:
    """Fills in the defaults and refuses what does not go together."""
    given = dataclasses.replace(settings)
    if given.ratings is not None and given.data_dir is not None:
        raise VaecfError("give --ratings or --data_dir, not both")
    if given.dataset is None and given.ratings is None:
        # The recipe's command: its data directory, its protocol.
        given = dataclasses.replace(
            given,
            dataset="ml-20m",
            data_dir=given.data_dir or _RECIPE_DATA_DIR,
            protocol=given.protocol or "recipe",
        )
    entry = catalog.get(given.dataset) if given.dataset is not None else None
    name = given.name or _default_name(entry, given.ratings)
    source, output = given.ratings, given.output
    if given.data_dir is not None and entry is not None:
        if not entry.generated:
            guessed = settings.data_dir is None
            source = _find_ratings(pathlib.Path(given.data_dir), entry, guessed)
        output = output or pathlib.Path(given.data_dir, name, "preprocessed")
    protocol = given.protocol or (entry.default_protocol if entry else "vaecf")
    if protocol not in splits.PROTOCOLS:
        raise VaecfError(
            f"unknown --protocol={protocol}"
            f"{did_you_mean(protocol, splits.PROTOCOLS)} (there are "
            f"{', '.join(splits.PROTOCOLS)})"
        )
    for flag in ("min_items_per_user", "min_users_per_item"):
        least = getattr(given, flag)
        if least is not None and least < 0:
            raise VaecfError(f"--{flag}={least} must not be negative")
    default_seed = splits.PAPER_SEED if protocol == "paper" else 0
    splits.check_seed(first(given.seed, default_seed))
    return Plan(
        name=name,
        entry=entry,
        source=source,
        output=pathlib.Path(output or pathlib.Path("data", name)),
        protocol=protocol,
        seed=first(given.seed, default_seed),
        min_rating=first(given.min_rating, entry and entry.min_rating),
        min_items_per_user=first(
            given.min_items_per_user,
            entry.min_items_per_user if entry else _MIN_ITEMS_PER_USER,
        ),
        min_users_per_item=first(
            given.min_users_per_item,
            entry.min_users_per_item if entry else 0,
        ),
    )


def first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _default_name(entry: catalog.Entry | None, ratings: Any) -> str:
    if entry is not None:
        return entry.name
    if isinstance(ratings, (str, os.PathLike)):
        return pathlib.Path(ratings).resolve().name.split(".")[0] or "ratings"
    return "interactions"


def _find_ratings(
    data_dir: pathlib.Path, entry: catalog.Entry, guessed: bool
) -> pathlib.Path:
    """The ratings of a known dataset below a data directory.

    The recipe unpacks the archive into ``<data_dir>/<name>/extracted``.
    """
    member = pathlib.PurePosixPath(entry.ratings_member)
    folders = (
        data_dir / entry.name / "extracted",
        data_dir / entry.name,
        data_dir,
    )
    for folder in folders:
        for path in (folder / member, folder / member.name):
            if "*" in member.name:
                if any(path.parent.glob(member.name)):
                    return path.parent
            elif entry.files:
                if (folder / entry.files[0]).is_file():
                    return folder
            elif path.is_file():
                return path
    wanted = folders[0] / (member if entry.ratings_member else entry.files[0])
    hint = (
        "name what to prepare with --dataset=NAME, --ratings=FILE or "
        "--data_dir=DIR"
        if guessed
        else "unpack it there, or name it with --ratings=FILE"
    )
    raise VaecfError(f"no such file: {wanted}; {hint}")


def test_proportion(fold_in_proportion: float) -> float:
    """What is not folded in; 1 - 0.8 is 0.2, not 0.19999999999999996."""
    if not 0 < fold_in_proportion < 1:
        raise VaecfError(
            f"--fold_in_proportion={fold_in_proportion:g} must be above 0 "
            "and below 1"
        )
    return round(1 - fold_in_proportion, 12)
