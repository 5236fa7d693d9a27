"""Plots of a sweep: its history, the settings tried, their importances.

A trial is a mapping with "number", "state" ("complete", "pruned", ...),
"value" (of `metric`, larger is better) and "params" ({setting: value}).
"""

from __future__ import annotations

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
    "pruned": {"color": plots.LIGHT, "fillstyle": "none", "markersize": 4.5},
    "complete": {"color": "C0", "markersize": 4.5},
    "best": {"color": "C1", "markersize": 7},
}


def _frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """Returns the pruned, complete and best trials, the best one twice."""
    import pandas as pd

    frame = pd.DataFrame([{**t, **t["params"]} for t in trials])
    frame = frame.dropna(subset=["value"]).sort_values("number")
    complete = frame[frame["state"] == "complete"]
    best = complete.nlargest(1, "value").assign(state="best")
    return pd.concat([frame[frame["state"] == "pruned"], complete, best])


def _plot_points(frame: pd.DataFrame, x: str, axes: Axes) -> None:
    for state, marker in _MARKERS.items():
        group = frame[frame["state"] == state]
        axes.plot(group[x], group["value"], "o", label=state, **marker)
    axes.set_xlabel(x)


def history(trials: Sequence[Trial], *, metric: str) -> Figure:
    """Plots the value of every trial by its number, and the best so far.

    At least one trial must be complete.
    """
    frame = _frame(trials).rename(columns={"number": "trial"})
    by_trial = frame.set_index("trial")
    so_far = by_trial["value"][by_trial["state"] == "complete"].cummax()
    so_far[max(t["number"] for t in trials)] = so_far.max()
    best = frame.iloc[-1]
    with plots.new_figure(1, height=3.4) as figure:
        (axes,) = figure.axes
        _plot_points(frame, "trial", axes)
        label = "best so far"
        axes.step(so_far.index, so_far, where="post", color="C2", label=label)
        axes.set_title(
            f"Validation {metric_label(metric)} by trial, best "
            f"{best['value']:.4f} in trial {best['trial']}"
        )
        axes.set_ylabel(metric_label(metric))
        plots.integer_ticks(axes)
        axes.legend()
    return figure


def importances(shares: Mapping[str, float], *, metric: str) -> Figure:
    """Plots the share of each setting in the sum, 1, the largest on top."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    rows = {key: {"importance": {"mean": share}} for key, share in ordered}
    with plots.new_figure(1, height=1.1 + 0.3 * len(rows)) as figure:
        axes = plots.plot_metric(rows, "importance", figure.axes[0])
        axes.set_title(f"Importance for validation {metric_label(metric)}")
        axes.set_xlabel("share in reaching the best quarter (PED-ANOVA)")
    return figure


def slices(
    trials: Sequence[Trial],
    keys: Sequence[str],
    *,
    metric: str,
    logarithmic: Collection[str] = (),
) -> Figure:
    """Plots the metric by the value of each setting of `keys`.

    The settings of `logarithmic` get a logarithmic axis.
    """
    frame = _frame(trials)
    with plots.new_figure(len(keys), columns=3, sharey=True) as figure:
        for key, axes in zip(keys, figure.axes, strict=False):
            _plot_slice(frame.dropna(subset=[key]), key, axes)
            if key in logarithmic:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")
        figure.axes[0].set_ylabel(metric_label(metric))
        figure.axes[0].legend()
    return figure


def _plot_slice(frame: pd.DataFrame, key: str, axes: Axes) -> None:
    if all(finite(value) is not None for value in frame[key]):
        _plot_points(frame, key, axes)
        return
    # Layer sizes and names are categories, ordered by length and letter.
    names = sorted({*map(str, frame[key])}, key=lambda s: (len(s), s))
    places = [names.index(str(value)) for value in frame[key]]
    _plot_points(frame.assign(**{key: places}), key, axes)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
