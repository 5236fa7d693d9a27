"""Plots of a sweep: its history, the settings tried, their importances.

A trial is a mapping with "number", "state" ("complete", "pruned", ...),
"value" (of the metric, larger is better) and "params" ({setting: value}).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting import plots
from vaecf.reporting.tables import metric_label
from vaecf.reporting.writers import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trial = Mapping[str, Any]

_MARKERS: dict[str, dict[str, Any]] = {
    "pruned": {"color": plots.COLOURS["bar"], "fillstyle": "none"},
    "complete": {"color": plots.COLOURS["blue"]},
    "best": {"color": plots.COLOURS["orange"], "markersize": 7},
}


def _groups(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Returns the pruned, the complete and the best trials with a value.

    Of equal trials, the first is the best.
    """
    known = [t for t in trials if finite(t["value"]) is not None]
    groups = {
        state: [t for t in known if t["state"] == state]
        for state in ("pruned", "complete")
    }
    best = max(
        groups["complete"],
        key=lambda t: (t["value"], -t["number"]),
        default=None,
    )
    return {**groups, "best": [] if best is None else [best]}


def _scatter(
    axes: Axes, state: str, x: Sequence[Any], group: Sequence[Trial]
) -> None:
    y = [t["value"] for t in group]
    axes.plot(x, y, "o", label=state, **{"markersize": 4.5, **_MARKERS[state]})


def history(trials: Sequence[Trial], *, metric: str) -> Figure:
    """Plots the value of every trial by its number, and the best so far.

    Args:
      trials: at least one is complete.
      metric: name of the metric.
    """
    label, groups = metric_label(metric), _groups(trials)
    complete = sorted(groups["complete"], key=lambda t: t["number"])
    best_so_far = list(
        itertools.accumulate((t["value"] for t in complete), max)
    )
    numbers = [t["number"] for t in complete]

    def draw(axes: Axes) -> None:
        for state, group in groups.items():
            x = [t["number"] for t in group]
            _scatter(axes, state, x, group)
        axes.step(
            [*numbers, max(t["number"] for t in trials)],
            [*best_so_far, best_so_far[-1]],
            where="post",
            color=plots.COLOURS["green"],
            label="best so far",
        )
        [best] = groups["best"]
        title = f"best {best['value']:.4f} in trial {best['number']}"
        axes.set_title(f"Validation {label} by trial, {title}")
        axes.set(xlabel="trial", ylabel=label)
        plots.integer_ticks(axes)
        axes.legend()

    return plots.grid([draw], size=(8.0, 3.4))


def importances(shares: Mapping[str, float], *, metric: str) -> Figure:
    """Plots the importance of each setting, the largest on top.

    Args:
      shares: importance by setting; the sum is 1.
      metric: name of the metric.
    """
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    rows = {key: {"importance": {"mean": share}} for key, share in ordered}

    def draw(axes: Axes) -> None:
        plots.plot_metric(rows, "importance", axes)
        axes.set_title(f"Importance for validation {metric_label(metric)}")
        axes.set_xlabel("share in reaching the best quarter (PED-ANOVA)")

    return plots.grid([draw], size=(8.0, 1.1 + 0.3 * len(ordered)))


def slices(
    trials: Sequence[Trial],
    keys: Sequence[str],
    *,
    metric: str,
    logarithmic: Collection[str] = (),
) -> Figure:
    """Plots the metric by the value of each setting.

    Args:
      trials: the trials of the sweep.
      keys: settings, one plot each.
      metric: name of the metric.
      logarithmic: settings with a logarithmic axis.
    """

    def draw(key: str, axes: Axes) -> None:
        having = [t for t in trials if key in t["params"]]
        values = [t["params"][key] for t in having]
        # Layer sizes and names are categories, ordered by length and letter.
        is_number = all(finite(v) is not None for v in values)
        names = sorted({str(v) for v in values}, key=lambda s: (len(s), s))
        for state, group in _groups(having).items():
            x = [t["params"][key] for t in group]
            if not is_number:
                x = [names.index(str(value)) for value in x]
            _scatter(axes, state, x, group)
        if not is_number:
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.5)
        elif key in logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(key)
        if key == keys[0]:
            axes.set_ylabel(metric_label(metric))
            axes.legend()

    panels = [functools.partial(draw, key) for key in keys]
    return plots.grid(panels, columns=3, size=(3.6, 2.5), sharey=True)
