"""Trains, tests and times a model.

    vaecf train --config=blend --data_dir=data/shop --workdir=runs/shop --test
    vaecf test --workdir=runs/shop --baselines
    python experiments/main.py --config=configs/ml1m.py \\
        --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test

`vaecf train` is main.py with --train, and `vaecf test` is main.py with --test.
Without --config the config is that of NVIDIA's recipe (configs/ml20m.py) or, if
there is nothing to train, that of the run in --workdir. The recipe's data
directory is /data; if that holds no dataset, data/ml-20m.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from vaecf import cli
from vaecf.commands import main_flags

define = main_flags.define


def main(argv: Sequence[str]) -> None:
    """Parses the flags and calls `experiment.run`, or that of all folds."""
    del argv
    from vaecf import experiment
    from vaecf.tuning import folds

    config, workdir, actions = main_flags.parse(flags.FLAGS)
    if workdir is None:
        experiment.benchmark_untrained(config, actions, log=cli.log)
    else:
        run = folds.run if folds.are_in(config.data.dir) else experiment.run
        run(config, workdir, actions, log=cli.log)
