"""Learning curves and metric plots as SVG texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting.drawing import (
    COLOURS,
    canvas,
    curve,
    end_labels,
    epoch_axis,
    render,
)
from vaecf.reporting.tables import Rows, cell_texts, cell_values, metric_names
from vaecf.reporting.text import (
    finite,
    is_accuracy,
    metric_label,
    printable,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _axis_name(records: Sequence[Mapping[str, Any]]) -> str:
    return "epoch" if any("epoch" in r for r in records) else "step"


def learning_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    baselines: Mapping[str, float] | None = None,
    metric: str = "ndcg@100",
) -> str:
    """Training loss and its parts, and the validation metric, by epoch.

    Args:
      records: lines of metrics.jsonl; training ones hold "train/loss",
        "train/nll", "train/kl", "train/anneal" (nats per user; anneal is
        the weight of the KL term), validations "validation/<metric>" and
        "validation/<metric>_stderr". "epoch" is the axis, else "step".
      baselines: names and values of the metric for models to compare with,
        drawn as horizontal lines.
      metric: the validation metric.

    Returns:
      An `<svg>` element, or "" if there is nothing to draw. Curves have the
      ids `learning-curves-nll`, `-loss`, `-kl`, `-anneal`, `-validation`,
      the best epoch's mark `-best`, baselines `-baseline-0` and so on.
    """
    axis = _axis_name(records)
    panels: list[Callable[[Axes], None]] = []
    if any("train/nll" in r or "train/loss" in r for r in records):
        panels.append(lambda axes: _loss_panel(axes, records, axis))
    if any(f"validation/{metric}" in r for r in records):
        panels.append(
            lambda axes: _validation_panel(
                axes, records, axis, metric, baselines or {}
            )
        )
    # A denoising autoencoder has no KL term: no empty panels for it.
    if any(finite(r.get("train/kl")) for r in records):
        panels.append(lambda axes: _kl_panel(axes, records, axis))
        panels.append(lambda axes: _anneal_panel(axes, records, axis))
    positions = [p for r in records if (p := finite(r.get(axis))) is not None]
    if not panels or not positions:
        return ""

    def draw() -> Figure:
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = canvas(rows, columns, 4.9 * columns, 2.75 * rows)
        for axes, panel in zip(figure.axes, panels, strict=False):
            panel(axes)
            epoch_axis(axes, positions)
            axes.set_xlabel(axis)
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        return figure

    alt = f"Learning curves: loss and validation {metric_label(metric)}"
    return render("learning-curves", alt, draw)


def _loss_panel(
    axes: Axes, records: Sequence[Mapping[str, Any]], axis: str
) -> None:
    labels = []
    for name, label, colour, dashes in (
        ("loss", "loss", COLOURS["muted"], (0, (4, 2))),
        ("nll", "NLL", COLOURS["blue"], "solid"),
    ):
        x, y = series(records, f"train/{name}", axis=axis)
        known = [v for v in y if not math.isnan(v)]
        if known:
            curve(axes, x, y, name, color=colour, linestyle=dashes)
            labels.append((known[-1], label, colour))
    axes.set_title("Training: negative log-likelihood and loss")
    axes.set_ylabel("nats per user")
    end_labels(axes, labels)


def _kl_panel(
    axes: Axes, records: Sequence[Mapping[str, Any]], axis: str
) -> None:
    x, y = series(records, "train/kl", axis=axis)
    curve(axes, x, y, "kl", color=COLOURS["blue"])
    axes.set_title("Training: KL divergence")
    axes.set_ylabel("nats per user")


def _anneal_panel(
    axes: Axes, records: Sequence[Mapping[str, Any]], axis: str
) -> None:
    x, y = series(records, "train/anneal", axis=axis)
    curve(axes, x, y, "anneal", color=COLOURS["green"])
    axes.set_ylim(bottom=0)
    axes.set_title("Training: weight of the KL term")
    axes.set_ylabel("weight")


def _validation_panel(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    axis: str,
    metric: str,
    baselines: Mapping[str, float],
) -> None:
    name = f"validation/{metric}"
    x, y = series(records, name, axis=axis)
    errors = dict(
        zip(*series(records, f"{name}_stderr", axis=axis), strict=True)
    )
    error = [errors.get(p, math.nan) for p in x]
    low = [v - e for v, e in zip(y, error, strict=True)]
    high = [v + e for v, e in zip(y, error, strict=True)]
    if len(x) == 1 and not math.isnan(error[0]):
        axes.errorbar(x, y, yerr=error, color=COLOURS["band"], linewidth=3)
    elif any(not math.isnan(e) for e in error):
        axes.fill_between(
            x, low, high, color=COLOURS["band"], linewidth=0, gid="band"
        )
    curve(axes, x, y, "validation", color=COLOURS["blue"])
    labels = []
    for number, (model, value) in enumerate(baselines.items()):
        if not math.isfinite(value):
            continue
        axes.axhline(
            value,
            color=COLOURS["muted"],
            linewidth=1,
            linestyle=(0, (1 + 2 * (number % 4), 2)),
            gid=f"baseline-{number}",
        )
        labels.append((value, printable(model), COLOURS["muted"]))
    known = [(v, -p) for p, v in zip(x, y, strict=True) if not math.isnan(v)]
    title = f"Validation {metric_label(metric)}"
    if known:
        # The earliest of equals, as the best checkpoint is.
        value, negative = max(known)
        axes.plot(
            [-negative],
            [value],
            gid="best",
            marker="o",
            markersize=6,
            color=COLOURS["orange"],
        )
        title += f", best {value:.4f} at {axis} {-negative:.0f}"
    axes.set_title(printable(title))
    axes.set_ylabel(printable(metric_label(metric)) + ", ± s.e. shaded")
    end_labels(axes, labels)


def metrics_bars(rows: Rows, *, metrics: Sequence[str] | None = None) -> str:
    """Every model's accuracy, a small plot a metric, with standard errors.

    Args:
      rows: as `tables.results_table` takes them; the first is the run's
        model and is coloured.
      metrics: which ones; by default all where more is better.

    Returns:
      An `<svg>` element, or "" if there is nothing to draw. The bars of
      metric number m have the ids `metrics-bars-m-0`, `-m-1`, ...
    """
    chosen = [
        m for m in metric_names(rows, metrics) if metrics or is_accuracy(m)
    ]
    if not chosen:
        return ""

    def draw() -> Figure:
        columns = min(3, len(chosen))
        lines = -(-len(chosen) // columns)
        height = 0.75 + 0.32 * len(rows)
        figure = canvas(lines, columns, 9.8, height * lines)
        for number, axes in enumerate(figure.axes):
            if number < len(chosen):
                _bar_panel(axes, rows, chosen[number], number)
                if number % columns:
                    axes.set_yticklabels([])
            else:
                axes.set_axis_off()
        return figure

    return render("metrics-bars", "Metrics by model", draw)


def _bar_panel(axes: Axes, rows: Rows, metric: str, number: int) -> None:
    reach = 0.0
    texts = []
    for place, cells in enumerate(rows.values()):
        mean, error = cell_values(cells.get(metric))
        if mean is None:
            continue
        axes.barh(
            place,
            mean,
            height=0.62,
            color=COLOURS["blue" if place == 0 else "bar"],
            gid=f"{number}-{place}",
        )[0].set_gid(f"{number}-{place}")
        if error:
            axes.errorbar(
                mean, place, xerr=error, color=COLOURS["ink"], linewidth=1.2
            )
        end = mean + (error or 0.0)
        texts.append((end, place, cell_texts(cells[metric])[0]))
        reach = max(reach, end)
    for end, place, text in texts:
        axes.text(end + 0.02 * reach, place, text, va="center", fontsize=8)
    axes.set_xlim(0, reach * 1.22 or 1.0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [printable(name) for name in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_title(printable(metric_label(metric)))


def throughput(records: Sequence[Mapping[str, Any]]) -> str:
    """Training speed by epoch, in users per second, with its median.

    Returns:
      An `<svg>` element whose curve has the id `throughput-speed`, or "".
    """
    axis = _axis_name(records)
    x, y = series(records, "train/users_per_second", axis=axis)
    known = sorted(v for v in y if not math.isnan(v))
    if not known:
        return ""
    middle = len(known) // 2
    median = (
        known[middle]
        if len(known) % 2
        else (known[middle - 1] + known[middle]) / 2
    )

    def draw() -> Figure:
        from matplotlib.ticker import StrMethodFormatter

        figure = canvas(1, 1, 9.8, 2.3)
        axes = figure.axes[0]
        curve(axes, x, y, "speed", color=COLOURS["blue"])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(f"Training speed, median {median:,.0f} users/s")
        axes.set_ylabel("users/s")
        axes.set_xlabel(axis)
        epoch_axis(axes, x)
        return figure

    return render("throughput", "Training speed by epoch", draw)


def history_buckets(
    buckets: Sequence[Mapping[str, Any]], *, metric: str = "ndcg@100"
) -> str:
    """A metric by the length of the users' histories.

    Args:
      buckets: in order; {"bucket": "5-9", "mean", "stderr", "users"}.
      metric: its name.

    Returns:
      An `<svg>` element whose points have the ids `history-buckets-0` and
      so on, or "" if there is nothing to draw.
    """
    known = [b for b in buckets if finite(b.get("mean")) is not None]
    if not known:
        return ""

    def draw() -> Figure:
        figure = canvas(1, 1, 9.8, 2.6)
        axes = figure.axes[0]
        for place, bucket in enumerate(known):
            mean, error = cell_values(bucket)
            axes.errorbar(place, mean or 0.0, yerr=error, color=COLOURS["blue"])
            axes.plot(
                [place],
                [mean or 0.0],
                marker="o",
                color=COLOURS["blue"],
                gid=str(place),
            )
        sizes = [finite(b.get("users")) or 0 for b in known]
        ticks = [
            f"{printable(b['bucket'])}\n{users:,.0f} users"
            for b, users in zip(known, sizes, strict=True)
        ]
        axes.set_xticks(
            range(len(known)),
            ticks,
        )
        axes.set_xlim(-0.5, len(known) - 0.5)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("items in the history")
        axes.set_ylabel(f"{printable(metric_label(metric))}, ± s.e.")
        axes.set_title(
            f"{printable(metric_label(metric))} by length of history"
        )
        return figure

    return render("history-buckets", "Metric by length of history", draw)
