"""HTML that objects show in a notebook: a card of facts, perhaps a table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from vaecf.reporting import tables

# The colours are those of the notebook, whether its theme is light or dark.
_CARD = (
    "display:inline-block;max-width:100%;overflow-x:auto;margin:4px 0;"
    "padding:8px 14px;border:1px solid rgba(128,128,128,.4);border-radius:8px"
)
_CELL = "text-align:left;vertical-align:top;padding:2px 14px 2px 0"


def card(
    title: object,
    facts: Mapping[str, object],
    rows: Sequence[Mapping[str, object]] = (),
) -> str:
    """Returns a box with a title, a line per fact and a table below them.

    Texts are escaped, and numbers are formatted by `tables.quantity`.

    Args:
      facts: values by name; those that are None are left out.
      rows: lines of the table, which map headings to cells. A line may lack
        cells.
    """
    known = {name: v for name, v in facts.items() if v is not None}
    lines = [
        _line([_cell("th", name), _cell("td", value)])
        for name, value in known.items()
    ]
    parts = [f"<b>{_text(title)}</b>", _table(lines)]
    if rows:
        headings = list(dict.fromkeys(name for row in rows for name in row))
        lines = [_line(_cell("th", heading) for heading in headings)]
        lines += [
            _line(_cell("td", row.get(heading)) for heading in headings)
            for row in rows
        ]
        parts.append(_table(lines))
    return f'<div style="{_CARD}">{"".join(parts)}</div>'


def _table(lines: Sequence[str]) -> str:
    style = "margin:4px 0;border-collapse:collapse"
    return f'<table style="{style}">{"".join(lines)}</table>' if lines else ""


def _line(cells: Iterable[str]) -> str:
    return f'<tr style="background:none">{"".join(cells)}</tr>'


def _cell(tag: str, value: object) -> str:
    return f'<{tag} style="{_CELL}">{_text(tables.quantity(value))}</{tag}>'


def _text(value: object) -> str:
    return html.escape(tables.printable(value))
