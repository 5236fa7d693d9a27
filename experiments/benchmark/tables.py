"""Prints the tables of docs/speed.md and docs/scaling.md.

    python experiments/benchmark/tables.py

Reads experiments/benchmark/results/*.json.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

Result = dict[str, Any]

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

_SPEED = {
    "batch": "{batch_size:,}",
    "precision": "{precision}",
    "users/s": "{users_per_second:,.0f}",
}
_CEILING = "{fraction_of_ceiling:.0%} of {ceiling_gflops:,.0f} GFLOP/s"
_PEAK = {"peak memory": "{gb:.1f} GB"}

# The format of every column, by benchmark and title. `_rows` makes the values.
COLUMNS = {
    "training": {
        "": "{name}",
        "items": "{items:,}",
        **_SPEED,
        "decoder products": "{ceiling}",
        "vaecf is": "{times}",
        **_PEAK,
    },
    "evaluation": {
        **_SPEED,
        "decoder product": _CEILING,
        "ranking": "{ranking_seconds:.2f} s",
        "metrics": "{metrics_seconds:.2f} s",
        **_PEAK,
    },
    "inference": {
        "users": "{size:,}",
        "precision": "{precision}",
        "users/s": "{mean_throughput:,.0f}",
        "mean": "{ms[mean]:.2f} ms",
        "p50": "{ms[p50]:.2f} ms",
        "p99": "{ms[p99]:.2f} ms",
    },
    "populations": {
        "members": "{size:,}",
        "precision": "{precision}",
        "users/s": "{users_per_second:,.0f}",
        "of one member": "{times:.2f} ×",
    },
    "gpu_program": {
        "program": "{program}",
        "precision": "{precision}",
        "input": "{input}",
        "users × items": "{mesh[data]} × {mesh[item]}",
        "kernels": "{kernels}",
        "passes": "{passes}",
        "GB": "{moved:.1f}",
        "GB without products": "{others:.1f}",
        "GB of temporaries": "{temporary:.2f}",
        "predicted": "{ms:.2f} ms",
        "users/s predicted": "{predicted_users_per_second:,.0f}",
    },
    "preparation": {
        "": "{name}",
        "time": "{seconds:.1f} s",
        "peak memory": "{gib:.2f} GiB",
    },
    "large": {
        "items": "{items:,}",
        "units": "{hidden}-{latent}-{hidden}",
        "mesh": "{mesh[data]} × {mesh[item]}",
        "batch": "{batch_size:,}",
        "log(items)": "{log_items:.4f}",
        "first loss": "{losses[0]:.4f}",
        "last loss (step)": "{last_loss:.4f} ({steps})",
        "per step": "{per_step:.1f} s",
        "GiB per device, compiled": "{compiled_gib:.2f}",
        "GiB of the process, initialised": "{initialised_gib:.2f}",
        "peak": "{gib:.2f}",
    },
}


def _rows(benchmark: str, run: Result) -> Iterable[Result]:
    """Yields the rows of a run; values that it lacks come from the run."""
    if benchmark == "training":
        model = run.get("config", {}).get("model", {})
        name = f"vaecf, {model['name']}" if model else "vaecf"
        if model.get("input", "auto") != "auto":
            name += f", {model['input']} input"
        yield {"name": name, "ceiling": _CEILING.format(**run), "times": ""}
        for peer, figures in run["peers"].items():
            version = figures["version"].partition("+")[0]
            torch = f"PyTorch {version}, {peer.removeprefix('torch_')}"
            own = peer.startswith("vaecf")
            yield {
                **figures,
                "name": "vaecf, in turns with it" if own else torch,
                "precision": "bf16" if "bf16" in peer else "fp32",
                "ceiling": "",
                "times": f"{figures['ratio']:.2f} ×",
            }
    elif benchmark == "inference":
        for size, figures in run["batches"].items():
            quantiles = ("mean", "p50", "p99")
            ms = {q: 1e3 * figures[f"{q}_latency"] for q in quantiles}
            yield {**figures, "size": int(size), "ms": ms}
    elif benchmark == "populations":
        one = next(iter(run["populations"].values()))["users_per_second"]
        for size, figures in run["populations"].items():
            times = figures["users_per_second"] / one
            yield {**figures, "size": int(size), "times": times}
    elif benchmark == "gpu_program":
        for name, figures in run["programs"].items():
            shape = f"{figures['users']:,} users, {run['items']:,} items"
            yield {
                **figures,
                "program": f"{run['model']} {name}, {shape}",
                "moved": figures["bytes"] / 1e9,
                "others": figures["bytes_without_products"] / 1e9,
                "temporary": figures["temporary_bytes"] / 1e9,
                "ms": 1e3 * figures["predicted_seconds"],
            }
    elif benchmark == "preparation":
        yield {**run["vaecf"], "name": "vaecf"}
        yield {**run["pandas"], "name": f"pandas {run['versions']['pandas']}"}
    elif benchmark == "large":
        later = run["step_seconds"][1:] or run["step_seconds"]
        yield {
            "last_loss": run["losses"][-1],
            "steps": len(run["losses"]),
            "per_step": statistics.median(later),
            "compiled_gib": run["program_bytes_per_device"] / 2**30,
            "initialised_gib": run["peak_rss_bytes_initialised"] / 2**30,
        }
    else:
        yield {}


def table(benchmark: str, runs: Iterable[Result]) -> str:
    """Returns the Markdown table of runs of a benchmark, a key of `COLUMNS`."""
    columns, cells = COLUMNS[benchmark], []
    for run in runs:
        for row in _rows(benchmark, run):
            values = {"peak_rss_bytes": 0, **run, **row}
            peak = values["peak_rss_bytes"]
            values |= {"gb": peak / 1e9, "gib": peak / 2**30}
            cells.append([text.format(**values) for text in columns.values()])
    head, *body = (f"| {' | '.join(row)} |" for row in (columns, *cells))
    rule = "|" + "---|" * len(columns)
    return "\n".join([head.replace("|  |", "| |"), rule, *body])


def main() -> None:
    """Prints a table for every benchmark and device, large runs first."""

    def size(run: Result) -> tuple[int, int]:
        return run.get("items", 0), run.get("batch_size", 0)

    for benchmark in COLUMNS:
        paths = sorted(RESULTS.glob(f"{benchmark}*.json"))
        runs = [json.loads(path.read_text()) for path in paths]
        runs.sort(key=size, reverse=True)
        for device in dict.fromkeys(run["device"] for run in runs):
            here = [run for run in runs if run["device"] == device]
            print(f"\n{benchmark}, {device}\n\n{table(benchmark, here)}")


if __name__ == "__main__":
    main()
