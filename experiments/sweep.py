"""Searches for hyper-parameters, by the validation users.

    python experiments/sweep.py --config=configs/ml1m.py \\
        --space=configs/sweeps/mult_vae.py --workdir=runs/sweep --trials=40
"""

from __future__ import annotations

from vaecf import interrupts

# Workers import this file as __mp_main__.
if __name__ in ("__main__", "__mp_main__"):
    interrupts.exit_at_once()

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from vaecf import cli
from vaecf.errors import VaecfError

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
cli.define_config(_ROOT / "configs" / "ml1m.py")
_SPACE = cli.define_path("space", None, "Python file with get_space().")
_WORKDIR = cli.define_path("workdir", None, "The sweep's directory.")
flags.mark_flags_as_required(["space", "workdir"])
_STUDY = flags.DEFINE_string("study", "sweep", "Name in the storage.")
_TRIALS = flags.DEFINE_integer("trials", 20, "Trials in all, over all workers.")
_STORAGE = cli.define_path("storage", None, ".journal or .log file; URL.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes on this machine.")
_AT_ONCE = flags.DEFINE_integer("population", 1, "Trials of a worker at once.")
_PRUNER = flags.DEFINE_string("pruner", "median", "median, hyperband or none.")
_AFTER = flags.DEFINE_integer("prune_after", None, "Epochs before pruning.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of what is tried.")
_KEEP = flags.DEFINE_bool("keep_all", False, "Keep all files of the trials.")


def main(argv: Sequence[str]) -> None:
    """One call of `sweep.sweep`."""
    del argv
    from vaecf.reporting import commands
    from vaecf.tuning import space, study, sweep

    if _AFTER.value is not None and _PRUNER.value == "none":
        raise VaecfError("--prune_after has no effect with --pruner=none")
    plan = study.SweepPlan(
        base=cli.make_config({}),
        space=space.load(pathlib.Path(_SPACE.value)),
        workdir=pathlib.Path(_WORKDIR.value),
        study=_STUDY.value,
        trials=_TRIALS.value,
        storage=_STORAGE.value or "",
        pruner=_PRUNER.value,
        prune_after=_AFTER.value,
        population=_AT_ONCE.value,
        seed=_SEED.value,
        keep_all=_KEEP.value,
    )
    try:
        sweep.sweep(plan, workers=_WORKERS.value, log=cli.log)
    finally:
        best = plan.workdir / "best.json"
        commands.log_best_command(best, cli.config_flag(), log=cli.log)


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
