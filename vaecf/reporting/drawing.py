"""How our plots look, and how they become SVG texts and PNG files.

matplotlib draws through its object-oriented interface: no pyplot, and no
backend is chosen. The same input gives the same bytes: ids are salted with
the plot's name and no date is written. Texts stay texts, so they can be
searched and read aloud. `COLOURS` are picked near the Okabe-Ito set, which
people with colour blindness tell apart; the report replaces them by others
in its dark mode.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vaecf.reporting.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee4",
    "blue": "#0072b2",
    "orange": "#c2500a",
    "green": "#00785a",
    "band": "#b9d9ec",
    "bar": "#9aa4af",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # Names may hold dollar signs.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_LABEL_INCHES = 0.15
_MARKED_POINTS = 30  # Curves with more points than this are plain lines.


def render(name: str, alt: str, draw: Callable[[], Figure]) -> str:
    """Draws in our style and returns an `<svg>` element.

    Ids are prefixed by the plot's name, so that several plots can stand in
    one HTML page.
    """
    import matplotlib

    buffer = io.StringIO()
    salted = {**_STYLE, "svg.hashsalt": f"vaecf-{name}"}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(salted), warnings.catch_warnings():
        # The browser has letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        draw().savefig(
            buffer,
            format="svg",
            metadata=nothing,
            transparent=True,
            bbox_inches="tight",
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip() + "\n"
    svg = re.sub(r"<[^>]+>", lambda tag: _with_prefix(tag[0], name), svg)
    label = html.escape(printable(alt))
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def render_png(draw: Callable[[], Figure]) -> bytes:
    """Draws in our style and returns a PNG file, on white."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(
            buffer,
            format="png",
            dpi=150,
            metadata={"Software": None},
            bbox_inches="tight",
        )
    return buffer.getvalue()


def _with_prefix(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|href="#)', rf"\1{name}-", tag)
    return tag.replace("url(#", f"url(#{name}-")


def canvas(rows: int, columns: int, width: float, height: float) -> Figure:
    """A figure of rows x columns plots, in inches; `figure.axes` is flat."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout)
    figure.subplots(rows, columns, squeeze=False)
    return figure


def curve(
    axes: Axes, x: Sequence[float], y: Sequence[float], gid: str, **style: Any
) -> None:
    """Draws a curve whose SVG group gets an id; few points are marked."""
    marker = "o" if len(x) <= _MARKED_POINTS else None
    axes.plot(x, y, gid=gid, marker=marker, markersize=3, **style)


def epoch_axis(axes: Axes, positions: Sequence[float]) -> None:
    """An axis over all positions, whole numbers at its ticks.

    Args:
      axes: the plot.
      positions: epochs or steps, not empty.
    """
    from matplotlib.ticker import MaxNLocator

    first, last = min(positions), max(positions)
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8, integer=True, min_n_ticks=1)
    )


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines beside their right ends, moved apart where they touch.

    Args:
      axes: a plot whose limits are final.
      labels: (height in data units, text, colour).
    """
    bottom, top = axes.get_ylim()
    grid = axes.get_subplotspec().get_gridspec()  # type: ignore[union-attr]
    figure_height = axes.figure.bbox.height / axes.figure.dpi
    # A line of text in axes heights; title and axis take a third of a panel.
    gap = _LABEL_INCHES / (0.67 * figure_height / grid.nrows)
    placed = -math.inf
    for value, text, colour in sorted(labels):
        share = (value - bottom) / (top - bottom) if top > bottom else 0.5
        placed = max(share, placed + gap)
        axes.text(
            1.02,
            placed,
            text,
            transform=axes.transAxes,
            color=colour,
            va="center",
            fontsize=8,
        )
