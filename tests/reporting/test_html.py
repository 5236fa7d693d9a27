"""Cards of notebooks: the facts are there, and text stays text."""

from vaecf.reporting import html

HOSTILE = "<script>alert(1)</script> & \x00"


def test_card():
    rows = [{"item": "Heat", "score": 0.25}, {"item": HOSTILE}]
    text = html.card(HOSTILE, {"users": 6034, "seed": None, HOSTILE: 1}, rows)
    assert "<script" not in text and "\x00" not in text
    safe = (
        "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \N{REPLACEMENT CHARACTER}"
    )
    assert text.count(safe) == 3
    cells = "users</th>", "6,034</td>", "item</th>", "Heat</td>", "0.2500</td>"
    for cell in (*cells, "–</td>"):
        assert f'">{cell}' in text
    assert "seed" not in text
    assert html.card("t", {}).count("<table") == 0
