"""Latency and throughput of queries, beside the machine's memory bandwidth.

    python experiments/benchmark/inference.py --json=out.json

A query takes the path of `Recommender.recommend`, from a history on the host to
ranked items on the host, with a random model of MovieLens-20M's shape. A single
query cannot be faster than reading the output weights once. The floor is the
time to sum as many bytes, measured in turns with the queries.
"""

from __future__ import annotations

import pathlib
import statistics
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common
from vaecf import cli

FLAGS = flags.FLAGS
common.define_flags(batch_size=500, repeats=300)
flags.DEFINE_list("batch_sizes", ["1", "8", "64", "512"], "Users per query.")
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
flags.DEFINE_integer("k", 100, "List length.", lower_bound=1)
flags.DEFINE_integer("items_per_user", 10, "Items of a history.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Compiles and measures."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmark import workloads
    from vaecf.serving import latency

    config = common.config_from_flags()
    model = workloads.random_model(config, FLAGS.items)
    dtype = jnp.dtype(model.module.dtype)
    n_bytes = model.params["output_kernel"].size * dtype.itemsize
    weights = jnp.ones(n_bytes // 4, jnp.float32)
    read = jax.jit(jnp.sum).lower(weights).compile()
    reads: list[float] = []
    batches = {}
    for size in map(int, FLAGS.batch_sizes):
        reads += common.timings(lambda: read(weights), 0.2)
        measured = latency.measure(
            model,
            batch_size=size,
            k=FLAGS.k,
            items_per_user=FLAGS.items_per_user,
            repeats=FLAGS.repeats,
        )
        batches[str(size)] = {
            name.removeprefix(f"batch_{size}_"): value
            for name, value in measured.items()
        }
    floor = statistics.mean(reads)
    cli.log(f"reading the output weights once takes {1e3 * floor:.3f} ms")
    result = {
        "batches": batches,
        "read_gb_per_second": n_bytes / floor / 1e9,
        "floor_seconds": floor,
        **common.describe(config, model.mesh),
    }
    common.report("inference", result)


if __name__ == "__main__":
    cli.run(main)
