"""A few real training steps with a catalogue of millions of items.

    python experiments/benchmark/large_catalogue.py --json=out.json \\
        --items=10000000 --hidden=16 --latent=16 --devices=8 --mesh_item=8

On a CPU, whose processor is divided into as many devices as asked: what counts
is that a step fits, its memory and its loss, not its speed. Interactions are
drawn uniformly, so the loss of an interaction starts at log(items); the same
batch is taken again and again, so it falls.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_ITEMS = flags.DEFINE_integer("items", 1_000_000, "Items.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer(
    "hidden", 64, "Width of the outer layers.", lower_bound=1
)
_LATENT = flags.DEFINE_integer("latent", 16, "Bottleneck.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 500, "Users a step, over all devices.", lower_bound=1
)
_ITEM_BLOCK = flags.DEFINE_integer(
    "item_block", 16_384, "Items a block of the likelihood.", lower_bound=0
)
_PRECISION = flags.DEFINE_enum("precision", "fp32", ("fp32", "bf16"), "Policy.")
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "CPU devices to divide the processor into.", lower_bound=1
)
_MESH_ITEM = flags.DEFINE_integer(
    "mesh_item", 1, "Devices along the items; the rest along the users."
)
_STEPS = flags.DEFINE_integer("steps", 4, "Training steps.", lower_bound=1)
_HISTORY = flags.DEFINE_integer(
    "history", 40, "Interactions of a user.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of data and training.")


def main(argv: Sequence[str]) -> None:
    """Trains, prints a few lines and writes the JSON."""
    del argv
    import jax

    with contextlib.suppress(RuntimeError):  # devices have started already
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    import math

    import numpy as np

    from experiments.benchmark import machine, models
    from vaecf import workdir as workdir_lib
    from vaecf.data.interactions import Interactions
    from vaecf.parallel import mesh as mesh_lib
    from vaecf.training import input_pipeline, precision
    from vaecf.training import state as state_lib

    n_users, history = _BATCH_SIZE.value, _HISTORY.value
    rng = np.random.default_rng(_SEED.value)
    item_UN = np.sort(
        rng.integers(0, _ITEMS.value, (n_users, history), np.int32), axis=1
    )
    train = Interactions(
        np.arange(n_users + 1, dtype=np.int64) * history,
        item_UN.reshape(-1),
        _ITEMS.value,
    )
    mesh = mesh_lib.make_mesh(
        _DEVICES.value // _MESH_ITEM.value, _MESH_ITEM.value
    )
    config = models.paper_config(
        {
            "seed": _SEED.value,
            "model.hidden": (_HIDDEN.value,),
            "model.latent": _LATENT.value,
            "model.item_block": _ITEM_BLOCK.value,
            "train.batch_size": _BATCH_SIZE.value,
            "precision.policy": _PRECISION.value,
        }
    )
    before = machine.peak_rss_bytes()
    setup = state_lib.make_setup(config, _ITEMS.value, mesh)
    state = jax.block_until_ready(state_lib.init_state(setup, _SEED.value))
    initialised = machine.peak_rss_bytes()
    feed = input_pipeline.make_pipeline("resident", setup, train, _SEED.value)
    order = input_pipeline.epoch_order(
        _SEED.value,
        0,
        n_users,
        _BATCH_SIZE.value,
        parts=setup.parts(_BATCH_SIZE.value),
    )
    epoch = feed.prepare(order)
    losses, seconds = [], []
    for step in range(_STEPS.value):
        began = time.perf_counter()
        state, totals = feed.run(state, epoch, 0, 1)
        seconds.append(time.perf_counter() - began)
        # Of an interaction, so that it compares with log(items).
        losses.append(float(totals.nll[0] / totals.users[0]) / history)
        cli.log(
            f"step {step + 1}: {losses[-1]:.4f} an interaction, "
            f"{seconds[-1]:.1f} s"
        )
    peak = machine.peak_rss_bytes()
    assembled = _assembled(rng, history, _ITEMS.value)
    result = {
        "items": _ITEMS.value,
        "hidden": _HIDDEN.value,
        "latent": _LATENT.value,
        "batch_size": _BATCH_SIZE.value,
        "item_block": _ITEM_BLOCK.value,
        "history": history,
        "losses": losses,
        "assembled_users_per_second": assembled,
        "log_items": math.log(_ITEMS.value),
        "step_seconds": seconds,
        "compile_seconds": feed.compile_seconds,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "program_bytes_per_device": feed.program_bytes(),
        "peak_rss_bytes_before": before,
        "peak_rss_bytes_initialised": initialised,
        "peak_rss_bytes": peak,
        **models.describe(precision.policy(_PRECISION.value), mesh),
    }
    cli.log(
        f"log(items) {result['log_items']:.4f}; peak memory of the process "
        f"{peak / 2**30:.2f} GiB ({initialised / 2**30:.2f} when initialised), "
        f"of the step's program {feed.program_bytes() / 2**30:.2f} GiB a device"
    )
    cli.log(
        f"the streamed feed's thread assembles {assembled:,.0f} users/s of "
        f"{history} interactions"
    )
    if _JSON.value is not None:
        text = json.dumps(result, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


def _assembled(rng: Any, history: int, n_items: int) -> float:
    """Users a second that the streamed feed's one thread puts together."""
    import numpy as np

    from vaecf.models import sparse_batch

    n_users, users = 200_000, 8192
    indptr = np.arange(n_users + 1, dtype=np.int64) * history
    indices = rng.integers(0, n_items, n_users * history, np.int32)
    rates = []
    for _ in range(7):
        user_1U = rng.choice(n_users, (1, users), replace=False)
        began = time.perf_counter()
        sparse_batch.window(
            indptr, indices, user_1U.astype(np.int32), users * history
        )
        rates.append(users / (time.perf_counter() - began))
    return float(np.median(rates))


if __name__ == "__main__":
    cli.run(main)
