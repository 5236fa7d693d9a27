"""Trains runs that differ in seeds and numbers together, in one program.

    vaecf population --config=ml1m --workdir=runs/pop \\
        --members=seed=0,1 --members=loss.gamma=0.01,0.02

Each member gets a workdir, as `vaecf train` makes them. The same command
resumes an interrupted population; further members may be added.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from vaecf import cli, cli_flags
from vaecf.errors import VaecfError


def define() -> None:
    """Defines the flags."""
    cli.define_config("ml1m")
    cli_flags.define_path("workdir", None, "The population's directory.")
    flags.mark_flag_as_required("workdir")
    about = "A setting and its values; may be repeated for a grid."
    flags.DEFINE_multi_string("members", [], about)
    flags.DEFINE_string("data_dir", None, "Sets --config.data.dir.")


def main(argv: Sequence[str]) -> None:
    """Trains the members and prints how to test the best one."""
    del argv
    from vaecf.reporting import commands
    from vaecf.tuning import population

    workdir = pathlib.Path(flags.FLAGS.workdir)
    base = cli.make_config({"data_dir": ("data.dir", flags.FLAGS.data_dir)})
    values: dict[str, list[Any]] = {}
    for key, found in map(_parse, flags.FLAGS.members):
        values.setdefault(key, []).extend(found)
    rows = population.train_grid(values, base, workdir, log=cli.log)
    best = {"workdir": workdir / rows[0]["member"]}
    cli.log(f"\n{commands.command_line('test', best)}")


def _parse(text: str) -> tuple[str, list[Any]]:
    """Returns the setting and the values of text such as 'seed=0,1'."""
    key, _, values = text.partition("=")
    try:
        return key, ast.literal_eval(f"[{values}]")
    except (SyntaxError, ValueError):
        raise VaecfError(f"--members={text} must be as in seed=0,1") from None
