"""What the library raises for bad input, and a helper for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VaecfError(ValueError):
    """Bad input; the message is one line that names the place and the fix.

    Entry points print it as ``error: <message>`` and exit with status 2;
    library users can catch it as a ``ValueError``.
    """


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the closest of `words`, or ''."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def listed(names: Iterable[object], most: int = 12) -> str:
    """Returns 'a, b, c', with at most `most` names."""
    texts = [str(name) for name in names]
    rest = f", ... ({len(texts):,} in all)" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def short(value: object, most: int = 60) -> str:
    """Returns the repr of a value on one line, cut to `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # polars panics at some nested columns
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."
