"""Config files: found by name or path, and called."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.errors import VaecfError, did_you_mean
from vaecf.files import user_path

_PACKAGE = pathlib.Path(__file__).resolve().parent


def load_config(
    name: str | os.PathLike[str], changes: Mapping[str, Any] | None = None
) -> Config:
    """Returns the settings of a config file, with changes.

    >>> import vaecf
    >>> config = vaecf.load_config("blend", {"train.epochs": 40})
    >>> config.model.name, config.train.epochs
    ('rec_vae', 40)

    Args:
      name: name of a file of `configs/`, such as 'blend' or 'ml1m'; or the path
        of a Python file (.py) with `get_config()`.
      changes: new values of settings by dotted key; `vaecf.config` describes
        all settings.

    Raises:
      VaecfError: there is no such file, it fails, a key is unknown, or a value
        is not allowed.
    """
    path = find(name)
    values = call(path, "get_config")
    if not isinstance(values, Config):
        if not hasattr(values, "items"):
            raise VaecfError(f"{path}: get_config() must return a ConfigDict")
        values = config_lib.from_mapping(values)
    return config_lib.replace(values, config_lib.flatten(changes or {}))


def directory() -> pathlib.Path:
    """Returns the folder `configs/`: of the installed package or checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def find(
    name: str | os.PathLike[str], *, folder: str = "", setting: str = "config"
) -> pathlib.Path:
    """Returns the path of a config file.

    Args:
      name: name of a file in `folder` of `configs/`, or a path ending in .py.
      setting: for the message of an error.

    Raises:
      VaecfError: there is no such file.
    """
    path = user_path(name)
    known = {
        file.stem: file
        for file in sorted((directory() / folder).glob("*.py"))
        if file.stem != "__init__"
    }
    if str(name) in known:
        return known[str(name)]
    if path.is_file():
        return path
    raise VaecfError(
        f"{setting}={name}: no such file; name a .py file, or one of "
        f"{', '.join(known)}{did_you_mean(path.stem, known)}"
    )


def call(path: pathlib.Path, function: str) -> Any:
    """Returns what a function of a Python file returns.

    Raises:
      VaecfError: the file fails; names the line.
    """
    try:
        with importable(path.parent):
            return runpy.run_path(str(path))[function]()
    except Exception as error:
        lines: list[int | None] = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == str(path)
        ]
        reason: object = error
        if isinstance(error, SyntaxError):
            reason = error.msg
            lines.append(error.lineno)
        where = f", line {lines[-1]}" if lines else ""
        raise VaecfError(
            f"{path}{where}: {function}() failed "
            f"({type(error).__name__}: {' '.join(str(reason).split())})"
        ) from error


def make_importable(*more: pathlib.Path) -> None:
    """Lets config files import each other as `configs.<name>`.

    A package `configs` of the user's project would otherwise be imported, or
    none. `more` are further folders of the package.
    """
    spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    spec.submodule_search_locations = [*map(str, (directory(), *more))]
    sys.modules["configs"] = importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def importable(*more: pathlib.Path) -> Iterator[None]:
    """Does what `make_importable` does, in the block only."""
    others = _loaded()
    for name in others:
        del sys.modules[name]
    make_importable(*more)
    try:
        yield
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(others)


def _loaded() -> dict[str, Any]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name == "configs" or name.startswith("configs.")
    }
