"""Small HTML tables by which notebooks show an object."""

from __future__ import annotations

import html
from collections.abc import Mapping

_LEFT = "text-align: left"


def card(title: str, facts: Mapping[str, object]) -> str:
    """Returns an HTML table with a title and a row per fact.

    Texts are escaped, integers get separators, and facts that are None are
    left out. The colours are those of the page, light or dark.
    """
    rows = "".join(
        f'<tr><th style="{_LEFT}">{_text(name)}</th>'
        f'<td style="{_LEFT}">{_text(value)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    caption = f'caption-side: top; {_LEFT}; color: inherit"><b>{_text(title)}'
    return f'<table><caption style="{caption}</b></caption>{rows}</table>'


def _text(value: object) -> str:
    text = f"{value:,}" if type(value) is int else str(value)
    # Control characters of strangers' ids and names.
    return html.escape(
        "".join(c if c.isprintable() else "\ufffd" for c in text)
    )
