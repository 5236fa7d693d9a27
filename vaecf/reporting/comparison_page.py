"""Writes the page of a comparison of runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vaecf.reporting import page, plots, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_comparison(
    path: str | os.PathLike[str],
    compared: Mapping[str, Any],
    *,
    environment: Mapping[str, Any],
) -> None:
    """Writes the page of a comparison atomically.

    Args:
      compared: the result of `vaecf.evaluation.compare.compare`.
      environment: see `report.environment`.

    Raises:
      VaecfError: the file cannot be written.
    """
    names = {name: tables.model_name(name) for name in compared["groups"]}
    metric, dataset = compared["metric"], compared["dataset"]
    about = [f"{k} {compared[k]}" for k in ("dataset", "protocol") if dataset]
    about.append(
        tables.number_of_users(compared["users"], compared["left_out"])
    )
    differences = {
        names[name]: found for name, found in compared["comparisons"].items()
    }
    reference = names[compared["reference"]]

    def plot_forest(axes: Axes) -> None:
        plot_differences(differences, axes, metric=metric, reference=reference)

    def plot_lengths(axes: Axes) -> None:
        models = {
            names[name]: group["history_length"]
            for name, group in compared["groups"].items()
        }
        of = "items in the history"
        plots.plot_groups(models, axes, metric=metric, of=of)

    height = 1.0 + 0.36 * len(differences)
    forest = [plot_forest] if differences else []
    page.write(
        *(path, "comparison.html.jinja", environment),
        title=f"Comparison of {len(names)} models"
        + (f" on {dataset}" if dataset else ""),
        about=", ".join(about),
        compared=compared,
        names=names,
        metric=metric,
        reference=reference,
        rows={n: g["metrics"] for n, g in compared["groups"].items()},
        differences=differences,
        forest=page.images(forest, height=height),
        lengths=page.images([plot_lengths], height=3.0),
    )


def plot_differences(
    differences: Mapping[str, Mapping[str, Any]],
    axes: Axes,
    *,
    metric: str,
    reference: str,
) -> None:
    """Plots paired differences with their intervals, as a forest plot.

    Models whose interval lacks zero are highlighted.

    Args:
      differences: by model, the fields of `significance.Paired`.
      reference: name of the model that the others are compared with.
    """
    names = tables.short_names([*differences, reference])
    for place, found in enumerate(differences.values()):
        mean, low, high = (found[k] for k in ("difference", "low", "high"))
        is_clear = low > 0 or high < 0
        axes.errorbar(
            *(mean, place),
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            markersize=5,
            color="C0" if is_clear else plots.DARK,
            markerfacecolor="C0" if is_clear else "white",
        )
    axes.axvline(0, color=plots.DARK, linewidth=1, linestyle="--")
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_yticks(
        range(len(differences)), [plots.wrapped(names[n]) for n in differences]
    )
    axes.grid(visible=False, axis="y")
    label = tables.metric_label(metric)
    axes.set_title(f"{label} minus that of {names[reference]}")
    axes.set_xlabel("mean over users, 95 % interval")
