"""Recommends items to every user of a file of histories.

    python experiments/recommend.py --workdir=runs/ml1m \\
        --histories=histories.csv --k=10 --output=recommendations.parquet
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli
from vaecf.data import layouts, readers

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a trained run.")
_HISTORIES = flags.DEFINE_string(
    "histories", None, "File, folder or pattern with one row per (user, item)."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Parquet (or .csv) file to write."
)
flags.mark_flags_as_required(["workdir", "histories", "output"])
_K = flags.DEFINE_integer("k", 10, "Items per user.")
_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Do not recommend items of the history."
)
_ALLOW = flags.DEFINE_string(
    "allow_items", None, "File with one item a line: recommend only these."
)
_DENY = flags.DEFINE_string(
    "deny_items", None, "File with one item a line: never recommend these."
)
cli.define_settings(layouts.FileSettings)
_BATCH = flags.DEFINE_integer("batch_size", 512, "Users per batch.")


def main(argv: Sequence[str]) -> None:
    """Scores the file and prints the counts."""
    del argv
    from vaecf.reporting.progress import counting
    from vaecf.serving import batch_scoring

    settings = cli.settings_from_flags(layouts.FileSettings)
    allow, deny = (
        readers.read_ids(pathlib.Path(path), layouts.FileSettings(**settings))
        if (path := flag.value)
        else None
        for flag in (_ALLOW, _DENY)
    )
    with counting("users") as show:
        scored = batch_scoring.score_file(
            pathlib.Path(_WORKDIR.value),
            pathlib.Path(_HISTORIES.value),
            pathlib.Path(_OUTPUT.value),
            k=_K.value,
            exclude_seen=_SEEN.value,
            allow_items=allow,
            deny_items=deny,
            batch_size=_BATCH.value,
            progress=show,
            **settings,
        )
    for n, text in readers.notes(scored.counts):
        cli.log(f"{n:>12,} {text}")
    unknown = f"; skipped {scored.unknown_items:,} unknown items of histories"
    cli.log(
        f"{scored.users:,} users, {scored.rows:,} recommendations: "
        f"{_OUTPUT.value}{unknown if scored.unknown_items else ''}"
    )


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
