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
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, tables
from vaecf import cli

# Our own step in fp32, as a peer of another precision.
OWN = "vaecf_fp32"

FLAGS = flags.FLAGS
common.define_flags(batch_size=4096)
flags.DEFINE_enum(
    "shape",
    "ml-20m-shape",
    ("ml-20m-shape", "synthetic"),
    "Generated dataset.",
)
flags.DEFINE_integer(
    "users", None, "Training users; None: those of the shape.", lower_bound=1
)
flags.DEFINE_integer(
    "items", None, "Items; None: those of the shape.", lower_bound=1
)
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
    """Generates the data, compiles, and measures in turns.

    Raises:
      VaecfError: a setting does not fit, or a peer cannot run.
    """
    from experiments.benchmark import ceilings, peers, workloads
    from vaecf.data import synthetic
    from vaecf.errors import VaecfError
    from vaecf.training import precision

    if FLAGS.peers:
        # Peers may share the GPU, of which JAX would reserve three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Settings that cannot be measured fail before the data are generated.
    config = common.config_from_flags({"eval.batch_size": 2000})
    policy = precision.policy(config.precision.policy)
    for name in FLAGS.peers:
        if name not in (OWN, *peers.STEPS):
            raise VaecfError(
                f"--peers={name} is unknown: use some of {OWN}, "
                f"{', '.join(peers.STEPS)}"
            )
    sizes = {"n_train_users": FLAGS.users, "n_items": FLAGS.items}
    dataset = synthetic.make(
        FLAGS.shape,
        seed=FLAGS.seed,
        n_held_out_users=10_000 if FLAGS.evaluate else 0,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    train, batch_size = dataset.train, config.train.batch_size
    trainer = workloads.Trainer(config, train)
    hidden, n_items = config.model.hidden[0], dataset.n_items
    product = ceilings.DecoderProduct(
        trainer.setup.mesh, policy, batch_size, hidden, n_items
    )
    flop = ceilings.training_flop(hidden, n_items)
    with contextlib.ExitStack() as stack:
        others: dict[str, Any] = _start_peers(config, train, stack)
        if OWN in FLAGS.peers:
            fp32 = dataclasses.replace(config.precision, policy="fp32")
            own = dataclasses.replace(config, precision=fp32)
            others[OWN] = workloads.Trainer(own, train)
        rounds = [
            _turn(product, {"vaecf": trainer, **others}, flop)
            for _ in range(FLAGS.repeats)
        ]
    middle = common.medians(
        [{k: v for k, v in turn.items() if k != "peers"} for turn in rounds]
    )
    evaluation = _evaluate(config, trainer, dataset) if FLAGS.evaluate else None
    return {
        **middle,
        "flop_per_user": flop,
        "ceiling_shape": list(product.shape),
        "batch_size": batch_size,
        "shape": FLAGS.shape,
        "users": train.n_users,
        "items": n_items,
        "interactions": train.nnz,
        "input": trainer.setup.model.input_lowering,
        "microbatch": trainer.setup.microbatch,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "program_bytes": trainer.pipeline.program_bytes(),
        "steps": trainer.steps,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
        "evaluation": evaluation,
        "peers": _summarise(rounds, others),
        **common.describe(config, trainer.setup.mesh),
        "rounds": rounds,
    }


def _start_peers(
    config: Any, train: Any, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Starts the PyTorch peers, which `stack` ends."""
    from experiments.benchmark import peers

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    started = {}
    for name in FLAGS.peers:
        if name != OWN:
            peer = peers.Peer(name, FLAGS.peer_python, config, train, folder)
            started[name] = stack.enter_context(peer)
            cli.log(f"{name} is ready")
    return started


def _turn(
    product: Any, contestants: dict[str, Any], flop: int
) -> dict[str, Any]:
    """Measures the ceiling, ours, the ceiling again, and the peers."""
    seconds = FLAGS.seconds / FLAGS.repeats
    ceiling = product.gflops(seconds / 2)
    answers = {}
    for name, contestant in contestants.items():
        answer = contestant.measure(seconds)
        answer["users_per_second"] = answer["users"] / answer["seconds"]
        answers[name] = answer
        if name == "vaecf":
            ceiling += product.gflops(seconds / 2)
        cli.log(f"{name}: {answer['users_per_second']:,.0f} users/s")
    rate = answers.pop("vaecf")["users_per_second"]
    gflops = statistics.median(ceiling)
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


def _evaluate(config: Any, trainer: Any, dataset: Any) -> dict[str, Any]:
    """Evaluates the validation users as the loop does, once compiled."""
    from experiments.benchmark import workloads
    from vaecf.evaluation import scorers

    setup = trainer.setup
    evaluate = workloads.validation(
        *(config, setup.mesh, scorers.model(setup.model)),
        *(trainer.state.params, dataset),
    ).evaluate
    evaluate()
    began = time.perf_counter()
    result = evaluate()
    return {
        "users": dataset.validation.fold_in.n_users,
        "seconds": time.perf_counter() - began,
        "ndcg@100": result.summary["ndcg@100"]["mean"],
    }


main = common.main_of(benchmark, tables.training)

if __name__ == "__main__":
    cli.run(main)
