"""Writes the report of a run: one HTML file that loads nothing else."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.reporting import plots, tables

if TYPE_CHECKING:
    import pandas as pd


def environment(devices: Iterable[Any]) -> dict[str, str]:
    """Returns the devices and the versions of packages, for `write_report`.

    Args:
      devices: JAX devices.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    kinds = [device.device_kind for device in devices]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": f"{len(kinds)} x {kinds[0]}",
        "platform": platform.platform(),
    }


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    recommendations: Sequence[Mapping[str, Any]] = (),
    model_name: str = "model",
    metric: str = "ndcg@100",
) -> None:
    """Writes the report. The same arguments give the same bytes.

    Args:
      path: the file, which is replaced atomically.
      title: heading of the page.
      config: settings of the run; may be nested.
      dataset: "name", "protocol" and counts; may be nested.
      records: records of metrics.jsonl (`writers.read_records`).
      results: content of results.json, see `tables.results_rows`, all of it
        optional. "test" also has "users_left_out". Further keys: "train"
        {"users_per_second", "seconds"}, "history_length" (see
        `plots.plot_history_lengths`), and "linear" {"gain", "prior"}, the
        weights of a blend.
      environment: versions and devices.
      recommendations: see `tables.recommendations_table`.
      model_name: name of the run's model.
      metric: the metric that selected the checkpoint; shown first.

    Raises:
      VaecfError: the file cannot be written.
    """
    history = plots.history_frame(records)
    rows = {}
    for split in ("test", "validation"):
        models = tables.results_rows(results, split=split, name=model_name)
        if tables.metric_names(models):
            rows[split] = models
    page = _template().render(
        title=title,
        about=f"dataset {dataset.get('name', 'unknown')}, "
        f"protocol {dataset.get('protocol', 'unknown')}",
        **_summary(rows, model_name, metric),
        metric=metric,
        rows=rows,
        references=tuple(results.get("references") or {}),
        train=results.get("train"),
        timedelta=datetime.timedelta,
        weights=results.get("linear"),
        users_left_out=(results.get("test") or {}).get("users_left_out", 0),
        history=history,
        best_epoch=plots.best_epoch(history, metric),
        figures=_figures(history, results, rows.get("test", {}), metric),
        recommendations=recommendations,
        facts={
            "Dataset": {
                name: tables.quantity(value)
                for name, value in config_lib.flatten(dataset).items()
            },
            "Configuration": config_lib.flatten(config),
            "Environment": config_lib.flatten(environment),
        },
        colours=plots.COLOURS,
        tables=tables,
    )
    page = tables.printable(page, keep_newlines=True)
    workdir_lib.write_bytes(path, page.encode("utf-8"))


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _summary(
    rows: Mapping[str, tables.Rows], model_name: str, metric: str
) -> dict[str, Any]:
    """Returns up to three of the model's metrics, and `metric` of others."""
    split, models = next(iter(rows.items()), ("test", {}))
    cells = models.get(model_name, {})
    names = filter(tables.is_accuracy, tables.metric_names({"": cells}))
    return {
        "split": split,
        "headline": {
            name: cells[name]
            for name in sorted(names, key=lambda name: name != metric)[:3]
        },
        "others": "; ".join(
            f"{name} {' '.join(tables.cell_texts(row[metric]))}"
            for name, row in models.items()
            if name != model_name and metric in row
        ),
    }


def _figures(
    history: pd.DataFrame,
    results: Mapping[str, Any],
    test_rows: tables.Rows,
    metric: str,
) -> dict[str, Any]:
    """Returns the SVG of each figure that has data, by name."""
    figures = {
        "Learning curves": plots.learning_curves(
            history, metric=metric, baselines=_baselines(results, metric)
        ),
        "Metrics by model": plots.metrics_bars(test_rows),
    }
    if "train/users_per_second" in history:
        figures["Training speed"] = plots.grid(
            [functools.partial(plots.plot_throughput, history)]
        )
    if buckets := results.get("history_length"):
        figures["Short and long histories"] = plots.grid(
            [
                functools.partial(
                    plots.plot_history_lengths, buckets, metric=metric
                )
            ]
        )
    return {n: _themed(plots.to_svg(f, n)) for n, f in figures.items() if f}


def _themed(svg: str) -> Any:
    """Returns the SVG with colours that follow the page's light or dark mode.

    Matplotlib has escaped the text of the plot.
    """
    import markupsafe

    for name, colour in plots.COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name},{colour})")
    return markupsafe.Markup(svg)


def _baselines(results: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Returns the baselines' values for the plot of the validation metric.

    The name of a baseline without a validation says that its value is from
    the test.
    """
    values = {}
    for name, splits in (results.get("baselines") or {}).items():
        for split, suffix in (("validation", ""), ("test", " (test)")):
            cell = (splits.get(split) or {}).get(metric)
            mean, _ = tables.cell_values(cell)
            if not math.isnan(mean):
                values[f"{name}{suffix}"] = mean
                break
    return values
