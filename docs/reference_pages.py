"""Writes the pages of the reference from docstrings, settings and flags."""

import ast
import dataclasses
import inspect
import os
import pathlib
import subprocess
import sys

import vaecf
from vaecf import commands
from vaecf import config as config_lib

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def write(directory: pathlib.Path) -> None:
    """Writes api.md, settings.md, commands.md and modules.md."""
    directory.mkdir(exist_ok=True)
    pages = {
        "api": _api(),
        "settings": _settings(),
        "commands": _commands(),
        "modules": _modules(),
    }
    for name, text in pages.items():
        path = directory / f"{name}.md"
        # An unchanged page is not built again.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _first_line(docstring: str | None) -> str:
    line = (docstring or "").strip().partition("\n")[0]
    return line.replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _api() -> str:
    """Returns a page with every public name of vaecf."""
    names = {name: getattr(vaecf, name) for name in vaecf.__all__}
    classes = [name for name, value in names.items() if inspect.isclass(value)]
    functions = [name for name in names if name not in classes]
    rows = [
        (f"{{py:obj}}`vaecf.{name}`", _first_line(names[name].__doc__))
        for name in (*functions, *classes)
    ]
    text = "# Python\n\nAll public names of `vaecf`.\n\n"
    text += _table(("name", ""), rows)
    for title, group, kind in (
        ("Functions", functions, "autofunction"),
        ("Classes", classes, "autoclass"),
    ):
        text += f"\n## {title}\n"
        for name in group:
            members = ""
            if kind == "autoclass":
                members = "   :members:\n"
                members += "   :inherited-members: BaseException, object\n"
            text += (
                f"\n```{{eval-rst}}\n.. {kind}:: vaecf.{name}\n{members}```\n"
            )
    return text


def _settings() -> str:
    """Returns a page with every setting that vaecf/config.py declares."""
    text = (
        "# Settings\n\nEvery setting of a run, as `vaecf/config.py` declares "
        "it. On the command line the setting `train.epochs` is "
        "`--config.train.epochs=40`; in Python it is a key of the changes that "
        "`vaecf.config.replace` takes. A setting marked *resumable* may change "
        "when a run is resumed.\n"
    )
    sections: dict[str, list[tuple[str, ...]]] = {"": []}
    for key, field in config_lib.settings().items():
        section, rule = key.rpartition(".")[0], field.metadata["rule"]
        notes = [field.metadata["meaning"]]
        if rule and not rule.choices:  # the meaning lists choices
            notes.append(f"Must be {rule.text}.")
        if field.metadata["resumable"]:
            notes.append("*Resumable.*")
        row = f"`{key}`", f"`{field.default!r}`", " ".join(notes)
        sections.setdefault(section, []).append(row)
    about = {
        field.name: _first_line(type(field.default).__doc__)
        for field in dataclasses.fields(config_lib.Config)
    }
    for section, rows in sections.items():
        title = section or "Top level"
        intro = about[section] if section else "Settings of the whole run."
        text += f"\n## {title}\n\n{intro}\n\n"
        text += _table(("setting", "default", "meaning"), rows)
    return text


def _commands() -> str:
    """Returns a page with the help text of every command."""
    text = (
        "# Commands\n\nWhat `--help` of each command prints. The scripts of "
        "`experiments/` have the same flags.\n"
    )
    for name, command in commands.COMMANDS.items():
        done = subprocess.run(
            [sys.executable, "-m", "vaecf", name, "--help"],
            cwd=_ROOT,
            env={**os.environ, "COLUMNS": "80", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if not done.stdout:
            raise RuntimeError(f"vaecf {name} --help: {done.stderr}")
        shown = done.stdout.strip().replace("python -m vaecf", "vaecf")
        text += f"\n## {name}: {command.about}\n\n````text\n{shown}\n````\n"
    return text


def _modules() -> str:
    """Returns a page with the first line of every module's docstring."""
    text = "# Modules\n\nWhat each module of the library is for.\n"
    folders: dict[str, list[tuple[str, ...]]] = {}
    for path in sorted((_ROOT / "vaecf").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        folder = path.parent.relative_to(_ROOT).as_posix().replace("/", ".")
        if path.name != "__init__.py" and docstring:
            row = f"`{path.stem}`", _first_line(docstring)
            folders.setdefault(folder, []).append(row)
    for folder, rows in folders.items():
        text += f"\n## {folder}\n\n" + _table(("module", ""), rows)
    return text
