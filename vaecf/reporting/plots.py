"""Plots of a run: learning curves, metrics by model, speed.

Each `plot_*` function draws on the given Axes, in matplotlib's current style.
The functions named `*_panels` return such functions, one for each plot that has
data: `draw` makes one figure of them, and a page has a figure for each, so that
they stand below each other on a phone. Figures use the style of the pages.
Nothing uses pyplot: no global state, no backend.

`history` is the table that `history_frame` returns, and `metric` is the name
of a metric, such as 'ndcg@100'.
"""

from __future__ import annotations

import functools
import io
import itertools
import pathlib
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting import tables
from vaecf.reporting.writers import finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes"], None]  # draws one plot

_STYLE = pathlib.Path(__file__).with_name("vaecf.mplstyle")
_MARKED_POINTS = 30  # a curve with more points has no markers
_TITLES = {
    "train/kl": "Training: KL divergence, nats per user",
    "train/anneal": "Training: weight of the KL term",
}
# What the groups of results.json differ in.
_GROUPS = {
    "history_length": "items in the history",
    "item_popularity": "popularity of the held-out items",
}
# Greys; the other colours are those of matplotlib's current style.
DARK, LIGHT = "0.4", "0.65"


def draw(
    panels: Sequence[Panel],
    *,
    columns: int = 1,
    height: float = 2.75,
    width: float = 4.9,
) -> Figure | None:
    """Returns a figure of some plots in the pages' style; None without plots.

    `columns` is the largest number of plots side by side, and `height` and
    `width` are those of one plot, in inches.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with style.context(_STYLE):
        figure = Figure((width * columns, rows * height), layout="constrained")
        figure.subplots(rows, columns, squeeze=False)
        for panel, axes in itertools.zip_longest(panels, figure.axes):
            if panel is None:
                axes.set_axis_off()
            else:
                panel(axes)
    return figure


def to_svg(figure: Figure) -> str:
    """Returns an SVG document; the same figure gives the same text."""
    from matplotlib import style

    buffer = io.StringIO()
    with style.context(_STYLE), warnings.catch_warnings():
        # The browser has letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", metadata={"Date": None}
        )
    # XML cannot contain control characters.
    return tables.printable(buffer.getvalue(), keep="\n")


def history_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns the records of metrics.jsonl with one row per epoch.

    The index is the epoch, an integer; the columns are names with a finite
    value, e.g. 'train/loss'. The last value of an epoch counts. Missing values
    are NaN.
    """
    import pandas as pd

    rows = [
        {
            name: v
            for name, x in record.items()
            if name not in ("step", "time") and (v := finite(x)) is not None
        }
        for record in records
        if "epoch" in record
    ]
    frame = pd.DataFrame(rows or {"epoch": []}).astype({"epoch": int})
    return frame.groupby("epoch").last()


def plot_curve(
    history: pd.DataFrame, name: str, axes: Axes, **style: Any
) -> None:
    """Plots a column of the history, e.g. 'train/kl', over the epochs.

    `style` holds options of `Axes.plot`.
    """
    values = history[name].dropna()
    marker = "o" if len(values) <= _MARKED_POINTS else None
    style = {"color": "C0", "marker": marker, **style}
    axes.plot(values.index, values, **style)
    axes.set(title=_TITLES.get(name, name), xlabel="epoch")
    axes.locator_params("x", nbins=8, integer=True, min_n_ticks=1)


def plot_loss(history: pd.DataFrame, axes: Axes) -> None:
    """Plots the training loss and its negative log-likelihood by epoch."""
    plot_curve(history, "train/loss", axes, label="loss", color=DARK)
    plot_curve(history, "train/nll", axes, label="NLL")
    axes.set_title("Training: negative log-likelihood and loss")
    axes.set_ylabel("nats per user")
    axes.legend()


def plot_validation(
    history: pd.DataFrame,
    axes: Axes,
    metric: str,
    baselines: Mapping[str, float],
) -> None:
    """Plots the validation metric by epoch, with its standard error.

    `baselines` maps names of other models to values, which become horizontal
    lines.
    """
    name, label = f"validation/{metric}", tables.metric_label(metric)
    plot_curve(history, name, axes)
    values = history[name].dropna()
    if f"{name}_stderr" in history:
        error = history[f"{name}_stderr"][values.index]
        # An outline shows the error of a single point, too.
        low, high = values - error, values + error
        band = axes.fill_between(low.index, low, high, color="C0", alpha=0.25)
        band.set_linewidth(2)
    epoch, best = int(values.idxmax()), values.max()
    axes.plot(epoch, best, "o", markersize=6, color="C1")
    axes.set_title(f"Validation {label}, best {best:.4f} at epoch {epoch}")
    axes.set_ylabel(f"{label}, ± s.e.")
    lines = sorted(baselines.items(), key=lambda line: -line[1])
    styles = itertools.cycle([":", "--", "-.", "-"])
    names = tables.short_names(baselines)
    for (model, value), style in zip(lines, styles, strict=False):
        label = wrapped(names[model])
        axes.axhline(value, label=label, color=DARK, lw=1, linestyle=style)
    if lines:
        _legend_below(axes)


def plot_throughput(history: pd.DataFrame, axes: Axes) -> None:
    """Plots the training speed by epoch, in users per second."""
    name = "train/users_per_second"
    plot_curve(history, name, axes)
    median = history[name].median()
    axes.set_title(f"Training speed, median {median:,.0f} users/s")
    axes.set_ylabel("users/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)


def learning_panels(
    history: pd.DataFrame, *, metric: str, baselines: Mapping[str, float]
) -> list[Panel]:
    """Returns the plots of loss, validation metric, KL divergence, KL weight.

    Plots without data are left out: a denoising autoencoder has no KL term.
    `baselines`: see `plot_validation`.
    """
    panels: list[Panel] = []
    if "train/loss" in history:
        panels.append(functools.partial(plot_loss, history))
    if f"validation/{metric}" in history:
        panels.append(
            lambda axes: plot_validation(history, axes, metric, baselines)
        )
    if "train/kl" in history and history["train/kl"].any():
        for name in ("train/kl", "train/anneal"):
            panels.append(functools.partial(plot_curve, history, name))
    return panels


def learning_curves(
    history: pd.DataFrame, *, metric: str, baselines: Mapping[str, float]
) -> Figure | None:
    """Returns one figure of `learning_panels`, or None without any."""
    panels = learning_panels(history, metric=metric, baselines=baselines)
    return draw(panels, columns=2)


def plot_metric(
    rows: tables.Rows,
    metric: str,
    axes: Axes,
    references: Collection[str] = (),
) -> None:
    """Plots one metric of every model as bars with standard errors.

    The first row is highlighted. `rows`: see `tables.results_rows`. Models in
    `references` are upper bounds, and become lines.
    """
    names = tables.short_names(rows)
    bars = {name: row.get(metric) for name, row in rows.items()}
    lines = {name: bars.pop(name) for name in references if name in bars}
    places = range(len(bars))
    means, errors = zip(*map(tables.cell_values, bars.values()), strict=True)
    colours = ["C0", *[LIGHT] * (len(bars) - 1)]
    drawn = axes.barh(places, means, xerr=errors, height=0.62, color=colours)
    texts = [tables.cell_texts(cell)[0] for cell in bars.values()]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(drawn, texts, padding=3, fontsize=8, bbox=box)
    axes.margins(x=0.18)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks(places, [wrapped(names[name]) for name in bars])
    axes.grid(visible=False, axis="y")
    axes.set_title(tables.metric_label(metric))
    for name, cell in lines.items():
        mean, label = tables.cell_values(cell)[0], tables.cell_texts(cell)[0]
        label = wrapped(f"{names[name]} {label}")
        # Behind the values.
        axes.axvline(mean, color="C1", ls="--", label=label, zorder=1)
        _legend_below(axes)


def metric_panels(
    rows: tables.Rows, references: Collection[str] = ()
) -> list[Panel]:
    """Returns a plot per accuracy metric; see `plot_metric`."""
    models = {n: row for n, row in rows.items() if n not in references}
    return [
        functools.partial(plot_metric, rows, metric, references=references)
        for metric in tables.metric_names(models)
        if tables.is_accuracy(metric)
    ]


def metrics_bars(
    rows: tables.Rows, references: Collection[str] = ()
) -> Figure | None:
    """Returns one figure of `metric_panels`, or None without any."""
    panels = metric_panels(rows, references)
    return draw(panels, columns=3, height=bars_height(len(rows)))


def bars_height(n_models: int) -> float:
    """Returns the height of a plot with a bar per model, in inches."""
    return 0.75 + 0.36 * n_models


def plot_groups(
    models: Mapping[str, Any],
    axes: Axes,
    *,
    metric: str,
    of: str,
) -> None:
    """Plots a metric of every model by groups of users or of items.

    The first model is highlighted. The points of a group stand side by side,
    with standard errors.

    Args:
      models: for each model, mappings with "bucket" (e.g. "5-9"), "mean",
        "stderr", "users" and perhaps "items", in order.
      of: what the groups differ in, such as "items in the history".
    """
    first = next(iter(models.values()))
    places = {group["bucket"]: place for place, group in enumerate(first)}
    names, width = tables.short_names(models), 0.7 / len(models)
    markers = itertools.cycle("osD^vPX*<>")
    for n, (model, groups) in enumerate(models.items()):
        groups = [group for group in groups if group["bucket"] in places]
        shift = (n - (len(models) - 1) / 2) * width
        at = [places[group["bucket"]] + shift for group in groups]
        means, errors = zip(*map(tables.cell_values, groups), strict=True)
        colour, size = ("C0", 5) if n == 0 else (DARK, 4)
        axes.errorbar(
            *(at, means, errors),
            fmt=next(markers),
            color=colour,
            markersize=size,
            elinewidth=1,
            markerfacecolor=colour if n == 0 else "white",
            clip_on=False,  # a marker at 0 is whole
            label=wrapped(names[model]),
        )
    texts = [_group_text(group) for group in first]
    axes.set_xticks(range(len(first)), texts)
    axes.set_xlim(-0.5, len(first) - 0.5)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    label = tables.metric_label(metric)
    axes.set_title(f"{label} by {of}")
    axes.set(ylabel=f"{label}, ± s.e.")
    _legend_below(axes)


def _group_text(group: Mapping[str, Any]) -> str:
    items = f" ({group['items']:,} items)" if "items" in group else ""
    return f"{group['bucket']}{items}\n{group['users']:,} users"


def group_panels(
    results: Mapping[str, Any], *, metric: str, name: str
) -> list[Panel]:
    """Returns plots by length of history and by popularity of the items.

    `name` is the run's model; the groups of a model are where
    `tables.results_rows` describes its splits.
    """
    return [
        functools.partial(plot_groups, models, metric=metric, of=of)
        for key, of in _GROUPS.items()
        if (models := tables.results_rows(results, split=key, name=name))
    ]


# --- Helpers ----------------------------------------------------------------


def wrapped(name: str) -> str:
    """Returns a name in at most three short lines, for ticks and legends."""
    return textwrap.fill(name, 22, max_lines=3, placeholder="…")


def _legend_below(axes: Axes) -> None:
    """Places the legend where it hides no data."""
    from matplotlib.transforms import ScaledTranslation

    inches = -(0.48 if axes.get_xlabel() else 0.42)
    shift = ScaledTranslation(0, inches, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + shift,
        borderaxespad=0,
        ncols=3,
    )
