"""Known datasets: where to get them and how papers prepare them.

To add a dataset, add an entry to `ENTRIES`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.data import download
from vaecf.data.download import Digest
from vaecf.data.file_settings import Dialect
from vaecf.errors import VaecfError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Entry:
    """One known dataset."""

    name: str
    title: str
    licence: str  # terms in short, with their address
    held_out_users: int  # for validation, and as many for test
    # Addresses of the archive in the order in which they are tried; with
    # `files`, addresses of the folder that holds these files.
    urls: tuple[str, ...] = ()
    # The owner's checksum of the archive. Without one, the `counts` of users
    # and items are checked too.
    digest: Digest | None = None
    ratings_member: str = ""  # path (or glob) of the ratings in the archive
    files: tuple[str, ...] = ()  # for datasets without an archive
    # How to read a text file whose layout `layouts.detect` does not know.
    dialect: Dialect | None = None
    min_rating: float | None = None  # of an interaction; None: all are
    min_items_per_user: int = 5
    min_users_per_item: int = 0
    protocol: str = "paper"
    # Published facts of the ratings file: `ratings`, `users` and `items`
    # (distinct items with a rating).
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    manual: str = ""  # how to get data that no program may download
    generated: bool = False  # by `vaecf.data.synthetic`
    config: str = "blend"  # name of the file in configs/ to train with


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
# Byte-identical copies of the four older archives, set up when GroupLens'
# certificate expired in August 2026 (recommenders-team/recommenders #2369).
_RECOMMENDERS = (
    "https://huggingface.co/datasets/Recommenders/MovieLens/resolve/main/"
)
_WAYBACK = "https://web.archive.org/web/2024id_/"
_LIGHTGCN = (
    "https://raw.githubusercontent.com/gusye1234/LightGCN-PyTorch/master/data/"
)


def _movielens(
    name: str,
    title: str,
    member: str,
    counts: Mapping[str, int],
    *,
    md5: str | None = None,
    mirrored: bool = False,
    readme: str | None = None,
    **more: Any,
) -> Entry:
    """Returns an entry with the MD5 that GroupLens publishes beside the zip."""
    archive = f"{name}.zip"
    mirrors = (_RECOMMENDERS + archive,) if mirrored else ()
    return Entry(
        name=name,
        title=title,
        licence=(
            "research use; no redistribution and no commercial use without "
            f"permission: {_GROUPLENS}{readme or name + '-README.html'}"
        ),
        counts=counts,
        urls=(_GROUPLENS + archive, *mirrors, _WAYBACK + _GROUPLENS + archive),
        digest=Digest("md5", md5) if md5 else None,
        ratings_member=member,
        min_rating=4.0,  # Liang et al. (2018): more than 3.5 stars
        **more,
    )


def _lightgcn(name: str, title: str, counts: Mapping[str, int]) -> Entry:
    """Returns an entry of files for which no checksum is published."""
    return Entry(
        name=name,
        title=title,
        licence=(
            "no licence is stated; research use as in He et al. (2020): "
            "https://github.com/gusye1234/LightGCN-PyTorch"
        ),
        counts=counts,
        held_out_users=3_000,
        urls=(_LIGHTGCN + name,),
        files=("train.txt", "test.txt"),
        protocol="vaecf",
    )


def _generated(
    name: str, title: str, held_out_users: int, config: str
) -> Entry:
    licence = "generated here: Apache-2.0, like the code"
    return Entry(
        name, title, licence, held_out_users,
        protocol="vaecf", generated=True, config=config,
    )  # fmt: skip


ENTRIES = (
    _generated("synthetic", "Generated taste groups", 400, "synthetic"),
    _generated(
        "ml-20m-shape", "Generated, shaped as MovieLens 20M", 10_000, "ml1m"
    ),
    _movielens(
        "ml-100k", "MovieLens 100K (1998)", "ml-100k/u.data",
        {"ratings": 100_000, "users": 943, "items": 1_682},
        held_out_users=100, md5="0e33842e24a9c977be4e0107933c0723",
        mirrored=True, readme="ml-100k-README.txt",
    ),
    _movielens(
        "ml-1m", "MovieLens 1M (2003)", "ml-1m/ratings.dat",
        {"ratings": 1_000_209, "users": 6_040, "items": 3_706},
        held_out_users=500, md5="c4d9eecfca2ab87c1945afe126590906",
        mirrored=True, readme="ml-1m-README.txt",
    ),
    _movielens(
        "ml-10m", "MovieLens 10M (2009)", "ml-10M100K/ratings.dat",
        {"ratings": 10_000_054, "users": 69_878, "items": 10_677},
        held_out_users=5_000, md5="ce571fd55effeba0271552578f2648bd",
        mirrored=True,
    ),
    _movielens(
        "ml-20m", "MovieLens 20M (2015)", "ml-20m/ratings.csv",
        {"ratings": 20_000_263, "users": 138_493, "items": 26_744},
        held_out_users=10_000, md5="cd245b17a1ae2cc31bb14903e1204af3",
        mirrored=True, config="ml20m_paper",
    ),
    _movielens(
        "ml-25m", "MovieLens 25M (2019)", "ml-25m/ratings.csv",
        {"ratings": 25_000_095, "users": 162_541, "items": 59_047},
        held_out_users=10_000, md5="6b51fb2759a8657d3bfcbfc42b592ada",
    ),
    _movielens(
        "ml-32m", "MovieLens 32M (2023)", "ml-32m/ratings.csv",
        # The README counts all movies, not the movies that have a rating.
        {"ratings": 32_000_204, "users": 200_948},
        held_out_users=10_000, md5="d472be332d4daa821edc399621853b57",
    ),
    _movielens(
        # GroupLens replaces this archive from time to time, so no checksum is
        # pinned.
        "ml-latest-small", "MovieLens latest-small (2018)",
        "ml-latest-small/ratings.csv",
        {"ratings": 100_836, "users": 610, "items": 9_724},
        held_out_users=60,
    ),
    Entry(
        name="netflix",
        title="Netflix Prize (2006)",
        licence="research use; no redistribution, no commercial use (README)",
        # The publisher withdrew the data and gives no checksum.
        counts={"ratings": 100_480_507, "users": 480_189, "items": 17_770},
        held_out_users=40_000,
        ratings_member="combined_data_*.txt",
        min_rating=4.0,
        manual=(
            "netflix cannot be downloaded by a program: sign in at "
            "https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data, "
            "unpack the archive and pass ratings=FOLDER, the folder with "
            "combined_data_1.txt to combined_data_4.txt"
        ),
        config="netflix",
    ),
    Entry(
        name="msd",
        title="Million Song Dataset, Echo Nest Taste Profile (2011)",
        licence=(
            "The Echo Nest's terms of use; publishing research is allowed: "
            "https://github.com/tbertinmahieux/MSongsDB/blob/master/LICENSE"
        ),
        # No checksum is published.
        counts={"ratings": 48_373_586, "users": 1_019_318, "items": 384_546},
        held_out_users=50_000,
        urls=(
            "https://millionsongdataset.com/sites/default/files/challenge/"
            "train_triplets.txt.zip",
            "https://labrosa.ee.columbia.edu/~dpwe/tmp/train_triplets.txt.zip",
        ),
        ratings_member="train_triplets.txt",
        min_rating=None,  # Liang et al. (2018): any play count
        min_items_per_user=20,
        min_users_per_item=200,
        config="msd",
    ),
    _lightgcn(
        "yelp2018", "Yelp 2018, 10-core, as released with LightGCN",
        {"ratings": 1_561_406, "users": 31_668, "items": 38_048},
    ),
    _lightgcn(
        "gowalla", "Gowalla check-ins, 10-core, as released with LightGCN",
        {"ratings": 1_027_370, "users": 29_858, "items": 40_981},
    ),
)  # fmt: skip
CATALOG: Mapping[str, Entry] = {entry.name: entry for entry in ENTRIES}


def get(name: str) -> Entry:
    """Returns the entry of a known dataset.

    Raises:
      VaecfError: unknown name; suggests the most similar one.
    """
    if name in CATALOG:
        return CATALOG[name]
    raise VaecfError(
        f"unknown dataset {name!r}{did_you_mean(name.lower(), CATALOG)} "
        f"(known are {', '.join(CATALOG)})"
    )


def fetch(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    urls: Sequence[str] | None = None,
) -> pathlib.Path:
    """Downloads a known dataset once and returns the path of its ratings.

    Archive and ratings stay in the cache: a second call needs no network.

    Args:
      cache_dir: directory of the cache; the default is ``$VAECF_CACHE`` or the
        platform's directory for caches.
      urls: addresses to try instead of the entry's, in order.

    Returns:
      The ratings file, or the folder of several files.

    Raises:
      VaecfError: unknown or generated dataset, a dataset that has to be
        downloaded by hand, no source worked, or a wrong checksum.
    """
    entry = get(name)
    if entry.generated:
        raise VaecfError(
            f"{name} is generated, not downloaded: prepare it with "
            f"dataset={name!r} alone"
        )
    sources = tuple(entry.urls if urls is None else urls)
    if not sources:
        raise VaecfError(entry.manual)
    root = pathlib.Path(cache_dir or download.user_cache_dir()) / name
    ratings = root / "ratings"
    workdir_lib.make_folder(root, f"cache_dir={root}")
    # Two processes would mix their bytes in one .part file.
    with workdir_lib.locked(root, wait=True):
        if entry.files:
            for file in entry.files:
                addresses = [f"{url.rstrip('/')}/{file}" for url in sources]
                download.download(addresses, ratings / file)
            return ratings
        if not ratings.exists():
            packed = root / sources[0].rsplit("/", 1)[-1]
            download.download(sources, packed, digest=entry.digest)
            download.extract(packed, entry.ratings_member, ratings)
    if "*" in entry.ratings_member:
        return ratings
    return ratings / entry.ratings_member.rsplit("/", 1)[-1]


def is_fetched(name: str) -> bool:
    """Returns whether the default cache holds the ratings of a dataset."""
    ratings = download.user_cache_dir() / name / "ratings"
    files = CATALOG[name].files
    return ratings.exists() and all((ratings / file).exists() for file in files)


def check_counts(entry: Entry, **found: int | None) -> None:
    """Compares counts before any filter with the published counts.

    Counts that are None are not compared.

    Raises:
      VaecfError: a count differs; names expected and found.
    """
    wrong = [
        f"{found[key]:,} {key} instead of {expected:,}"
        for key, expected in entry.counts.items()
        if found.get(key) not in (None, expected)
    ]
    if wrong:
        raise VaecfError(
            f"{entry.name}: read {', '.join(wrong)}: the file is truncated or "
            "of another release; get it again, or prepare it as data of your "
            "own, with ratings, user_column and item_column"
        )


def config_of(name: str, protocol: str = "") -> str:
    """Returns the name of the file in configs/ to train a dataset with."""
    if (name, protocol) == ("ml-20m", "recipe"):
        return "ml20m"
    return CATALOG[name].config if name in CATALOG else "blend"
