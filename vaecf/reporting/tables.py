"""Results and recommendations as text for terminals and as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vaecf.reporting.text import (
    MISSING,
    decimals,
    finite,
    is_accuracy,
    metric_label,
    pad,
    printable,
    quantity,
    width,
)

# Model name to metric name to {"mean", "stderr", "users"}.
Rows = Mapping[str, Mapping[str, Any]]


def results_rows(
    results: Mapping[str, Any], *, split: str = "test", name: str = "model"
) -> dict[str, dict[str, Any]]:
    """The rows of a results table out of what results.json holds.

    Args:
      results: {"test": {metric: {"mean", "stderr", "users"}}, "baselines":
        {name: {"test": ...}}, "references": {name: {"test": ...}}}. All but
        the split are optional; references are bounds rather than rivals.
      split: "test" or "validation".
      name: what to call the model of this run.

    Returns:
      Model name to metrics: the run's model, baselines, references.
    """
    rows = {}
    if isinstance(results.get(split), Mapping):
        rows[name] = dict(results[split])
    for group in ("baselines", "references"):
        for other, splits in (results.get(group) or {}).items():
            if isinstance(splits, Mapping) and split in splits:
                rows[other] = dict(splits[split])
    return rows


def metric_names(rows: Rows, metrics: Sequence[str] | None = None) -> list[str]:
    """Metrics in order of first appearance, or those of `metrics`."""
    seen: dict[str, None] = {}
    for cells in rows.values():
        for metric, cell in cells.items():
            if isinstance(cell, Mapping) and "mean" in cell:
                seen[metric] = None
    return list(seen) if metrics is None else [m for m in metrics if m in seen]


def best_of(
    rows: Rows, metric: str, references: Collection[str] = ()
) -> frozenset[str]:
    """The models with the largest mean, if there is a choice.

    Empty for metrics where more is not better, and where fewer than two
    models (references left aside) have the metric.
    """
    if not is_accuracy(metric):
        return frozenset()
    means = {
        model: mean
        for model, cells in rows.items()
        if model not in references
        and (mean := cell_values(cells.get(metric))[0]) is not None
    }
    if len(means) < 2:
        return frozenset()
    top = max(means.values())
    return frozenset(m for m, mean in means.items() if mean == top)


def cell_values(cell: object) -> tuple[float | None, float | None]:
    """(mean, standard error) of a cell, None for what it does not have."""
    if not isinstance(cell, Mapping):
        return None, None
    return finite(cell.get("mean")), finite(cell.get("stderr"))


def cell_texts(cell: object) -> tuple[str, str]:
    """(mean, "± standard error" or nothing), rounded alike."""
    mean, stderr = cell_values(cell)
    if mean is None:
        return MISSING, ""
    digits = decimals(mean)
    error = "" if stderr is None else f"± {stderr:,.{digits}f}"
    return f"{mean:,.{digits}f}", error


def user_counts(rows: Rows) -> dict[str, list[int]]:
    """Per model the different numbers of users behind its metrics."""
    counts: dict[str, list[int]] = {}
    for model, cells in rows.items():
        users = {
            int(number)
            for cell in cells.values()
            if isinstance(cell, Mapping)
            and (number := finite(cell.get("users"))) is not None
        }
        counts[model] = sorted(users)
    return counts


def users_text(rows: Rows, users_left_out: int | None = None) -> str:
    """`500 users (3 left out: nothing of theirs is held out)`."""
    numbers = sorted({n for ns in user_counts(rows).values() for n in ns})
    if not numbers:
        text = "number of users not given"
    elif len(numbers) == 1:
        text = f"{numbers[0]:,} user" + ("s" if numbers[0] != 1 else "")
    else:
        text = f"{numbers[0]:,} to {numbers[-1]:,} users"
    if users_left_out:
        text += f" ({users_left_out:,} left out: nothing of theirs is held out)"
    return text


def _users_differ(rows: Rows) -> bool:
    return len({tuple(n) for n in user_counts(rows).values() if n}) > 1


def _heading(
    title: str, dataset: str, protocol: str, users: str
) -> tuple[str, str]:
    parts = [f"dataset {dataset}", f"protocol {protocol}", users]
    return printable(title), ", ".join(map(printable, parts))


def results_table(
    rows: Rows,
    *,
    title: str,
    protocol: str,
    dataset: str,
    metrics: Sequence[str] | None = None,
    users_left_out: int | None = None,
    references: Collection[str] = (),
    footnote: str | None = None,
) -> str:
    """Models by metrics, `0.4012 ± 0.0061`, aligned for a terminal.

    Args:
      rows: model name to {metric: {"mean", "stderr", "users"}}; a model may
        lack a metric, a metric its standard error (coverage has none).
      title: first line.
      protocol: the evaluation protocol; printed beside the numbers, for
        without it they compare with nothing.
      dataset: the dataset's name.
      metrics: which, in which order; all of them by default.
      users_left_out: users that count in no mean, having nothing held out.
      references: rows that are bounds rather than rivals: never marked.
      footnote: a last line.

    Returns:
      Lines without a newline at the end. The largest mean of an accuracy
      metric is marked by a star.
    """
    columns = [
        _metric_column(rows, metric, references)
        for metric in metric_names(rows, metrics)
    ]
    names = ["model", *(printable(name) for name in rows)]
    table = [names, *columns]
    if _users_differ(rows):
        counts = user_counts(rows)
        users = [" / ".join(f"{n:,}" for n in counts[m]) for m in rows]
        table.append(["users", *users])
    users_line = users_text(rows, users_left_out)
    lines = list(_heading(title, dataset, protocol, users_line))
    lines += ["", *aligned(table)]
    starred = any("*" in cell for column in columns for cell in column)
    notes = ["mean ± standard error over users"]
    if starred:
        notes.append("* largest mean")
    lines += ["", "; ".join(notes)]
    if footnote:
        lines.append(printable(footnote, keep_newlines=True))
    return "\n".join(lines)


def _metric_column(
    rows: Rows, metric: str, references: Collection[str]
) -> list[str]:
    """A metric's heading and cells, decimal points and ± in one line."""
    best = best_of(rows, metric, references)
    texts = [cell_texts(cells.get(metric)) for cells in rows.values()]
    left = max((width(mean) for mean, _ in texts), default=0)
    right = max((width(error) for _, error in texts), default=0)
    cells = [printable(metric_label(metric))]
    for model, (mean, error) in zip(rows, texts, strict=True):
        star = " *" if model in best else ""
        cell = pad(mean, left, right=True)
        cell += f" {pad(error, right)}" if right else ""
        cells.append((cell + star).rstrip())
    return cells


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of texts (headings first) as lines, a rule below the heads."""
    widths = [max(map(width, column)) for column in table]
    lines = [
        "  ".join(pad(c, w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in zip(*table, strict=True)
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def to_markdown(
    rows: Rows,
    *,
    title: str,
    protocol: str,
    dataset: str,
    metrics: Sequence[str] | None = None,
    users_left_out: int | None = None,
    references: Collection[str] = (),
    footnote: str | None = None,
) -> str:
    """The same table in Markdown, the largest means in bold.

    Arguments are those of `results_table`.
    """
    shown = metric_names(rows, metrics)
    best = {metric: best_of(rows, metric, references) for metric in shown}
    heading, details = _heading(
        title, dataset, protocol, users_text(rows, users_left_out)
    )
    lines = [
        f"**{_markdown(heading)}** ({_markdown(details)})",
        "",
        _markdown_row(["model", *map(metric_label, shown)]),
        _markdown_row(["---"] + ["---:"] * len(shown), escape=False),
    ]
    for model, cells in rows.items():
        line = [_markdown(model)]
        for metric in shown:
            text = " ".join(cell_texts(cells.get(metric))).strip()
            line.append(f"**{text}**" if model in best[metric] else text)
        lines.append(_markdown_row(line, escape=False))
    lines += ["", "Mean ± standard error over users."]
    if footnote:
        lines[-1] += f" {_markdown(footnote)}"
    return "\n".join(lines)


def _markdown(text: object) -> str:
    clean = printable(text)
    for character in "\\`*_[]<>|":
        clean = clean.replace(character, "\\" + character)
    return clean


def _markdown_row(cells: Sequence[str], *, escape: bool = True) -> str:
    texts = [_markdown(cell) if escape else cell for cell in cells]
    return "| " + " | ".join(texts) + " |"


def recommendations_table(
    records: Sequence[Mapping[str, Any]], *, shown_history: int = 5
) -> str:
    """Lists of recommended items for a few users, aligned for a terminal.

    Args:
      records: one mapping a user: "user" (raw id), "history" (titles or
        raw ids, the ones to show first), "rows" (mappings with "rank",
        "item", "score" and, if known, "title").
      shown_history: how many of the history's entries are named.

    Returns:
      Lines without a newline at the end; an empty text for no records.
    """
    blocks = []
    for record in records:
        history = [printable(h) for h in record.get("history", ())]
        named = "; ".join(history[:shown_history]) or "empty"
        if len(history) > shown_history:
            named += f"; and {len(history) - shown_history:,} more"
        rows = list(record.get("rows", ()))
        scores = [finite(row.get("score")) for row in rows]
        table = [
            ["rank", *(pad(f"{r['rank']}", 4, right=True) for r in rows)],
            ["item", *(printable(r["item"]) for r in rows)],
        ]
        if any(row.get("title") is not None for row in rows):
            titles = [row.get("title") for row in rows]
            table.append(
                ["title", *("" if t is None else printable(t) for t in titles)]
            )
        figures = [MISSING if s is None else f"{s:.4f}" for s in scores]
        digits = max(map(width, ["score", *figures]))
        table.append([pad(f, digits, right=True) for f in ("score", *figures)])
        lines = [f"user {printable(record['user'])}, history: {named}"]
        lines += [f"  {line}" for line in aligned(table)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def trials_table(
    trials: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    title: str,
    first: str = "trial",
) -> str:
    """Trials of a sweep, a line each, aligned for a terminal.

    Args:
      trials: in order; mappings with "number", "value" (of the metric),
        "epochs", "best_epoch", "seconds" and "params" (key to value).
      metric: its name.
      title: first line.
      first: what "number" is called.

    Returns:
      Lines without a newline at the end.
    """
    keys = list(dict.fromkeys(key for t in trials for key in t["params"]))
    columns = {
        first: [str(t["number"]) for t in trials],
        metric_label(metric): [_short(t["value"]) for t in trials],
        "best epoch": [
            f"{quantity(t['best_epoch'])} of {quantity(t['epochs'])}"
            for t in trials
        ],
        "seconds": [
            MISSING if t["seconds"] is None else f"{t['seconds']:.1f}"
            for t in trials
        ],
        **{key: [_short(t["params"].get(key)) for t in trials] for key in keys},
    }
    table = []
    for name, cells in columns.items():
        heads = [printable(name), *map(printable, cells)]
        wide = max(map(width, heads))
        table.append([pad(text, wide, right=True) for text in heads])
    return "\n".join([printable(title), "", *aligned(table)])


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.4g}"
    return MISSING if value is None else str(value)
