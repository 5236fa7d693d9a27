"""Writes pages about runs: HTML files that load nothing else."""

from __future__ import annotations

import base64
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
from vaecf import workdir as workdir_lib
from vaecf.reporting import plots, tables

if TYPE_CHECKING:
    import pandas as pd

_TEMPLATES = pathlib.Path(__file__).with_name("templates")
# What the top of a page shows of the environment.
_SHOWN = ("vaecf", "python", "jax", "device")
_PASSWORD = re.compile(r"://[^/@\s]*@")


def environment(devices: Iterable[Any] = ()) -> dict[str, str]:
    """Returns the command, the versions of packages and the JAX devices.

    There is no command in a notebook.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    kinds = [device.device_kind for device in devices]
    words = [pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
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
    _write(
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
        "learning": _images(learning),
        "metrics": _images(bars, height=plots.bars_height(len(models))),
        "groups": _images(
            plots.group_panels(results, metric=metric, name=name), height=3.0
        ),
    }


def _images(
    panels: Iterable[plots.Panel], **options: Any
) -> list[tuple[str, str]]:
    """Returns the title and the URL of a figure for each plot.

    An image cannot run scripts or load files, whatever its labels contain.
    """
    images = []
    for panel in panels:
        figure = plots.draw([panel], **options)
        assert figure is not None
        svg = base64.b64encode(plots.to_svg(figure).encode()).decode()
        title = figure.axes[0].get_title("left")
        images.append((title, f"data:image/svg+xml;base64,{svg}"))
    return images


def _write(
    path: str | os.PathLike[str],
    template: str,
    environment: Mapping[str, Any],
    **values: Any,
) -> None:
    """Writes the page of a template, with the command and the versions."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [name for name in _SHOWN if name in environment]
    page = templates.get_template(template).render(
        command=environment.get("command"),
        versions=[f"{name} {environment[name]}" for name in shown],
        tables=tables,
        **values,
    )
    page = tables.printable(page, keep="\n")
    workdir_lib.write_bytes(path, page.encode("utf-8"))
