"""Known datasets: where they live, what they hold, how papers prepare them.

An entry's checksum is one that the data's own publisher states; where the
publisher states none the entry says so and the counts of what was read are
held against the published counts instead (`check_counts`).
"""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from vaecf.data import archive, download
from vaecf.data.catalog_entries import ENTRIES, Entry
from vaecf.errors import VaecfError

__all__ = ["CATALOG", "Entry", "check_counts", "fetch", "get", "names"]


CATALOG: Mapping[str, Entry] = MappingProxyType({e.name: e for e in ENTRIES})


def names() -> list[str]:
    """All known names, in the catalog's order."""
    return list(CATALOG)


def get(name: str) -> Entry:
    """The entry of a known dataset.

    Raises:
      VaecfError: unknown; names the nearest known one and lists them all.
    """
    if name in CATALOG:
        return CATALOG[name]
    near = difflib.get_close_matches(name.lower(), CATALOG, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise VaecfError(
        f"unknown dataset {name!r}: {hint}known are {', '.join(CATALOG)}"
    )


def fetch(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    urls: Sequence[str] | None = None,
    progress: download.Progress | None = None,
) -> pathlib.Path:
    """Downloads a known dataset once and gives the path of its ratings.

    The archive and the unpacked ratings stay in the cache; a second call
    touches no network.

    Args:
      name: a name of the catalog.
      cache_dir: where to keep it; the default is ``$VAECF_CACHE`` or the
        platform's cache folder.
      urls: addresses to try instead of the entry's, in order.
      progress: called with (bytes so far, total bytes or None).

    Returns:
      The ratings file; the folder that holds them if they are several
      files (`Entry.files`, or a `ratings_member` with a glob).

    Raises:
      VaecfError: unknown or generated dataset, one that has to be fetched
        by hand (the message says how), no source worked, wrong checksum.
    """
    entry = get(name)
    if entry.generated:
        raise VaecfError(
            f"{name} is generated, not downloaded: leave out the download "
            "and prepare it with --dataset alone"
        )
    sources = tuple(entry.urls if urls is None else urls)
    if not sources:
        raise VaecfError(entry.manual)
    root = pathlib.Path(cache_dir or download.user_cache_dir()) / name
    ratings = root / "ratings"
    with download.locked(root):
        if entry.files:
            for file in entry.files:
                _download(
                    entry,
                    [f"{url.rstrip('/')}/{file}" for url in sources],
                    ratings / file,
                    progress,
                )
            return ratings
        if not ratings.exists():
            packed = root / sources[0].rsplit("/", 1)[-1]
            _download(entry, sources, packed, progress)
            archive.extract(packed, entry.ratings_member, ratings)
    if "*" in entry.ratings_member:
        return ratings
    return ratings / entry.ratings_member.rsplit("/", 1)[-1]


def _download(
    entry: Entry,
    urls: Sequence[str],
    destination: pathlib.Path,
    progress: download.Progress | None,
) -> None:
    try:
        download.download(
            urls,
            destination,
            digest=entry.digest,
            n_bytes=entry.archive_bytes,
            progress=progress,
        )
    except VaecfError as error:
        if destination.exists():  # the cached file itself is at fault
            raise
        raise VaecfError(
            f"{entry.name}: {error}. Get it elsewhere and pass "
            f"--ratings=FILE, or place the archive at {destination}"
        ) from error


def check_counts(
    name: str,
    *,
    ratings: int | None = None,
    users: int | None = None,
    items: int | None = None,
) -> None:
    """Holds what was read from a file against the published counts.

    Counts are those of the file as it is, before any threshold or filter.
    A count left out here, or not published, is not compared.

    Raises:
      VaecfError: a count differs; names expected and found.
    """
    found = {"ratings": ratings, "users": users, "items": items}
    wrong = [
        f"{found[key]:,} {key} instead of {expected:,}"
        for key, expected in get(name).counts.items()
        if found[key] is not None and found[key] != expected
    ]
    if wrong:
        raise VaecfError(
            f"{name}: read {', '.join(wrong)}: the file is cut short or of "
            "another release; get it again, or prepare it as data of your "
            "own, with --ratings, --user_column and --item_column"
        )
