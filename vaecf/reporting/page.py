"""Writes pages: HTML files that load nothing else and run nothing."""

from __future__ import annotations

import base64
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.reporting import plots, tables

_TEMPLATES = pathlib.Path(__file__).with_name("templates")
# What the top of a page shows of the environment.
_SHOWN = ("vaecf", "python", "jax", "device")


def images(
    panels: Iterable[plots.Panel], **options: Any
) -> list[tuple[str, str]]:
    """Returns the title and the URL of a figure for each plot.

    An image cannot run scripts or load files, whatever its labels contain.
    `options` are those of `plots.draw`.
    """
    shown = []
    for panel in panels:
        figure = plots.draw([panel], **options)
        assert figure is not None
        svg = base64.b64encode(plots.to_svg(figure).encode()).decode()
        title = figure.axes[0].get_title("left").replace("\n", " ")
        shown.append((title, f"data:image/svg+xml;base64,{svg}"))
    return shown


def write(
    path: str | os.PathLike[str],
    template: str,
    environment: Mapping[str, Any],
    **values: Any,
) -> None:
    """Writes the page of a template atomically.

    Args:
      environment: see `report.environment`; the top of the page shows the
        command and the main versions.
      values: variables of the template; "title" and "about" at least.

    Raises:
      VaecfError: the file cannot be written.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [name for name in _SHOWN if name in environment]
    text = templates.get_template(template).render(
        command=environment.get("command"),
        versions=[f"{name} {environment[name]}" for name in shown],
        tables=tables,
        **values,
    )
    text = tables.printable(text, keep="\n")
    workdir_lib.write_bytes(path, text.encode("utf-8"))
