"""Tables of per-user metrics: one row per model and test user."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vaecf import workdir as workdir_lib
from vaecf.evaluation.evaluator import Evaluation

if TYPE_CHECKING:
    import polars as pl


def frame(model: str, evaluation: Evaluation, dataset: Any) -> pl.DataFrame:
    """Returns the metrics of every test user.

    Args:
      model: name of the model, the same in all rows.
      evaluation: metrics of the test users.
      dataset: the dataset whose test users were evaluated.

    Returns:
      DataFrame with columns model, user (raw id), fold_in and held_out
      (numbers of items), and one column per metric.
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
    """Writes frames with the same columns to one file, atomically.

    Args:
      path: a CSV file if its suffix is .csv, else a Parquet file.
      frames: results of `frame`.

    Raises:
      VaecfError: the file cannot be written.
    """
    import polars as pl

    rows = pl.concat(frames)
    with workdir_lib.atomic_file(path) as temporary:
        if path.suffix == ".csv":
            rows.write_csv(temporary)
        else:
            rows.write_parquet(temporary)


def read(path: pathlib.Path) -> dict[str, pl.DataFrame]:
    """Returns the frames of a Parquet file that `write` wrote, by model.

    A missing or damaged file has no frames: the next test writes it again.
    """
    import polars as pl

    try:
        rows = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        return {}
    if "model" not in rows.columns:
        return {}
    parts = rows.partition_by("model", as_dict=True, maintain_order=True)
    return {str(name): part for (name,), part in parts.items()}
