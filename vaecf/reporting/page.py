"""The HTML of the run's page: its style sheet and its small elements."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vaecf.reporting.drawing import COLOURS
from vaecf.reporting.tables import (
    Rows,
    best_of,
    cell_texts,
    metric_names,
    user_counts,
    users_text,
)
from vaecf.reporting.text import metric_label, printable

_LIGHT = {
    **COLOURS,
    "paper": "#ffffff",
    "card": "#f6f8fa",
}
_DARK = {
    "ink": "#e6e9ed",
    "muted": "#9aa5b1",
    "grid": "#30363d",
    "blue": "#58b0e8",
    "orange": "#f0894a",
    "green": "#3fc79a",
    "band": "#1d4a66",
    "bar": "#6b7682",
    "paper": "#14171c",
    "card": "#1c2128",
}

_LONG = 36  # Characters that fit beside a name.

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",
sans-serif}
main{max-width:1000px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px;padding-bottom:6px;
border-bottom:1px solid var(--grid)}
h3{font-size:15px;margin:20px 0 6px}
p{margin:6px 0}
.muted{color:var(--muted)}
.tiles{display:grid;gap:12px;margin:16px 0;
grid-template-columns:repeat(auto-fit,minmax(165px,1fr))}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:8px;
padding:12px 14px}
.tile b{display:block;font-size:24px;line-height:1.3;font-weight:650;
font-variant-numeric:tabular-nums}
.tile small{color:var(--muted);display:block;font-size:13px}
.tile.first{border-left:4px solid var(--blue)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;
font-variant-numeric:tabular-nums}
table.wide{width:100%}
caption{text-align:left;color:var(--muted);padding:0 0 8px}
th,td{padding:6px 12px;text-align:left;vertical-align:top;
border-bottom:1px solid var(--grid);overflow-wrap:anywhere}
thead th{color:var(--muted);font-weight:600;white-space:nowrap}
tbody th{font-weight:600;overflow-wrap:break-word;min-width:7em}
.n{text-align:right;white-space:nowrap}
.e{color:var(--muted);font-weight:400}
.best{font-weight:700}
.own{background:var(--card)}
.bound{font-style:italic}
figure{margin:12px 0;overflow-x:auto}
figure svg{display:block;width:100%;min-width:640px;height:auto}
figcaption{color:var(--muted);font-size:13px}
dl{display:grid;gap:0 24px;margin:0;font-size:14px;
grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}
dl div{display:flex;justify-content:space-between;gap:16px;padding:4px 0;
border-bottom:1px solid var(--grid);break-inside:avoid}
dt{color:var(--muted)}
dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0;
font-variant-numeric:tabular-nums}
dl div.long{grid-column:1/-1;justify-content:flex-start}
.long dt{white-space:nowrap}
.long dd{text-align:left}
.users{display:grid;gap:8px 40px;
grid-template-columns:repeat(auto-fill,minmax(min(430px,100%),1fr))}
.user{break-inside:avoid;min-width:0}
footer{margin-top:48px;color:var(--muted);font-size:13px}
@media print{main{max-width:none;padding:0}figure svg{min-width:0}
h2{break-after:avoid}
figure,table,.tile{break-inside:avoid}}
"""


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def style_sheet() -> str:
    """The page's CSS. Paper is white: dark mode is for screens only."""
    return (
        f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}\n"
        "@media screen and (prefers-color-scheme:dark){"
        f":root{{{_variables(_DARK)}}}}}" + _RULES
    )


def escape(text: object) -> str:
    """Text for HTML, in an element or a quoted attribute."""
    return html.escape(printable(text), quote=True)


def themed(svg: str) -> str:
    """A plot whose colours follow the page's light or dark mode."""
    for name, colour in COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name},{colour})")
    return svg


def figure(svg: str, caption: str = "") -> str:
    """A plot with a caption; nothing for an empty plot."""
    if not svg:
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{themed(svg)}{below}</figure>\n"


def section(title: str, body: str) -> str:
    """A section with its heading; nothing for an empty body."""
    if not body:
        return ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def tile(value: str, label: str, *details: str, first: bool = False) -> str:
    """A figure in large type, what it is and what belongs to it."""
    small = "".join(f"<small>{escape(d)}</small>" for d in details if d)
    name = "tile first" if first else "tile"
    return (
        f'<div class="{name}"><small>{escape(label)}</small>'
        f"<b>{escape(value)}</b>{small}</div>\n"
    )


def definitions(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values in columns, long values on lines of their own."""
    rows = []
    for name, value in pairs:
        kind = ' class="long"' if len(str(value)) > _LONG else ""
        rows.append(
            f"<div{kind}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        )
    return "<dl>\n" + "\n".join(rows) + "\n</dl>\n" if rows else ""


def results_html(
    rows: Rows,
    *,
    dataset: str,
    protocol: str,
    users_left_out: int | None = None,
    references: Collection[str] = (),
) -> str:
    """The results table; the arguments are those of `results_table`."""
    shown = metric_names(rows)
    if not shown:
        return ""
    best = {metric: best_of(rows, metric, references) for metric in shown}
    heads = "".join(
        f'<th scope="col" class="n">{escape(metric_label(m))}</th>'
        for m in shown
    )
    counts = user_counts(rows)
    lines = []
    for place, (model, cells) in enumerate(rows.items()):
        columns = []
        for metric in shown:
            mean, error = cell_texts(cells.get(metric))
            mark = "n best" if model in best[metric] else "n"
            after = f' <span class="e">{escape(error)}</span>' if error else ""
            columns.append(f'<td class="{mark}">{escape(mean)}{after}</td>')
        users = " / ".join(f"{n:,}" for n in counts[model])
        kind = "bound" if model in references else "own" if not place else ""
        row_class = f' class="{kind}"' if kind else ""
        lines.append(
            f'<tr{row_class}><th scope="row">{escape(model)}</th>'
            f'{"".join(columns)}<td class="n">{escape(users)}</td></tr>'
        )
    caption = (
        f"dataset {dataset}, protocol {protocol}, "
        f"{users_text(rows, users_left_out)}; mean ± standard error over "
        "users, largest mean in bold"
    )
    return (
        f'<div class="scroll"><table class="wide">\n'
        f"<caption>{escape(caption)}</caption>\n"
        f'<thead><tr><th scope="col">model</th>{heads}'
        '<th scope="col" class="n">users</th></tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>\n"
    )


def recommendations_html(
    records: Sequence[Mapping[str, Any]], *, shown_history: int = 10
) -> str:
    """Users with their histories and lists.

    Records are as in `tables.recommendations_table`.
    """
    users = "".join(_user_html(record, shown_history) for record in records)
    return f'<div class="users">\n{users}</div>\n' if users else ""


def _user_html(record: Mapping[str, Any], shown_history: int) -> str:
    history = [printable(h) for h in record.get("history", ())]
    named = "; ".join(history[:shown_history]) or "empty"
    if len(history) > shown_history:
        named += f"; and {len(history) - shown_history:,} more"
    rows = list(record.get("rows", ()))
    titled = any(row.get("title") is not None for row in rows)
    lines = []
    for row in rows:
        score = row.get("score")
        title = row.get("title")
        title_cell = f"<td>{escape(title if title is not None else '')}</td>"
        score_text = "–" if score is None else f"{float(score):.4f}"
        lines.append(
            f'<tr><td class="n">{escape(row["rank"])}</td>'
            f"<td>{escape(row['item'])}</td>"
            f"{title_cell if titled else ''}"
            f'<td class="n">{escape(score_text)}</td></tr>'
        )
    title_head = '<th scope="col">title</th>' if titled else ""
    return (
        f'<div class="user"><h3>User {escape(record["user"])}</h3>\n'
        f'<p class="muted">History: {escape(named)}</p>\n'
        '<div class="scroll"><table>\n<thead><tr>'
        '<th scope="col" class="n">rank</th><th scope="col">item</th>'
        f'{title_head}<th scope="col" class="n">score</th></tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div></div>\n"
    )
