"""Plots of a sweep: the Axes hold the trials they were given."""

from __future__ import annotations

from typing import Any

from vaecf.reporting import plots, sweep_plots


def trial(number: int, value: float | None, state: str, **params: Any):
    return {
        "number": number,
        "value": value,
        "state": state,
        "params": {"model.latent": 10 * number, **params},
    }


TRIALS = [
    trial(0, 0.2, "complete", rate=0.1, hidden=(600, 300)),
    trial(1, None, "failed", rate=0.001, hidden=()),
    trial(2, 0.4, "complete", rate=0.01, hidden=()),
    trial(4, 0.1, "pruned", rate=0.5, hidden=(50,)),
    trial(5, 0.4, "complete", rate=0.02, hidden=(50,)),
    trial(6, None, "waiting"),
]


def points(axes, label: str) -> list[tuple[float, float]]:
    (line,) = [li for li in axes.get_lines() if li.get_label() == label]
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_history() -> None:
    figure = sweep_plots.history(TRIALS, metric="ndcg@100")
    data = plots.to_png(figure)
    assert data.startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert points(axes, "complete") == [(0, 0.2), (2, 0.4), (5, 0.4)]
    assert points(axes, "pruned") == [(4, 0.1)]
    so_far = [(0, 0.2), (2, 0.4), (5, 0.4), (6, 0.4)]
    assert points(axes, "best so far") == so_far
    # Of equals, the first.
    assert points(axes, "best") == [(2, 0.4)]
    assert "best 0.4000 in trial 2" in axes.get_title("left")


def test_slices() -> None:
    keys = ["model.latent", "rate", "hidden"]
    figure = sweep_plots.slices(
        TRIALS, keys, metric="ndcg@100", logarithmic={"rate"}
    )
    latent, rate, hidden = figure.axes
    assert points(latent, "complete") == [(0, 0.2), (20, 0.4), (50, 0.4)]
    scales = [a.get_xscale() for a in (latent, rate, hidden)]
    assert scales == ["linear", "log", "linear"]
    assert [a.get_xlabel() for a in (latent, rate, hidden)] == keys
    names = [text.get_text() for text in hidden.get_xticklabels()]
    assert names == ["()", "(50,)", "(600, 300)"]
    assert points(hidden, "complete") == [(2, 0.2), (0, 0.4), (1, 0.4)]


def test_five_plots_do_not_fill_two_rows() -> None:
    with plots.new_figure(5, columns=3) as figure:
        assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]


def test_importances() -> None:
    shares = {"a": 0.25, "b": 0.7, "c": 0.05}
    (axes,) = sweep_plots.importances(shares, metric="ndcg@100").axes
    # The largest on top: the y axis points down.
    assert axes.yaxis_inverted()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "a", "c"]
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.25, 0.05]
