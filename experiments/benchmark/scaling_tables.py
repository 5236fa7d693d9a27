"""Counts of many meshes, and tables of them."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

from experiments.benchmark import hardware

Row = dict[str, Any]


def count(
    settings: Any,
    meshes: list[tuple[int, int]],
    weak: bool,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Compiles the step for every mesh.

    Args:
      settings: `compiled.Settings`.
      meshes: (data, item).
      weak: also with batch_size users for every device.
      log: gets a line a mesh.

    Returns:
      {'settings', 'strong': steps, 'weak': steps}.
    """
    from experiments.benchmark import compiled

    result: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
    for kind in ("strong", "weak")[: 1 + weak]:
        result[kind] = []
        for data, item in meshes:
            users = settings.batch_size
            users *= data * item if kind == "weak" else 1
            step = compiled.step(
                dataclasses.replace(settings, batch_size=users), data, item
            )
            result[kind].append(step)
            log(
                f"{data} x {item}: {step['flop'] / 1e9:,.0f} GFLOP, "
                f"{step['memory']['total'] / 1e9:.2f} GB, "
                f"{sent(step) / 1e6:,.1f} MB sent, a device and step"
            )
    return result


def sent(step: Row) -> float:
    """Bytes that a device sends in a step, in rings."""
    return sum(
        hardware.ring_share(c["op"], c["devices"]) * c["bytes"] * c["trips"]
        for c in step["collectives"]
    )


def devices(step: Row) -> int:
    """Of the mesh."""
    return step["mesh"]["data"] * step["mesh"]["item"]


def predict(
    result: Row, step: Row, name: str, **choice: bool
) -> hardware.Seconds:
    """Time of a step on hardware of that name."""
    settings = result["settings"]
    return hardware.seconds(
        step,
        hardware.HARDWARE[name],
        operand=4 if settings["precision"] == "fp32" else 2,
        item_block=settings["item_block"],
        choice=hardware.Choice(**choice),
    )


def best(result: Row, kind: str, name: str) -> list[Row]:
    """The fastest mesh for every number of devices."""
    found: dict[int, Row] = {}
    for step in result[kind]:
        n = devices(step)
        took = predict(result, step, name).total
        if n not in found or took < predict(result, found[n], name).total:
            found[n] = step
    return [found[n] for n in sorted(found)]


def _mesh(step: Row) -> str:
    return f"{step['mesh']['data']} × {step['mesh']['item']}"


def _table(head: str, rows: list[list[str]]) -> str:
    rule = "---|" * (head.count(" | ") + 1)
    lines = [f"| {head} |", f"|{rule}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def counted(result: Row, most: float | str = math.inf) -> str:
    """What meshes of at most so many devices compute, hold and send."""
    rows = []
    for step in result["strong"]:
        if devices(step) > float(most):
            continue
        moved = [c for c in step["collectives"] if c["devices"] > 1]
        rows.append(
            [
                _mesh(step),
                f"{step['flop'] / 1e9:,.1f}",
                f"{_over(step, 'data') / 1e6:,.2f}",
                f"{_over(step, 'item') / 1e6:,.2f}",
                str(sum(c["trips"] for c in moved)),
                f"{step['memory']['total'] / 1e9:.2f}",
                f"{step['memory_formula']['total'] / 1e9:.2f}",
                f"{step['memory_on_gpu']['total'] / 1e9:.2f}",
            ]
        )
    return _table(
        "users × items | GFLOP | MB over users | MB over items | collectives | "
        "GB compiled | GB by formula | GB by formula, GPU",
        rows,
    )


def _over(step: Row, axis: str) -> int:
    return sum(
        c["bytes"] * c["trips"]
        for c in step["collectives"]
        if c["axis"] == axis
    )


def scaling(result: Row, kind: str, name: str) -> str:
    """Predicted time on the fastest mesh of every number of devices."""
    rows = []
    steps = best(result, kind, name)
    alone = predict(result, steps[0], name).total / steps[0]["batch_size"]
    for step in steps:
        took = predict(result, step, name)
        rate = step["batch_size"] / took.total
        # Without one device in it, there is nothing to compare with.
        known = devices(steps[0]) == 1
        ratio = rate * alone
        rows.append(
            [
                str(devices(step)),
                _mesh(step),
                f"{step['batch_size']:,}",
                *(f"{1e3 * part:.2f}" for part in took),
                f"{1e3 * took.total:.2f}",
                f"{rate / 1e6:.1f} M",
                f"{ratio:.2f} ×" if known else "–",
                f"{ratio / devices(step):.0%}" if known else "–",
            ]
        )
    return _table(
        "devices | mesh | batch | products | passes | Adam | over users | "
        "over items | latency | step, ms | users/s | speed-up | efficiency",
        rows,
    )


CHOICES: list[tuple[str, dict[str, bool]]] = [
    ("as compiled", {}),
    ("gradients summed in bf16: `mesh.reduce=compute`", {"half": True}),
    ("output gradients summed during the encoder's", {"overlap": True}),
    ("Adam sharded over the users' axis: `mesh.zero`", {"zero": True}),
    ("both", {"half": True, "zero": True}),
    ("all three", {"half": True, "overlap": True, "zero": True}),
]


def choices(result: Row, name: str, n: int | str = 8) -> str:
    """What would change the strong scaling on n devices."""
    n = int(n)
    one = best(result, "strong", name)[0]
    base = predict(result, one, name).total * devices(one)
    steps = [s for s in result["strong"] if devices(s) == n]
    rows = [
        [
            title,
            *(
                f"{base / predict(result, step, name, **choice).total:.2f} ×"
                for step in steps
            ),
        ]
        for title, choice in CHOICES
    ]
    return _table(" | ".join([f"{n} devices", *map(_mesh, steps)]), rows)


def every_mesh(result: Row, kind: str, name: str, n: int) -> str:
    """Predicted time on all meshes of n devices."""
    rows = []
    for step in result[kind]:
        if devices(step) != n:
            continue
        took = predict(result, step, name)
        rows.append(
            [
                _mesh(step),
                *(f"{1e3 * part:.2f}" for part in took),
                f"{1e3 * took.total:.2f}",
                f"{step['batch_size'] / took.total / 1e6:.2f} M",
                f"{step['memory_on_gpu']['total'] / 1e9:.1f}",
            ]
        )
    return _table(
        "mesh | products | passes | Adam | over users | over items | latency | "
        "step, ms | users/s | GB a device",
        rows,
    )


def epoch(result: Row, name: str, n: int | str, users: int | str) -> str:
    """Time of an epoch of so many users on all meshes of at most n devices."""
    rows = []
    for step in result["strong"]:
        if devices(step) > int(n):
            continue
        parts = predict(result, step, name)
        took = parts.total
        rate = step["batch_size"] / took
        rows.append(
            [
                str(devices(step)),
                _mesh(step),
                f"{step['batch_size']:,}",
                f"{step['memory_on_gpu']['total'] / 1e9:.1f}",
                f"{sent(step) / 1e9:.2f}",
                *(f"{1e3 * part:.1f}" for part in parts),
                f"{1e3 * took:.0f}",
                f"{rate / 1e6:.2f} M",
                f"{int(users) / rate:,.0f} s",
            ]
        )
    return _table(
        "devices | mesh | batch | GB a device | GB sent | products | passes | "
        "Adam | over users | over items | latency | step, ms | users/s | epoch",
        rows,
    )


def text(result: Row) -> str:
    """All tables, for the terminal."""
    parts = [counted(result)]
    for name in hardware.HARDWARE if _predicted(result) else ():
        for kind in ("strong", "weak"):
            if kind in result:
                title = f"{hardware.HARDWARE[name].name}, {kind} scaling"
                parts += [title, scaling(result, kind, name)]
        for n in sorted({devices(step) for step in result["strong"]}):
            if n > 1:
                parts.append(every_mesh(result, "strong", name, n))
    return "\n\n".join(parts)


def _predicted(result: Row) -> bool:
    """Products in fp32 are no tensor core's: not predicted."""
    return result["settings"]["precision"] == "bf16"


def measured(result: Row) -> str:
    """A run of large_catalogue.py."""
    mesh = f"{result['mesh']['data']} × {result['mesh']['item']}"
    rows = [
        [
            f"{result['items']:,}",
            f"{result['hidden']}-{result['latent']}-{result['hidden']}",
            mesh,
            f"{result['batch_size']:,}",
            f"{result['log_items']:.4f}",
            f"{result['losses'][0]:.4f}",
            f"{result['losses'][-1]:.4f} ({len(result['losses'])})",
            f"{statistics.median(result['step_seconds'][1:]):.1f} s",
            f"{result['program_bytes_per_device'] / 2**30:.2f}",
            f"{result['formula_bytes_per_device'] / 2**30:.2f}",
            f"{result['peak_rss_bytes_initialised'] / 2**30:.2f}",
            f"{result['peak_rss_bytes'] / 2**30:.2f}",
        ]
    ]
    return _table(
        "items | units | mesh | batch | log(items) | first loss | "
        "last (step) | a step | GiB a device, compiled | by formula | "
        "GiB of the process, initialised | peak",
        rows,
    )


_MAKERS: dict[str, Callable[..., str]] = {
    "counted": counted,
    "scaling": scaling,
    "choices": choices,
    "epoch": epoch,
    "measured": measured,
}


def replace(page: str, load: Callable[[str], Row]) -> str:
    """The page with what is between its marks made anew.

    A mark is a line `<!-- table: result maker arguments -->`, such as
    `<!-- table: scaling choices h100 8 -->`; the table goes on until the next
    `<!-- end -->`.

    Args:
      page: Markdown.
      load: the JSON of a result of that name.
    """

    def fill(found: re.Match[str]) -> str:
        name, maker, *arguments = found[1].split()
        made = _MAKERS[maker](load(name), *arguments)
        return f"<!-- table: {found[1]} -->\n{made}\n<!-- end -->"

    return re.sub(
        r"<!-- table: (.*?) -->\n.*?<!-- end -->", fill, page, flags=re.S
    )
