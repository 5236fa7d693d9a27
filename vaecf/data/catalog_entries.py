"""The facts of the known datasets; `vaecf.data.catalog` is their interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from vaecf.data.download import Digest


@dataclasses.dataclass(frozen=True)
class Entry:
    """One known dataset.

    Attributes:
      name: what a user types.
      title: full name.
      urls: the archive's addresses, mirrors in the order they are tried;
        where `files` is not empty, the folder that holds those files.
      digest: the publisher's checksum of the archive, or None.
      checksum_note: who gives the checksum, or that nobody does.
      archive_bytes: size of the archive, or None if not known.
      licence: terms in short, with their address.
      layout: the reader in `vaecf.data.readers`.
      ratings_member: path (or glob) of the ratings inside the archive.
      files: plain files below each of `urls`, for sets without an archive.
      min_rating: a rating at least this large is an interaction; None for
        implicit data, where every row is one.
      min_items_per_user, min_users_per_item: what the papers filter to.
      held_out_users: validation users; as many again are test users.
      default_protocol: split used unless the user says otherwise.
      counts: published facts of the ratings file: `ratings`, `users`,
        `items` (distinct items that have a rating).
      manual: how to get data that may not be downloaded by a program.
      generated: made by `vaecf.data.synthetic`, nothing to download.
    """

    name: str
    title: str
    layout: str
    licence: str
    checksum_note: str
    counts: Mapping[str, int]
    held_out_users: int
    urls: tuple[str, ...] = ()
    digest: Digest | None = None
    archive_bytes: int | None = None
    ratings_member: str = ""
    files: tuple[str, ...] = ()
    min_rating: float | None = None
    min_items_per_user: int = 5
    min_users_per_item: int = 0
    default_protocol: str = "paper"
    manual: str = ""
    generated: bool = False


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
# Byte-identical copies of the four older archives, set up when GroupLens'
# certificate ran out in August 2026 (recommenders-team/recommenders #2369).
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
    *,
    member: str,
    layout: str,
    counts: Mapping[str, int],
    held_out_users: int,
    md5: str | None,
    archive_bytes: int | None,
    mirrored: bool = False,
    readme: str | None = None,
    checksum_note: str | None = None,
) -> Entry:
    archive = f"{name}.zip"
    mirrors = (_RECOMMENDERS + archive,) if mirrored else ()
    return Entry(
        name=name,
        title=title,
        layout=layout,
        licence=(
            "research use; no redistribution and no commercial use without "
            f"permission: {_GROUPLENS}{readme or name + '-README.html'}"
        ),
        checksum_note=checksum_note
        or f"MD5 published by GroupLens in {_GROUPLENS}{archive}.md5",
        counts=MappingProxyType(dict(counts)),
        held_out_users=held_out_users,
        urls=(_GROUPLENS + archive, *mirrors, _WAYBACK + _GROUPLENS + archive),
        digest=Digest("md5", md5) if md5 else None,
        archive_bytes=archive_bytes,
        ratings_member=member,
        min_rating=4.0,  # Liang et al. (2018): more than 3.5 stars
    )


def _lightgcn(name: str, title: str, counts: Mapping[str, int]) -> Entry:
    return Entry(
        name=name,
        title=title,
        layout="lightgcn_txt",
        licence=(
            "no licence is stated; research use as in He et al. (2020): "
            "https://github.com/gusye1234/LightGCN-PyTorch"
        ),
        checksum_note=(
            "no checksum is published; the counts of the files are checked"
        ),
        counts=MappingProxyType(dict(counts)),
        held_out_users=3_000,
        urls=(_LIGHTGCN + name,),
        files=("train.txt", "test.txt"),
        default_protocol="vaecf",
    )


def _generated(
    name: str, title: str, held_out_users: int, protocol: str = "vaecf"
) -> Entry:
    return Entry(
        name=name,
        title=title,
        layout="generated",
        licence="generated here: Apache-2.0, like the code",
        checksum_note="generated from a seed; the manifest holds its digests",
        counts=MappingProxyType({}),
        held_out_users=held_out_users,
        default_protocol=protocol,
        generated=True,
    )


ENTRIES: tuple[Entry, ...] = (
    _generated("synthetic", "Generated users with planted taste groups", 400),
    _generated(
        "ml-20m-shape", "Generated data of MovieLens 20M's shape", 10_000
    ),
    _movielens(
        "ml-100k",
        "MovieLens 100K (1998)",
        member="ml-100k/u.data",
        layout="movielens_tab",
        counts={"ratings": 100_000, "users": 943, "items": 1_682},
        held_out_users=100,
        md5="0e33842e24a9c977be4e0107933c0723",
        archive_bytes=4_924_029,
        mirrored=True,
        readme="ml-100k-README.txt",
    ),
    _movielens(
        "ml-1m",
        "MovieLens 1M (2003)",
        member="ml-1m/ratings.dat",
        layout="movielens_dat",
        counts={"ratings": 1_000_209, "users": 6_040, "items": 3_706},
        held_out_users=500,
        md5="c4d9eecfca2ab87c1945afe126590906",
        archive_bytes=5_917_549,
        mirrored=True,
        readme="ml-1m-README.txt",
    ),
    _movielens(
        "ml-10m",
        "MovieLens 10M (2009)",
        member="ml-10M100K/ratings.dat",
        layout="movielens_dat",
        counts={"ratings": 10_000_054, "users": 69_878, "items": 10_677},
        held_out_users=5_000,
        md5="ce571fd55effeba0271552578f2648bd",
        archive_bytes=65_566_137,
        mirrored=True,
    ),
    _movielens(
        "ml-20m",
        "MovieLens 20M (2015)",
        member="ml-20m/ratings.csv",
        layout="movielens_csv",
        counts={"ratings": 20_000_263, "users": 138_493, "items": 26_744},
        held_out_users=10_000,
        md5="cd245b17a1ae2cc31bb14903e1204af3",
        archive_bytes=198_702_078,
        mirrored=True,
    ),
    _movielens(
        "ml-25m",
        "MovieLens 25M (2019)",
        member="ml-25m/ratings.csv",
        layout="movielens_csv",
        counts={"ratings": 25_000_095, "users": 162_541, "items": 59_047},
        held_out_users=10_000,
        md5="6b51fb2759a8657d3bfcbfc42b592ada",
        archive_bytes=261_978_986,
    ),
    _movielens(
        "ml-32m",
        "MovieLens 32M (2023)",
        member="ml-32m/ratings.csv",
        layout="movielens_csv",
        # The README counts movies, not movies that have a rating.
        counts={"ratings": 32_000_204, "users": 200_948},
        held_out_users=10_000,
        md5="d472be332d4daa821edc399621853b57",
        archive_bytes=238_950_008,
    ),
    _movielens(
        "ml-latest-small",
        "MovieLens latest-small (2018)",
        member="ml-latest-small/ratings.csv",
        layout="movielens_csv",
        counts={"ratings": 100_836, "users": 610, "items": 9_724},
        held_out_users=60,
        md5=None,
        archive_bytes=None,
        checksum_note=(
            "GroupLens replaces this archive from time to time, so no "
            "checksum is pinned; the counts of the 2018 release are checked. "
            "TensorFlow Datasets, a third party, records 978,202 bytes and "
            "sha256 696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb9"
            "1ebc9e436"
        ),
    ),
    Entry(
        name="netflix",
        title="Netflix Prize (2006)",
        layout="netflix",
        licence="research use; no redistribution, no commercial use (README)",
        checksum_note="the publisher withdrew the data and gives no checksum",
        counts=MappingProxyType(
            {"ratings": 100_480_507, "users": 480_189, "items": 17_770}
        ),
        held_out_users=40_000,
        ratings_member="combined_data_*.txt",
        min_rating=4.0,
        manual=(
            "netflix cannot be downloaded by a program: sign in at "
            "https://www.kaggle.com/datasets/netflix-inc/netflix-prize-data, "
            "unpack the archive and pass --ratings=FOLDER, the folder with "
            "combined_data_1.txt to combined_data_4.txt"
        ),
    ),
    Entry(
        name="msd",
        title="Million Song Dataset, Echo Nest Taste Profile (2011)",
        layout="msd",
        licence=(
            "The Echo Nest's terms of use; publishing research is allowed: "
            "https://github.com/tbertinmahieux/MSongsDB/blob/master/LICENSE"
        ),
        checksum_note=(
            "no checksum is published; the counts of the file are checked"
        ),
        counts=MappingProxyType(
            {"ratings": 48_373_586, "users": 1_019_318, "items": 384_546}
        ),
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
    ),
    _lightgcn(
        "yelp2018",
        "Yelp 2018, 10-core, as released with LightGCN",
        {"ratings": 1_561_406, "users": 31_668, "items": 38_048},
    ),
    _lightgcn(
        "gowalla",
        "Gowalla check-ins, 10-core, as released with LightGCN",
        {"ratings": 1_027_370, "users": 29_858, "items": 40_981},
    ),
)
