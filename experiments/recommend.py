"""Recommends items to every user of a file of histories.

    python experiments/recommend.py --workdir=runs/ml1m \\
        --histories=histories.csv --k=10 --output=recommendations.parquet
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a trained run.")
_HISTORIES = flags.DEFINE_string(
    "histories", None, "CSV, TSV or Parquet file with one row per (user, item)."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Parquet (or .csv) file to write."
)
flags.mark_flags_as_required(["workdir", "histories", "output"])
_K = flags.DEFINE_integer("k", 10, "Items per user.")
_USER = flags.DEFINE_string("user_column", "user", "Column of the users.")
_ITEM = flags.DEFINE_string("item_column", "item", "Column of the items.")
_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Do not recommend items of the history."
)
_BATCH = flags.DEFINE_integer("batch_size", 512, "Users per batch.")


def main(argv: Sequence[str]) -> None:
    """Scores the file and prints the counts."""
    del argv
    from vaecf.reporting.progress import counting
    from vaecf.serving import batch_scoring

    with counting("users") as show:
        scored = batch_scoring.score_file(
            pathlib.Path(_WORKDIR.value),
            pathlib.Path(_HISTORIES.value),
            pathlib.Path(_OUTPUT.value),
            k=_K.value,
            user_column=_USER.value,
            item_column=_ITEM.value,
            exclude_seen=_SEEN.value,
            batch_size=_BATCH.value,
            progress=show,
        )
    unknown = f"; skipped {scored.unknown_items:,} unknown items of histories"
    cli.log(
        f"{scored.users:,} users, {scored.rows:,} recommendations: "
        f"{_OUTPUT.value}{unknown if scored.unknown_items else ''}"
    )


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
