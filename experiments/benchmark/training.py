"""Training throughput, in turns with PyTorch and the machine's own ceiling.

    python experiments/benchmark/training.py --json=out.json
    python experiments/benchmark/training.py --json=out.json \\
        --peers=torch_dense,torch_sparse --peer_python=~/torch/bin/python

Trains on generated interactions with the shape of MovieLens-20M, with the data
on the device and many steps per dispatch, as the training loop does.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, peers
from vaecf import cli
from vaecf import config as config_lib

OWN = "vaecf_fp32"  # our own step, as a peer of another precision

FLAGS = flags.FLAGS
common.define_flags(batch_size=4096)
flags.DEFINE_integer("users", 116_677, "Training users.", lower_bound=1)
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
_PEERS = (OWN, *peers.VARIANTS)
flags.DEFINE_list("peers", [], f"Also measure some of {', '.join(_PEERS)}.")
flags.register_validator(
    "peers",
    lambda names: set(names) <= set(_PEERS),
    f"use some of {', '.join(_PEERS)}",
)
flags.DEFINE_string(
    "peer_python",
    os.environ.get("VAECF_PEER_PYTHON", sys.executable),
    "Interpreter that has PyTorch; also $VAECF_PEER_PYTHON.",
)


def main(argv: list[str]) -> None:
    """Generates the data, compiles, and measures in turns."""
    from experiments.benchmark import workloads
    from vaecf.data import synthetic

    if FLAGS.peers:
        # Peers may share the GPU, of which JAX would reserve three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = common.config_from_flags()
    train = synthetic.make(
        "ml-20m-shape",
        seed=FLAGS.seed,
        n_train_users=FLAGS.users,
        n_held_out_users=0,
        n_items=FLAGS.items,
    ).train
    batch_size = config.train.batch_size
    trainer = workloads.Trainer(config, train)
    mesh = trainer.setup.mesh
    ceiling = workloads.decoder_product(config, mesh, batch_size, FLAGS.items)
    fp32 = config_lib.replace(config, {"precision.policy": "fp32"})
    others = {
        name: workloads.Trainer(fp32, train)
        if name == OWN
        else peers.Peer(name, FLAGS.peer_python, config, train)
        for name in FLAGS.peers
    }
    contestants = {"vaecf": trainer, **others}
    rates = common.in_turns(
        {"ceiling": ceiling} | {k: v.measure for k, v in contestants.items()}
    )
    # The logits, the gradient of the hidden layer and that of the weights, with
    # 2 FLOP for each of hidden x items entries: no implementation needs less.
    flop = 3 * 2 * config.model.hidden[0] * FLAGS.items
    fraction = 1e-9 * flop * common.ratio(rates["vaecf"], rates["ceiling"])
    result = {
        "users_per_second": statistics.median(rates["vaecf"]),
        "ceiling_gflops": statistics.median(rates["ceiling"]),
        "fraction_of_ceiling": fraction,
        "flop_per_user": flop,
        "batch_size": batch_size,
        "interactions": train.nnz,
        "input": trainer.setup.model.input_lowering,
        "microbatch": trainer.setup.microbatch,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "program_bytes": trainer.pipeline.program_bytes(),
        "steps": trainer.steps,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
        "peers": {
            name: {
                **other.figures,
                "users_per_second": statistics.median(rates[name]),
                "ratio": common.ratio(rates["vaecf"], rates[name]),
            }
            for name, other in others.items()
        },
        **common.describe(config, mesh),
        "rates": rates,
    }
    common.report("training", result)


if __name__ == "__main__":
    cli.run(main)
