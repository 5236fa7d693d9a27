"""Prints the tables of docs/speed.md, docs/scaling.md and docs/sweeps.md.

    python experiments/benchmark/tables.py

Reads experiments/benchmark/results/*.json. Peers and ceilings were measured in
turns within the run that a row belongs to.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common

Result = dict[str, Any]

_PEAK = "peak_rss_bytes"
_CEILING = "{fraction_of_ceiling:.0%} of {ceiling_gflops:,.0f} GFLOP/s"


def _table(columns: Mapping[str, str], rows: Iterable[Result]) -> str:
    """Returns a Markdown table.

    Args:
      columns: a format string per column title.
      rows: the values of each row; `peak_rss_bytes` may be formatted as `gb`.
    """
    cells = []
    for row in rows:
        values = {**row, "gb": row.get(_PEAK, 0) / 1e9}
        cells.append([text.format(**values) for text in columns.values()])
    return common.markdown(columns, cells)


def training(*runs: Result) -> str:
    """Returns the table of runs of training.py and their peers."""
    rows = []
    for run in runs:
        ceiling = _CEILING.format(**run)
        rows.append({**run, "name": "vaecf", "ceiling": ceiling, "times": ""})
        for name, peer in run["peers"].items():
            library, _, variant = name.partition("_")
            title = f"PyTorch {peer['version'].partition('+')[0]}, {variant}"
            rows.append(
                {
                    **peer,
                    "name": title
                    if library == "torch"
                    else "vaecf, in turns with it",
                    "batch_size": run["batch_size"],
                    "precision": "bf16" if "bf16" in name else "fp32",
                    "ceiling": "",
                    "times": f"{peer['ratio']:.2f} ×",
                }
            )
    columns = {
        "": "{name}",
        "batch": "{batch_size:,}",
        "precision": "{precision}",
        "users/s": "{users_per_second:,.0f}",
        "decoder products": "{ceiling}",
        "vaecf is": "{times}",
        "peak memory": "{gb:.1f} GB",
    }
    return _table(columns, rows)


def evaluation(*runs: Result) -> str:
    """Returns the table of runs of evaluation.py."""
    columns = {
        "batch": "{batch_size:,}",
        "precision": "{precision}",
        "users/s": "{users_per_second:,.0f}",
        "decoder product": _CEILING,
        "ranking": "{ranking_seconds:.2f} s",
        "metrics": "{metrics_seconds:.2f} s",
        "peak memory": "{gb:.1f} GB",
    }
    return _table(columns, runs)


def inference(run: Result) -> str:
    """Returns the table of a run of inference.py."""
    rows = []
    for size, figures in run["batches"].items():
        ms = {
            name: f"{1e3 * figures[f'{name}_latency']:.2f} ms"
            for name in ("mean", "p50", "p99")
        }
        rows.append({**run, **figures, **ms, "size": int(size)})
    columns = {
        "users": "{size:,}",
        "precision": "{precision}",
        "users/s": "{mean_throughput:,.0f}",
        **{name: f"{{{name}}}" for name in ("mean", "p50", "p99")},
    }
    return _table(columns, rows)


def preparation(run: Result) -> str:
    """Returns the table of a run of preparation.py."""
    titles = {"vaecf": "vaecf", "pandas": f"pandas {run['versions']['pandas']}"}
    rows = [
        {
            **run[name],
            "title": title,
            "gib": run[name][_PEAK] / 2**30,
        }
        for name, title in titles.items()
    ]
    columns = {
        "": "{title}",
        "time": "{seconds:.1f} s",
        "peak memory": "{gib:.2f} GiB",
    }
    return _table(columns, rows)


def population(run: Result) -> str:
    """Returns the table of a run of population.py."""
    titles = {
        "processes": f"{run['members']} times `main.py --train`",
        "population": "one population",
    }
    columns = {
        "": "{title}",
        "total": "{seconds:.1f} s",
        "steps": "{training_seconds:.1f} s",
        "compilation of steps": "{compile_seconds:.1f} s",
        "start, validations, checkpoints": "{other_seconds:.1f} s",
    }
    rows = [{**run["ways"][way], "title": t} for way, t in titles.items()]
    return _table(columns, rows)


def large_catalogue(*runs: Result) -> str:
    """Returns the table of runs of large_catalogue.py."""
    rows = []
    for run in runs:
        keys = ("program_bytes_per_device", "peak_rss_bytes_initialised")
        gib = [run[key] / 2**30 for key in (*keys, _PEAK)]
        seconds = statistics.median(run["step_seconds"][1:] or [float("nan")])
        steps = len(run["losses"])
        rows.append({**run, "gib": gib, "per_step": seconds, "steps": steps})
    columns = {
        "items": "{items:,}",
        "units": "{hidden}-{latent}-{hidden}",
        "mesh": "{mesh[data]} × {mesh[item]}",
        "batch": "{batch_size:,}",
        "log(items)": "{log_items:.4f}",
        "first loss": "{losses[0]:.4f}",
        "last loss (step)": "{last_loss:.4f} ({steps})",
        "per step": "{per_step:.1f} s",
        "GiB per device, compiled": "{gib[0]:.2f}",
        "GiB of the process, initialised": "{gib[1]:.2f}",
        "peak": "{gib[2]:.2f}",
    }
    return _table(columns, [{**r, "last_loss": r["losses"][-1]} for r in rows])


def results(name: str) -> list[Result]:
    """Returns the runs of a benchmark, those of gpu.py included."""
    runs = [
        json.loads(path.read_text())
        for path in sorted(common.RESULTS.glob(f"{name}*.json"))
    ]
    gpu = common.RESULTS / "gpu.json"
    for run in json.loads(gpu.read_text())["runs"] if gpu.exists() else ():
        if run["arguments"][0] == name and "result" in run:
            runs.append(run["result"])
    return runs


def _by_device(runs: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns runs by device and versions, the largest batches first."""
    found: dict[str, list[Result]] = {}
    for run in sorted(runs, key=lambda run: -run.get("batch_size", 0)):
        where = "{device}, Python {versions[python]}, jax {versions[jax]}"
        found.setdefault(where.format(**run), []).append(run)
    return found


def main() -> None:
    """Prints every table as Markdown."""
    for where, runs in _by_device(results("training")).items():
        print(f"\nTraining, {where}:\n\n{training(*runs)}")
    for where, runs in _by_device(results("evaluation")).items():
        print(f"\nEvaluation, {where}:\n\n{evaluation(*runs)}")
    for where, runs in _by_device(results("inference")).items():
        for run in runs:
            print(f"\nQueries, {where}:\n\n{inference(run)}")
    for run in results("preparation"):
        print(f"\nPreparation, {run['processor']}:\n\n{preparation(run)}")
    for run in results("population"):
        print(f"\nPopulation, {run['processor']}:\n\n{population(run)}")
    runs = sorted(results("large"), key=lambda run: -run["items"])
    print(f"\nLarge catalogues:\n\n{large_catalogue(*runs)}")


if __name__ == "__main__":
    main()
