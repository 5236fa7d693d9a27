"""README's tables out of experiments/benchmark/results/*.json.

    python experiments/benchmark/tables.py

Every figure is that of one run, peers and ceiling measured in turns with it.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

RESULTS = pathlib.Path(__file__).with_name("results")


def training(result: dict[str, Any]) -> list[str]:
    """Rows of one run of training.py: ours, then its peers."""
    shown = (
        f"{result['batch_size']:,}",
        result["precision"],
        f"{result['users_per_second']:,.0f}",
        f"{result['fraction_of_ceiling']:.0%} of "
        f"{result['ceiling_gflops']:,.0f} GFLOP/s",
        "",
        f"{result['peak_rss_bytes'] / 1e9:.1f} GB",
    )
    rows = [f"| vaecf | {' | '.join(shown)} |"]
    for name, peer in result["peers"].items():
        shown = (
            f"{result['batch_size']:,}",
            "bf16" if "bf16" in name else "fp32",
            f"{peer['users_per_second']:,.0f}",
            "",
            f"{peer['ratio']:.2f} ×",
            f"{peer['peak_rss_bytes'] / 1e9:.1f} GB",
        )
        own = name.startswith("vaecf")
        title = (
            "vaecf"
            if own
            else f"PyTorch {peer['version'].split('+')[0]}, {name[6:]}"
        )
        rows.append(f"| {title} | {' | '.join(shown)} |")
    return rows


def evaluation(result: dict[str, Any]) -> str:
    """Row of one run of evaluation.py."""
    shown = (
        f"{result['batch_size']:,}",
        result["precision"],
        f"{result['users_per_second']:,.0f}",
        f"{result['fraction_of_ceiling']:.0%} of "
        f"{result['ceiling_gflops']:,.0f} GFLOP/s",
        f"{result['ranking_seconds']:.2f} s",
        f"{result['metrics_seconds']:.2f} s",
        f"{result['peak_rss_bytes'] / 1e9:.1f} GB",
    )
    return f"| {' | '.join(shown)} |"


def inference(result: dict[str, Any]) -> list[str]:
    """Rows of one run of inference.py."""
    return [
        f"| {int(size):,} | {result['precision']} | "
        f"{figures['mean_throughput']:,.0f} | "
        + " | ".join(
            f"{1e3 * figures[f'{name}_latency']:.2f} ms"
            for name in ("mean", "p50", "p99")
        )
        + " |"
        for size, figures in result["batches"].items()
    ]


def preparation(result: dict[str, Any]) -> list[str]:
    """Rows of one run of preparation.py."""
    return [
        f"| {title} | {result[name]['seconds']:.1f} s | "
        f"{result[name]['peak_rss_bytes'] / 2**30:.2f} GiB |"
        for name, title in (
            ("vaecf", "vaecf"),
            ("pandas", f"pandas {result['versions']['pandas']}"),
        )
    ]


def population(result: dict[str, Any]) -> list[str]:
    """Rows of one run of population.py."""
    keys = ("seconds", "training_seconds", "compile_seconds", "other_seconds")
    titles = {
        "processes": f"{result['members']} times `main.py --train`",
        "one_process": f"{result['members']} runs in one process",
        "population": "one population",
    }
    return [
        f"| {title} | "
        + " | ".join(f"{result['ways'][way][key]:.1f} s" for key in keys)
        + " |"
        for way, title in titles.items()
    ]


def large_catalogue(result: dict[str, Any]) -> str:
    """Row of one run of large_catalogue.py."""
    losses, mesh = result["losses"], result["mesh"]
    shown = (
        f"{result['items']:,}",
        f"{result['hidden']}-{result['latent']}-{result['hidden']}",
        f"{mesh['data']} × {mesh['item']}",
        f"{result['batch_size']:,}",
        f"{result['log_items']:.4f}",
        f"{losses[0]:.4f}",
        f"{losses[-1]:.4f} ({len(losses)})",
        f"{statistics.median(result['step_seconds'][1:]):.1f} s",
        f"{result['program_bytes_per_device'] / 2**30:.2f}",
        f"{result['peak_rss_bytes_initialised'] / 2**30:.2f}",
        f"{result['peak_rss_bytes'] / 2**30:.2f}",
    )
    return f"| {' | '.join(shown)} |"


def load(pattern: str) -> list[dict[str, Any]]:
    """Results whose file names match, in the order of their names."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(pattern))]


def results(name: str) -> list[dict[str, Any]]:
    """Runs of one benchmark, those on a GPU too."""
    runs = load(f"{name}*.json")
    for whole in load("gpu.json"):
        runs += [
            run["result"]
            for run in whole["runs"]
            if run["arguments"][0] == name and "result" in run
        ]
    return runs


def by_device(name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Runs of one benchmark, large batches first.

    Returns:
      [('AMD EPYC, 2 cores, python 3.11.7, jax 0.10.2', runs), ...].
    """
    runs = results(name)
    runs.sort(key=lambda run: -run["batch_size"])
    devices: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        devices.setdefault(run["device"], []).append(run)
    return [
        (", ".join((device, *_versions(here[0]))), here)
        for device, here in devices.items()
    ]


def _versions(run: dict[str, Any]) -> list[str]:
    return [f"{name} {run['versions'][name]}" for name in ("python", "jax")]


def main() -> None:
    """Prints Markdown."""
    for where, here in by_device("training"):
        print(f"\nTraining, {here[0]['shape']} shape, {where}:\n")
        print(
            "| | batch | precision | users/s | decoder products | vaecf is | "
            "peak memory |\n|---|---|---|---|---|---|---|"
        )
        for run in here:
            print("\n".join(training(run)))
    for where, here in by_device("evaluation"):
        counts = f"{here[0]['users']:,} users, {here[0]['items']:,} items"
        print(f"\nEvaluation, {counts}, {where}:\n")
        print(
            "| batch | precision | users/s | decoder product | ranking | "
            "metrics | peak memory |\n|---|---|---|---|---|---|---|"
        )
        print("\n".join(evaluation(run) for run in here))
    for run in results("inference"):
        where = ", ".join((run["device"], *_versions(run)))
        print(f"\nQueries, top {run['k']} of {run['items']:,}, {where}:\n")
        print("| users | precision | users/s | mean | p50 | p99 |")
        print("|---|---|---|---|---|---|")
        print("\n".join(inference(run)))
    for run in load("preparation*.json"):
        print(f"\nPreparation, {run['rows']:,} rows, {run['processor']}:\n")
        print("| | time | peak memory |\n|---|---|---|")
        print("\n".join(preparation(run)))
    for run in load("population*.json"):
        print(f"\nPopulation, {run['users']:,} users, {run['host']}:\n")
        print(
            "| | all | steps | compilation of steps | start, validations, "
            "checkpoints |\n|---|---|---|---|---|"
        )
        print("\n".join(population(run)))
    print(
        "\nLarge catalogues:\n\n| items | units | mesh | batch | log(items) "
        "| first loss | last loss (step) | per step | GiB per device, compiled "
        "| GiB of the process, initialised | peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for run in load("large-*.json"):
        print(large_catalogue(run))


if __name__ == "__main__":
    main()
