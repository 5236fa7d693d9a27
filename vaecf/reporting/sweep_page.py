"""Writes the page of a sweep.

A trial is a mapping with 'number', 'state' ('complete', 'pruned', ...),
'value', 'epochs', 'best_epoch', 'seconds', 'error' and 'params' ({setting:
value}); a space is what `vaecf.tuning.space` describes.
"""

from __future__ import annotations

import collections
import datetime
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting import page, plots, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Trials = Sequence[Mapping[str, Any]]
Space = Mapping[str, Mapping[str, Any]]

_MOST_ROWS = 100


def write_sweep(
    path: str | os.PathLike[str],
    *,
    model: str,
    about: str,
    metric: str,
    trials: Trials,
    space: Space,
    importances: Mapping[str, float],
    environment: Mapping[str, Any],
) -> None:
    """Writes the page of a sweep atomically. One trial must be complete.

    Args:
      model: title of the config, such as "rec_vae+linear".
      about: the dataset and its protocol.
      metric: the metric of the trials' values.
      importances: share of the settings in the variation of the value, by
        setting; may be empty.
      environment: see `report.environment`.

    Raises:
      VaecfError: the file cannot be written.
    """
    complete = [trial for trial in trials if trial["state"] == "complete"]
    complete.sort(key=lambda trial: -trial["value"])
    others = [trial for trial in trials if trial["state"] != "complete"]
    settings = sorted(space, key=lambda key: -importances.get(key, 0.0))
    wide = functools.partial(
        plot_parallel, complete, {key: space[key] for key in settings}, metric
    )
    panels: list[plots.Panel] = [
        functools.partial(plot_trials, complete, metric)
    ]
    for key in settings:
        share = importances.get(key)
        title = key if share is None else f"{key}, importance {share:.0%}"
        panels.append(
            functools.partial(
                plot_setting, complete, key, space[key], metric, title=title
            )
        )
    states = collections.Counter(trial["state"] for trial in trials)
    seconds = sum(trial["seconds"] or 0.0 for trial in trials)
    page.write(
        *(path, "sweep.html.jinja", environment),
        title=f"Sweep of {tables.model_name(model)}",
        about=f"{about}, validation users",
        metric=metric,
        best=complete[0],
        states=", ".join(f"{n} {state}" for state, n in states.items()),
        trials=[*complete, *others][:_MOST_ROWS],
        n_trials=len(trials),
        seconds=datetime.timedelta(seconds=round(seconds)),
        settings=settings,
        importances=importances,
        parallel=page.images([wide], height=4.0, width=9.8),
        panels=page.images(panels),
    )


def plot_trials(complete: Trials, metric: str, axes: Axes) -> None:
    """Plots the values of the trials in their order, and the best so far."""
    trials = sorted(complete, key=lambda trial: trial["number"])
    numbers = [trial["number"] for trial in trials]
    values = [trial["value"] for trial in trials]
    best = [max(values[: n + 1]) for n in range(len(values))]
    axes.plot(numbers, values, "o", color=plots.DARK, markersize=4)
    axes.step(numbers, best, where="post", color="C1")
    label = tables.metric_label(metric)
    axes.set_title(f"{label} by trial, and the best so far")
    axes.set(xlabel="number of the trial", ylabel=label)
    axes.locator_params("x", nbins=8, integer=True, min_n_ticks=1)


def plot_setting(
    complete: Trials,
    key: str,
    described: Mapping[str, Any],
    metric: str,
    axes: Axes,
    *,
    title: str = "",
) -> None:
    """Plots the values over one setting, with ticks at what was tried."""
    tried = [trial["params"][key] for trial in complete]
    values = [trial["value"] for trial in complete]
    places, ticks = _places(tried, described)
    axes.plot(places, values, "o", color="C0", markersize=4, alpha=0.7)
    axes.plot(places[0], values[0], "o", color="C1", markersize=7)
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.set_xlim(-0.06, 1.06)
    axes.set_title(title or key)
    axes.set_ylabel(tables.metric_label(metric))


def plot_parallel(
    complete: Trials, space: Space, metric: str, axes: Axes
) -> None:
    """Plots each trial as a line through its settings and its value.

    Every axis has ticks at values that were tried. The best trial comes first
    in `complete`, and is drawn thickest; darker lines are better.
    """
    import matplotlib

    label = tables.metric_label(metric)
    columns = {key: [t["params"][key] for t in complete] for key in space}
    columns[label] = [trial["value"] for trial in complete]
    placed = []
    for x, (key, tried) in enumerate(columns.items()):
        places, ticks = _places(tried, space.get(key, {}), most=10)
        placed.append(places)
        axes.axvline(x, color=plots.LIGHT, linewidth=1)
        for y, text in ticks.items():
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(x - 0.03, y, text, ha="right", va="center", fontsize=8,
                      bbox={**box, "alpha": 0.8}, zorder=4)  # fmt: skip
    colours = matplotlib.colormaps["viridis_r"]
    for n, line in reversed([*enumerate(zip(*placed, strict=True))]):
        axes.plot(
            line,
            color="C1" if n == 0 else colours(line[-1]),
            linewidth=2.6 if n == 0 else 1.2,
            zorder=3 if n == 0 else 2,
            alpha=1.0 if n == 0 else 0.7,
            clip_on=False,
        )
    names = [key.replace(".", ".\n") for key in columns]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) - 0.9)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(f"Settings and {label} of the complete trials")


def _places(
    tried: Sequence[Any], described: Mapping[str, Any], *, most: int = 5
) -> tuple[list[float], dict[float, str]]:
    """Returns places in [0, 1] of the values tried, and ticks {place: text}.

    Choices are evenly spaced. Among numbers, at most about `most` of those that
    were tried have a tick, the smallest and the largest among them.
    """
    if choices := described.get("choices"):
        order = {repr(choice): n for n, choice in enumerate(choices)}
        last = max(len(choices) - 1, 1)
        at = [order[repr(value)] / last for value in tried]
        texts = {
            order[repr(choice)] / last: plots.wrapped(str(choice))
            for choice in choices
        }
        return at, texts if len(choices) <= 2 * most else {}
    numbers = [math.log(v) if described.get("log") else v for v in tried]
    low, high = min(numbers), max(numbers)
    at = [(n - low) / (high - low) if high > low else 0.5 for n in numbers]
    ticks: dict[float, str] = {}
    for place, value in sorted(zip(at, tried, strict=True)):
        gap = min((abs(place - other) for other in ticks), default=1.0)
        if gap * most >= 1.0 and (place == max(at) or (1 - place) * most >= 1):
            is_whole = isinstance(value, int)
            ticks[place] = f"{value:,}" if is_whole else f"{value:.3g}"
    return at, ticks
