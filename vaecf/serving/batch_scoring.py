"""Files of histories in, a file of recommendations out.

Besides the users' ids, memory is bounded by one partition of users, not by
the file: a first pass maps ids to numbers and deals the pairs out to temporary
files by user, a second one ranks partition after partition while the output
is written.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.data import layouts, readers
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.data.row_batches import Batch, file_batches
from vaecf.errors import VaecfError
from vaecf.serving.recommender import list_columns
from vaecf.serving.trained_model import load

if TYPE_CHECKING:
    import polars as pl

_USERS_A_PARTITION = 65_536


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
      histories: CSV, TSV (both also gzipped) or Parquet with a row for each
        (user, item); rows of a user need not be together.
      output: file to write, Parquet, or CSV if it is called so: user, rank,
        item, score (natural logarithm of the item's probability), users in
        order of first appearance. It is there whole or not at all.
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
    if output.is_dir():
        raise VaecfError(f"--output={output} is a folder: name a Parquet file")
    if output.exists() and histories.exists() and output.samefile(histories):
        raise VaecfError(
            f"--output={output} is the file of --histories: it would be lost; "
            "name another one"
        )
    if output.suffix not in ("", ".parquet", ".pq", ".csv"):
        raise VaecfError(
            f"--output={output}: what is written is Parquet or CSV: let it end "
            "in .parquet or .csv"
        )
    batches = file_batches(
        layouts.require(histories),
        None,
        {"user": user_column, "item": item_column},
    )
    model = load(workdir)
    ranker = model.ranker(min(k, len(model.items)), exclude_seen)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            dir=output.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise VaecfError(
            f"--output={output}: cannot be written ({error.strerror})"
        ) from None
    with folder as name:
        # In the folder that goes: polars may still open the file when an error
        # has already stopped what it is to write.
        temporary = pathlib.Path(name) / output.name
        dealt = _deal(batches, model.items, pathlib.Path(name))
        if dealt.n_users == 0:
            raise VaecfError(f"{histories} holds no rows")
        rows = 0

        def blocks() -> Iterator[pl.DataFrame]:
            nonlocal rows
            done = 0
            for users, matrix in dealt.partitions(len(model.items)):
                for ranked in ranker.blocks(
                    model.scorer_params,
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

        _sink(
            blocks(),
            dealt.users.dtype,
            model.items,
            temporary,
            as_csv=output.suffix == ".csv",
        )
        temporary.replace(output)
    return Scored(dealt.n_users, rows, dealt.unknown_items)


class _Dealt(NamedTuple):
    """Pairs of (user number, item index) in files of 65,536 users each."""

    folder: pathlib.Path
    users: pl.Series
    unknown_items: int

    @property
    def n_users(self) -> int:
        return len(self.users)

    def partitions(
        self, n_items: int
    ) -> Iterator[tuple[pl.Series, Interactions]]:
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


def _deal(
    batches: Iterator[Batch], items: IdTable, folder: pathlib.Path
) -> _Dealt:
    """The first pass; users are numbered by first appearance."""
    number: dict[str, int] = {}
    unknown = 0
    user_type = None

    def numbers(users: list[str]) -> list[int]:
        return [number.setdefault(user, len(number)) for user in users]

    for batch in batches:
        if batch.first_line is None:  # a text has no types
            user_type = batch.frame["user"].dtype
        frame = readers.convert_ids(batch).frame
        if not frame.height:
            continue
        user = _by_value(frame["user"], numbers)
        item = _by_value(frame["item"], items.index_of)
        unknown += int((item < 0).sum())
        pairs = np.stack([user, item], axis=1)
        part = user // _USERS_A_PARTITION
        for p in np.unique(part):
            with open(folder / f"{p}.pairs", "ab") as file:
                pairs[part == p].tofile(file)
    return _Dealt(folder, _typed(list(number), user_type), unknown)


def _by_value(
    column: pl.Series, function: Callable[[list[str]], Any]
) -> np.ndarray:
    """int32 [rows], a function of the distinct values."""
    import polars as pl

    distinct = column.unique(maintain_order=True)
    result = pl.Series(function(distinct.to_list()), dtype=pl.Int32)
    mapped = column.replace_strict(distinct, result, return_dtype=pl.Int32)
    return mapped.to_numpy()


def _typed(ids: list[str], kind: Any) -> pl.Series:
    """Ids of that type; None makes integers of them if all can be."""
    import polars as pl

    series = pl.Series(ids, dtype=pl.String)
    if kind is not None or not ids:
        return series.cast(kind or pl.String)
    codes, raw = readers.encode_ids(
        series.cast(pl.Categorical(pl.Categories.random()))
    )
    return pl.Series(raw[codes].tolist())


def _as_frame(users: pl.Series, columns: dict[str, np.ndarray]) -> pl.DataFrame:
    import polars as pl

    row = columns.pop("row")
    return pl.DataFrame(
        {
            "user": users.gather(row),
            "rank": columns["rank"].astype(np.int32),
            "item": pl.Series(columns["item"].tolist()),
            "score": columns["score"].astype(np.float32),
        }
    )


def _sink(
    blocks: Iterator[pl.DataFrame],
    user_type: Any,
    items: IdTable,
    path: pathlib.Path,
    *,
    as_csv: bool,
) -> None:
    """Writes frames to one file as they come."""
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
        frames = register_io_source(source, schema=schema)
        if as_csv:
            frames.sink_csv(path)
        else:
            frames.sink_parquet(path)
    except pl.exceptions.PolarsError:
        # polars wraps what a source raises; the person wants the reason.
        if failure:
            raise failure[0] from None
        raise
