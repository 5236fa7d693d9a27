"""Training throughput, measured against the machine's own ceiling.

    python experiments/benchmark/training.py --json=out.json
    python experiments/benchmark/training.py --json=out.json --evaluate \\
        --peers=torch_dense,torch_sparse --peer_python=~/torch/bin/python

Generated interactions of MovieLens-20M's shape go the way that training
takes: a resident feed, many steps a dispatch. The ceiling, the training and
the peers are measured in turns, because a shared machine drifts.

Needs jax, flax, optax, absl, numpy and scipy; nothing has to be installed of
vaecf itself.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 4096, "Users a step, over all devices.", lower_bound=1
)
_PRECISION = flags.DEFINE_enum(
    "precision", "fp32", ("fp32", "bf16", "fp16", "tf32", "amp"), "Policy."
)
_INPUT = flags.DEFINE_enum(
    "input", "auto", ("auto", "gather", "dense"), "Lowering of the input layer."
)
_ITEM_BLOCK = flags.DEFINE_integer(
    "item_block",
    0,
    "Items a block of the likelihood; 0: all at once.",
    lower_bound=0,
)
_SHAPE = flags.DEFINE_enum(
    "shape", "ml-20m", ("ml-20m", "synthetic"), "Shape of the generated data."
)
_USERS = flags.DEFINE_integer(
    "users", None, "Training users; None: the shape's.", lower_bound=1
)
_ITEMS = flags.DEFINE_integer(
    "items", None, "Items; None: the shape's.", lower_bound=1
)
_HIDDEN = flags.DEFINE_list(
    "hidden", ["600"], "Widths of the hidden layers, from the items inwards."
)
_LATENT = flags.DEFINE_integer(
    "latent", 200, "Units of the bottleneck.", lower_bound=1
)
_MICROBATCH = flags.DEFINE_integer(
    "microbatch",
    0,
    "Users whose activations a device holds at once; 0: as config.train says.",
    lower_bound=0,
)
_FEED = flags.DEFINE_enum(
    "feed", "resident", ("resident", "streamed"), "Where interactions lie."
)
_MESH_DATA = flags.DEFINE_integer(
    "mesh_data", -1, "Devices along the users; -1: the rest."
)
_MESH_ITEM = flags.DEFINE_integer("mesh_item", 1, "Devices along the items.")
_SECONDS = flags.DEFINE_float(
    "seconds", 30.0, "Time for each thing measured.", lower_bound=0.0
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Turns that this time is divided into.", lower_bound=1
)
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    "Also measure torch_dense, torch_sparse, torch_compile_bf16 (CUDA), or "
    "vaecf_fp32, beside another precision.",
)
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python",
    os.environ.get("VAECF_PEER_PYTHON", sys.executable),
    "Interpreter that has PyTorch; also $VAECF_PEER_PYTHON.",
)
_EVALUATE = flags.DEFINE_bool(
    "evaluate",
    False,
    "Also rank and score 10,000 held-out users, so that the peak memory is "
    "that of training with validation.",
)
_EVALUATED_USERS = flags.DEFINE_integer(
    "evaluated_users", 10_000, "How many with --evaluate.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of data and training.")


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table and writes the JSON."""
    del argv
    if _PEERS.value:
        # Peers may share the GPU: JAX takes three quarters of it otherwise.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from experiments.benchmark import throughput
    from vaecf import workdir as workdir_lib
    from vaecf.errors import VaecfError

    try:
        hidden = tuple(int(width) for width in _HIDDEN.value)
    except ValueError:
        raise VaecfError(
            f"--hidden={','.join(_HIDDEN.value)} must be whole numbers"
        ) from None
    result = throughput.benchmark(
        throughput.Settings(
            shape=_SHAPE.value,
            users=_USERS.value,
            items=_ITEMS.value,
            hidden=hidden,
            latent=_LATENT.value,
            batch_size=_BATCH_SIZE.value,
            precision=_PRECISION.value,
            input=_INPUT.value,
            item_block=_ITEM_BLOCK.value,
            feed=_FEED.value,
            microbatch=_MICROBATCH.value,
            mesh_data=_MESH_DATA.value,
            mesh_item=_MESH_ITEM.value,
            seconds=_SECONDS.value,
            repeats=_REPEATS.value,
            peers=tuple(_PEERS.value),
            peer_python=os.path.expanduser(_PEER_PYTHON.value),
            evaluated_users=_EVALUATED_USERS.value if _EVALUATE.value else 0,
            seed=_SEED.value,
        ),
        log=cli.log,
    )
    cli.log(throughput.table(result))
    if _JSON.value is not None:
        text = json.dumps(result, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


if __name__ == "__main__":
    cli.run(main)
