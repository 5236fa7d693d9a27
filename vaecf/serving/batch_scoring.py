"""Files of histories in, a Parquet file of recommendations out.

Memory is bounded by one partition of users, not by the file: a first pass
maps ids to numbers and deals the pairs out to temporary files by user, a
second one ranks partition after partition while the output is written.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.options import nearest
from vaecf.serving.model import load
from vaecf.serving.recommender import list_columns

if TYPE_CHECKING:
    import polars as pl

_USERS_A_PARTITION = 65_536
_ROWS_A_READ = 500_000


class Scored(NamedTuple):
    """What `score_file` did: users and rows written, unknown items left out."""

    users: int
    rows: int
    unknown_items: int


def score_file(
    workdir: pathlib.Path,
    histories: pathlib.Path,
    output: pathlib.Path,
    *,
    k: int = 10,
    user_column: str = "user",
    item_column: str = "item",
    exclude_seen: bool = True,
    batch_size: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Recommends to every user of a file.

    Args:
      workdir: of a trained run, or a directory of `Recommender.save`.
      histories: CSV, TSV or Parquet with a row for each (user, item); rows of
        a user need not be together.
      output: Parquet file to write: user, rank, item, score (natural
        logarithm of the item's probability), users in order of first
        appearance. It is there whole or not at all.
      k: items a user.
      user_column: of the histories.
      item_column: of the histories.
      exclude_seen: leave out the items of the history.
      batch_size: users a dispatch.
      progress: called with (users done, users in all).

    Raises:
      VaecfError: bad input; nothing is written.
    """
    if k < 1:
        raise VaecfError(f"--k={k} must be at least 1")
    frame = scan(histories, user_column, item_column)
    model = load(workdir)
    ranker = model.ranker(min(k, len(model.items)), exclude_seen)
    temporary = output.with_name(f".{output.name}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        dealt = _deal(frame, model.items, pathlib.Path(folder))
        if dealt.n_users == 0:
            raise VaecfError(f"{histories}: no rows")
        rows = 0

        def blocks() -> Iterator[pl.DataFrame]:
            nonlocal rows
            done = 0
            for users, matrix in dealt.partitions(len(model.items)):
                for ranked in ranker.blocks(
                    model.params,
                    matrix.indptr,
                    matrix.indices,
                    batch_size=batch_size,
                ):
                    n = len(ranked.item_UK)
                    block = _as_frame(
                        users[:n], list_columns(ranked, model.items)
                    )
                    users = users[n:]
                    rows += block.height
                    done += n
                    progress(done, dealt.n_users)
                    yield block

        try:
            _sink(blocks(), dealt.user_type, model.items, temporary)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    return Scored(dealt.n_users, rows, dealt.unknown_items)


def scan(
    path: pathlib.Path, user_column: str, item_column: str
) -> pl.LazyFrame:
    """Lazy frame with the columns user and item.

    Raises:
      VaecfError: missing or empty file, unknown kind of file, missing column.
    """
    import polars as pl

    if not path.is_file():
        raise VaecfError(f"--histories={path}: no such file")
    if path.stat().st_size == 0:
        raise VaecfError(f"--histories={path}: the file is empty")
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            frame = pl.scan_parquet(path)
        elif kind in (".csv", ".tsv", ".txt"):
            separator = "," if kind == ".csv" else "\t"
            frame = pl.scan_csv(
                path, separator=separator, infer_schema_length=10_000
            )
        else:
            raise VaecfError(
                f"--histories={path}: name it .csv, .tsv or .parquet"
            )
        columns = frame.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        first_line = str(error).strip().splitlines()[0]
        raise VaecfError(f"--histories={path}: {first_line}") from None
    for flag, column in (("user", user_column), ("item", item_column)):
        if column not in columns:
            raise VaecfError(
                f"--histories={path} has no column {column!r}"
                f"{nearest(column, columns)} (columns: {', '.join(columns)}); "
                f"set --{flag}_column"
            )
    return frame.select(
        pl.col(user_column).alias("user"), pl.col(item_column).alias("item")
    )


class _Dealt(NamedTuple):
    """Pairs of (user number, item index) in files of 65,536 users each."""

    folder: pathlib.Path
    users: list[Any]
    user_type: Any
    unknown_items: int

    @property
    def n_users(self) -> int:
        return len(self.users)

    def partitions(
        self, n_items: int
    ) -> Iterator[tuple[list[Any], Interactions]]:
        """Users and their histories, in order of first appearance."""
        for first in range(0, self.n_users, _USERS_A_PARTITION):
            users = self.users[first : first + _USERS_A_PARTITION]
            path = self.folder / f"{first // _USERS_A_PARTITION}.pairs"
            pairs = np.fromfile(path, np.int32).reshape(-1, 2)
            known = pairs[pairs[:, 1] >= 0]
            matrix, _ = Interactions.from_pairs(
                known[:, 0] - first, known[:, 1], len(users), n_items
            )
            yield users, matrix


def _deal(frame: pl.LazyFrame, items: Any, folder: pathlib.Path) -> _Dealt:
    """The first pass; users are numbered by first appearance."""
    import polars as pl

    number: dict[Any, int] = {}
    unknown = 0
    row = 0
    for block in frame.collect_batches(
        chunk_size=_ROWS_A_READ, maintain_order=True
    ):
        for name in ("user", "item"):
            empty = block[name].is_null().to_numpy()
            if empty.any():
                raise VaecfError(
                    f"--histories: data row {row + int(empty.argmax()) + 1} "
                    f"has no {name}: fill or drop it"
                )
        row += block.height
        distinct = block["user"].unique(maintain_order=True)
        for user in distinct.to_list():
            number.setdefault(user, len(number))
        codes = pl.Series([number[u] for u in distinct], dtype=pl.Int32)
        user = block["user"].replace_strict(
            distinct, codes, return_dtype=pl.Int32
        )
        item = items.index_of(block["item"].to_numpy())
        unknown += int((item < 0).sum())
        pairs = np.stack([user.to_numpy(), item.astype(np.int32)], axis=1)
        part = pairs[:, 0] // _USERS_A_PARTITION
        for p in np.unique(part):
            with open(folder / f"{p}.pairs", "ab") as file:
                pairs[part == p].tofile(file)
    schema = frame.collect_schema()
    return _Dealt(folder, list(number), schema["user"], unknown)


def _as_frame(users: list[Any], columns: dict[str, np.ndarray]) -> pl.DataFrame:
    import polars as pl

    row = columns.pop("row")
    return pl.DataFrame(
        {
            "user": pl.Series(users).gather(row),
            "rank": columns["rank"].astype(np.int32),
            "item": pl.Series(columns["item"].tolist()),
            "score": columns["score"].astype(np.float32),
        }
    )


def _sink(
    blocks: Iterator[pl.DataFrame],
    user_type: Any,
    items: Any,
    path: pathlib.Path,
) -> None:
    """Writes frames to one Parquet file as they come."""
    import polars as pl
    from polars.io.plugins import register_io_source

    schema = {
        "user": user_type,
        "rank": pl.Int32,
        "item": pl.Int64 if items.type == "int64" else pl.String,
        "score": pl.Float32,
    }
    failure: list[Exception] = []

    def source(
        with_columns: Any, predicate: Any, n_rows: Any, batch_size: Any
    ) -> Iterator[pl.DataFrame]:
        del with_columns, predicate, n_rows, batch_size  # all of it is written
        try:
            for block in blocks:
                yield block.cast(schema)  # type: ignore[arg-type]
        except VaecfError as error:
            failure.append(error)
            raise

    try:
        register_io_source(source, schema=schema).sink_parquet(path)
    except pl.exceptions.PolarsError:
        # polars wraps what a source raises; the person wants the reason.
        if failure:
            raise failure[0] from None
        raise
