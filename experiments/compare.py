"""Compares finished runs user by user, on the same test users.

    python experiments/compare.py runs/a runs/b --metric=ndcg@100

The runs are workdirs of main.py --test, or files written by its --per_user.
"""

from __future__ import annotations

from vaecf import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli

_METRIC = flags.DEFINE_string(
    "metric",
    None,
    "Metric to compare by; default: config.eval.best_metric of the first run.",
)
_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "Run or name to compare with; default: the best on the validation users.",
)
_BASELINES = flags.DEFINE_bool(
    "baselines", True, "Also compare the baselines of the runs."
)
_RESAMPLES = flags.DEFINE_integer(
    "resamples", 10_000, "Number of bootstrap resamples.", lower_bound=100
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")
_JSON = cli.define_path("json", None, "JSON file to write all numbers to.")


def main(argv: Sequence[str]) -> None:
    """Compares the runs and prints the tables."""
    from vaecf import files
    from vaecf.evaluation import compare
    from vaecf.reporting import tables

    compared = compare.compare(
        [files.user_path(run) for run in argv[1:]],
        metric=_METRIC.value,
        reference=_REFERENCE.value,
        baselines=_BASELINES.value,
        resamples=_RESAMPLES.value,
        seed=_SEED.value,
    )
    if _JSON.value:
        files.write_json(pathlib.Path(_JSON.value), compared)
    cli.log(tables.comparison_table(compared))


if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
