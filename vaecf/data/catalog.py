"""Known datasets: where to get them and how papers prepare them.

To add a dataset, add an entry to `ENTRIES`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from vaecf import workdir as workdir_lib
from vaecf.data import download
from vaecf.data.download import Digest
from vaecf.data.layouts import Dialect
from vaecf.errors import VaecfError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Entry:
    """One known dataset.

    Attributes:
      name: name of the dataset in the library and on the command line.
      title: full name.
      licence: terms in short, with their address.
      held_out_users: validation users; as many again are test users.
      urls: addresses of the archive in the order in which they are tried; with
        `files`, addresses of the folder that holds these files.
      digest: checksum of the archive, published by its owner; None if there is
        none. Then `counts` are also checked for users and items.
      ratings_member: path (or glob) of the ratings inside the archive.
      files: plain files below each of `urls`, for datasets without an archive.
      dialect: how to read a text file that `layouts.detect` does not
        recognise; None for the released layouts.
      min_rating: ratings of at least this value are interactions; None for
        implicit data, where every row is one.
      min_items_per_user: threshold of the papers.
      min_users_per_item: threshold of the papers.
      protocol: split that is used unless another is chosen.
      counts: published facts of the ratings file: `ratings`, `users`, `items`
        (distinct items with a rating).
      manual: how to get data that no program may download.
      generated: made by `vaecf.data.synthetic`; nothing to download.
      config: name of the file in configs/ to train with.
    """

    name: str
    title: str
    licence: str
    held_out_users: int
    urls: tuple[str, ...] = ()
    digest: Digest | None = None
    ratings_member: str = ""
    files: tuple[str, ...] = ()
    dialect: Dialect | None = None
    min_rating: float | None = None
    min_items_per_user: int = 5
    min_users_per_item: int = 0
    protocol: str = "paper"
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    manual: str = ""
    generated: bool = False
    config: str = "ml1m"


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
    held_out_users: int,
    md5: str | None = None,
    mirrored: bool = False,
    readme: str | None = None,
    config: str = "ml1m",
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
        held_out_users=held_out_users,
        urls=(_GROUPLENS + archive, *mirrors, _WAYBACK + _GROUPLENS + archive),
        digest=Digest("md5", md5) if md5 else None,
        ratings_member=member,
        min_rating=4.0,  # Liang et al. (2018): more than 3.5 stars
        config=config,
    )


def _lightgcn(
    name: str, title: str, counts: Mapping[str, int], config: str = "ml1m"
) -> Entry:
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
        config=config,
    )


def _generated(
    name: str, title: str, held_out_users: int, config: str = "ml1m"
) -> Entry:
    return Entry(
        name=name,
        title=title,
        licence="generated here: Apache-2.0, like the code",
        held_out_users=held_out_users,
        protocol="vaecf",
        generated=True,
        config=config,
    )


ENTRIES = (
    _generated("synthetic", "Generated taste groups", 400, "synthetic"),
    _generated("ml-20m-shape", "Generated, shaped as MovieLens 20M", 10_000),
    _movielens(
        "ml-100k", "MovieLens 100K (1998)", "ml-100k/u.data",
        {"ratings": 100_000, "users": 943, "items": 1_682},
        held_out_users=100, md5="0e33842e24a9c977be4e0107933c0723",
        mirrored=True, readme="ml-100k-README.txt", config="ml100k",
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
        # pinned. TensorFlow Datasets records 978,202 bytes and sha256 696d65a3
        # dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436 for 2018.
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
            "http://millionsongdataset.com/sites/default/files/challenge/"
            "train_triplets.txt.zip",
            "http://labrosa.ee.columbia.edu/~dpwe/tmp/train_triplets.txt.zip",
        ),
        ratings_member="train_triplets.txt",
        min_rating=None,  # Liang et al. (2018): any play count
        min_items_per_user=20,
        min_users_per_item=200,
        config="msd",
    ),
    _lightgcn(
        "yelp2018", "Yelp 2018, 10-core, as released with LightGCN",
        {"ratings": 1_561_406, "users": 31_668, "items": 38_048}, "yelp2018",
    ),
    _lightgcn(
        "gowalla", "Gowalla check-ins, 10-core, as released with LightGCN",
        {"ratings": 1_027_370, "users": 29_858, "items": 40_981},
    ),
)  # fmt: skip
CATALOG: Mapping[str, Entry] = MappingProxyType({e.name: e for e in ENTRIES})


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

    The archive and the unpacked ratings stay in the cache, where a second call
    finds them without network access.

    Args:
      name: a name of the catalog.
      cache_dir: directory of the cache; the default is ``$VAECF_CACHE`` or the
        platform's directory for caches.
      urls: addresses to try instead of the entry's, in order.

    Returns:
      The ratings file; or its folder if there are several files
      (`Entry.files`, or a `ratings_member` with a glob).

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
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VaecfError(
            f"cannot write to {root} ({error.strerror}); choose another "
            "directory with cache_dir"
        ) from error
    # Two processes would mix their bytes in one .part file.
    with workdir_lib.locked(root, wait=True):
        if entry.files:
            for file in entry.files:
                addresses = [f"{url.rstrip('/')}/{file}" for url in sources]
                _download(entry, addresses, ratings / file)
            return ratings
        if not ratings.exists():
            packed = root / sources[0].rsplit("/", 1)[-1]
            _download(entry, sources, packed)
            download.extract(packed, entry.ratings_member, ratings)
    if "*" in entry.ratings_member:
        return ratings
    return ratings / entry.ratings_member.rsplit("/", 1)[-1]


def _download(
    entry: Entry, urls: Sequence[str], destination: pathlib.Path
) -> None:
    try:
        download.download(urls, destination, digest=entry.digest)
    except VaecfError as error:
        if destination.exists():  # the cached file itself is at fault
            raise
        raise VaecfError(
            f"{entry.name}: {error}. Get it elsewhere and pass ratings=FILE, "
            f"or place the archive at {destination}"
        ) from error


def check_counts(entry: Entry, **found: int | None) -> None:
    """Compares the counts of a ratings file with the published counts.

    Args:
      entry: the dataset.
      **found: `ratings`, `users` and `items` before any threshold or filter;
        None is not compared.

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


def config_of(name: str) -> str:
    """Returns the name of the file in configs/ to train a dataset with.

    Data that is not in the catalog is usually small, and settings for large
    datasets overfit small ones: the default is MovieLens 1M's.
    """
    return CATALOG[name].config if name in CATALOG else "ml1m"
