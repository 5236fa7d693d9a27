"""Latency and throughput of queries, measured against the machine's memory.

    python experiments/benchmark/inference.py --json=out.json

A query goes the way that `Recommender.recommend` goes, from a history on the
host to ranked items on the host, over a model of MovieLens-20M's shape with
random weights. A single query cannot be faster than reading the output weights
once: the time of a sum over as many bytes, taken in turns with the queries, is
the floor it is shown beside.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", ["1", "8", "64", "512"], "Users a query."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "fp32", ("fp32", "bf16", "fp16", "tf32", "amp"), "Policy."
)
_ITEMS = flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
_K = flags.DEFINE_integer("k", 100, "List length.", lower_bound=1)
_HISTORY = flags.DEFINE_integer(
    "items_per_user", 10, "Items of a history.", lower_bound=1
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 300, "Queries of each size.", lower_bound=1
)


# Sums before and after the queries of each size.
_READS = 30


def _read_timings(n_bytes: int) -> list[float]:
    """Seconds to read so many bytes of the device's memory, several times."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(n_bytes // 4, jnp.float32)
    program = jax.jit(jnp.sum).lower(x).compile()
    jax.block_until_ready(program(x))
    timings = []
    for _ in range(_READS):
        began = time.perf_counter()
        jax.block_until_ready(program(x))
        timings.append(time.perf_counter() - began)
    return timings


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table and writes the JSON."""
    del argv
    import jax.numpy as jnp

    from experiments.benchmark import ceilings, machine, models
    from vaecf import workdir as workdir_lib
    from vaecf.errors import VaecfError
    from vaecf.serving import latency
    from vaecf.training import precision

    if not all(text.isdecimal() and int(text) for text in _BATCH_SIZES.value):
        raise VaecfError(
            f"--batch_sizes={','.join(_BATCH_SIZES.value)} must be numbers of "
            "users of at least 1"
        )
    model = models.random_model(_ITEMS.value, _PRECISION.value)
    bandwidth = ceilings.copy_bandwidth(1.0)
    policy = precision.policy(_PRECISION.value)
    decoder = model.params["output_kernel"]
    n_bytes = decoder.size * jnp.dtype(policy.dtype).itemsize
    reads = _read_timings(n_bytes)
    figures: dict[str, Any] = {}
    for size in map(int, _BATCH_SIZES.value):
        measured = latency.measure(
            model,
            batch_size=size,
            k=_K.value,
            items_per_user=_HISTORY.value,
            repeats=_REPEATS.value,
        )
        figures[str(size)] = {
            name.removeprefix(f"batch_{size}_"): value
            for name, value in measured.items()
        }
        shown = figures[str(size)]
        beside = reads[-_READS:] + (after := _read_timings(n_bytes))
        reads += after
        shown["floor"] = statistics.mean(beside)
        shown["fraction_of_floor"] = shown["floor"] / shown["mean_latency"]
        shown["p99_over_mean"] = shown["p99_latency"] / shown["mean_latency"]
        cli.log(
            f"batch {size:>6,}: {shown['mean_throughput']:>10,.0f} users/s, "
            f"mean {1e3 * shown['mean_latency']:.3f} ms, p50 "
            f"{1e3 * shown['p50_latency']:.3f}, p90 "
            f"{1e3 * shown['p90_latency']:.3f}, p95 "
            f"{1e3 * shown['p95_latency']:.3f}, p99 "
            f"{1e3 * shown['p99_latency']:.3f} "
            f"({shown['p99_over_mean']:.1f} x mean); reading the weights "
            f"{1e3 * shown['floor']:.3f} ms, {shown['fraction_of_floor']:.0%}"
        )
    floor = statistics.mean(reads)
    result = {
        "batches": figures,
        "items": _ITEMS.value,
        "k": _K.value,
        "items_per_user": _HISTORY.value,
        "repeats": _REPEATS.value,
        "copy_gb_per_second": bandwidth / 1e9,
        "read_gb_per_second": n_bytes / floor / 1e9,
        "floor_seconds": floor,
        "peak_rss_bytes": machine.peak_rss_bytes(),
        **models.describe(policy, model.setup.mesh),
    }
    cli.log(
        f"reading the output weights once takes {1e3 * floor:.3f} ms at "
        f"{n_bytes / floor / 1e9:.1f} GB/s; {result['device']}, "
        f"{result['precision']}"
    )
    if _JSON.value is not None:
        text = json.dumps(result, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


if __name__ == "__main__":
    cli.run(main)
