"""What every entry point shares: errors in one line, and an exit status."""

from __future__ import annotations

import logging as python_logging
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from vaecf.errors import VaecfError


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parses flags, calls `main` and exits.

    Bad input (`VaecfError`, or a flag's value) is one line on stderr and exit
    status 2; an interrupt is 130; anything else is a bug and keeps its
    traceback.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            return _fail(
                f"unexpected argument {argv[1]!r}: flags start with --"
            )
        _quiet_libraries()
        try:
            return main(argv)
        except VaecfError as error:
            return _fail(str(error))
        except KeyboardInterrupt as error:
            print(
                f"interrupted: {error}" if str(error) else "interrupted",
                file=sys.stderr,
            )
            return 128 + signal.SIGINT

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """absl's parser, with every mistake in one line."""
    try:
        return app.parse_flags_with_usage(list(argv))
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        # ml_collections raises these for a config that does not exist, and for
        # keys and values that do not fit it.
        message = str(error.args[0]) if error.args else str(error)
        sys.exit(_fail(" ".join(message.split())))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _quiet_libraries() -> None:
    """Libraries speak up from warnings on; we speak from info on."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(
        python_logging.Formatter("%(message)s")
    )
    for name in ("jax", "orbax", "tensorboardX", "matplotlib"):
        python_logging.getLogger(name).setLevel(python_logging.WARNING)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


class _ListSwitch(flags.ArgumentParser):
    """'true' (the bare flag) is all, 'false' none, else a list of names."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def parse(self, argument: str | tuple[str, ...]) -> tuple[str, ...]:
        if isinstance(argument, tuple):
            return argument
        if argument in ("true", "false"):
            return self._choices if argument == "true" else ()
        names = tuple(
            name.strip() for name in argument.split(",") if name.strip()
        )
        for name in names:
            if name not in self._choices:
                raise ValueError(
                    f"{name!r} is unknown, use one of {', '.join(self._choices)}"
                )
        return names

    def flag_type(self) -> str:
        return "list of names"


def define_list_switch(
    name: str, choices: tuple[str, ...], help_text: str
) -> None:
    """Defines --name (all choices), --name=a,b and --noname."""
    flags.DEFINE_flag(
        flags.Flag(
            parser=_ListSwitch(choices),
            serializer=flags.CsvListSerializer(","),
            name=name,
            default=(),
            help_string=f"{help_text} ({', '.join(choices)})",
            boolean=True,
        )
    )


def say(message: str) -> None:
    """A line for the person, on stdout, at once."""
    print(message, flush=True)
