"""Pictures of a sweep, as PNG: its history, importances, slices.

A trial is a mapping with "number", "state" ("complete", "pruned", ...),
"value" (of the metric, more is better) and "params" (key to value).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting.drawing import COLOURS, canvas, epoch_axis, render_png
from vaecf.reporting.text import finite, metric_label, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trial = Mapping[str, Any]


def _with_value(trials: Sequence[Trial], state: str) -> list[Trial]:
    return [
        t
        for t in trials
        if t["state"] == state and finite(t["value"]) is not None
    ]


def _best(trials: Sequence[Trial]) -> Trial | None:
    complete = _with_value(trials, "complete")
    return max(complete, key=lambda t: (t["value"], -t["number"]), default=None)


def _points(axes: Axes, x: Sequence[Any], y: Sequence[Any], kind: str) -> None:
    """Complete trials filled, pruned ones hollow, the best one orange."""
    style: dict[str, dict[str, Any]] = {
        "complete": {"color": COLOURS["blue"], "markersize": 4.5},
        "pruned": {
            "markerfacecolor": "none",
            "markeredgecolor": COLOURS["bar"],
            "markersize": 4.5,
        },
        "best": {"color": COLOURS["orange"], "markersize": 7},
    }
    axes.plot(x, y, linestyle="none", marker="o", label=kind, **style[kind])


def history(trials: Sequence[Trial], *, metric: str) -> bytes:
    """Every trial's value by its number, and the best so far.

    Args:
      trials: at least one is complete.
      metric: name of what was maximised.

    Returns:
      A PNG file.
    """

    def draw() -> Figure:
        figure = canvas(1, 1, 8.0, 3.4)
        axes = figure.axes[0]
        for state in ("pruned", "complete"):
            some = _with_value(trials, state)
            x = [t["number"] for t in some]
            if some:
                _points(axes, x, [t["value"] for t in some], state)
        so_far: list[tuple[int, float]] = []
        for trial in sorted(
            _with_value(trials, "complete"), key=lambda t: t["number"]
        ):
            top = max(
                trial["value"], so_far[-1][1] if so_far else -float("inf")
            )
            so_far.append((trial["number"], top))
        last = max(t["number"] for t in trials)
        so_far.append((last, so_far[-1][1]))
        axes.step(
            *zip(*so_far, strict=True),
            where="post",
            color=COLOURS["green"],
            label="best so far",
        )
        best = _best(trials)
        assert best is not None
        _points(axes, [best["number"]], [best["value"]], "best")
        epoch_axis(axes, [t["number"] for t in trials])
        axes.set_xlabel("trial")
        axes.set_ylabel(printable(metric_label(metric)))
        axes.set_title(
            printable(
                f"Validation {metric_label(metric)} by trial, best "
                f"{best['value']:.4f} in trial {best['number']}"
            )
        )
        _legend(axes)
        return figure

    return render_png(draw)


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def importances(shares: Mapping[str, float], *, metric: str) -> bytes:
    """Share of each parameter in the differences between trials.

    Args:
      shares: key to a number; they sum to 1.
      metric: name of what was maximised.

    Returns:
      A PNG file.
    """
    ordered = sorted(shares.items(), key=lambda item: item[1])

    def draw() -> Figure:
        figure = canvas(1, 1, 8.0, 1.1 + 0.3 * len(ordered))
        axes = figure.axes[0]
        places = range(len(ordered))
        values = [value for _, value in ordered]
        axes.barh(places, values, height=0.62, color=COLOURS["blue"])
        reach = max(values) or 1.0
        for place, value in zip(places, values, strict=True):
            axes.text(
                value + 0.01 * reach,
                place,
                f"{value:.2f}",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(places, [printable(key) for key, _ in ordered])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.1 * reach)
        axes.set_xlabel("share in reaching the best quarter (PED-ANOVA)")
        axes.set_title(
            f"What decides validation {printable(metric_label(metric))}"
        )
        return figure

    return render_png(draw)


def slices(
    trials: Sequence[Trial],
    keys: Sequence[str],
    *,
    metric: str,
    logarithmic: Collection[str] = (),
) -> bytes:
    """The value by each parameter, a small plot each.

    Args:
      trials: at least one is complete.
      keys: the parameters.
      metric: name of what was maximised.
      logarithmic: keys with a logarithmic axis.

    Returns:
      A PNG file.
    """

    def draw() -> Figure:
        columns = min(3, len(keys))
        rows = -(-len(keys) // columns)
        figure = canvas(rows, columns, 3.3 * columns + 0.9, 2.5 * rows)
        for number, axes in enumerate(figure.axes):
            if number >= len(keys):
                axes.set_axis_off()
                continue
            _slice(axes, trials, keys[number], keys[number] in logarithmic)
            axes.set_xlabel(printable(keys[number]))
            if number % columns == 0:
                axes.set_ylabel(printable(metric_label(metric)))
            else:  # the same points, so the same heights
                axes.set_yticklabels([])
        _legend(figure.axes[columns - 1])
        return figure

    return render_png(draw)


def _slice(
    axes: Axes, trials: Sequence[Trial], key: str, logarithmic: bool
) -> None:
    having = [t for t in trials if key in t["params"]]
    values = [t["params"][key] for t in having]
    named = any(isinstance(v, bool) or finite(v) is None for v in values)
    # Names and sizes of layers stand side by side, in an order of their own.
    names = sorted({str(v) for v in values}, key=lambda s: (len(s), s))

    def place(trial: Trial) -> Any:
        value = trial["params"][key]
        return names.index(str(value)) if named else value

    for state in ("pruned", "complete"):
        if some := _with_value(having, state):
            _points(
                axes, [*map(place, some)], [t["value"] for t in some], state
            )
    if (best := _best(having)) is not None:
        _points(axes, [place(best)], [best["value"]], "best")
    if named:
        axes.set_xticks(range(len(names)), [printable(n) for n in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif logarithmic:
        _log_axis(axes)


def _log_axis(axes: Axes) -> None:
    """Powers of ten as plain numbers; our style draws no mathematics."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
