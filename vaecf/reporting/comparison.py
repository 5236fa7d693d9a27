"""The comparison of runs as text for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vaecf.reporting.tables import aligned, cell_texts
from vaecf.reporting.text import MISSING, metric_label, printable


def comparison_text(compared: Mapping[str, Any]) -> str:
    """Three tables: metrics, paired differences, lengths of histories.

    Args:
      compared: what `vaecf.evaluation.compare.compare` returns.

    Returns:
      Lines without a newline at the end.
    """
    metric = metric_label(compared["metric"])
    about = [
        f"{compared['users']:,} users"
        + (f" ({compared['left_out']:,} left out)" * bool(compared["left_out"]))
    ]
    for name in ("protocol", "dataset"):
        if compared[name]:
            about.insert(0, f"{name} {printable(compared[name])}")
    lines = ["Test users", ", ".join(about), "", *_metrics(compared)]
    if compared["comparisons"]:
        reference = printable(compared["reference"])
        lines += ["", f"{metric} against {reference}, paired by user", ""]
        lines += _differences(compared["comparisons"])
    lines += ["", f"{metric} by history length (users)", ""]
    lines += _by_history(compared["groups"])
    return "\n".join(lines)


def _metrics(compared: Mapping[str, Any]) -> list[str]:
    """A line a run, and one for the mean of several seeds."""
    rows: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, group in compared["groups"].items():
        for run in compared["runs"]:
            if run["group"] == name:
                seed = "" if run["seed"] is None else str(run["seed"])
                rows.append((name, seed, run["metrics"]))
        if group["seeds"] > 1:
            rows.append((name, "mean", group["metrics"]))
    table = [
        ["model", *(printable(name) for name, _, _ in rows)],
        ["seed", *(seed for _, seed, _ in rows)],
    ]
    for m in compared["metrics"]:
        cells = [_cell(cells[m]) for _, _, cells in rows]
        table.append([metric_label(m), *cells])
    note = "mean ± standard error over users"
    if any(seed == "mean" for _, seed, _ in rows):
        note += "; in lines of seed 'mean' over seeds"
    return [*aligned(table), "", note]


def _differences(comparisons: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = list(comparisons.values())
    intervals = [f"{c['low']:+.4f} to {c['high']:+.4f}" for c in found]
    errors = [
        MISSING if c["stderr"] is None else f"{c['stderr']:.4f}" for c in found
    ]
    table: Sequence[Sequence[str]] = [
        ["model", *map(printable, comparisons)],
        ["difference", *(f"{c['difference']:+.4f}" for c in found)],
        ["s.e.", *errors],
        ["95 % bootstrap", *intervals],
        ["p (t-test)", *(f"{c['p']:.2g}" for c in found)],
        ["p (Holm)", *(f"{c['p_holm']:.2g}" for c in found)],
    ]
    return aligned(table)


def _by_history(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    table = [["model", *map(printable, groups)]]
    per_group = [group["history_length"] for group in groups.values()]
    for b, bucket in enumerate(per_group[0]):
        head = f"{bucket['bucket']} ({bucket['users']:,})"
        table.append([head, *(_cell(rows[b]) for rows in per_group)])
    return aligned(table)


def _cell(cell: Mapping[str, Any]) -> str:
    return " ".join(cell_texts(cell)).strip()
