"""Links of README and docs, and the order of the pages; `make docs` does more."""

import re

import pytest
from oracles import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# Written by `make docs`.
MADE = ("_generated/", "_notebooks/")


def without_code(text):
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text):
    """Anchors of headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", h.lower()) for h in headings]
    return {h.replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_local_link_is_dead(page):
    text = without_code(page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link) or path.startswith(MADE):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_table_of_contents_has_every_page():
    folder = ROOT / "docs"
    index = (folder / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)
    lines = "".join(trees).splitlines()
    listed = {line for line in lines if line and line[0] not in ":_"}
    assert listed == {page.stem for page in folder.glob("*.md")} - {"index"}
