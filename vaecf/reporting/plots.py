"""Plots of a run: learning curves, metrics by model, speed.

Each `plot_*` function draws on the given Axes, or on new ones, and returns
them; it follows matplotlib's current style. The functions that return figures
use the style of the report. Nothing uses pyplot: no global state, no backend.
"""

from __future__ import annotations

import functools
import html
import io
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting.tables import (
    Rows,
    cell_texts,
    cell_values,
    is_accuracy,
    metric_label,
    metric_names,
    printable,
)
from vaecf.reporting.writers import finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Close to the Okabe-Ito palette, which colour-blind people can tell apart.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee4",
    "blue": "#0072b2",
    "orange": "#c2500a",
    "green": "#00785a",
    "band": "#b9d9ec",
    "bar": "#9aa4af",
}
_STYLE = pathlib.Path(__file__).with_name("vaecf.mplstyle")
_MARKED_POINTS = 30  # a curve with more points has no markers


# --- Figures ----------------------------------------------------------------


def grid(
    panels: Sequence[Callable[[Axes], object]],
    *,
    columns: int = 1,
    size: tuple[float, float] = (9.8, 2.6),
    sharey: bool = False,
) -> Figure:
    """Returns a figure with one plot per panel.

    Args:
      panels: functions that draw on the Axes they are given.
      columns: largest number of plots side by side.
      size: width and height of a plot in inches.
      sharey: use the same y axis for all plots.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    inches = columns * size[0], rows * size[1]
    with style.context(_STYLE):
        figure = Figure(inches, layout="constrained")
        figure.subplots(rows, columns, squeeze=False, sharey=sharey)
        for axes, draw in zip(figure.axes, panels, strict=False):
            draw(axes)
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """Returns an `<svg>` element; the same figure gives the same text.

    Args:
      figure: the figure to draw.
      name: label of the element, and prefix of all ids, so that a page can
        contain several figures.
    """
    from matplotlib import style

    prefix = re.sub(r"\W+", "-", name.lower())
    buffer = io.StringIO()
    with (
        style.context([_STYLE, {"svg.hashsalt": prefix}]),
        warnings.catch_warnings(),
    ):
        # The browser has letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            buffer,
            format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            transparent=True,
            bbox_inches="tight",
        )
    svg = buffer.getvalue()

    def with_prefix(tag: re.Match[str]) -> str:
        return re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{prefix}-", tag[0])

    svg = re.sub(r"<[^>]+>", with_prefix, svg[svg.index("<svg") :])
    svg = printable(svg, keep_newlines=True)
    label = html.escape(name)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def to_png(figure: Figure) -> bytes:
    """Returns a PNG file; the same figure gives the same bytes."""
    from matplotlib import style

    buffer = io.BytesIO()
    with style.context(_STYLE):
        figure.savefig(
            buffer, dpi=150, metadata={"Software": None}, bbox_inches="tight"
        )
    return buffer.getvalue()


def _new_axes() -> Axes:
    from matplotlib.figure import Figure

    return Figure(layout="constrained").subplots()


def integer_ticks(axes: Axes) -> None:
    """Restricts the ticks of the x axis to whole numbers."""
    axes.locator_params("x", nbins=8, integer=True, min_n_ticks=1)


# --- Curves over epochs -----------------------------------------------------


def history_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the records of metrics.jsonl with one row per epoch.

    The index is the epoch; the columns are names with a finite value, e.g.
    'train/loss'. The last value of an epoch counts. Missing values are NaN.
    """
    import pandas as pd

    rows = [
        {name: v for name, x in record.items() if (v := finite(x)) is not None}
        for record in records
        if "epoch" in record
    ]
    return pd.DataFrame(rows or {"epoch": []}).groupby("epoch").last()


def best_epoch(history: pd.DataFrame, metric: str) -> int | None:
    """Returns the first epoch with the largest validation metric, if any."""
    values = history.get(f"validation/{metric}")
    return None if values is None else int(values.idxmax())


def plot_curve(
    history: pd.DataFrame,
    name: str,
    axes: Axes | None = None,
    *,
    title: str = "",
    unit: str = "",
    **style: Any,
) -> Axes:
    """Plots a column of the history over the epochs.

    Args:
      history: see `history_frame`.
      name: e.g. 'train/kl'.
      axes: where to draw; None makes a figure.
      title: title of the plot.
      unit: label of the y axis.
      **style: options of `Axes.plot`.
    """
    axes = axes or _new_axes()
    values = history[name].dropna()
    marker = "o" if len(values) <= _MARKED_POINTS else None
    kind = {"color": COLOURS["blue"], "marker": marker, **style}
    axes.plot(values.index, values, **kind)
    axes.set(title=title, ylabel=unit, xlabel="epoch")
    integer_ticks(axes)
    return axes


def plot_loss(history: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Plots the training loss and its negative log-likelihood by epoch."""
    dashed = {"color": COLOURS["muted"], "linestyle": "--"}
    title = "Training: negative log-likelihood and loss"
    axes = plot_curve(history, "train/loss", axes, label="loss", **dashed)
    plot_curve(history, "train/nll", axes, label="NLL")
    axes.set(title=title, ylabel="nats per user")
    axes.legend()
    return axes


def plot_validation(
    history: pd.DataFrame,
    axes: Axes | None = None,
    *,
    metric: str = "ndcg@100",
    baselines: Mapping[str, float] | None = None,
) -> Axes:
    """Plots the validation metric by epoch, with its standard error.

    Args:
      history: see `history_frame`.
      axes: where to draw; None makes a figure.
      metric: name of the metric.
      baselines: values of other models by name, drawn as horizontal lines.
    """
    name, label = f"validation/{metric}", metric_label(metric)
    axes = plot_curve(history, name, axes, unit=f"{label}, ± s.e.")
    values = history[name].dropna()
    if f"{name}_stderr" in history:
        error = history[f"{name}_stderr"][values.index]
        # An outline shows the error of a single point, too.
        style: dict[str, Any] = {"color": COLOURS["band"], "linewidth": 2}
        axes.fill_between(values.index, values - error, values + error, **style)
    epoch, best = int(values.idxmax()), values.max()
    axes.plot(epoch, best, "o", markersize=6, color=COLOURS["orange"])
    axes.set_title(f"Validation {label}, best {best:.4f} at epoch {epoch}")
    known = [(v, n) for n, v in (baselines or {}).items() if math.isfinite(v)]
    for number, (value, model) in enumerate(sorted(known, reverse=True)):
        axes.axhline(
            value,
            label=model,
            color=COLOURS["muted"],
            linewidth=1,
            linestyle=(0, (1 + 2 * (number % 4), 2)),
        )
    if known:
        axes.legend()
    return axes


def plot_throughput(history: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Plots the training speed by epoch, in users per second."""
    name = "train/users_per_second"
    title = f"Training speed, median {history[name].median():,.0f} users/s"
    axes = plot_curve(history, name, axes, title=title, unit="users/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    return axes


def learning_curves(
    history: pd.DataFrame,
    *,
    metric: str = "ndcg@100",
    baselines: Mapping[str, float] | None = None,
) -> Figure | None:
    """Returns plots of loss, validation metric, KL divergence and KL weight.

    Plots without data are left out: a denoising autoencoder has no KL term.
    Returns None if no plot is left.

    Args:
      history: see `history_frame`.
      metric: name of the validation metric.
      baselines: see `plot_validation`.
    """
    panels: list[Callable[[Axes], object]] = []
    if "train/loss" in history:
        panels.append(functools.partial(plot_loss, history))
    if f"validation/{metric}" in history:
        panels.append(
            functools.partial(
                plot_validation, history, metric=metric, baselines=baselines
            )
        )
    if "train/kl" in history and history["train/kl"].any():
        for name, title, unit in (
            ("train/kl", "Training: KL divergence", "nats per user"),
            ("train/anneal", "Training: weight of the KL term", "weight"),
        ):
            kinds: dict[str, Any] = {"title": title, "unit": unit}
            panels.append(functools.partial(plot_curve, history, name, **kinds))
    return grid(panels, columns=2, size=(4.9, 2.75)) if panels else None


# --- Bars and points --------------------------------------------------------


def plot_metric(rows: Rows, metric: str, axes: Axes | None = None) -> Axes:
    """Plots one metric of every model as bars with standard errors.

    Args:
      rows: see `tables.results_table`; the first row is highlighted.
      metric: name of the metric.
      axes: where to draw; None makes a figure.
    """
    axes = axes or _new_axes()
    cells, places = [row.get(metric) for row in rows.values()], range(len(rows))
    means, errors = zip(*map(cell_values, cells), strict=True)
    bars = axes.barh(
        places,
        means,
        xerr=errors,
        height=0.62,
        color=[COLOURS["blue"], *[COLOURS["bar"]] * (len(rows) - 1)],
        ecolor=COLOURS["ink"],
    )
    texts = [cell_texts(cell)[0] for cell in cells]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.margins(x=0.18)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(places, list(rows))
    axes.grid(visible=False, axis="y")
    axes.set_title(metric_label(metric))
    return axes


def metrics_bars(rows: Rows) -> Figure | None:
    """Returns a plot per accuracy metric, or None without such a metric."""
    metrics = [name for name in metric_names(rows) if is_accuracy(name)]
    if not metrics:
        return None
    return grid(
        [functools.partial(plot_metric, rows, m) for m in metrics],
        columns=3,
        size=(9.8 / min(3, len(metrics)), 0.75 + 0.32 * len(rows)),
        sharey=True,
    )


def plot_history_lengths(
    buckets: Sequence[Mapping[str, Any]],
    axes: Axes | None = None,
    *,
    metric: str = "ndcg@100",
) -> Axes:
    """Plots a metric by the length of the users' histories.

    Args:
      buckets: mappings with "bucket" (e.g. "5-9"), "mean", "stderr" and
        "users", in order.
      axes: where to draw; None makes a figure.
      metric: name of the metric.
    """
    axes = axes or _new_axes()
    places, label = range(len(buckets)), metric_label(metric)
    means, errors = zip(*map(cell_values, buckets), strict=True)
    axes.errorbar(places, means, errors, fmt="o", color=COLOURS["blue"])
    texts = [f"{b['bucket']}\n{b['users']:,} users" for b in buckets]
    axes.set_xticks(places, texts)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    axes.set(
        title=f"{label} by length of history",
        xlabel="items in the history",
        ylabel=f"{label}, ± s.e.",
    )
    return axes
