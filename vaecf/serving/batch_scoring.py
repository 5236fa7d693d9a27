"""Recommends items to all users of a file.

Memory is bounded by one partition of users, not by the file, except for the
user ids. A first pass over the file replaces ids by numbers and appends the
pairs to one temporary file per partition. A second pass ranks partition after
partition, each to a temporary file; the output joins these files.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.data.file_settings import FileSettings
from vaecf.data.id_table import CANONICAL_INTEGER, WHOLE_FLOAT, IdTable
from vaecf.data.interactions import Interactions
from vaecf.data.readers import Rows, notes, read_ids
from vaecf.errors import VaecfError
from vaecf.evaluation.ranking import RankedLists
from vaecf.serving.histories import all_unknown, allowed_items, count
from vaecf.serving.trained_model import TrainedModel, load

if TYPE_CHECKING:
    import polars as pl

_USERS_PER_PARTITION = 65_536
_ROWS_PER_PARTITION = 2**22  # of the output, at most


class Scored(NamedTuple):
    """Counts of `score_file`."""

    users: int  # in the histories
    rows: int  # recommendations written
    unknown_items: int  # history rows whose item the model does not know
    counts: Mapping[str, int]  # of what was changed, see `readers.notes`

    def lines(self, output: str) -> list[str]:
        """Returns a report for a person, with the name of the output."""
        changes = [f"{n:>12,} {text}" for n, text in notes(self.counts)]
        total = f"{self.users:,} users, {self.rows:,} recommendations: {output}"
        if self.unknown_items:
            total += (
                f"; skipped {self.unknown_items:,} unknown items of histories"
            )
        return [*changes, total]


def score_file(
    workdir: pathlib.Path,
    histories: pathlib.Path,
    output: pathlib.Path,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    allow_items: Iterable[Any] | pathlib.Path | None = None,
    deny_items: Iterable[Any] | pathlib.Path | None = None,
    batch_size: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Scored:
    """Writes the k best items of every user of a file.

    The output has the columns user, rank (from 1), item and score (natural
    logarithm of the item's probability; the score itself of a model without
    probabilities), with users in order of their first row. It is replaced
    atomically. The arguments not described here are those
    of `Recommender.recommend`.

    Args:
      workdir: workdir of a run, or a directory written by `Recommender.save`.
      histories: whatever `read_ratings` reads, with one row per (user, item),
        in any order.
      allow_items: recommend only these items: ids, or a file of `read_ids`.
      deny_items: never recommend these items, likewise.
      output: file to write, CSV if its suffix is .csv, else Parquet.
      progress: called with (number of users done, number of all users).
      **settings: fields of `file_settings.FileSettings`, for the histories.

    Raises:
      VaecfError: an argument or the file cannot be used; nothing is written.
    """
    import polars as pl

    k = count("k", k)
    batch_size = count("batch_size", batch_size)
    _check_output(output, histories)
    reading = FileSettings(**settings)
    allow_items, deny_items = (
        read_ids(ids, reading) if isinstance(ids, pathlib.Path) else ids
        for ids in (allow_items, deny_items)
    )
    rows = Rows(histories, reading)
    model = load(workdir)
    k = min(k, len(model.items))
    size = min(_USERS_PER_PARTITION, max(1, _ROWS_PER_PARTITION // k))
    ranker = model.ranker(k, exclude_seen)
    allowed = allowed_items(model.items, allow_items, deny_items)
    written = done = 0
    with (
        workdir_lib.atomic_file(output) as target,
        workdir_lib.scratch_directory(output) as folder,
    ):
        partitions = _partition(rows, model.items, folder, size)
        n_users = len(partitions.users)
        if n_users == 0:
            raise VaecfError(f"{histories} holds no rows")
        parts: list[pathlib.Path] = []
        for users, matrix in partitions.read(len(model.items)):
            frames = []
            for lists in ranker.blocks(
                model.scorer_params,
                matrix.indptr,
                matrix.indices,
                batch_size=batch_size,
                allowed_I=None if allowed is None else ranker.allow(allowed),
            ):
                frames.append(_frame(model, lists, users))
                users = users[len(lists.item_UK) :]
                done += len(lists.item_UK)
                progress(done, n_users)
            parts.append(folder / f"{len(parts)}.parquet")
            part = pl.concat(frames)
            part.write_parquet(parts[-1])
            written += part.height
        joined = pl.scan_parquet(parts, glob=False)
        if output.suffix == ".csv":
            joined.sink_csv(target)
        else:
            joined.sink_parquet(target)
    return Scored(n_users, written, partitions.unknown_items, dict(rows.counts))


def _frame(
    model: TrainedModel, lists: RankedLists, users: pl.Series
) -> pl.DataFrame:
    """Returns lists with raw ids; they belong to the first of the users."""
    import polars as pl

    columns = model.columns(lists)
    item_type = pl.Int64 if model.items.type == "int64" else pl.String
    return pl.DataFrame(
        {
            "user": users.gather(columns["row"]),
            "rank": columns["rank"].astype(np.int32),
            "item": pl.Series(columns["item"].tolist(), dtype=item_type),
            "score": columns["score"].astype(np.float32),
        }
    )


def _check_output(output: pathlib.Path, histories: pathlib.Path) -> None:
    if output.is_dir():
        raise VaecfError(f"output={output} is a folder: name a Parquet file")
    if output.exists() and histories.exists() and output.samefile(histories):
        raise VaecfError(
            f"output={output} is the file of the histories: name another file"
        )
    if output.suffix not in ("", ".parquet", ".pq", ".csv"):
        raise VaecfError(
            f"output={output}: the file is Parquet or CSV: use the suffix "
            ".parquet or .csv"
        )


class _Partitions(NamedTuple):
    """Files of (user number, item index) pairs, one per partition of users."""

    folder: pathlib.Path
    size: int  # users per partition
    users: pl.Series  # raw ids, by user number
    unknown_items: int  # rows with an unknown item

    def read(self, n_items: int) -> Iterator[tuple[pl.Series, Interactions]]:
        """Yields the users of each partition and their histories."""
        for first in range(0, len(self.users), self.size):
            users = self.users[first : first + self.size]
            path = self.folder / f"{first // self.size}.pairs"
            pairs = np.fromfile(path, np.int32).reshape(-1, 2)
            known = pairs[pairs[:, 1] >= 0]
            matrix, _ = Interactions.from_pairs(
                known[:, 0] - first, known[:, 1], len(users), n_items
            )
            yield users, matrix


def _partition(
    rows: Rows, items: IdTable, folder: pathlib.Path, size: int
) -> _Partitions:
    """Numbers the users by first appearance and writes the pairs."""
    users = _Users()
    n_rows = unknown = 0
    examples: list[str] = []
    user_type = None
    for batch in rows:
        if batch.first_line is None:  # not a text file: the ids have a type
            user_type = rows.user_type
        enough = rows.enough(batch)
        frame = batch.frame if enough is None else batch.frame.filter(enough)
        if not frame.height:
            continue
        user = _map_distinct(frame["user"], users.numbers)
        item = _map_distinct(frame["item"], items.index_of)
        n_rows += len(item)
        unknown += int((item < 0).sum())
        examples = examples or frame["item"].filter(item < 0)[:3].to_list()
        pairs = np.stack([user, item], axis=1)
        partition = user // size
        for p in np.unique(partition):
            with open(folder / f"{p}.pairs", "ab") as file:
                pairs[partition == p].tofile(file)
    if n_rows and n_rows == unknown:
        raise all_unknown(n_rows, examples, "the histories", items)
    return _Partitions(folder, size, users.ids(user_type), unknown)


class _Users:
    """Numbers users by first appearance; 12 and 12.0 are one if all are whole.

    `id_table.encode_ids` has the same rule.
    """

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._floats: dict[str, str] = {}  # 12.0 by 12
        self._mixed: set[str] = set()  # users that are written in both ways

    def numbers(self, users: list[str]) -> list[int]:
        return [self._numbered(user) for user in users]

    def _numbered(self, user: str) -> int:
        whole = re.sub(WHOLE_FLOAT, r"\1", user)
        if whole != user:
            if whole in self._number and whole not in self._floats:
                self._mixed.add(whole)
            self._floats[whole] = user
        elif whole in self._floats:
            self._mixed.add(whole)
        return self._number.setdefault(whole, len(self._number))

    def ids(self, dtype: Any) -> pl.Series:
        """Returns ids of a dtype; None makes integers of them if all can be."""
        import polars as pl

        ids = pl.Series(list(self._number), dtype=pl.String)
        if dtype is not None or not len(ids):
            # Dates and booleans come back as the texts of `id_table.text_of`.
            is_number = dtype is not None and dtype.is_numeric()
            is_kept = is_number or dtype in (pl.Categorical, pl.Enum)
            return ids.cast(dtype if is_kept else pl.String)
        if not ids.str.contains(CANONICAL_INTEGER).all():
            if self._mixed:
                raise VaecfError(
                    f"user {min(self._mixed)} is also written as "
                    f"{self._floats[min(self._mixed)]}, among users that are "
                    "no numbers; write it in one way"
                )
            return pl.Series([self._floats.get(id_, id_) for id_ in ids])
        numbers = ids.cast(pl.Int64, strict=False)
        return ids if numbers.null_count() else numbers


def _map_distinct(
    column: pl.Series, function: Callable[[list[str]], Any]
) -> np.ndarray:
    """Returns int32 [rows]; the function is called with distinct values."""
    import polars as pl

    distinct = column.unique(maintain_order=True)
    result = pl.Series(function(distinct.to_list()), dtype=pl.Int32)
    mapped = column.replace_strict(distinct, result, return_dtype=pl.Int32)
    return mapped.to_numpy()
