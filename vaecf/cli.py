"""What every entry point shares: flags, errors in one line, exit statuses."""

from __future__ import annotations

import errno
import inspect
import logging as python_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from vaecf import config as config_lib
from vaecf import config_files, interrupts
from vaecf.errors import VaecfError

# The flags that functions of this module define belong to their callers.
flags.disclaim_key_flags()

# What ml_collections raises for keys, values and files that do not fit.
_CONFIG_ERRORS = (KeyError, AttributeError, TypeError, ValueError, OSError)

# The name by which ml_collections imports the file of --config.
_CONFIG_MODULE = "config_config"

# What the operating system says of disks and permissions, not of defects.
_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM),
)

# What JAX's collectives raise when a process has died.
_LOST_PEER = r"(?i)gloo|nccl|connection (closed|reset|refused)|unavailable"


def run(
    main: Callable[[Sequence[str]], int | None],
    *,
    define: Callable[[], None] | None = None,
    on: str | None = None,
    use_compilation_cache: bool = False,
    takes_arguments: bool = False,
) -> None:
    """Defines and parses the flags, calls `main` and exits.

    Bad input (`VaecfError`, or a flag's value) prints one line on stderr and
    exits with status 2; SIGINT and SIGTERM exit with status 130; any other
    exception is a bug and keeps its traceback.

    `define` defines the flags, if the import of a script has not done so, and
    the flag `on`, if given, is on by default.
    `main` receives the arguments that are not flags; there may be some only if
    it `takes_arguments`.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1 and not takes_arguments:
            return _fail(
                f"unexpected argument {argv[1]!r}: flags start with --"
            )
        _quiet_libraries()
        if use_compilation_cache:
            _use_compilation_cache()
        try:
            with interrupts.raised():
                _join_processes()
                return main(argv)
        except VaecfError as error:
            return _exit(_fail(with_flags(_with_line(str(error)))))
        except KeyboardInterrupt as error:
            reason = f": {error}" if str(error) else ""
            print(f"interrupted{reason}", file=sys.stderr)
            status = interrupts.STATUS
            # A subclass means that all processes have agreed to stop.
            return _exit(status) if type(error) is KeyboardInterrupt else status
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                return _exit(_fail(_disk_mistake(error)))
            # ml_collections loads the config file at its first use.
            if mistake := _config_file_mistake(error):
                return _exit(_fail(mistake))
            if not _several_processes():
                raise
            if not re.search(_LOST_PEER, str(error)):
                traceback.print_exc()
                return _exit(1)
            reason = str(error).splitlines()[0]
            message = (
                "another process of the run died or cannot be reached: see its "
                "output; the same command resumes from the last checkpoint "
            )
            return _exit(_fail(f"{message}({reason})"))

    if define is not None:
        define()
        # What --help lists.
        for flag in flags.FLAGS.get_key_flags_for_module(define.__module__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if on is not None:
        flags.FLAGS.set_default(on, True)
    app.run(guarded, flags_parser=_parse)


def log(message: str) -> None:
    """Prints a line on stdout and flushes it."""
    try:
        print(message, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does: go on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


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


def _exit(status: int) -> int:
    """Returns the status, or exits at once if there are several processes."""
    if _several_processes():
        # JAX's shutdown would wait for the other processes, which may be
        # waiting for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# --- Messages ---------------------------------------------------------------


def with_flags(message: str) -> str:
    """Returns the message with settings spelled as command-line flags.

    'user_column=...' and 'config.train.epochs' become '--user_column=...' and
    '--config.train.epochs' if the entry point has these flags. A word that
    could be plain English changes only before '=', or before ':' at the start
    of the message.
    """
    keys = config_lib.settings() if "config" in flags.FLAGS else ()

    def spell(match: re.Match[str]) -> str:
        name, following = match[0], message[match.end() :]
        if "." in name:
            is_flag = name.removeprefix("config.") in keys
        else:
            is_flag = name in flags.FLAGS and (
                "_" in name
                or following.startswith("=")
                or (match.start() == 0 and following.startswith(":"))
            )
        return f"--{name}" if is_flag else name

    # A whole word, neither quoted nor part of a path or of an option.
    word = r"(?<![\w./'\"-])(?:config(?:\.\w+)+|[a-z]\w*)(?![\w/]|\.\w)"
    return re.sub(word, spell, message)


def _disk_mistake(error: OSError) -> str:
    # The standard streams have no name.
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror}; free space, or choose another place, and "
        "call the command again"
    )


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _use_compilation_cache() -> None:
    from vaecf.training import compilation_cache

    try:
        compilation_cache.use_compilation_cache()
    except OSError as error:
        text = f"warning: compiled programs are not cached: {error}"
        print(text, file=sys.stderr)


def _quiet_libraries() -> None:
    """Shows warnings of libraries, without absl's prefixes."""
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(message)s"))
    for name in ("jax", "orbax", "tensorboardX", "matplotlib"):
        python_logging.getLogger(name).setLevel(python_logging.WARNING)
    # If orbax cannot write or read a file, its threads and tasks show
    # tracebacks, besides the error that it raises.
    handler.addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    show = sys.unraisablehook
    sys.unraisablehook = lambda args: (
        None
        if inspect.iscoroutine(args.object)
        or "Event loop is closed" in str(args.exc_value)
        else show(args)
    )
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


# --- Config files -----------------------------------------------------------


def define_config(default: str) -> Any:
    """Defines --config, and --config.<key> for the keys of the file.

    `default` is the name of a config file, as for `config_files.find`.
    ml_collections loads the file and applies the overrides of the command line
    here, so mistakes in them exit here as in `run`. Returns the flag's holder,
    whose `.value` is the locked ConfigDict.
    """
    from ml_collections import config_flags

    config_files.make_importable()
    try:
        _find_config(sys.argv)
        path = str(config_files.find(default))
    except VaecfError as error:
        sys.exit(_fail(f"--{error}"))
    config_flags.register_flag_parser_for_type(int, _OptionalInteger())
    about = "Config file, by path or name; --config.<key>=... changes a key."
    return _in_one_line(
        sys.argv,
        lambda: config_flags.DEFINE_config_file(
            "config", path, about, lock_config=True
        ),
    )


def _find_config(words: list[str]) -> None:
    """Replaces the name of a config by its path, and '~' by its meaning.

    A file that a path names may import others of its folder.
    """
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        at, before = (i, f"{flag}=") if equals else (i + 1, "")
        value = value if equals else words[at] if at < len(words) else ""
        if value and not re.search(r"[/.]", value):
            words[at] = f"{before}{config_files.find(value)}"
        elif value:
            path = os.path.expanduser(value)
            words[at] = before + path
            config_files.make_importable(pathlib.Path(path).absolute().parent)


class _OptionalInteger(flags.IntegerParser):
    """Parses None, too; the config says which settings may be None."""

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else super().parse(argument)


def make_config(given: Mapping[str, tuple[str, Any]]) -> config_lib.Config:
    """Returns the settings of --config, its overrides, and other flags.

    `given` maps a flag to its setting and its value, None if it is not given.

    Raises:
      VaecfError: a flag contradicts an override, or a setting is not valid.
    """
    flag = config_flag()
    overrides, changes = flag.override_values, {}
    for name, (key, value) in given.items():
        if value is None:
            continue
        if overrides.get(key, value) != value:
            raise VaecfError(
                f"--{name} and --config.{key}={overrides[key]} contradict each "
                "other: give one of them"
            )
        changes[key] = value
    _on_command_line.clear()
    _on_command_line.update(overrides, changes)
    flag.value.update_from_flattened_dict(changes)
    return config_lib.from_mapping(flag.value)


# Settings that the command line gives, whatever the file of --config says.
_on_command_line: set[str] = set()


def config_flag() -> Any:
    """Returns the flag of ml_collections; None without --config."""
    return flags.FLAGS._flags().get("config")


def _with_line(message: str) -> str:
    """Adds 'FILE, line N: ' if the file of --config sets the message's key."""
    flag = config_flag()
    found = re.match(r"config\.((?:\w+\.)*(\w+))", message)
    if flag is None or not flag.present:
        return message
    if found is None or found[1] in _on_command_line:
        return message
    path = pathlib.Path(flag.config_filename)
    assignment = re.compile(rf"\b{found[2]}\b[\"']?\]?\s*[=:](?!=)")
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if assignment.search(line):
            return f"{path}, line {number}: {message}"
    return message


def _parse(argv: Sequence[str]) -> list[str]:
    words = ["--help" if word == "-h" else word for word in argv]
    try:
        return _in_one_line(argv, lambda: flags.FLAGS(words))
    except SystemExit as exit:
        # absl's --help exits with status 1.
        sys.exit(0 if exit.code == 1 else exit.code)


def _in_one_line(argv: Sequence[str], parse: Callable[[], Any]) -> Any:
    """Calls `parse`; a mistake of the user prints one line and exits."""
    try:
        return parse()
    except flags.Error as error:
        mistake = _config_file_mistake(error) or _missing(str(error))
        sys.exit(_fail(mistake or " ".join(str(error).split())))
    except Exception as error:
        if mistake := _config_file_mistake(error):
            sys.exit(_fail(mistake))
        if not isinstance(error, _CONFIG_ERRORS):
            raise
        sys.exit(_fail(_override_mistake(str(error), argv)))


def _missing(text: str) -> str:
    """Returns one line if required flags are not given, else ''."""
    names = re.findall(r"Flag --(\w+) must have a value other than None", text)
    return f"--{', --'.join(names)} must be given" if names else ""


def _config_file_mistake(error: Exception) -> str:
    """Returns one line if the file of --config caused the error, else ''."""
    cause: BaseException | None = error
    while cause is not None:
        places = [
            (frame.f_code.co_filename, line)
            for frame, line in traceback.walk_tb(cause.__traceback__)
            if frame.f_globals.get("__name__") == _CONFIG_MODULE
        ]
        reason: object = cause
        if isinstance(cause, SyntaxError):
            places.append((cause.filename or "--config", cause.lineno or 1))
            reason = cause.msg
        if places:
            path, line = places[-1]
            kind = type(cause).__name__
            reason = _no_such_key(str(reason), "Key") or reason
            return f"{path}, line {line}: {reason} ({kind})"
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if not re.match("Failed load|Configuration is not|.*update_from_fl", text):
        return ""
    if found := re.search(r"\[Errno \d+\] ([^:]+): '([^']+)'", text):
        return f"--config={found[2]}: {found[1].lower()}"
    return f"--config cannot be loaded: {text.splitlines()[-1].strip()}"


def _override_mistake(text: str, argv: Sequence[str]) -> str:
    """Returns one line for a --config.<key> that the config does not have."""
    if "'get_config'" in text:
        return "--config names a file without get_config()"
    text = text.replace("\\n", " ").replace("\\", "")
    if not (key := re.search(r"'(\w+)'", text)):
        return " ".join(text.split())
    names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:]]
    name = next((n for n in names if key[1] in n.split(".")), "config")
    return f"--{name}: {_no_such_key(text)}"


def _no_such_key(text: str, before: str = "") -> str:
    """Returns what ml_collections says of a missing key, in our words."""
    key = re.search(rf"{before}[ '\"]*['\"](\w+)['\"]", text)
    near = re.search(r'Did you mean "(\w+)"', text)
    hint = f"; did you mean {near[1]}?" if near else ""
    return f"the config has no key {key[1]!r}{hint}" if key else ""
