"""The settings of a preparation, and which of them go together."""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
from typing import Any

from vaecf.data import catalog, known_users, splits
from vaecf.data.file_settings import RatingsSettings, setting
from vaecf.data.id_table import is_integer
from vaecf.errors import VaecfError, did_you_mean, short

# Settings that replace the values of a catalog entry.
_OF_THE_ENTRY = (
    "protocol",
    "held_out_users",
    "min_rating",
    "min_items_per_user",
    "min_users_per_item",
)
SOURCES = ("ratings", "validation_ratings", "test_ratings")
# Settings that only some protocols use.
_OF_PROTOCOLS = {
    "folds": ("vaecf",),
    "test_share": ("weak", "temporal"),
    "test_items": ("leave_last",),
    "test_time": ("temporal",),
    "time_column": ("leave_last", "temporal"),
    "split_column": ("given",),
    "validation_ratings": ("given",),
    "test_ratings": ("given",),
}
PROTOCOLS = (*splits.PROTOCOLS, *known_users.PROTOCOLS)
# People's name of protocol vaecf, which the manifests keep.
STRONG = "strong"


@dataclasses.dataclass(frozen=True)
class Settings(RatingsSettings):
    """Settings of `prepare`. None means the default, given in brackets.

    A known dataset's protocol, number of held-out users and thresholds are the
    catalog's by default.
    """

    dataset: str | None = setting("Known dataset, such as ml-20m (your own).")
    ratings: Any = setting(
        "Ratings: file, folder, or a pattern such as *.csv (downloads dataset)."
    )
    validation_ratings: Any = setting(
        "Protocol given: the same for the validation."
    )
    test_ratings: Any = setting("Protocol given: the same for the test.")
    data_dir: str | None = setting(
        "Folder laid out as the recipe's, instead of ratings; without dataset, "
        "MovieLens 20M under the recipe's protocol (/data)."
    )
    output: str | os.PathLike[str] | None = setting(
        "Directory to write (data/<name>, or below data_dir "
        "<name>/preprocessed)."
    )
    name: str | None = setting("Name of the data (the dataset's or file's).")
    cache_dir: str | None = setting("Directory for downloads ($VAECF_CACHE).")
    protocol: str | None = setting(
        f"{', '.join((STRONG, *PROTOCOLS))} (the dataset's, else {STRONG}, "
        "which vaecf means, too)."
    )
    held_out_users: int | None = setting(
        "Validation users (a tenth, at most 10,000; leave_last: all); under "
        f"{', '.join(splits.PROTOCOLS)} as many test users, too."
    )
    folds: int | None = setting(
        "Protocol vaecf: datasets to write; every user is a test user of one "
        "of them (1)."
    )
    fold_in_proportion: float = setting(
        "Share of a held-out user's items that is shown.", default=0.8
    )
    test_share: float | None = setting(
        "Protocol weak: share of every user's interactions; temporal: of all "
        "(0.2)."
    )
    test_items: int | None = setting(
        "Protocol leave_last: interactions per user (1)."
    )
    test_time: Any = setting("Protocol temporal: time when the test begins.")
    min_items_per_user: int | None = setting(
        "Items that a user needs (5; given: 0)."
    )
    min_users_per_item: int | None = setting("Users that an item needs (0).")
    iterate_filters: bool = setting(
        "Repeat both filters until nothing changes.", default=False
    )
    seed: int | None = setting("Seed of the split (98765 for paper, else 0).")
    overwrite: bool = setting("Replace an existing dataset.", default=False)


def resolve_entry(settings: Settings) -> catalog.Entry:
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
    if settings.folds is not None:
        entry = dataclasses.replace(entry, protocol="vaecf")
    if settings.protocol == "given":
        entry = dataclasses.replace(entry, min_items_per_user=0)
    given = {key: getattr(settings, key) for key in _OF_THE_ENTRY}
    given = {k: value for k, value in given.items() if value is not None}
    if given.get("protocol") == STRONG:
        given["protocol"] = "vaecf"
    if entry.generated:
        _check_generated(settings, given)
    entry = dataclasses.replace(entry, **given)
    if entry.protocol not in PROTOCOLS:
        raise VaecfError(
            f"unknown protocol={entry.protocol}"
            f"{did_you_mean(str(entry.protocol), (STRONG, *PROTOCOLS))} "
            f"(there are {', '.join((STRONG, *PROTOCOLS))})"
        )
    for key, protocols in _OF_PROTOCOLS.items():
        is_used = entry.protocol in protocols
        if getattr(settings, key) is not None and not is_used:
            raise VaecfError(
                f"{key} has no effect with protocol={entry.protocol}: leave "
                f"it out, or choose protocol={' or '.join(protocols)}"
            )
    if (n := settings.folds) is not None and (not is_integer(n) or n < 2):
        raise VaecfError(f"folds={short(n)} must be 2 or more, and whole")
    for key in ("held_out_users", "min_items_per_user", "min_users_per_item"):
        value = getattr(entry, key)
        if not is_integer(value) or value < 0:
            raise VaecfError(
                f"{key}={short(value)} must not be negative, and whole"
            )
    splits.check_settings(
        seed_of(settings, entry), 1 - settings.fold_in_proportion
    )
    return entry


def _check_generated(settings: Settings, given: dict[str, Any]) -> None:
    """Raises if a setting would change the split of generated data."""
    for key in ("ratings", "folds"):
        if (value := getattr(settings, key)) is not None:
            given = {key: value, **given}
    for key, value in given.items():
        if key != "held_out_users" and (key, value) != ("protocol", "vaecf"):
            raise VaecfError(
                f"{key}={value} does not go with dataset={settings.dataset}, "
                "which is generated; leave it out"
            )


def seed_of(settings: Settings, entry: catalog.Entry) -> int:
    """Returns the seed of the split."""
    if settings.seed is not None:
        return settings.seed
    return splits.PAPER_SEED if entry.protocol == "paper" else 0
