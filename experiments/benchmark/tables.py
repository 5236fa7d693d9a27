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
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common

Result = dict[str, Any]


def training(*runs: Result) -> str:
    """Returns the table of runs of training.py and their peers."""
    rows = []
    for run in runs:
        batch_size = f"{run['batch_size']:,}"
        rows.append(
            (
                "vaecf",
                batch_size,
                run["precision"],
                f"{run['users_per_second']:,.0f}",
                _of_ceiling(run),
                "",
                f"{run['peak_rss_bytes'] / 1e9:.1f} GB",
            )
        )
        for name, peer in run["peers"].items():
            library, _, variant = name.partition("_")
            version = peer["version"].partition("+")[0]
            rows.append(
                (
                    f"PyTorch {version}, {variant}"
                    if library == "torch"
                    else "vaecf, in turns with it",
                    batch_size,
                    "bf16" if "bf16" in name else "fp32",
                    f"{peer['users_per_second']:,.0f}",
                    "",
                    f"{peer['ratio']:.2f} ×",
                    f"{peer['peak_rss_bytes'] / 1e9:.1f} GB",
                )
            )
    return common.markdown(
        "| | batch | precision | users/s | decoder products | vaecf is | peak "
        "memory |",
        rows,
    )


def _of_ceiling(run: Result) -> str:
    return (
        f"{run['fraction_of_ceiling']:.0%} of "
        f"{run['ceiling_gflops']:,.0f} GFLOP/s"
    )


def evaluation(*runs: Result) -> str:
    """Returns the table of runs of evaluation.py."""
    return common.markdown(
        "| batch | precision | users/s | decoder product | ranking | metrics | "
        "peak memory |",
        [
            (
                f"{run['batch_size']:,}",
                run["precision"],
                f"{run['users_per_second']:,.0f}",
                _of_ceiling(run),
                f"{run['ranking_seconds']:.2f} s",
                f"{run['metrics_seconds']:.2f} s",
                f"{run['peak_rss_bytes'] / 1e9:.1f} GB",
            )
            for run in runs
        ],
    )


def inference(run: Result) -> str:
    """Returns the table of a run of inference.py."""
    return common.markdown(
        "| users | precision | users/s | mean | p50 | p99 |",
        [
            (
                f"{int(size):,}",
                run["precision"],
                f"{figures['mean_throughput']:,.0f}",
                *(
                    f"{1e3 * figures[f'{name}_latency']:.2f} ms"
                    for name in ("mean", "p50", "p99")
                ),
            )
            for size, figures in run["batches"].items()
        ],
    )


def preparation(run: Result) -> str:
    """Returns the table of a run of preparation.py."""
    titles = {"vaecf": "vaecf", "pandas": f"pandas {run['versions']['pandas']}"}
    return common.markdown(
        "| | time | peak memory |",
        [
            (
                title,
                f"{run[name]['seconds']:.1f} s",
                f"{run[name]['peak_rss_bytes'] / 2**30:.2f} GiB",
            )
            for name, title in titles.items()
        ],
    )


def population(run: Result) -> str:
    """Returns the table of a run of population.py."""
    titles = {
        "processes": f"{run['members']} times `main.py --train`",
        "population": "one population",
    }
    keys = ("seconds", "training_seconds", "compile_seconds", "other_seconds")
    return common.markdown(
        "| | total | steps | compilation of steps | start, validations, "
        "checkpoints |",
        [
            (title, *(f"{run['ways'][way][key]:.1f} s" for key in keys))
            for way, title in titles.items()
        ],
    )


def large_catalogue(*runs: Result) -> str:
    """Returns the table of runs of large_catalogue.py."""
    rows = []
    for run in runs:
        losses, mesh = run["losses"], run["mesh"]
        per_step = statistics.median(run["step_seconds"][1:] or [float("nan")])
        rows.append(
            (
                f"{run['items']:,}",
                f"{run['hidden']}-{run['latent']}-{run['hidden']}",
                f"{mesh['data']} × {mesh['item']}",
                f"{run['batch_size']:,}",
                f"{run['log_items']:.4f}",
                f"{losses[0]:.4f}",
                f"{losses[-1]:.4f} ({len(losses)})",
                f"{per_step:.1f} s",
                f"{run['program_bytes_per_device'] / 2**30:.2f}",
                f"{run['peak_rss_bytes_initialised'] / 2**30:.2f}",
                f"{run['peak_rss_bytes'] / 2**30:.2f}",
            )
        )
    return common.markdown(
        "| items | units | mesh | batch | log(items) | first loss | last loss "
        "(step) | per step | GiB per device, compiled | GiB of the process, "
        "initialised | peak |",
        rows,
    )


def results(name: str) -> list[Result]:
    """Returns the runs of a benchmark, those of gpu.py included."""
    runs = [
        json.loads(path.read_text())
        for path in sorted(common.RESULTS.glob(f"{name}*.json"))
    ]
    gpu = common.RESULTS / "gpu.json"
    if gpu.exists():
        runs += [
            run["result"]
            for run in json.loads(gpu.read_text())["runs"]
            if run["arguments"][0] == name and "result" in run
        ]
    return runs


def by_device(runs: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns runs by device and versions, the largest batches first."""
    found: dict[str, list[Result]] = {}
    for run in sorted(runs, key=lambda run: -run["batch_size"]):
        found.setdefault(_where(run), []).append(run)
    return found


def _where(run: Result) -> str:
    versions = run["versions"]
    return (
        f"{run['device']}, Python {versions['python']}, jax {versions['jax']}"
    )


def main() -> None:
    """Prints every table as Markdown."""
    for where, runs in by_device(results("training")).items():
        print(f"\nTraining, {where}:\n\n{training(*runs)}")
    for where, runs in by_device(results("evaluation")).items():
        print(f"\nEvaluation, {where}:\n\n{evaluation(*runs)}")
    for run in results("inference"):
        print(f"\nQueries, {_where(run)}:\n\n{inference(run)}")
    for run in results("preparation"):
        where = f"{run['rows']:,} rows, {run['processor']}"
        print(f"\nPreparation, {where}:\n\n{preparation(run)}")
    for run in results("population"):
        print(f"\nPopulation, {run['processor']}:\n\n{population(run)}")
    if runs := sorted(results("large"), key=lambda run: -run["items"]):
        print(f"\nLarge catalogues:\n\n{large_catalogue(*runs)}")


if __name__ == "__main__":
    main()
