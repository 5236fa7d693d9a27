"""A few real training steps with a catalogue of millions of items.

    python experiments/benchmark/large_catalogue.py --json=out.json \\
        --items=10000000 --devices=8 --set=mesh.item=8 \\
        --set='model.hidden=(16,)' --batch_size=64

Runs on a CPU that stands in for all devices: it shows that a step fits, not its
speed. Items are drawn uniformly, so that the loss per interaction starts at
log(items), and falls because all steps train on the same batch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import statistics
import sys
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, machine
from vaecf import cli

FLAGS = flags.FLAGS
common.define_flags(batch_size=500)
flags.DEFINE_integer("items", 1_000_000, "Items.", lower_bound=1)
flags.DEFINE_integer("devices", 1, "Virtual CPU devices.", lower_bound=1)
flags.DEFINE_integer("steps", 4, "Training steps.", lower_bound=1)
flags.DEFINE_integer("history", 40, "Interactions per user.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Takes the steps and reports them."""
    import jax

    with contextlib.suppress(RuntimeError):  # the devices have started already
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    from experiments.benchmark import workloads

    config = common.config_from_flags(
        **{
            "model.hidden": (64,),
            "model.latent": 16,
            "model.item_block": 16_384,
            "mesh.data": -1 if FLAGS.devices > 1 else 1,
        }
    )
    train = _interactions(config.train.batch_size)
    trainer = workloads.Trainer(config, train)
    jax.block_until_ready(trainer.state)
    initialised = machine.peak_rss_bytes()
    losses, seconds = [], []
    for step in range(FLAGS.steps):
        totals, took = trainer.run(1)
        losses.append(float(totals.nll[0] / totals.users[0]) / FLAGS.history)
        seconds.append(took)
        cli.log(f"step {step + 1}: loss {losses[-1]:.4f}, {took:.1f} s")
    result = {
        "hidden": config.model.hidden[0],
        "latent": config.model.latent,
        "batch_size": config.train.batch_size,
        "losses": losses,
        "log_items": math.log(FLAGS.items),
        "step_seconds": seconds,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(trainer.state)),
        "program_bytes_per_device": trainer.pipeline.program_bytes(),
        "peak_rss_bytes_initialised": initialised,
        **common.describe(config, trainer.setup.mesh),
        # Last, because it raises the peak memory.
        "assembled_users_per_second": _assembled(),
    }
    common.report("large", result)


def _interactions(n_users: int) -> Any:
    """Returns Interactions of uniformly drawn items."""
    import numpy as np

    from vaecf.data.interactions import Interactions

    item_UN = np.random.default_rng(FLAGS.seed).integers(
        0, FLAGS.items, (n_users, FLAGS.history), np.int32
    )
    indptr = np.arange(n_users + 1, dtype=np.int64) * FLAGS.history
    return Interactions(indptr, np.sort(item_UN).reshape(-1), FLAGS.items)


def _assembled() -> float:
    """Returns the users/s that the streamed pipeline's thread assembles."""
    import numpy as np

    from vaecf.models import sparse_batch

    users = 8192
    n_users = 24 * users
    train = _interactions(n_users)
    user = np.random.default_rng(FLAGS.seed).permutation(n_users)
    batches = itertools.cycle(user.astype(np.int32).reshape(-1, 1, users))
    csr = (train.indptr, train.indices)
    slots = users * FLAGS.history
    times = common.timings(
        lambda: sparse_batch.window(*csr, next(batches), slots), 1.0
    )
    rate = users / statistics.median(times)
    cli.log(f"the streamed pipeline's thread assembles {rate:,.0f} users/s")
    return rate


if __name__ == "__main__":
    cli.run(main)
