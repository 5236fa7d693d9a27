"""The run's page: one HTML file that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.reporting import page, plots
from vaecf.reporting.tables import (
    cell_texts,
    cell_values,
    metric_names,
    results_rows,
)
from vaecf.reporting.text import (
    duration,
    finite,
    flatten,
    is_accuracy,
    metric_label,
    quantity,
    series,
)

# Nothing may be loaded and nothing may run, whatever an id contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    recommendations: Sequence[Mapping[str, Any]] | None = None,
    model_name: str = "model",
    metric: str = "ndcg@100",
) -> None:
    """Writes the page. The same arguments give the same bytes.

    Args:
      path: the file; it is replaced in one piece.
      title: the page's heading.
      config: the run's settings, nested mappings allowed.
      dataset: "name", "protocol" and counts, nested mappings allowed.
      records: the lines of metrics.jsonl (`writers.read_records`).
      results: what results.json holds, all of it optional: "test" and
        "validation" {metric: {"mean", "stderr", "users"}} with, beside the
        metrics, "users_left_out"; "train" {"users_per_second", "seconds"};
        "baselines" and "references" {name: {"test": ..., "validation":
        ...}}; "history_length" [{"bucket", "mean", "stderr", "users"}];
        "linear" {"gain", "prior"} of a blend.
      environment: versions, device, command.
      recommendations: as `tables.recommendations_table` takes them.
      model_name: what to call this run's model.
      metric: the headline metric and the one that chose the checkpoint.

    Raises:
      VaecfError: the file cannot be written.
    """
    about = {
        "dataset": str(dataset.get("name", "not named")),
        "protocol": str(dataset.get("protocol", "not named")),
    }
    curves = plots.learning_curves(
        records, baselines=_levels(results, metric), metric=metric
    )
    buckets = results.get("history_length") or ()
    body = [
        _summary(results, records, about, model_name, metric),
        _results(results, about, model_name),
        page.section(
            "Learning curves",
            page.figure(curves) + page.figure(plots.throughput(records)),
        ),
        page.section(
            "Short and long histories",
            page.figure(plots.history_buckets(buckets, metric=metric)),
        ),
        page.section(
            "Recommendations",
            page.recommendations_html(recommendations or ()),
        ),
        page.section("Dataset", page.definitions(_facts(dataset))),
        # Settings as they are written, to be copied back into a command.
        page.section("Configuration", page.definitions(flatten(config))),
        page.section("Environment", page.definitions(flatten(environment))),
    ]
    workdir_lib.write_bytes(path, _document(title, about, body).encode("utf-8"))


def _facts(dataset: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The dataset's facts; counts, but no seeds, with thousands separators."""
    for name, value in flatten(dataset):
        if name.startswith("counts.") or "." not in name:
            yield name.removeprefix("counts."), quantity(value)
        else:
            yield name, value


def _document(title: str, about: Mapping[str, str], body: Sequence[str]) -> str:
    subtitle = f"dataset {about['dataset']}, protocol {about['protocol']}"
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,'
        'initial-scale=1">\n'
        f"<title>{page.escape(title)}</title>\n"
        f"<style>{page.style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{page.escape(title)}</h1>\n"
        f'<p class="muted">{page.escape(subtitle)}</p>\n</header>\n'
        f"{''.join(body)}"
        "<footer>Written by vaecf.</footer>\n</main>\n</body>\n</html>\n"
    )


def _levels(results: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Baselines' values for the validation plot.

    A baseline that was only tested is drawn too, and says so.
    """
    levels = {}
    for split, suffix in (("validation", ""), ("test", " (test)")):
        rows = results_rows(results, split=split)
        for name in results.get("baselines") or {}:
            mean, _ = cell_values(rows.get(name, {}).get(metric))
            if mean is not None and name not in levels:
                levels[name] = mean
                if suffix:
                    levels[f"{name}{suffix}"] = levels.pop(name)
    return levels


def _headline(results: Mapping[str, Any], metric: str) -> tuple[str, list[str]]:
    """The split that the summary shows, and its metrics, headline first."""
    for split in ("test", "validation"):
        cells = results.get(split)
        if isinstance(cells, Mapping):
            names = metric_names({"": cells})
            names = [m for m in names if is_accuracy(m)]
            names.sort(key=lambda name: name != metric)
            if names:
                return split, names[:3]
    return "test", []


def _summary(
    results: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    about: Mapping[str, str],
    model_name: str,
    metric: str,
) -> str:
    split, names = _headline(results, metric)
    tiles = []
    for place, name in enumerate(names):
        cell = results[split][name]
        mean, error = cell_texts(cell)
        users = finite(cell.get("users"))
        tiles.append(
            page.tile(
                mean,
                f"{split} {metric_label(name)}",
                f"{error} s.e." if error else "",
                "" if users is None else f"{users:,.0f} users",
                first=place == 0,
            )
        )
    tiles += _training_tiles(results, records, metric)
    if not tiles:
        return page.section("Summary", "<p>No results yet.</p>\n")
    text = _comparison(results, split, names[:1], model_name)
    return page.section(
        "Summary", f'<div class="tiles">\n{"".join(tiles)}</div>\n{text}'
    )


def _training_tiles(
    results: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    metric: str,
) -> list[str]:
    tiles = []
    x, y = series(records, f"validation/{metric}")
    known = [(v, -p) for p, v in zip(x, y, strict=True) if v == v]
    if known:
        value, negative = max(known)
        tiles.append(
            page.tile(
                f"{-negative:,.0f}",
                "best epoch",
                f"validation {metric_label(metric)} {value:.4f}",
            )
        )
    train = results.get("train") or {}
    speed = finite(train.get("users_per_second"))
    seconds = finite(train.get("seconds"))
    epochs = len(series(records, "train/loss")[0])
    rate = "" if speed is None else f"{speed:,.0f}"
    done = f"{epochs:,} epochs" if epochs else ""
    if seconds is not None:
        unit = "h:mm:ss" if seconds >= 3600 else "m:ss"
        label = f"training time, {unit}"
        pace = f"{rate} users/s" if rate else ""
        tiles.append(page.tile(duration(seconds), label, done, pace))
    elif rate:
        tiles.append(page.tile(rate, "training speed, users/s", done))
    return tiles


def _comparison(
    results: Mapping[str, Any],
    split: str,
    names: Sequence[str],
    model_name: str,
) -> str:
    """A sentence that puts the headline beside the baselines."""
    if not names:
        return ""
    metric = names[0]
    rows = results_rows(results, split=split, name=model_name)
    others = []
    for name in (
        *(results.get("baselines") or {}),
        *(results.get("references") or {}),
    ):
        mean, error = cell_texts(rows.get(name, {}).get(metric))
        if name in rows:
            others.append(f"{name} {mean} {error}".strip())
    if not others:
        return ""
    sentence = (
        f"{split.capitalize()} {metric_label(metric)} beside it, on the same "
        f"users: {'; '.join(others)}."
    )
    return f"<p>{page.escape(sentence)}</p>\n"


def _results(
    results: Mapping[str, Any], about: Mapping[str, str], model_name: str
) -> str:
    parts = []
    references = tuple(results.get("references") or {})
    for split in ("test", "validation"):
        rows = results_rows(results, split=split, name=model_name)
        if not rows:
            continue
        left_out = finite(next(iter(rows.values())).get("users_left_out"))
        table = page.results_html(
            rows,
            dataset=about["dataset"],
            protocol=about["protocol"],
            users_left_out=None if left_out is None else int(left_out),
            references=references,
        )
        if table:
            parts.append(f"<h3>{split.capitalize()}</h3>\n{table}")
            if split == "test":
                parts.append(page.figure(plots.metrics_bars(rows)))
    if parts and (weights := results.get("linear")):
        parts.append(
            f"<p>The linear branch ranks with gain {weights['gain']:g} and prior "
            f"{weights['prior']:g}; the learning curves have those to begin "
            "with.</p>\n"
        )
    return page.section("Results", "".join(parts))
