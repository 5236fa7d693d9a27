"""What every entry point shares: errors in one line, and an exit status."""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from vaecf.errors import VaecfError

# What ml_collections raises for keys, values and files that do not fit.
_CONFIG_ERRORS = (KeyError, AttributeError, TypeError, ValueError, OSError)

# What JAX's collectives say when the other end is gone.
_LOST_PEER = r"(?i)gloo|nccl|connection (closed|reset|refused)|unavailable"


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    keep_programs: bool = False,
    takes_arguments: bool = False,
) -> None:
    """Parses flags, calls `main` and exits.

    Bad input (`VaecfError`, or a flag's value) is one line on stderr and exit
    status 2; an interrupt is 130; anything else is a bug and keeps its
    traceback.

    Args:
      main: gets the arguments that are no flags.
      keep_programs: load compiled programs of earlier calls, and keep those
        of this one (`compilation_cache.keep_programs`). Benchmarks do without: what
        they say of compilation is meant.
      takes_arguments: arguments that are no flags are for `main`, not refused.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1 and not takes_arguments:
            return _fail(
                f"unexpected argument {argv[1]!r}: flags start with --"
            )
        _quiet_libraries()
        if keep_programs:
            _keep_programs()
        try:
            _join_processes()
            return main(argv)
        except VaecfError as error:
            return _leave(_fail(str(error)))
        except KeyboardInterrupt as error:
            print(
                f"interrupted: {error}" if str(error) else "interrupted",
                file=sys.stderr,
            )
            status = 128 + signal.SIGINT
            # A subclass means that all processes have agreed to stop.
            return (
                _leave(status) if type(error) is KeyboardInterrupt else status
            )
        except Exception as error:
            if where := _in_config_file(error):
                return _leave(_fail(where))
            # ml_collections loads the config file when it is first asked for.
            if "Failed loading config file" in str(error):
                return _leave(_fail(_missing_config(str(error))))
            if not _several_processes():
                raise
            if not re.search(_LOST_PEER, str(error)):
                traceback.print_exc()
                return _leave(1)
            return _leave(
                _fail(
                    "another process of the run died or cannot be reached: "
                    "its output says why; the same command goes on from the "
                    f"last checkpoint ({str(error).splitlines()[0]})"
                )
            )

    app.run(guarded, flags_parser=_parse)


def define_processes() -> None:
    """Defines the flags by which several processes become one run."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, for a run of several processes. Slurm, Open "
        "MPI and Kubernetes say this and the next two themselves.",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Processes of the run; 1: alone, whatever started it.",
    )
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")


def _join_processes() -> None:
    if "coordinator_address" not in flags.FLAGS:
        return
    from vaecf.parallel import processes

    names = ("coordinator_address", "num_processes", "process_id")
    processes.start(**{name: flags.FLAGS[name].value for name in names})


def _several_processes() -> bool:
    if "vaecf.parallel.processes" not in sys.modules:
        return False
    from vaecf.parallel import processes

    return not processes.alone()


def _leave(status: int) -> int:
    """The status; of several processes one that fails leaves at once.

    In the usual way out it would wait for the others, who may wait for it.
    """
    if _several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def define_config(default: pathlib.Path) -> Any:
    """Defines --config, a config file, and with it --config.<key>.

    A default is parsed at once, and the overrides of the command line with
    it: mistakes in them are one line here as in `run`.
    """
    from ml_collections import config_flags

    return _in_one_line(
        sys.argv,
        lambda: config_flags.DEFINE_config_file(
            "config",
            str(default),
            "Config file; --config.<key>=... changes a key.",
            lock_config=True,
        ),
    )


def _parse(argv: Sequence[str]) -> list[str]:
    """absl's parser, with every mistake in one line."""
    return _in_one_line(argv, lambda: flags.FLAGS(list(argv)))


def _in_one_line(argv: Sequence[str], parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except flags.Error as error:
        sys.exit(_fail(" ".join(str(error).split())))
    except Exception as error:
        if where := _in_config_file(error):
            sys.exit(_fail(where))
        if not isinstance(error, _CONFIG_ERRORS):
            raise
        sys.exit(_fail(_config_mistake(str(error), argv)))


def _in_config_file(error: Exception) -> str:
    """One line for a mistake in the file of --config; '' for all others."""
    files = [os.path.realpath(file) for file in _config_files()]
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        places = [
            (frame.filename, frame.lineno)
            for frame in traceback.extract_tb(cause.__traceback__)
        ]
        if isinstance(cause, SyntaxError):
            places.append((cause.filename or "", cause.lineno))
        for path, line in reversed(places):
            if os.path.realpath(path) in files:
                reason = cause.msg if isinstance(cause, SyntaxError) else cause
                kind = type(cause).__name__
                return f"--config={path}, line {line}: {reason} ({kind})"
    return ""


def _config_files() -> list[str]:
    """What --config names on the command line, without a config's string."""
    files = []
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-"):
            files.append((value if equals else following).partition(":")[0])
    return files


def _missing_config(text: str) -> str:
    """One line for a config file that is not there."""
    missing = re.search(r"No such file or directory: '([^']+)'", text)
    if missing and missing[1] in _config_files():
        return f"--config={missing[1]}: no such file"
    return f"--config cannot be loaded: {text.split(chr(10))[-1].strip()}"


def _config_mistake(text: str, argv: Sequence[str]) -> str:
    """One line for an override that the config does not take."""
    if "No such file or directory" in text:
        return _missing_config(text)
    if "'get_config'" in text:
        return "--config names a file without get_config()"
    unknown = re.search(r"(\w+)\W+(?:n\W*)?Did you mean \"(\w+)\"", text)
    overrides = [a.lstrip("-").partition("=")[0] for a in argv[1:]]
    for name in overrides:
        for part in name.split(".")[1:]:
            if re.search(rf"\b{re.escape(part)}\b", text.partition("Did")[0]):
                hint = f"; did you mean {unknown[2]}?" if unknown else ""
                return f"--{name}: the config has no key {part!r}{hint}"
    return " ".join(text.replace("\\n", " ").split())


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _keep_programs() -> None:
    """A cache that cannot be had costs time, and a line on stderr."""
    from vaecf.training import compilation_cache

    try:
        compilation_cache.keep_programs()
    except OSError as error:
        print(
            f"warning: compiled programs are not kept: {error}", file=sys.stderr
        )


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
                    f"{name!r} is unknown, use one of "
                    f"{', '.join(self._choices)}"
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


def log(message: str) -> None:
    """A line for the person, on stdout, at once."""
    print(message, flush=True)
