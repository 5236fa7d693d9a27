"""Compares finished runs user by user, on the same test users.

    vaecf compare runs/a runs/b --metric=ndcg@100

The runs are workdirs of tested runs, or files written by --per_user.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli, cli_flags


def define() -> None:
    """Defines the flags."""
    about = "Metric to compare by; default: config.eval.best_metric of the "
    flags.DEFINE_string("metric", None, f"{about}first run.")
    about = "Run or name to compare with; default: the best on the validation "
    flags.DEFINE_string("reference", None, f"{about}users.")
    about = "Also compare the baselines of the runs."
    flags.DEFINE_bool("baselines", True, about)
    about = "Number of bootstrap resamples."
    flags.DEFINE_integer("resamples", 10_000, about, lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")
    cli_flags.define_path("json", None, "JSON file to write all numbers to.")
    cli_flags.define_path("html", None, "Page to write the comparison to.")


def main(argv: Sequence[str]) -> None:
    """Compares the runs and prints the tables."""
    from vaecf import files
    from vaecf.evaluation import compare
    from vaecf.reporting import comparison_page, report, tables

    values = flags.FLAGS
    compared = compare.compare(
        [files.user_path(run) for run in argv[1:]],
        metric=values.metric,
        reference=values.reference,
        baselines=values.baselines,
        resamples=values.resamples,
        seed=values.seed,
    )
    if values.json:
        files.write_json(pathlib.Path(values.json), compared)
    if values.html:
        path = files.user_path(values.html)
        comparison_page.write_comparison(
            path, compared, environment=report.environment()
        )
    cli.log(tables.comparison_table(compared))
