"""Id tables as Parquet files: raw id and index."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from vaecf.data import storage
from vaecf.data.id_table import IdTable
from vaecf.errors import VaecfError


def write_ids(
    path: pathlib.Path, column: str, table: IdTable, **more: Any
) -> None:
    """Writes ids with their indices.

    Args:
      path: file to write; flushed to the disk.
      column: name of the id column, 'item' or 'user'.
      table: the ids.
      more: further string columns, by name.
    """
    import polars as pl

    kind = pl.Int64 if table.type == "int64" else pl.String
    frame = pl.DataFrame(
        [
            pl.Series(column, table.ids.tolist(), dtype=kind),
            pl.Series("index", np.arange(len(table), dtype=np.int64)),
            *(
                pl.Series(name, list(values), dtype=pl.String)
                for name, values in more.items()
            ),
        ]
    )
    with open(path, "wb") as stream:
        frame.write_parquet(stream)
        storage.sync(stream)


def read_ids(path: pathlib.Path, column: str) -> IdTable:
    """Ids in index order.

    Raises:
      VaecfError: the file is missing, damaged or lacks the column.
    """
    import polars as pl

    try:
        frame = pl.read_parquet(path, columns=[column, "index"])
    except FileNotFoundError:
        raise VaecfError(f"{path}: no such file") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise VaecfError(f"{path}: not an id table ({first_line})") from None
    return IdTable(frame.sort("index")[column].to_numpy())
