"""Tables of per-user metrics: one row per model and test user."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vaecf import workdir as workdir_lib
from vaecf.data import layouts
from vaecf.errors import VaecfError
from vaecf.evaluation.evaluator import Evaluation

if TYPE_CHECKING:
    import polars as pl

# Columns besides model and metrics: raw id, numbers of items.
USER_COLUMNS = ("user", "fold_in", "held_out")
_DIGEST = "vaecf.sha256"  # of the rows as CSV, in the Parquet file's metadata


def frame(model: str, evaluation: Evaluation, dataset: Any) -> pl.DataFrame:
    """Returns the metrics of a dataset's test users, one row per user.

    The columns are model (the same name in all rows), `USER_COLUMNS`, and one
    column per metric.
    """
    import polars as pl

    train, validation, _ = dataset.split_sizes
    ids = dataset.users.ids[train + validation :].tolist()
    return pl.DataFrame(
        {
            "model": [model] * len(ids),
            "user": ids,
            "fold_in": dataset.test.fold_in.counts,
            "held_out": dataset.test.held_out.counts,
            **evaluation.per_user,
        }
    )


def write(path: pathlib.Path, frames: Iterable[pl.DataFrame]) -> None:
    """Writes results of `frame` with the same columns to one file, atomically.

    The file is CSV if its suffix is .csv, else Parquet.

    Raises:
      VaecfError: the file cannot be written.
    """
    import polars as pl

    rows = pl.concat(frames)
    with workdir_lib.atomic_file(path) as temporary:
        if path.suffix == ".csv":
            rows.write_csv(temporary)
        else:
            digest = {_DIGEST: _digest(rows)}
            rows.write_parquet(temporary, metadata=digest)


def _digest(rows: pl.DataFrame) -> str:
    return hashlib.sha256(rows.write_csv().encode()).hexdigest()


def read(path: pathlib.Path) -> dict[str, pl.DataFrame]:
    """Returns the frames of a file that `write` wrote, by model.

    Raises:
      VaecfError: the file cannot be read, or lacks a column or rows.
    """
    import polars as pl

    digest = None
    try:
        with layouts.polars_errors(path):
            if path.suffix == ".csv":
                rows = pl.read_csv(path, infer_schema_length=None, glob=False)
            else:
                rows = pl.read_parquet(path, glob=False)
                digest = pl.read_parquet_metadata(path).get(_DIGEST)
    except VaecfError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise VaecfError(
            f"{path}: neither a workdir nor per-user metrics ({reason})"
        ) from None
    if digest not in (None, _digest(rows)):
        raise VaecfError(f"{path}: damaged; test again to write the file anew")
    columns = ("model", *USER_COLUMNS)
    missing = [name for name in columns if name not in rows.columns]
    if missing or not len(rows):
        raise VaecfError(
            f"{path}: not a file of per-user metrics (it has no "
            f"{', '.join(missing) or 'rows'})"
        )
    parts = rows.partition_by("model", as_dict=True, maintain_order=True)
    return {str(name): part for (name,), part in parts.items()}
