"""Plain-text tables: results, recommendations, trials, comparisons.

Ids and titles come from files of strangers, so every cell is stripped of
control characters: they could move the cursor of a terminal.
"""

from __future__ import annotations

import numbers
import re
import textwrap
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vaecf.reporting.writers import finite

# {model: {metric: {"mean", "stderr", "users"}}}; a model may lack metrics.
Rows = Mapping[str, Mapping[str, Any]]

MISSING = "–"
_ACRONYMS = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}
# Metrics where more is not better.
_PROPERTIES = frozenset({"coverage", "popularity"})
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?|–")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


# --- Text of names and numbers ----------------------------------------------


def metric_label(name: str) -> str:
    """Returns `NDCG@100` for `ndcg@100`."""
    kind, at, k = name.partition("@")
    return _ACRONYMS.get(kind, kind.replace("_", " ").capitalize()) + at + k


def is_accuracy(name: str) -> bool:
    """Returns whether a larger value of the metric is better."""
    return name.partition("@")[0] not in _PROPERTIES


def printable(text: object, *, keep_newlines: bool = False) -> str:
    """Returns the text without escape sequences and control characters."""
    clean = _ESCAPES.sub("", str(text))
    if keep_newlines:
        clean = clean.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        c
        if c.isprintable() or (keep_newlines and c == "\n")
        else "\N{REPLACEMENT CHARACTER}"
        for c in clean
    )


def quantity(value: object) -> str:
    """Returns a number with thousands separators; other values as text."""
    if value is None:
        return MISSING
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        return f"{number:.4f}" if 0.1 <= abs(number) < 10 else f"{number:,.4g}"
    return str(value)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Returns seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


# --- The formatter ----------------------------------------------------------


def format_table(columns: Mapping[str, Sequence[str]]) -> str:
    """Returns a table: headings, a rule, and a line per row.

    Columns of numbers are aligned on the right.

    Args:
      columns: cells by heading; all columns have the same length.
    """
    blocks = []
    for heading, cells in columns.items():
        texts = [printable(text) for text in (heading, *cells)]
        is_numeric = all(map(_NUMBER.fullmatch, texts[1:]))
        width = max(map(_width, texts))
        for n, text in enumerate(texts):
            fill = " " * (width - _width(text))
            texts[n] = fill + text if is_numeric else text + fill
        blocks.append([texts[0], "-" * width, *texts[1:]])
    rows = zip(*blocks, strict=True)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _width(text: str) -> int:
    """Columns of a terminal; wide letters (Chinese, Japanese) take two."""
    letters = [c for c in text if not unicodedata.combining(c)]
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in letters)
    return len(letters) + wide


# --- Results ----------------------------------------------------------------


def results_rows(
    results: Mapping[str, Any], *, split: str = "test", name: str = "model"
) -> dict[str, dict[str, Any]]:
    """Returns the rows of a results table: {model: {metric: cell}}.

    Args:
      results: {"test": {metric: cell}, "validation": {metric: cell},
        "baselines": {model: {split: {metric: cell}}}, "references": the
        same for upper bounds, such as the oracle of generated data}. Each key
        is optional.
      split: "test" or "validation".
      name: name of the run's model, which comes first.
    """
    others = {
        **(results.get("baselines") or {}),
        **(results.get("references") or {}),
    }
    splits = {name: results, **others}
    return {n: dict(s[split]) for n, s in splits.items() if s.get(split)}


def metric_names(rows: Rows) -> list[str]:
    """Returns the metrics of all models, in order of first appearance."""
    pairs = [pair for cells in rows.values() for pair in cells.items()]
    return list(dict.fromkeys(m for m, cell in pairs if _is_cell(cell)))


def best_models(
    rows: Rows, metric: str, references: Collection[str] = ()
) -> set[str]:
    """Returns the models with the largest mean of an accuracy metric.

    References are left out. The set is empty for other metrics, and if fewer
    than two models have the metric.
    """
    means = {
        model: mean
        for model, cells in rows.items()
        if model not in references
        and (mean := cell_values(cells.get(metric))[0]) is not None
    }
    if len(means) < 2 or not is_accuracy(metric):
        return set()
    return {m for m, mean in means.items() if mean == max(means.values())}


def _is_cell(value: object) -> bool:
    return isinstance(value, Mapping) and "mean" in value


def cell_values(cell: Mapping[str, Any] | None) -> list[float | None]:
    """Returns [mean, standard error] of a cell; None for missing values."""
    return [finite((cell or {}).get(key)) for key in ("mean", "stderr")]


def cell_texts(cell: Mapping[str, Any] | None) -> tuple[str, str]:
    """Returns (mean, "± standard error" or ""), with the same decimals."""
    mean, stderr = cell_values(cell)
    if mean is None:
        return MISSING, ""
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 1000 else 0
    error = "" if stderr is None else f"± {stderr:,.{digits}f}"
    return f"{mean:,.{digits}f}", error


def _cell(cell: Mapping[str, Any] | None) -> str:
    return " ".join(cell_texts(cell)).strip()


def users_text(rows: Rows, left_out: int = 0) -> str:
    """Returns the number of users behind the means, as text."""
    cells = [c for row in rows.values() for c in row.values() if _is_cell(c)]
    counts = {int(n) for cell in cells if (n := finite(cell.get("users")))}
    counts = counts or {0}
    text = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    text += " user" if counts == {1} else " users"
    return text + f" ({left_out:,} left out: no held-out items)" * (
        left_out > 0
    )


def results_table(
    rows: Rows,
    *,
    title: str,
    protocol: str,
    dataset: str,
    users_left_out: int = 0,
    references: Collection[str] = (),
    footnote: str | None = None,
) -> str:
    """Returns a table of models by metrics with cells `0.4012 ± 0.0061`.

    A star marks the largest mean of each accuracy metric.

    Args:
      rows: {model: {metric: {"mean", "stderr", "users"}}}.
      title: first line.
      protocol: protocol of the evaluation; means under different protocols
        cannot be compared.
      dataset: name of the dataset.
      users_left_out: users in no mean because they have no held-out items.
      references: rows that are never starred.
      footnote: last line.
    """
    columns = {"model": list(rows)}
    for metric in metric_names(rows):
        best = best_models(rows, metric, references)
        columns[metric_label(metric)] = [
            _cell(cells.get(metric)) + " *" * (model in best)
            for model, cells in rows.items()
        ]
    note = "mean ± standard error over users"
    if any(" *" in cell for cells in columns.values() for cell in cells):
        note += "; * largest mean"
    about = (
        f"dataset {dataset}, protocol {protocol}, "
        f"{users_text(rows, users_left_out)}"
    )
    lines = [printable(title), printable(about), "", format_table(columns)]
    lines += ["", note]
    if footnote:
        lines.append(printable(footnote, keep_newlines=True))
    return "\n".join(lines)


# --- Recommendations --------------------------------------------------------


def history_text(history: Sequence[object], shown: int) -> str:
    """Returns the first `shown` entries of a history and how many follow."""
    text = "; ".join(map(str, history[:shown])) or "empty"
    more = len(history) - shown
    return text + (f"; and {more:,} more" if more > 0 else "")


def recommendations_table(
    records: Sequence[Mapping[str, Any]], *, shown_history: int = 5
) -> str:
    """Returns the recommended items of a few users, one table per user.

    Args:
      records: for each user a mapping with "user" (raw id), "history" (titles
        or raw ids) and "rows": mappings with "rank", "item", "score" and, if
        known, "title".
      shown_history: number of entries of the history to show.
    """
    blocks = []
    for record in records:
        rows = record["rows"]
        columns = {
            "rank": [str(row["rank"]) for row in rows],
            "item": [str(row["item"]) for row in rows],
        }
        titles = [row.get("title") for row in rows]
        if any(title is not None for title in titles):
            columns["title"] = ["" if t is None else str(t) for t in titles]
        columns["score"] = [_number(row["score"], ".4f") for row in rows]
        history = history_text(record.get("history", ()), shown_history)
        table = format_table(columns)
        heading = printable(f"user {record['user']}, history: {history}")
        blocks.append(f"{heading}\n{textwrap.indent(table, '  ')}")
    return "\n\n".join(blocks)


# --- Sweeps -----------------------------------------------------------------


def trials_table(
    trials: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    title: str,
    first: str = "trial",
) -> str:
    """Returns a table of the trials of a sweep, one per line.

    Args:
      trials: mappings with "number", "value" (of the metric), "epochs",
        "best_epoch", "seconds" and "params" ({setting: value}).
      metric: name of the metric.
      title: first line.
      first: heading of the column with the trials' numbers.
    """
    keys = dict.fromkeys(key for t in trials for key in t["params"])
    columns = {
        first: [str(t["number"]) for t in trials],
        metric_label(metric): [quantity(t["value"]) for t in trials],
        "best epoch": [
            f"{quantity(t['best_epoch'])} of {quantity(t['epochs'])}"
            for t in trials
        ],
        "seconds": [_number(t["seconds"], ".1f") for t in trials],
    }
    for key in keys:
        columns[key] = [quantity(t["params"].get(key)) for t in trials]
    return f"{printable(title)}\n\n{format_table(columns)}"


# --- Comparisons ------------------------------------------------------------


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Returns three tables: metrics, paired differences, history lengths.

    Args:
      compared: the result of `vaecf.evaluation.compare.compare`.
    """
    metric = metric_label(compared["metric"])
    about = [
        f"{name} {compared[name]}"
        for name in ("dataset", "protocol")
        if compared[name]
    ]
    left_out = compared["left_out"]
    about.append(
        f"{compared['users']:,} users"
        + (f" ({left_out:,} left out)" * bool(left_out))
    )
    lines = ["Test users", printable(", ".join(about)), ""]
    lines.append(_metrics_by_run(compared))
    if compared["comparisons"]:
        reference = printable(compared["reference"])
        lines += ["", f"{metric} against {reference}, paired by user", ""]
        lines.append(_differences(compared["comparisons"]))
    lines += ["", f"{metric} by history length (users)", ""]
    groups = compared["groups"]
    columns: dict[str, list[str]] = {"model": list(groups)}
    lengths = [group["history_length"] for group in groups.values()]
    for buckets in zip(*lengths, strict=True):
        heading = f"{buckets[0]['bucket']} ({buckets[0]['users']:,})"
        columns[heading] = [_cell(bucket) for bucket in buckets]
    return "\n".join([*lines, format_table(columns)])


def _metrics_by_run(compared: Mapping[str, Any]) -> str:
    """Returns a line per run, and a line per mean of several seeds."""
    rows: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, group in compared["groups"].items():
        for run in compared["runs"]:
            if run["group"] == name:
                seed = "" if run["seed"] is None else str(run["seed"])
                rows.append((name, seed, run["metrics"]))
        if group["seeds"] > 1:
            rows.append((name, "mean", group["metrics"]))
    models, seeds, metrics = zip(*rows, strict=True)
    columns = {"model": models, "seed": seeds}
    for m in compared["metrics"]:
        columns[metric_label(m)] = [_cell(cells[m]) for cells in metrics]
    note = "mean ± standard error over users"
    if "mean" in seeds:
        note += "; where the seed is 'mean', over seeds"
    return f"{format_table(columns)}\n\n{note}"


def _differences(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    found = comparisons.values()
    return format_table(
        {
            "model": list(comparisons),
            "difference": [f"{c['difference']:+.4f}" for c in found],
            "s.e.": [_number(c["stderr"], ".4f") for c in found],
            "95 % bootstrap": [
                f"{c['low']:+.4f} to {c['high']:+.4f}" for c in found
            ],
            "p (t-test)": [f"{c['p']:.2g}" for c in found],
            "p (Holm)": [f"{c['p_holm']:.2g}" for c in found],
        }
    )
