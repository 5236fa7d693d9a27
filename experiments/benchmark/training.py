"""Training throughput, in turns with PyTorch and the machine's own ceiling.

    python experiments/benchmark/training.py --json=out.json
    python experiments/benchmark/training.py --json=out.json --evaluate \\
        --peers=torch_dense,torch_sparse --peer_python=~/torch/bin/python

Trains on generated interactions with the shape of MovieLens-20M, with the data
on the device and many steps per dispatch, as the training loop does.

Needs jax, flax, optax, orbax-checkpoint and SciPy; vaecf itself need not be
installed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, tables
from vaecf import cli
from vaecf import config as config_lib

# Our own step in fp32, as a peer of another precision.
OWN = "vaecf_fp32"

FLAGS = flags.FLAGS
common.define_flags(batch_size=4096)
flags.DEFINE_integer("users", 116_677, "Training users.", lower_bound=1)
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
flags.DEFINE_list(
    "peers",
    [],
    "Also measure torch_dense, torch_sparse, torch_compile_bf16 (needs CUDA) "
    f"or {OWN}.",
)
flags.DEFINE_string(
    "peer_python",
    os.environ.get("VAECF_PEER_PYTHON", sys.executable),
    "Interpreter that has PyTorch; also $VAECF_PEER_PYTHON.",
)
flags.DEFINE_bool(
    "evaluate",
    False,
    "Also evaluate 10,000 held-out users, so that the peak memory is that of "
    "training with validation.",
)


def benchmark() -> dict[str, Any]:
    """Generates the data, compiles, and measures in turns."""
    from experiments.benchmark import peers, workloads
    from vaecf.data import synthetic
    from vaecf.errors import VaecfError

    if FLAGS.peers:
        # Peers may share the GPU, of which JAX would reserve three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Settings that cannot be measured fail before the data are generated.
    config = common.config_from_flags({"eval.batch_size": 2000})
    for name in FLAGS.peers:
        if name not in (OWN, *peers.VARIANTS):
            raise VaecfError(
                f"--peers={name} is unknown: use some of {OWN}, "
                f"{', '.join(peers.VARIANTS)}"
            )
    dataset = synthetic.make(
        "ml-20m-shape",
        seed=FLAGS.seed,
        n_train_users=FLAGS.users,
        n_held_out_users=10_000 if FLAGS.evaluate else 0,
        n_items=FLAGS.items,
    )
    train, batch_size = dataset.train, config.train.batch_size
    trainer = workloads.Trainer(config, train)
    ceiling = workloads.decoder_product(
        config, trainer.setup.mesh, batch_size, FLAGS.items
    )
    # The logits, the gradient of the hidden layer and that of the weights, with
    # 2 FLOP for each of hidden x items entries: no implementation needs less.
    flop = 3 * 2 * config.model.hidden[0] * FLAGS.items
    with contextlib.ExitStack() as stack:
        others: dict[str, Any] = {}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name in FLAGS.peers:
            if name == OWN:
                fp32 = config_lib.replace(config, {"precision.policy": "fp32"})
                others[name] = workloads.Trainer(fp32, train)
            else:
                others[name] = stack.enter_context(
                    peers.Peer(name, FLAGS.peer_python, config, train, folder)
                )
            cli.log(f"{name} is ready")
        rounds = [
            _turn(ceiling, {"vaecf": trainer, **others}, flop)
            for _ in range(FLAGS.repeats)
        ]
    middle = common.medians(
        [{k: v for k, v in turn.items() if k != "peers"} for turn in rounds]
    )
    evaluation_seconds = None
    if FLAGS.evaluate:
        evaluate = trainer.validation(dataset).evaluate
        evaluate()  # compiles
        [evaluation_seconds] = common.timings(evaluate, 0.0, 0.0)
    return {
        **middle,
        "flop_per_user": flop,
        "batch_size": batch_size,
        "users": train.n_users,
        "items": FLAGS.items,
        "interactions": train.nnz,
        "input": trainer.setup.model.input_lowering,
        "microbatch": trainer.setup.microbatch,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "program_bytes": trainer.pipeline.program_bytes(),
        "steps": trainer.steps,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
        "evaluation_seconds": evaluation_seconds,
        "peers": _summarise(rounds, others),
        **common.describe(config, trainer.setup.mesh),
        "rounds": rounds,
    }


def _turn(
    ceiling: Any, contestants: dict[str, Any], flop: int
) -> dict[str, Any]:
    """Measures the ceiling, ours, the ceiling again, and the peers."""
    seconds = FLAGS.seconds / FLAGS.repeats
    rates = ceiling(seconds / 2)
    answers = {}
    for name, contestant in contestants.items():
        answer = contestant.measure(seconds)
        answer["users_per_second"] = answer["users"] / answer["seconds"]
        answers[name] = answer
        if name == "vaecf":
            rates += ceiling(seconds / 2)
        cli.log(f"{name}: {answer['users_per_second']:,.0f} users/s")
    rate = answers.pop("vaecf")["users_per_second"]
    gflops = statistics.median(rates)
    cli.log(f"ceiling: {gflops:,.1f} GFLOP/s")
    return {
        "users_per_second": rate,
        "ceiling_gflops": gflops,
        "fraction_of_ceiling": rate * flop / (1e9 * gflops),
        "peers": answers,
    }


def _summarise(
    rounds: list[dict[str, Any]], others: dict[str, Any]
) -> dict[str, Any]:
    """Returns medians over the turns; a ratio is taken within a turn."""
    result = {}
    for name, peer in others.items():
        answers = [turn["peers"][name] for turn in rounds]
        rates = [answer["users_per_second"] for answer in answers]
        result[name] = {
            **peer.facts,
            **answers[-1],
            "users_per_second": statistics.median(rates),
            "ratio": statistics.median(
                turn["users_per_second"] / rate
                for turn, rate in zip(rounds, rates)
            ),
        }
    return result


main = common.main_of(benchmark, tables.training)

if __name__ == "__main__":
    cli.run(main)
