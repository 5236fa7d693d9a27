"""Train, test and time a model.

    python experiments/main.py --config=configs/ml1m.py \\
        --config.data.dir=data/ml-1m --workdir=runs/ml1m --train --test

Without --config it is the recipe's (configs/ml20m.py), or, when there is
nothing to train, the config of the run in --workdir.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import main_flags
from absl import flags

from vaecf import cli, experiment
from vaecf import config as config_lib
from vaecf import workdir as workdir_lib

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
_CONFIG = cli.define_config(_ROOT / "configs" / "ml20m.py")
main_flags.define()
for _module in (cli, main_flags):
    flags.adopt_module_key_flags(_module)  # for --help


def main(argv: Sequence[str]) -> None:
    """Parses, calls `experiment.run`."""
    del argv
    values = flags.FLAGS
    actions, workdir = main_flags.actions(values), main_flags.workdir(values)
    config = _CONFIG.value
    if not actions.train and not values["config"].present:
        if (workdir / workdir_lib.CONFIG).exists():
            with config.unlocked():
                config.update(workdir_lib.read_config(workdir).to_dict())
        config.update_from_flattened_dict(values["config"].override_values)
    main_flags.override(config, values)
    actions = dataclasses.replace(
        actions, arguments=main_flags.arguments(values, config)
    )
    experiment.run(
        config_lib.from_mapping(config), workdir, actions, log=cli.log
    )


if __name__ == "__main__":
    cli.run(main, keep_programs=True)
