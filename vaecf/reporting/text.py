"""How numbers, durations and names are spelled, everywhere the same."""

from __future__ import annotations

import math
import numbers
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from vaecf.reporting.writers import finite

MISSING = "–"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"

_ACRONYMS = {
    "ndcg": "NDCG",
    "recall": "Recall",
    "precision": "Precision",
    "hit_rate": "Hit rate",
    "hit": "Hit rate",
    "mrr": "MRR",
    "map": "MAP",
    "coverage": "Coverage",
    "popularity": "Mean popularity",
    "mean_popularity": "Mean popularity",
}
# More is better for these; coverage and popularity have no better side.
_ACCURACY = frozenset(
    {"ndcg", "recall", "precision", "hit_rate", "hit", "mrr", "map"}
)
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


def metric_label(name: str) -> str:
    """`ndcg@100` to `NDCG@100`; a name that is not known stays as it is."""
    stem, at, k = name.partition("@")
    return _ACRONYMS.get(stem, stem) + at + k


def is_accuracy(name: str) -> bool:
    """Whether a larger value of this metric is a better one."""
    return name.partition("@")[0] in _ACCURACY


def decimals(value: float) -> int:
    """Digits after the point: four for rates, fewer for large values."""
    size = abs(value)
    return 4 if size < 10 else 2 if size < 1000 else 0


def quantity(value: object) -> str:
    """A number with thousands separators, anything else as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        if number != 0 and (abs(number) < 1e-3 or abs(number) >= 1e15):
            return f"{number:.6g}"
        text = f"{number:,.6f}".rstrip("0").rstrip(".")
        return f"{number:,.1f}" if abs(number) >= 1e5 else text
    if isinstance(value, list | tuple):
        return ", ".join(quantity(v) for v in value) or "none"
    return str(value)


def duration(seconds: float | None) -> str:
    """Seconds as `m:ss` or `h:mm:ss`; unknown as a dash."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def printable(text: object, *, keep_newlines: bool = False) -> str:
    """The text without escape sequences and control characters.

    Raw ids and titles come from files of strangers: printed as they are
    they could move a terminal's cursor or break an XML document.
    """
    clean = _ESCAPES.sub("", str(text))
    if keep_newlines:
        clean = clean.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        c if c.isprintable() or (keep_newlines and c == "\n") else _UNKNOWN
        for c in clean
    )


def width(text: str) -> int:
    """Columns that a text takes on a terminal (wide CJK letters take two)."""
    return sum(
        0
        if unicodedata.combining(c)
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def pad(text: str, columns: int, *, right: bool = False) -> str:
    """The text filled up with spaces to a number of terminal columns."""
    fill = " " * max(0, columns - width(text))
    return fill + text if right else text + fill


def flatten(
    values: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Nested mappings as (dotted name, value), in their own order."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def series(
    records: Sequence[Mapping[str, object]], name: str, *, axis: str = "epoch"
) -> tuple[list[float], list[float]]:
    """One curve out of the run's records: its positions and its values.

    Records without the name or the axis are left out. A value that is not
    a finite number becomes NaN, so that a curve shows a gap there. Where a
    position occurs twice (a resumed run) the later record counts.
    """
    points: dict[float, float] = {}
    for record in records:
        position = finite(record.get(axis))
        if name not in record or position is None:
            continue
        value = finite(record[name])
        points[position] = math.nan if value is None else value
    ordered = sorted(points.items())
    return [p for p, _ in ordered], [v for _, v in ordered]
