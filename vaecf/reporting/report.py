"""Writes the report of a run: one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
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

_TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")


def environment(devices: Iterable[Any]) -> dict[str, str]:
    """Returns the JAX devices and the versions of packages."""
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
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    model_name: str = "model",
    metric: str = "ndcg@100",
) -> None:
    """Writes the report atomically. The same arguments give the same bytes.

    Args:
      config: settings of the run; may be nested.
      dataset: "name", "protocol", its constants and counts; may be
        nested.
      records: records of metrics.jsonl (`writers.read_records`).
      results: see `tables.results_rows`. Further keys, all optional:
        "users_left_out" of the test, "train" {"users_per_second", "seconds"},
        "history_length" and "item_popularity" (see `plots.plot_groups`),
        "linear" the weights of a blend, by name, and "refit", whether the
        tested model has learned from the validation users.
      environment: see `environment`.
      recommendations: see `tables.recommendations_table`.
      facts: further lists of names and values, by heading.
      metric: the metric that selected the checkpoint.

    Raises:
      VaecfError: the file cannot be written.
    """
    import jinja2

    history = plots.history_frame(records)
    rows = {}
    for split in ("test", "validation"):
        models = tables.results_rows(results, split=split, name=model_name)
        if models:
            rows[split] = models
    template = jinja2.Template(
        _TEMPLATE.read_text("utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = template.render(
        title=title,
        about=f"dataset {dataset['name']}, protocol {dataset['protocol']}",
        model_name=model_name,
        metric=metric,
        rows=rows,
        results=results,
        timedelta=datetime.timedelta,
        history=history,
        figures=_figures(history, results, rows, metric, model_name),
        recommendations=recommendations,
        facts={
            **(facts or {}),
            "Dataset": {
                name: tables.quantity(value)
                for name, value in config_lib.flatten(dataset).items()
            },
            "Configuration": config_lib.flatten(config),
            "Environment": environment,
        },
        tables=tables,
    )
    page = tables.printable(page, keep="\n")
    workdir_lib.write_bytes(path, page.encode("utf-8"))


def _figures(
    history: pd.DataFrame,
    results: Mapping[str, Any],
    rows: Mapping[str, tables.Rows],
    metric: str,
    model_name: str,
) -> dict[str, str]:
    """Returns the URL of each figure that has data, by name.

    An image cannot run scripts or load files, whatever its labels contain.
    """
    baselines = {
        name: tables.cell_values(cells[metric])[0]
        for name, cells in rows.get("validation", {}).items()
        if name in results.get("baselines", {}) and metric in cells
    }
    figures = {
        "Learning curves": plots.learning_curves(
            history, metric=metric, baselines=baselines
        ),
        "Metrics by model": plots.metrics_bars(rows.get("test", {})),
    }
    if "train/users_per_second" in history:
        with plots.new_figure(1) as figure:
            plots.plot_throughput(history, figure.axes[0])
        figures["Training speed"] = figure
    figures["Groups of users and items"] = plots.groups_figure(
        results, metric=metric, name=model_name
    )
    return {
        name: "data:image/svg+xml;base64,"
        + base64.b64encode(plots.to_svg(figure).encode()).decode()
        for name, figure in figures.items()
        if figure is not None
    }
