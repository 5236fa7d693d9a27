"""Flags of several commands: paths, choices, fields of a dataclass."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable
from typing import Any

from absl import flags

from vaecf.cli import with_flags

# The flags that functions of this module define belong to their callers.
flags.disclaim_key_flags()


def define_settings(settings: type) -> None:
    """Defines a flag for every field that tells its `meaning` in metadata."""
    define: dict[type, Callable[..., Any]] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if (meaning := field.metadata.get("meaning")) is not None:
            kinds = {hints[field.name], *typing.get_args(hints[field.name])}
            kind = next((kind for kind in define if kind in kinds), str)
            define[kind](field.name, field.default, meaning)
    for field in dataclasses.fields(settings):  # once all flags are known
        if meaning := field.metadata.get("meaning"):
            flags.FLAGS[field.name].help = with_flags(meaning)


def settings_from_flags(settings: type) -> dict[str, Any]:
    """Returns the values of the flags of `define_settings`, by field."""
    fields = (field.name for field in dataclasses.fields(settings))
    return {name: flags.FLAGS[name].value for name in fields}


class _Path(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, default: str | None, help_text: str) -> Any:
    """Defines a flag for a path; '~' stands for the home directory."""
    return flags.DEFINE(_Path(), name, default, help_text)


class _ListSwitch(flags.ListParser):
    """Parses 'true' (the bare flag) as all names and 'false' as none."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        super().__init__()
        self._choices = choices

    def parse(self, argument: Any) -> Any:
        if argument in ("true", "false"):
            return self._choices if argument == "true" else ()
        for name in (names := super().parse(argument)):
            if name not in self._choices:
                known = ", ".join(self._choices)
                raise ValueError(f"{name!r} is unknown, use one of {known}")
        return tuple(names)


def define_list_switch(
    name: str, choices: tuple[str, ...], help_text: str
) -> None:
    """Defines --name (all choices), --name=a,b and --noname."""
    flag = flags.Flag(
        parser=_ListSwitch(choices),
        serializer=flags.CsvListSerializer(","),
        name=name,
        default="",
        help_string=f"{help_text} ({', '.join(choices)})",
        boolean=True,
    )
    flags.DEFINE_flag(flag)


def define_processes() -> None:
    """Defines the flags that join several processes into one run."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, for a run of several processes. Slurm, Open "
        "MPI and Kubernetes provide this flag and the next two.",
    )
    about = "Number of processes; 1 runs alone, whatever started it."
    flags.DEFINE_integer("num_processes", None, about)
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
