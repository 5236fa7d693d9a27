"""Plots: well-formed SVG that holds what was given, and nothing changing."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from vaecf.reporting.plots import (
    history_buckets,
    learning_curves,
    metrics_bars,
    throughput,
)
from vaecf.reporting.tables import results_rows

SVG = "{http://www.w3.org/2000/svg}"


def _groups(svg: str) -> dict[str, ElementTree.Element]:
    """Elements by id; ids are unique."""
    found: dict[str, ElementTree.Element] = {}
    for element in ElementTree.fromstring(svg).iter():
        name = element.get("id")
        if name is not None:
            assert name not in found
            found[name] = element
    return found


def _texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]


def _path_points(element: ElementTree.Element) -> list[tuple[float, float]]:
    """Points of the first path, by its M and L commands."""
    path = element.find(f"{SVG}path")
    assert path is not None
    tokens = path.attrib["d"].split()
    numbers = [float(t) for t in tokens if t not in "MLz"]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_learning_curves(records: list[dict[str, Any]]) -> None:
    svg = learning_curves(records, baselines={"EASE": 0.42, "pop": 0.21})
    groups = _groups(svg)
    prefix = "learning-curves-"
    for name in ("nll", "loss", "kl", "anneal", "validation", "best", "band"):
        assert prefix + name in groups
    assert f"{prefix}baseline-1" in groups
    assert f"{prefix}baseline-2" not in groups
    # One marker an epoch that was validated.
    uses = list(groups[f"{prefix}validation"].iter(f"{SVG}use"))
    assert len(uses) == 4
    # Of the two best validations, epochs 9 and 12, the earlier is marked.
    (best,) = groups[f"{prefix}best"].iter(f"{SVG}use")
    assert (best.get("x"), best.get("y")) == (
        uses[2].get("x"),
        uses[2].get("y"),
    )
    texts = _texts(svg)
    assert "Validation NDCG@100, best 0.4000 at epoch 9" in texts
    assert {"EASE", "pop", "epoch", "nats per user"} <= set(texts)


def test_a_line_of_numbers_is_drawn_as_a_line(
    records: list[dict[str, Any]],
) -> None:
    # The NLL falls by 10 an epoch: equal steps to the right and down.
    points = _path_points(
        _groups(learning_curves(records))["learning-curves-nll"]
    )
    first, last = points[0], points[-1]
    slope = (last[1] - first[1]) / (last[0] - first[0])
    assert slope > 0  # SVG's y grows downwards.
    for x, y in points:
        assert y == pytest.approx(first[1] + slope * (x - first[0]), abs=1e-3)


def test_a_denoising_autoencoder_has_no_kl_panels(
    records: list[dict[str, Any]],
) -> None:
    for record in records:
        record.pop("train/kl", None)
    groups = _groups(learning_curves(records))
    assert "learning-curves-nll" in groups
    assert "learning-curves-kl" not in groups


def test_gaps_and_single_points() -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "train/nll": 1.0},
        {"step": 2, "train/nll": None, "nonfinite": ["train/nll"]},
        {"step": 3, "train/nll": 2.0},
        {"step": 3, "validation/ndcg@100": 0.5},
    ]
    svg = learning_curves(records)
    assert "step" in _texts(svg)
    uses = _groups(svg)["learning-curves-nll"].iter(f"{SVG}use")
    assert len(list(uses)) == 2
    assert "learning-curves-best" in _groups(svg)
    # Nothing is said of epochs between the whole numbers.
    assert {"1", "2", "3"} <= set(_texts(svg))
    assert "1.5" not in _texts(svg)


def test_nothing_to_draw() -> None:
    assert learning_curves([]) == ""
    assert throughput([{"epoch": 1}]) == ""
    assert metrics_bars({"a": {"coverage": {"mean": 0.5}}}) == ""
    assert history_buckets([]) == ""


def test_metrics_bars(results: dict[str, Any]) -> None:
    svg = metrics_bars(results_rows(results, name="Mult-VAE"))
    bars = [n for n in _groups(svg) if n.count("-") == 3 and n[-1].isdigit()]
    # NDCG@100 of four models, Recall@20 of two; coverage has no better side.
    assert sorted(bars) == [
        "metrics-bars-0-0",
        "metrics-bars-0-1",
        "metrics-bars-0-2",
        "metrics-bars-0-3",
        "metrics-bars-1-0",
        "metrics-bars-1-1",
    ]
    assert {"0.4012", "0.4207", "planted truth"} <= set(_texts(svg))
    widths = {}
    for name in ("0-0", "0-2"):
        xs = [x for x, _ in _path_points(_groups(svg)[f"metrics-bars-{name}"])]
        widths[name] = max(xs) - min(xs)
    assert widths["0-0"] / widths["0-2"] == pytest.approx(
        0.40124 / 0.21, rel=1e-4
    )


def test_throughput(records: list[dict[str, Any]]) -> None:
    svg = throughput(records)
    assert "throughput-speed" in _groups(svg)
    # Speeds are 1,001 to 1,012.
    assert "Training speed, median 1,006 users/s" in _texts(svg)


def test_history_buckets() -> None:
    svg = history_buckets(
        [
            {"bucket": "1-9", "mean": 0.3, "stderr": 0.02, "users": 1200},
            {"bucket": "10-99", "mean": 0.4, "stderr": None, "users": 3},
            {"bucket": "none", "mean": None, "users": 0},
        ]
    )
    groups = _groups(svg)
    assert {"history-buckets-0", "history-buckets-1"} <= set(groups)
    assert "history-buckets-2" not in groups
    assert {"1-9", "1,200 users"} <= set(_texts(svg))


def test_hostile_names_are_text(records: list[dict[str, Any]]) -> None:
    name = '$\\frac{a}$ <script>alert(1)</script> & id="x" \x00'
    svg = learning_curves(records, baselines={name: 0.3})
    shown = name.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert shown in _texts(svg)
    assert "<script" not in svg


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_do_not_warn(
    records: list[dict[str, Any]],
) -> None:
    assert "千尋" in _texts(learning_curves(records, baselines={"千尋": 0.3}))


def test_bytes_do_not_change(records: list[dict[str, Any]]) -> None:
    svg = learning_curves(records, baselines={"EASE": 0.42})
    assert svg == learning_curves(records, baselines={"EASE": 0.42})
    assert "<!DOCTYPE" not in svg
    assert "<dc:date>" not in svg


_OTHER_PROCESS = """
import hashlib, sys
from vaecf.reporting import plots
import vaecf.reporting
heavy = {"matplotlib", "tensorboardX", "tqdm", "jax"} & set(sys.modules)
assert not heavy, heavy
records = [{"epoch": e, "train/users_per_second": 10.0 * e} for e in (1, 2, 3)]
svg = plots.throughput(records)
assert "matplotlib.pyplot" not in sys.modules
print(hashlib.sha256(svg.encode()).hexdigest())
"""


def test_other_processes_draw_the_same_and_import_cheaply() -> None:
    digests = [
        subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "PYTHONHASHSEED": seed,
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1]
