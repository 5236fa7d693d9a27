"""The report: complete, self-contained, escaped and reproducible."""

from __future__ import annotations

import html.parser
import pathlib
import re
from typing import Any

import pytest

from vaecf.reporting.report import write_report

HOSTILE = "\"'><script>alert(1)</script><img src=https://evil.example/x>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest; keeps tags, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes.get("id") for _, attributes in self.tags]
        self.ids = [name for name in ids if name]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def arguments(
    records: list[dict[str, Any]], results: dict[str, Any]
) -> dict[str, Any]:
    return {
        "title": "Mult-VAE on ml-1m",
        "config": {"seed": 98765, "model": {"latent": 200, "hidden": [600]}},
        "dataset": {
            "name": "ml-1m",
            "protocol": "paper",
            "counts": {"users": 6034, "interactions": 575272},
        },
        "records": records,
        "results": results,
        "environment": {"jax": "0.10.2", "device": "cpu"},
        "recommendations": [{"user": 1, "rows": []}],
        "model_name": "Mult-VAE",
    }


def _written(path: pathlib.Path, arguments: dict[str, Any]) -> str:
    write_report(path, **arguments)
    return path.read_text("utf-8")


def test_content(tmp_path: pathlib.Path, arguments: dict[str, Any]) -> None:
    source = _written(tmp_path / "new" / "report.html", arguments)
    assert source == _written(tmp_path / "again.html", arguments)
    page = Page(source)
    text = "\n".join(page.text)
    for fact in (
        "Summary",
        "Results",
        "Learning curves",
        "Dataset",
        "Configuration",
        "Environment",
        "Recommendations",
        "0.4012",
        "± 0.0061 s.e.",
        "3:12",
        "20,731 users/s",
        "575,272",
        "98765",
        "model.latent",
        "EASE 0.4207 ± 0.0061; popularity 0.2100 ± 0.0050",
        "500 users (3 left out",
    ):
        assert fact in text, fact
    # Learning curves, bars, throughput.
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert len(page.ids) == len(set(page.ids))
    # A baseline that was only tested says so beside the validation curve.
    assert {"EASE", "popularity (test)"} <= set(page.text)
    # Every colour in the plots follows the light or dark mode.
    svgs = "".join(re.findall(r"<svg.*?</svg>", source, re.S))
    assert "var(--blue,#0072b2)" in svgs
    assert not re.findall(r"(?:fill|stroke): (#\w+)", svgs)


def test_nothing_foreign_is_loaded_or_run(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    row = {"rank": 1, "item": HOSTILE, "title": HOSTILE, "score": -1}
    user = {"user": HOSTILE, "history": [HOSTILE, "Heat"], "rows": [row]}
    arguments |= {
        "title": HOSTILE,
        "model_name": HOSTILE,
        "config": {HOSTILE: HOSTILE},
        "dataset": {"name": HOSTILE, "protocol": HOSTILE},
        "environment": {"command": HOSTILE + "\x00\x1b[31m"},
        "recommendations": [user],
    }
    baselines = arguments["results"]["baselines"]
    baselines[HOSTILE] = baselines["EASE"]
    text = _written(tmp_path / "report.html", arguments)
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "base"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert str(value).startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "\x00" not in text
    assert "\x1b" not in text
    assert HOSTILE in page.text


@pytest.mark.parametrize("results", [{}, {"test": {}}, {"train": None}])
def test_a_run_without_results(
    tmp_path: pathlib.Path, results: dict[str, Any]
) -> None:
    empty: dict[str, Any] = {"config": {}, "dataset": {}, "environment": {}}
    arguments = {**empty, "title": "t", "records": [], "results": results}
    text = _written(tmp_path / "report.html", arguments)
    assert "No results yet." in Page(text).text
