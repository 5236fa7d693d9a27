"""The commands: a module each, with `define` for its flags and `main`.

The program `vaecf`, which is also `python -m vaecf`, and the scripts of
experiments/ call them. Nothing heavy is imported before the flags are parsed.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import NamedTuple

import vaecf
from vaecf import interrupts


class Command(NamedTuple):
    """A command of the program."""

    about: str  # for the list of commands
    module: str  # in this package
    on: str | None = None  # flag that is on by default


COMMANDS = {
    "prepare": Command("turn ratings into a dataset", "prepare_dataset"),
    "train": Command("train a model, or resume", "main", "train"),
    "test": Command("test a trained model", "main", "test"),
    "recommend": Command("recommend items to many users", "recommend"),
    "sweep": Command("search for good settings", "sweep"),
    "population": Command("train several seeds or settings", "population"),
    "compare": Command("compare tested runs, user by user", "compare"),
}
_COMPILING = ("main", "recommend", "sweep", "population")

_HELP = """\
vaecf recommends items from histories alone: who bought, played or rated what.
It trains a variational autoencoder beside a linear model, measures it on users
it has never seen, and ranks the whole catalogue for any user, old or new.

A first run, with a file shop.csv that has the columns customer and sku:

  vaecf prepare --ratings=shop.csv --user_column=customer --item_column=sku \\
      --output=data/shop
  vaecf train --config=blend --data_dir=data/shop --workdir=runs/shop \\
      --test --baselines
  vaecf recommend --workdir=runs/shop --histories=shop.csv \\
      --user_column=customer --item_column=sku --output=recommended.csv

The second line ends with a table of metrics and runs/shop/report.html. If you
have no file, `vaecf prepare --dataset=ml-100k` downloads MovieLens-100K.

Commands:

{commands}

`vaecf COMMAND --help` lists the flags of a command. The same commands as Python
functions: vaecf.train, vaecf.compare and so on; help(vaecf) lists them.
"""


def run_program() -> None:
    """Runs the command that the first word names, and exits."""
    interrupts.exit_at_once()
    path, *words = sys.argv
    name = words[0] if words else "--help"
    if name in ("--help", "-h", "help"):
        lines = [f"  {name:12}{c.about}" for name, c in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)), end="")
        sys.exit(0)
    if name == "--version":
        print(f"vaecf {vaecf.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        from vaecf.errors import did_you_mean

        print(
            f"error: {name!r} is not a command{did_you_mean(name, COMMANDS)} "
            "(vaecf --help lists all)",
            file=sys.stderr,
        )
        sys.exit(2)
    program = pathlib.Path(path).name
    if program == "__main__.py":
        program = "python -m vaecf"
    sys.argv[:2] = [f"{program} {name}"]
    start(COMMANDS[name].module, COMMANDS[name].on)


def start(name: str, on: str | None = None) -> None:
    """Runs the command of a module with the flags of sys.argv, and exits.

    Args:
      on: flag that is on by default.
    """
    interrupts.exit_at_once()
    from vaecf import cli

    module = importlib.import_module(f"vaecf.commands.{name}")
    sys.modules["__main__"].__doc__ = module.__doc__  # for --help

    cli.run(
        module.main,
        define=module.define,
        on=on,
        use_compilation_cache=name in _COMPILING,
        takes_arguments=name == "compare",
    )
