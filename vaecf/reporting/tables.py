"""Plain-text tables: results, recommendations, comparisons.

Ids and titles come from files of strangers, so every cell is stripped of
control characters: they could move the cursor of a terminal.
"""

from __future__ import annotations

import math
import numbers
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vaecf.reporting.writers import finite

# {"mean", "stderr", "users"}, all optional; None for an unknown metric.
Cell = Mapping[str, Any] | None
# {model: {metric: cell}}; a model may lack metrics.
Rows = Mapping[str, Mapping[str, Any]]

MISSING = "–"
_MEANS = "mean ± standard error over users"
# Names of models as people write them.
_MODELS = {
    **{"mult_vae": "Mult-VAE", "mult_dae": "Mult-DAE", "rec_vae": "RecVAE"},
    **{"ease": "EASE", "ials": "iALS", "slim": "SLIM", "rp3beta": "RP3beta"},
    "itemknn": "ItemKNN",
}
_EXPERTS = {
    **{"gain": "EASE", "graph_gain": "graph filter"},
    **{"ials_gain": "ALS", "slim_gain": "SLIM"},
}
_ACRONYMS = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "auc": "AUC"}
# Metrics where more is not better.
_PROPERTIES = frozenset(
    {
        *("coverage", "user_coverage", "gini", "entropy", "popularity"),
        *("novelty", "long_tail", "diversity"),
    }
)
# The denominators of recall in use: tables say which one was divided by.
_RECALLS = {
    "recall": "recall: hits / min(k, held-out items)",
    "calibrated_recall": "calibrated recall: hits / min(k, held-out items)",
    "plain_recall": "plain recall: hits / held-out items",
}
_SHOWN = 5  # entries of a history
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?|–")


def metric_label(name: str) -> str:
    """Returns `NDCG@100` for `ndcg@100`."""
    kind, at, k = name.partition("@")
    return _ACRONYMS.get(kind, kind.replace("_", " ").capitalize()) + at + k


def model_name(name: str, experts: Collection[str] = ()) -> str:
    """Returns `RecVAE` for `rec_vae`, and `EASE (l2 500)` for `ease (l2 500)`.

    `experts` are the weights' names of a blend's linear branch: with 'gain' and
    'ials_gain', `rec_vae+linear` is a `blend of RecVAE and EASE, ALS`.
    """
    kind, bracket, settings = name.partition(" (")
    model, plus, _ = kind.partition("+linear")
    text = _MODELS.get(model, model)
    if plus:
        branch = [_EXPERTS[expert] for expert in experts if expert in _EXPERTS]
        text = f"blend of {text} and {', '.join(branch) or 'linear models'}"
    return text + bracket + settings


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Returns names without the settings in brackets, as long as they differ.

    'EASE' for 'EASE (l2 500)'.
    """
    names = list(names)
    short = [name.partition(" (")[0] for name in names]
    return {
        name: brief if short.count(brief) == 1 else name
        for name, brief in zip(names, short, strict=True)
    }


def is_accuracy(name: str) -> bool:
    """Returns whether a larger value of the metric is better."""
    return name.partition("@")[0] not in _PROPERTIES


def recall_notes(metrics: Iterable[str]) -> list[str]:
    """Returns what the kinds of recall among the metrics divide by."""
    kinds = {name.partition("@")[0] for name in metrics}
    return [text for kind, text in _RECALLS.items() if kind in kinds]


def printable(text: object, *, keep: str = "") -> str:
    """Returns the text with U+FFFD for control characters not in `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else "\ufffd" for c in str(text)
    )


def quantity(value: object) -> str:
    """Returns a number with separators and few digits; other values as text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):  # a bool is an Integral, too
        return str(value)
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        x = float(value)
        return f"{x:,.4f}" if 0.1 <= abs(x) < 100 else f"{x:,.4g}"
    return str(value)


def cell_values(cell: Cell) -> tuple[float, float]:
    """Returns (mean, standard error) of a cell; NaN for missing values."""
    values = (finite((cell or {}).get(key)) for key in ("mean", "stderr"))
    mean, stderr = (math.nan if v is None else v for v in values)
    return mean, stderr


def cell_texts(cell: Cell) -> tuple[str, str]:
    """Returns (mean, "± standard error" or ""), with the same decimals."""
    mean, stderr = cell_values(cell)
    if math.isnan(mean):
        return MISSING, ""
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 1000 else 0
    error = "" if math.isnan(stderr) else f"± {stderr:,.{digits}f}"
    return f"{mean:,.{digits}f}", error


def _cell(cell: Cell) -> str:
    return " ".join(cell_texts(cell)).strip()


def terminal_width() -> int:
    """Returns the width of the terminal; in a file, lines may be long."""
    return shutil.get_terminal_size((10_000, 24)).columns


def format_table(rows: Sequence[Mapping[str, object]], *, keys: int = 1) -> str:
    """Returns a table: headings, a rule, and a line per row.

    A table that is wider than the terminal is split into tables below each
    other. Rows map headings to cells, and may lack cells. Numbers are formatted
    by `quantity`; columns of numbers are aligned on the right.

    Args:
      keys: number of columns that say what a row is, and are repeated.
    """
    columns = []
    for heading in dict.fromkeys(heading for row in rows for heading in row):
        cells = [printable(quantity(row.get(heading))) for row in rows]
        is_numeric = all(map(_NUMBER.fullmatch, cells))
        cells.insert(0, printable(heading))
        width = max(map(_width, cells))
        for n, cell in enumerate(cells):
            fill = " " * (width - _width(cell))
            cells[n] = fill + cell if is_numeric else cell + fill
        columns.append([cells[0], "-" * width, *cells[1:]])
    parts, most = [columns[:keys]], terminal_width()
    for column in columns[keys:]:
        wider = [*parts[-1], column]
        if len(wider) > keys + 1 and _line_width(wider) > most:
            parts.append([*columns[:keys], column])
        else:
            parts[-1] = wider
    return "\n\n".join(
        "\n".join("  ".join(line).rstrip() for line in zip(*part, strict=True))
        for part in parts
    )


def _line_width(columns: Sequence[Sequence[str]]) -> int:
    return sum(_width(cells[0]) + 2 for cells in columns) - 2


def _width(text: str) -> int:
    # Wide letters (Chinese, Japanese) take two columns of a terminal.
    letters = [c for c in text if not unicodedata.combining(c)]
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in letters)
    return len(letters) + wide


def results_rows(
    results: Mapping[str, Any], *, split: str = "test", name: str = "model"
) -> dict[str, Mapping[str, Any]]:
    """Returns the rows of a results table, the run's model `name` first.

    Args:
      results: {"test": {metric: cell}, "validation": {metric: cell},
        "baselines": {model: {split: {metric: cell}}}, "references": the
        same for upper bounds, such as the oracle of generated data}. Each key
        is optional.
      split: "test" or "validation".
    """
    models = {name: results}
    models |= results.get("baselines", {}) | results.get("references", {})
    return {n: cells[split] for n, cells in models.items() if cells.get(split)}


def metric_names(rows: Rows) -> list[str]:
    """Returns the metrics of all models, in order of first appearance."""
    return list(dict.fromkeys(m for cells in rows.values() for m in cells))


def best_models(
    rows: Rows, metric: str, references: Collection[str] = ()
) -> set[str]:
    """Returns the models with the largest mean of an accuracy metric.

    References are left out. The set is empty for other metrics.
    """
    means = {
        model: mean
        for model, cells in rows.items()
        if not math.isnan(mean := cell_values(cells.get(metric))[0])
        and model not in references
    }
    if not is_accuracy(metric):
        return set()
    return {model for model in means if means[model] == max(means.values())}


def users_text(rows: Rows, left_out: int = 0) -> str:
    """Returns the number of users behind the means, as text."""
    cells = [cell for row in rows.values() for cell in row.values()]
    users = max((cell.get("users") or 0 for cell in cells), default=0)
    return number_of_users(users, left_out)


def number_of_users(count: int, left_out: int) -> str:
    """Returns the number of users, and of those left out, as text."""
    return f"{count:,} users" + f" ({left_out:,} left out)" * bool(left_out)


def results_table(
    rows: Rows,
    *,
    protocol: str,
    dataset: str,
    users_left_out: int = 0,
    references: Collection[str] = (),
) -> str:
    """Returns a table of test metrics by model, with cells `0.4012 ± 0.0061`.

    A star marks the largest mean of each accuracy metric; rows of models in
    `references` have none. Means under different protocols cannot be compared.
    `users_left_out` have no held-out items, and are in no mean.
    """
    notes = [_MEANS, "* largest mean", *recall_notes(metric_names(rows))]
    table = _results(rows, references, {name: name for name in rows})
    if "\n\n" in table:  # split: it has more room with short names
        names = short_names(rows)
        table = _results(rows, references, names)
        notes += [name for name in rows if names[name] != name]
    users = users_text(rows, users_left_out)
    about = printable(f"dataset {dataset}, protocol {protocol}, {users}")
    return f"Test users\n{about}\n\n{table}\n\n{printable('; '.join(notes))}"


def _results(
    rows: Rows, references: Collection[str], names: Mapping[str, str]
) -> str:
    lines: list[dict[str, object]] = []
    for model, cells in rows.items():
        lines.append({"model": names[model]})
        for metric in metric_names(rows):
            is_best = model in best_models(rows, metric, references)
            text = _cell(cells.get(metric)) + " *" * is_best
            lines[-1][metric_label(metric)] = text
    return format_table(lines)


def history_text(history: Sequence[object], shown: int) -> str:
    """Returns the first `shown` entries of a history and how many follow."""
    text = "; ".join(map(str, history[:shown])) or "empty"
    more = len(history) - shown
    return text + (f"; and {more:,} more" if more > 0 else "")


def recommendations_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the recommended items of a few users, one table per user.

    Each record has "user" (raw id), "history" (titles or raw ids) and "rows":
    mappings with "rank", "item", "score" and, if known, "title".
    """
    blocks = []
    for record in records:
        history = history_text(record.get("history", ()), _SHOWN)
        # An id is no quantity: 1234, not 1,234.
        table = format_table(
            [{**row, "item": str(row["item"])} for row in record["rows"]]
        )
        heading = printable(f"user {record['user']}, history: {history}")
        blocks.append(f"{heading}\n{textwrap.indent(table, '  ')}")
    return "\n\n".join(blocks)


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Returns three tables: metrics, paired differences, history lengths.

    `compared` is the result of `vaecf.evaluation.compare.compare`.
    """
    metric, groups = metric_label(compared["metric"]), compared["groups"]
    names = [name for name in ("dataset", "protocol") if compared[name]]
    about = [f"{name} {compared[name]}" for name in names]
    about.append(number_of_users(compared["users"], compared["left_out"]))
    note = "; ".join([_MEANS, *recall_notes(compared["metrics"])])
    if any(group["seeds"] > 1 for group in groups.values()):
        note += "; where the seed is 'mean', over seeds"
    blocks = [
        f"Test users\n{printable(', '.join(about))}",
        format_table(_metrics_by_run(compared), keys=2),
        note,
    ]
    if compared["comparisons"]:
        reference = printable(compared["reference"])
        differences = [
            {
                "model": name,
                "difference": f"{c['difference']:+.4f}",
                "s.e.": None if c["stderr"] is None else f"{c['stderr']:.4f}",
                "95 % bootstrap": f"{c['low']:+.4f} to {c['high']:+.4f}",
                "p (t-test)": f"{c['p']:.2g}",
                "p (Holm)": f"{c['p_holm']:.2g}",
            }
            for name, c in compared["comparisons"].items()
        ]
        blocks += [
            f"{metric} against {reference}, paired by user",
            format_table(differences),
        ]
    lengths: list[dict[str, object]] = []
    for name, group in groups.items():
        lengths.append({"model": name})
        for bucket in group["history_length"]:
            heading = f"{bucket['bucket']} ({bucket['users']:,})"
            lengths[-1][heading] = _cell(bucket)
    blocks += [f"{metric} by history length (users)", format_table(lengths)]
    return "\n\n".join(blocks)


def _metrics_by_run(compared: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a row per run, and a row per mean of several seeds."""
    rows: list[dict[str, object]] = []
    for name, group in compared["groups"].items():
        runs = [run for run in compared["runs"] if run["group"] == name]
        if group["seeds"] > 1:
            runs.append({"seed": "mean", "metrics": group["metrics"]})
        for run in runs:
            seed = "" if run["seed"] is None else str(run["seed"])
            rows.append({"model": name, "seed": seed})
            for m in compared["metrics"]:
                rows[-1][metric_label(m)] = _cell(run["metrics"][m])
    return rows
