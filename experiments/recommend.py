"""Recommends items to every user of a file of histories.

    python experiments/recommend.py --workdir=runs/ml1m \\
        --histories=histories.csv --k=10 --output=recommendations.parquet
"""

from __future__ import annotations

from vaecf import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli
from vaecf.data.file_settings import FileSettings

_WORKDIR = cli.define_path("workdir", None, "Workdir of a trained run.")
_HISTORIES = cli.define_path(
    "histories", None, "File, folder or pattern with one row per (user, item)."
)
_OUTPUT = cli.define_path("output", None, "Parquet (or .csv) file to write.")
flags.mark_flags_as_required(["workdir", "histories", "output"])
_K = flags.DEFINE_integer("k", 10, "Items per user.")
_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Do not recommend items of the history."
)
_ALLOW = cli.define_path(
    "allow_items", None, "File with one item a line: recommend only these."
)
_DENY = cli.define_path(
    "deny_items", None, "File with one item a line: never recommend these."
)
cli.define_settings(FileSettings)
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
            exclude_seen=_SEEN.value,
            allow_items=_ALLOW.value and pathlib.Path(_ALLOW.value),
            deny_items=_DENY.value and pathlib.Path(_DENY.value),
            batch_size=_BATCH.value,
            progress=show,
            **cli.settings_from_flags(FileSettings),
        )
    for line in scored.lines(_OUTPUT.value):
        cli.log(line)


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
