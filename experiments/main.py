"""Trains, tests and times a model.

    python experiments/main.py --config=configs/ml1m.py \\
        --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test

Without --config the config is that of NVIDIA's recipe (configs/ml20m.py) or, if
there is nothing to train, that of the run in --workdir. The recipe's data
directory is /data; if that holds no dataset, data/ml-20m.
"""

from __future__ import annotations

from vaecf import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()

import pathlib
import sys
from collections.abc import Sequence

import main_flags
from absl import flags

from vaecf import cli, experiment
from vaecf.tuning import folds

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
cli.define_config(_ROOT / "configs" / "ml20m.py")
main_flags.define()
flags.adopt_module_key_flags(main_flags)  # for --help


def main(argv: Sequence[str]) -> None:
    """Parses the flags and calls `experiment.run`, or that of all folds."""
    del argv
    config, workdir, actions = main_flags.parse(flags.FLAGS)
    if workdir is None:
        experiment.benchmark_untrained(config, actions, log=cli.log)
    else:
        run = folds.run if folds.are_in(config.data.dir) else experiment.run
        run(config, workdir, actions, log=cli.log)


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
