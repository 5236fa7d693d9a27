"""Pictures of a sweep, read back through the figures that were drawn."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from vaecf.reporting import sweep_plots


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


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, as they are rendered."""
    figures: list[Figure] = []
    render = sweep_plots.render_png

    def keep(draw):
        def draw_and_keep():
            figures.append(draw())
            return figures[-1]

        return render(draw_and_keep)

    monkeypatch.setattr(sweep_plots, "render_png", keep)
    return figures


def points(axes, label: str) -> list[tuple[float, float]]:
    (line,) = [li for li in axes.get_lines() if li.get_label() == label]
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_history(drawn) -> None:
    data = sweep_plots.history(TRIALS, metric="ndcg@100")
    assert data.startswith(b"\x89PNG")
    assert data == sweep_plots.history(TRIALS, metric="ndcg@100")
    axes = drawn[0].axes[0]
    assert points(axes, "complete") == [(0, 0.2), (2, 0.4), (5, 0.4)]
    assert points(axes, "pruned") == [(4, 0.1)]
    assert points(axes, "best so far") == [
        (0, 0.2),
        (2, 0.4),
        (5, 0.4),
        (6, 0.4),
    ]
    # Of equals, the first.
    assert points(axes, "best") == [(2, 0.4)]
    assert "NDCG@100 by trial, best 0.4000 in trial 2" in axes.get_title("left")


def test_slices(drawn) -> None:
    keys = ["model.latent", "rate", "hidden"]
    sweep_plots.slices(TRIALS, keys, metric="ndcg@100", logarithmic={"rate"})
    latent, rate, hidden = drawn[0].axes
    assert points(latent, "complete") == [(0, 0.2), (20, 0.4), (50, 0.4)]
    assert [a.get_xscale() for a in (latent, rate, hidden)] == [
        "linear",
        "log",
        "linear",
    ]
    assert [a.get_xlabel() for a in (latent, rate, hidden)] == keys
    names = [text.get_text() for text in hidden.get_xticklabels()]
    assert names == ["()", "(50,)", "(600, 300)"]
    assert points(hidden, "complete") == [(2, 0.2), (0, 0.4), (1, 0.4)]
    # Five parameters do not fill two rows.
    five = {f"k{n}": 0.1 * n for n in range(5)}
    many = [{**t, "params": five} for t in TRIALS]
    sweep_plots.slices(many, list(five), metric="ndcg@100")
    assert [axes.axison for axes in drawn[1].axes] == [True] * 5 + [False]


def test_importances(drawn) -> None:
    shares = {"a": 0.25, "b": 0.7, "c": 0.05}
    data = sweep_plots.importances(shares, metric="ndcg@100")
    assert data.startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    # The largest on top.
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "a", "b"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [0.05, 0.25, 0.7]
