"""Commands that entry points print: quoted for the shell, for any directory."""

from __future__ import annotations

import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vaecf import workdir as workdir_lib


def command_line(
    script: str, values: Mapping[str, Any], *, separator: str = " "
) -> str:
    """Returns the command of an entry point.

    The script stands beside the running one. Its path, and the values that are
    paths, become absolute. A flag with True has no value; one with False is
    left out.
    """
    path = pathlib.Path(sys.argv[0]).resolve().with_name(script)
    words = [f"python {shlex.quote(str(path))}"]
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
    file = pathlib.Path(sys.argv[0]).resolve().parents[1] / "configs" / config
    run = {"train": True, "config": file.with_name(f"{config}.py")}
    run["workdir"] = pathlib.Path("runs", name)
    return command_line("main.py", {**run, **values})


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
    values: dict[str, Any] = {"config": pathlib.Path(config.config_filename)}
    for key, value in {**config.override_values, **best["params"]}.items():
        value = tuple(value) if isinstance(value, list) else value
        values[f"config.{key}"] = str(value)
    values["config.data.dir"] = pathlib.Path(config.value.data.dir)
    values["workdir"] = pathlib.Path("runs/best")
    values |= {"train": True, "test": True}
    command = command_line("main.py", values, separator=" \\\n    ")
    workdir_lib.write_json(path, {**best, "command": command})
    log(f"\n{command}")
