"""Plots of a sweep: its history, the settings tried, their importances.

A trial is a mapping with "number", "state" ("complete", "pruned", ...),
"value" (of the metric, larger is better) and "params" ({setting: value}).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting import plots
from vaecf.reporting.tables import metric_label
from vaecf.reporting.writers import finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trial = Mapping[str, Any]

_MARKERS: dict[str, dict[str, Any]] = {
    "pruned": {"color": plots.COLOURS["bar"], "fillstyle": "none", "ms": 4.5},
    "complete": {"color": plots.COLOURS["blue"], "ms": 4.5},
    "best": {"color": plots.COLOURS["orange"], "ms": 7},
}


def _groups(trials: Sequence[Trial]) -> dict[str, pd.DataFrame]:
    """Returns the pruned, the complete and the best trials that have a value.

    Of equal trials, the first is the best.
    """
    import pandas as pd

    frame = pd.DataFrame([{**t, **t["params"]} for t in trials])
    frame = frame.dropna(subset=["value"]).sort_values("number")
    groups = {s: frame[frame["state"] == s] for s in ("pruned", "complete")}
    return {**groups, "best": groups["complete"].nlargest(1, "value")}


def history(trials: Sequence[Trial], *, metric: str) -> Figure:
    """Plots the value of every trial by its number, and the best so far.

    Args:
      trials: at least one is complete.
      metric: name of the metric.
    """
    groups = _groups(trials)
    best_so_far = groups["complete"].set_index("number")["value"].cummax()
    best_so_far[max(t["number"] for t in trials)] = best_so_far.max()
    best = groups["best"].iloc[0]

    def draw(axes: Axes) -> None:
        for state, group in groups.items():
            x, y = group["number"], group["value"]
            axes.plot(x, y, "o", label=state, **_MARKERS[state])
        axes.step(
            best_so_far.index,
            best_so_far,
            where="post",
            color=plots.COLOURS["green"],
            label="best so far",
        )
        axes.set_title(
            f"Validation {metric_label(metric)} by trial, best "
            f"{best['value']:.4f} in trial {best['number']}"
        )
        axes.set(xlabel="trial", ylabel=metric_label(metric))
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

    groups = _groups(trials)

    def draw(key: str, axes: Axes) -> None:
        values = [v for group in groups.values() for v in group[key].dropna()]
        is_number = all(finite(v) is not None for v in values)
        # Layer sizes and names are categories, ordered by length and letter.
        names = sorted({str(v) for v in values}, key=lambda s: (len(s), s))
        for state, group in groups.items():
            x = group[key].dropna()
            y = group["value"][x.index]
            if not is_number:
                x = x.map(lambda value: names.index(str(value)))
            axes.plot(x, y, "o", label=state, **_MARKERS[state])
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
