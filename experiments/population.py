"""Trains runs that differ in numbers and seeds together, in one program.

    python experiments/population.py --config=configs/ml1m.py \\
        --workdir=runs/pop --members='seed=0,1,2' \\
        --members='loss.anneal_cap=0.1,0.2'

Each member gets a run directory of its own, as main.py --train makes them.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from vaecf import cli
from vaecf import config as config_lib

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
_CONFIG = cli.define_config(_ROOT / "configs" / "ml1m.py")
flags.adopt_module_key_flags(cli)  # for --help
_WORKDIR = flags.DEFINE_string("workdir", None, "The population's directory.")
flags.mark_flag_as_required("workdir")
_MEMBERS = flags.DEFINE_multi_string(
    "members",
    [],
    "A key of the config and its values, such as seed=0,1,2; several of these "
    "flags give every combination.",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The dataset; the same as --config.data.dir."
)


def main(argv: Sequence[str]) -> None:
    """One call of `population.train`."""
    del argv
    from vaecf.tuning import population

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.dir = _DATA_DIR.value
    population.train(
        config_lib.from_mapping(config),
        _MEMBERS.value,
        pathlib.Path(_WORKDIR.value),
        log=cli.log,
    )


if __name__ == "__main__":
    cli.run(main, keep_programs=True)
