"""Searches for hyper-parameters, by the validation users.

    vaecf sweep --config=ml1m --space=mult_vae --workdir=runs/sweep --trials=40

--space names a Python file with get_space(), or one of configs/sweeps/.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from vaecf import cli, cli_flags


def define() -> None:
    """Defines the flags."""
    cli.define_config("ml1m")
    path, integer = cli_flags.define_path, flags.DEFINE_integer
    path("space", None, "Python file with get_space(), by path or name.")
    path("workdir", None, "The sweep's directory.")
    flags.mark_flags_as_required(["space", "workdir"])
    flags.DEFINE_string("study", "sweep", "Name in the storage.")
    integer("trials", 20, "Trials in all, over all workers.")
    path("storage", None, ".journal or .log file; URL.")
    integer("workers", 1, "Processes on this machine.")
    integer("population", 1, "Trials of a worker at once.")
    flags.DEFINE_string("pruner", "median", "median, hyperband or none.")
    integer("prune_after", None, "Epochs before pruning.")
    integer("seed", 0, "Seed of what is tried.")
    flags.DEFINE_bool("keep_all", False, "Keep all files of the trials.")


def main(argv: Sequence[str]) -> None:
    """One call of `sweep.sweep`."""
    del argv
    from vaecf.reporting import commands
    from vaecf.tuning import space, study, sweep

    values = flags.FLAGS
    plan = study.SweepPlan(
        base=cli.make_config({}),
        space=space.load(values.space),
        workdir=pathlib.Path(values.workdir),
        study=values.study,
        trials=values.trials,
        storage=values.storage or "",
        pruner=values.pruner,
        prune_after=values.prune_after,
        population=values.population,
        seed=values.seed,
        keep_all=values.keep_all,
    )
    try:
        sweep.sweep(plan, workers=values.workers, log=cli.log)
    finally:
        best = plan.workdir / "best.json"
        commands.log_best_command(best, cli.config_flag(), log=cli.log)
