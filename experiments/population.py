"""Trains runs that differ in seeds and numbers together, in one program.

    python experiments/population.py --config=configs/ml1m.py \\
        --workdir=runs/pop --members=seed=0,1 --members=loss.gamma=0.01,0.02

Each member gets a workdir, as main.py --train makes them. The same command
resumes an interrupted population; further members may be added.
"""

from __future__ import annotations

from vaecf import interrupts

if __name__ == "__main__":
    interrupts.exit_at_once()

import ast
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vaecf import cli
from vaecf.errors import VaecfError

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(_ROOT))  # configs import each other as configs.<name>
cli.define_config(_ROOT / "configs" / "ml1m.py")
_WORKDIR = cli.define_path("workdir", None, "The population's directory.")
flags.mark_flag_as_required("workdir")
_MEMBERS = flags.DEFINE_multi_string(
    "members", [], "A setting and its values; may be repeated for a grid."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Sets --config.data.dir.")


def main(argv: Sequence[str]) -> None:
    """Trains the members and prints how to test the best one."""
    del argv
    from vaecf.reporting import commands
    from vaecf.tuning import population

    workdir = pathlib.Path(_WORKDIR.value)
    base = cli.make_config({"data_dir": ("data.dir", _DATA_DIR.value)})
    values: dict[str, list[Any]] = {}
    for key, found in map(_parse, _MEMBERS.value):
        values.setdefault(key, []).extend(found)
    rows = population.train_grid(values, base, workdir, log=cli.log)
    best = {"workdir": workdir / rows[0]["member"], "test": True}
    cli.log(f"\n{commands.command_line('main.py', best)}")


def _parse(text: str) -> tuple[str, list[Any]]:
    """Returns the setting and the values of text such as 'seed=0,1'."""
    key, _, values = text.partition("=")
    try:
        return key, ast.literal_eval(f"[{values}]")
    except (SyntaxError, ValueError):
        raise VaecfError(f"--members={text} must be as in seed=0,1") from None


if __name__ == "__main__":
    cli.run(main, use_compilation_cache=True)
