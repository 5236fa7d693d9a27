"""Writes the page of a run."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import vaecf
from vaecf import config as config_lib
from vaecf.reporting import page, plots, tables

if TYPE_CHECKING:
    import pandas as pd

_PASSWORD = re.compile(r"://[^/@\s]*@")


def environment(devices: Iterable[Any] = ()) -> dict[str, str]:
    """Returns the command, the versions of packages and the JAX devices.

    There is no command in a notebook.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    kinds = [device.device_kind for device in devices]
    words = [pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    if len(words) > 1 and pathlib.Path(words[1]).name == "vaecf":
        words[:2] = ["vaecf"]  # the program that pip installs
    command = _PASSWORD.sub("://***@", shlex.join(words))
    return {
        **({} if "ipykernel" in sys.modules else {"command": command}),
        "vaecf": vaecf.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **({"device": f"{len(kinds)} x {kinds[0]}"} if kinds else {}),
        "platform": platform.platform(),
    }


def write_report(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    recommendations: Sequence[Mapping[str, Any]] = (),
    lists: Mapping[str, Mapping[str, Any]] | None = None,
    model: str = "model",
    metric: str = "ndcg@100",
) -> None:
    """Writes the page of a run atomically.

    The same arguments give the same bytes. Models are named as
    `tables.model_name` says.

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
      lists: further lists of names and values, by heading.
      model: title of the run's model, such as "rec_vae+linear".
      metric: the metric that selected the checkpoint.

    Raises:
      VaecfError: the file cannot be written.
    """
    history = plots.history_frame(records)
    name = tables.model_name(model, results.get("linear", ()))
    baselines = results.get("baselines", {})
    named = {tables.model_name(k): found for k, found in baselines.items()}
    results = {**results, "baselines": named}
    rows = {}
    for split in ("test", "validation"):
        models = tables.results_rows(results, split=split, name=name)
        if models:
            rows[split] = models
    page.write(
        *(path, "run.html.jinja", environment),
        title=f"{name[:1].upper()}{name[1:]} on {dataset['name']}",
        about=f"dataset {dataset['name']}, protocol {dataset['protocol']}",
        model_name=name,
        metric=metric,
        rows=rows,
        results=results,
        timedelta=datetime.timedelta,
        history=history,
        figures=_figures(history, results, rows, metric, name),
        recommendations=recommendations,
        lists={
            **(lists or {}),
            "Dataset": {
                name: tables.quantity(value)
                for name, value in config_lib.flatten(dataset).items()
            },
            "Configuration": config_lib.flatten(config),
            "Environment": environment,
        },
    )


def _figures(
    history: pd.DataFrame,
    results: Mapping[str, Any],
    rows: Mapping[str, tables.Rows],
    metric: str,
    name: str,
) -> dict[str, list[tuple[str, str]]]:
    """Returns the figures of the sections that have data."""
    baselines = {
        name: tables.cell_values(cells[metric])[0]
        for name, cells in rows.get("validation", {}).items()
        if name in results["baselines"] and metric in cells
    }
    learning = plots.learning_panels(
        history, metric=metric, baselines=baselines
    )
    if "train/users_per_second" in history:
        learning.append(functools.partial(plots.plot_throughput, history))
    models = rows.get("test", {})
    bars = plots.metric_panels(models, results.get("references", ()))
    return {
        "learning": page.images(learning),
        "metrics": page.images(bars, height=plots.bars_height(len(models))),
        "groups": page.images(
            plots.group_panels(results, metric=metric, name=name), height=3.0
        ),
    }
