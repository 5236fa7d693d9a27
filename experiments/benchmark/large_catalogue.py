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
import math
import pathlib
import sys

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
    import numpy as np

    with contextlib.suppress(RuntimeError):  # the devices have started already
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    from experiments.benchmark import workloads
    from vaecf.data.interactions import Interactions

    config = common.config_from_flags(
        **{
            "model.hidden": (64,),
            "model.latent": 16,
            "model.item_block": 16_384,
            "mesh.data": -1 if FLAGS.devices > 1 else 1,
        }
    )
    users, length = config.train.batch_size, FLAGS.history
    item_UN = np.random.default_rng(FLAGS.seed).integers(
        0, FLAGS.items, (users, length), np.int32
    )
    indptr = np.arange(users + 1, dtype=np.int64) * length
    train = Interactions(indptr, np.sort(item_UN).reshape(-1), FLAGS.items)
    trainer = workloads.Trainer(config, train)
    jax.block_until_ready(trainer.state)
    initialised = machine.peak_rss_bytes()
    losses, seconds = [], []
    for step in range(FLAGS.steps):
        totals, took = trainer.run(1)
        losses.append(float(totals.nll[0] / totals.users[0]) / length)
        seconds.append(took)
        cli.log(f"step {step + 1}: loss {losses[-1]:.4f}, {took:.1f} s")
    result = {
        "hidden": config.model.hidden[0],
        "latent": config.model.latent,
        "batch_size": users,
        "losses": losses,
        "log_items": math.log(FLAGS.items),
        "step_seconds": seconds,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(trainer.state)),
        "program_bytes_per_device": trainer.pipeline.program_bytes(),
        "peak_rss_bytes_initialised": initialised,
        **common.describe(config, trainer.setup.mesh),
    }
    common.report("large", result)


if __name__ == "__main__":
    cli.run(main)
