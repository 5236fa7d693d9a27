"""The report: complete, self-contained, escaped and reproducible."""

import base64
import html.parser
import re
import sys

import jax
import pytest

from vaecf.reporting.report import environment, write_report

HOSTILE = "\"'><script>alert(1)</script><img src=https://evil.example/x>"
SVG_URL = "data:image/svg+xml;base64,"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest; keeps tags, text and the SVG of images."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.text = []
        self.feed(text)
        self.close()
        assert self.open == []
        urls = [str(a["src"]) for tag, a in self.tags if tag == "img"]
        assert all(url.startswith(SVG_URL) for url in urls)
        data = [url.removeprefix(SVG_URL) for url in urls]
        self.images = [base64.b64decode(d).decode() for d in data]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def arguments(records, results):
    return {
        "config": {"seed": 98765, "model": {"latent": 200, "hidden": [600]}},
        "dataset": {
            "name": "ml-1m",
            "protocol": "paper",
            "counts": {"users": 6034, "interactions": 575272},
        },
        "records": records,
        "results": results,
        "environment": {
            **{"command": "python main.py --test", "jax": "0.10.2"},
            "device": "1 x cpu",
        },
        "recommendations": [{"user": 1, "rows": []}],
        "model": "mult_vae",
    }


def _written(path, arguments):
    write_report(path, **arguments)
    return path.read_text("utf-8")


def test_content(tmp_path, arguments):
    group = {"bucket": "tail", "items": 77, "mean": 0.1, "users": 5}
    arguments["results"]["item_popularity"] = [group]
    source = _written(tmp_path / "new" / "report.html", arguments)
    assert source == _written(tmp_path / "again.html", arguments)
    page = Page(source)
    text = "\n".join(page.text)
    headings = "Summary Results Dataset Configuration Environment"
    for fact in (
        *headings.split(),
        "Mult-VAE on ml-1m",
        "python main.py --test",
        "jax 0.10.2, device 1 x cpu",
        "Learning curves",
        "Recommendations",
        "0.4012",
        "± 0.0061 s.e.",
        "3:12",
        "20,731 users/s",
        "575,272",
        "98765",
        "model.latent",
        "EASE 0.4207 ± 0.0061",
        "500 users (3 left out",
        "recall: hits / min(k, held-out items)",
    ):
        assert fact in text, fact
    titles = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    image = dict(zip(titles, page.images, strict=True))
    assert titles[:2] == ["NDCG@100", "Recall@20"]
    assert ">planted truth 0.4655</text>" in image["NDCG@100"]
    # The baseline with a validation is drawn beside the validation curve.
    curve = image["Validation NDCG@100, best 0.4000 at epoch 9"]
    assert ">EASE</text>" in curve
    assert "users/s" in image["Training speed, median 1,006 users/s"]
    groups = image["NDCG@100 by popularity of the held-out items"]
    assert "tail (77 items)" in groups


def test_nothing_foreign_is_loaded_or_run(tmp_path, arguments):
    row = {"rank": 1, "item": HOSTILE, "title": HOSTILE, "score": -1}
    user = {"user": HOSTILE, "history": [HOSTILE, "Heat"], "rows": [row]}
    arguments |= {
        "model": HOSTILE,
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
    assert not tags & {"script", "link", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not set(attributes) & {"href", "action", "data"}
    assert "@import" not in text
    assert "url(" not in text
    for svg in page.images:
        assert "<script" not in svg
        assert not re.search(r"""(href="|url\()(?!#)""", svg)
    assert "\x00" not in text
    assert "\x1b" not in text
    assert HOSTILE in page.text


@pytest.mark.parametrize("results", [{}, {"test": {}}, {"train": None}])
def test_a_run_without_results(tmp_path, results):
    empty = {"config": {}, "environment": {}}
    empty["dataset"] = {"name": "d", "protocol": "p"}
    arguments = {**empty, "records": [], "results": results}
    text = _written(tmp_path / "report.html", arguments)
    assert "No results yet." in Page(text).text


def test_environment(monkeypatch):
    monkeypatch.setattr(
        sys, "orig_argv", ["/usr/bin/python", "a b.py", "db://me:secret@host/s"]
    )
    found = environment(jax.devices())
    assert found["command"] == "python 'a b.py' db://***@host/s"
    assert found["jax"] == jax.__version__
    assert found["device"].startswith("8 x ")
    program = ["/usr/bin/python3.11", "/usr/bin/vaecf", "train", "--test"]
    monkeypatch.setattr(sys, "orig_argv", program)
    assert environment()["command"] == "vaecf train --test"
