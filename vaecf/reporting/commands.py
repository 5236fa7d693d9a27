"""Commands that are printed: quoted for the shell, for any directory."""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vaecf import config_files
from vaecf import workdir as workdir_lib

# Command -> script of experiments/, and the flag that makes it the same.
_SCRIPTS = {"train": ("main.py", "train"), "test": ("main.py", "test")}


def _as_script() -> bool:
    """Returns whether a script of experiments/ runs, and not the program."""
    return sys.argv[0].endswith(".py")


def command_line(
    command: str, values: Mapping[str, Any], *, separator: str = " "
) -> str:
    """Returns the line that calls a command as the running one was called.

    A script stands beside the running script; its path, and the values that
    are paths, become absolute. A flag with True has no value; one with False
    is left out.
    """
    if _as_script():
        script, flag = _SCRIPTS[command]
        path = pathlib.Path(sys.argv[0]).resolve().with_name(script)
        words = [f"python {shlex.quote(str(path))}"]
        values = {flag: True, **values}
    else:
        program = sys.argv[0].rpartition(" ")[0]
        words = [f"{program} {command}"]
    for name, value in values.items():
        if value is False:
            continue
        if isinstance(value, pathlib.Path):
            value = value.expanduser().absolute()
        word = f"--{name}" if value is True else f"--{name}={value}"
        words.append(shlex.quote(word))
    return separator.join(words)


def training(config: str, name: str, values: Mapping[str, Any]) -> str:
    """Returns the command that trains runs/<name> with a file of configs/."""
    run = {"config": _named(config_files.find(config))}
    run["workdir"] = pathlib.Path("runs", name)
    return command_line("train", {**run, **values})


def _named(path: pathlib.Path) -> pathlib.Path | str:
    """Returns the path of a config, or its name if the program knows it."""
    known = path.parent == config_files.directory()
    return path.stem if known and not _as_script() else path


def log_best_command(
    path: pathlib.Path, config: Any, *, log: Callable[[str], None]
) -> None:
    """Adds the command that trains the best trial to a sweep's best.json.

    `config` is the flag that ml_collections defined. Nothing happens without
    the file, that is, before a trial is complete.
    """
    if not path.exists():
        return
    best = workdir_lib.read_json(path)
    file = pathlib.Path(config.config_filename)
    values: dict[str, Any] = {"config": _named(file)}
    for key, value in {**config.override_values, **best["params"]}.items():
        value = tuple(value) if isinstance(value, list) else value
        values[f"config.{key}"] = str(value)
    values["config.data.dir"] = pathlib.Path(config.value.data.dir)
    values["workdir"] = pathlib.Path("runs/best")
    values["test"] = True
    command = command_line("train", values, separator=" \\\n    ")
    workdir_lib.write_json(path, {**best, "command": command})
    log(f"\n{command}")
