"""Recommends items to every user of a file of histories.

    vaecf recommend --workdir=runs/ml1m \\
        --histories=histories.csv --k=10 --output=recommendations.parquet
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli, cli_flags
from vaecf.data.file_settings import FileSettings


def define() -> None:
    """Defines the flags."""
    path = cli_flags.define_path
    path("workdir", None, "Workdir of a trained run.")
    about = "File, folder or pattern with one row per (user, item)."
    path("histories", None, about)
    path("output", None, "Parquet (or .csv) file to write.")
    flags.mark_flags_as_required(["workdir", "histories", "output"])
    flags.DEFINE_integer("k", 10, "Items per user.")
    about = "Do not recommend items of the history."
    flags.DEFINE_bool("exclude_seen", True, about)
    about = "File with one item a line: recommend only these."
    path("allow_items", None, about)
    about = "File with one item a line: never recommend these."
    path("deny_items", None, about)
    cli_flags.define_settings(FileSettings)
    flags.DEFINE_integer("batch_size", 512, "Users per batch.")


def main(argv: Sequence[str]) -> None:
    """Scores the file and prints the counts."""
    del argv
    from vaecf.reporting.progress import counting
    from vaecf.serving import batch_scoring

    values = flags.FLAGS
    with counting("users") as show:
        scored = batch_scoring.score_file(
            pathlib.Path(values.workdir),
            pathlib.Path(values.histories),
            pathlib.Path(values.output),
            k=values.k,
            exclude_seen=values.exclude_seen,
            allow_items=values.allow_items and pathlib.Path(values.allow_items),
            deny_items=values.deny_items and pathlib.Path(values.deny_items),
            batch_size=values.batch_size,
            progress=show,
            **cli_flags.settings_from_flags(FileSettings),
        )
    for line in scored.lines(values.output):
        cli.log(line)
