"""The run's page: whole, self-contained, escaped and reproducible."""

from __future__ import annotations

import html.parser
import os
import pathlib
import re
from typing import Any

import pytest

from vaecf.errors import VaecfError
from vaecf.reporting.report import write_report

HOSTILE = "\"'><script>alert(1)</script><img src=https://evil.example/x>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps them with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [str(v) for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [str(v) for k, v in attrs if k == "id"]

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
        "recommendations": [
            {
                "user": HOSTILE,
                "history": [HOSTILE, "Heat"],
                "rows": [
                    {"rank": 1, "item": HOSTILE, "title": HOSTILE, "score": -1}
                ],
            }
        ],
        "model_name": "Mult-VAE",
    }


def _written(path: pathlib.Path, arguments: dict[str, Any]) -> str:
    write_report(path, **arguments)
    return path.read_text("utf-8")


def test_everything_is_there(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    arguments["recommendations"] = [{"user": 1, "rows": []}]
    source = _written(tmp_path / "new" / "report.html", arguments)
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", source)
    page = Page(source)
    text = "\n".join(page.text)
    for heading in (
        "Summary",
        "Results",
        "Learning curves",
        "Dataset",
        "Configuration",
        "Environment",
        "Recommendations",
    ):
        assert heading in page.text
    for fact in (
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


def test_nothing_foreign_is_loaded_or_run(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    hostile = {
        **arguments,
        "title": HOSTILE,
        "model_name": HOSTILE,
        "config": {HOSTILE: HOSTILE},
        "dataset": {"name": HOSTILE, "protocol": HOSTILE},
        "environment": {"command": HOSTILE + "\x00\x1b[31m"},
    }
    hostile["results"]["baselines"][HOSTILE] = hostile["results"]["baselines"][
        "EASE"
    ]
    text = _written(tmp_path / "report.html", hostile)
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


def test_same_bytes_again(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    first = _written(tmp_path / "a.html", arguments)
    assert first == _written(tmp_path / "b.html", arguments)


@pytest.mark.parametrize("results", [{}, {"test": {}}, {"train": None}])
def test_a_run_without_results(
    tmp_path: pathlib.Path, results: dict[str, Any]
) -> None:
    text = _written(
        tmp_path / "report.html",
        {
            "title": "t",
            "config": {},
            "dataset": {},
            "records": [],
            "results": results,
            "environment": {},
        },
    )
    assert "No results yet." in Page(text).text


def test_dark_mode_recolours_the_plots(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    text = _written(tmp_path / "report.html", arguments)
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--blue,#0072b2)" in svgs
    # Every colour in the plots follows the mode.
    bare = set(re.findall(r"(?:fill|stroke): (#\w+)", svgs))
    assert bare == set()


def test_an_old_report_survives_a_failure(
    tmp_path: pathlib.Path,
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VaecfError, match=r"report\.html.*No space left"):
        write_report(path, **arguments)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
