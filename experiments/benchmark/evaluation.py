"""Speed of evaluation, in turns with the machine's own ceiling.

    python experiments/benchmark/evaluation.py --json=out.json

Evaluates generated held-out users with the shape of MovieLens-20M as the
training loop does, from histories on the host to metrics with standard errors,
with a random model. The ceiling is the one product that every implementation
computes: the scores of all items.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, tables
from vaecf import cli

FLAGS = flags.FLAGS
common.define_flags(batch_size=2000)
flags.DEFINE_integer("users", 10_000, "Held-out users.", lower_bound=1)
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=20)


def benchmark() -> dict[str, Any]:
    """Generates the users, compiles, and measures in turns."""
    from experiments.benchmark import workloads
    from vaecf.data import synthetic
    from vaecf.evaluation import metrics

    config = common.config_from_flags()
    depth = metrics.depth(config.eval.metrics)
    model = workloads.random_model(config, FLAGS.items)
    dataset = synthetic.make(
        "ml-20m-shape",
        seed=FLAGS.seed,
        # Training users only count items here, and every item needs one.
        n_train_users=max(FLAGS.users, FLAGS.items // 10),
        n_held_out_users=FLAGS.users,
        n_items=FLAGS.items,
    )
    work = workloads.validation(
        config, model.mesh, model.scorer(), model.params, dataset
    )
    ceiling = workloads.decoder_product(
        config, model.mesh, config.eval.batch_size, FLAGS.items
    )
    flop = 2 * config.model.hidden[0] * FLAGS.items
    began = time.perf_counter()
    work.evaluate()
    first = time.perf_counter() - began
    rounds = [_turn(ceiling, work, flop) for _ in range(FLAGS.repeats)]
    middle = common.medians(rounds)
    fold_in = dataset.validation.fold_in
    return {
        "users_per_second": FLAGS.users / middle["seconds"],
        **middle,
        "first_seconds": first,
        "users": FLAGS.users,
        "items": FLAGS.items,
        "batch_size": config.eval.batch_size,
        "k": depth,
        "flop_per_user": flop,
        "interactions_per_user": fold_in.nnz / fold_in.n_users,
        "input": model.module.input_lowering,
        **common.describe(config, model.mesh),
        "rounds": rounds,
    }


def _turn(ceiling: Any, work: Any, flop: int) -> dict[str, float]:
    """Measures the ceiling, the evaluation and its parts, and the ceiling."""
    turn = FLAGS.seconds / FLAGS.repeats
    rates = ceiling(turn / 2)
    seconds = statistics.mean(common.timings(work.evaluate, turn))
    ranking = statistics.mean(common.timings(work.rank, turn))
    work.score()  # ranks, the first time
    scoring = statistics.mean(common.timings(work.score, min(turn, 1.0)))
    rates += ceiling(turn / 2)
    gflops = statistics.median(rates)
    rate = FLAGS.users / seconds
    cli.log(f"evaluation {rate:,.0f} users/s, ceiling {gflops:,.1f} GFLOP/s")
    return {
        "seconds": seconds,
        "ranking_seconds": ranking,
        "metrics_seconds": scoring,
        "ceiling_gflops": gflops,
        "fraction_of_ceiling": rate * flop / (1e9 * gflops),
    }


main = common.main_of(benchmark, tables.evaluation)

if __name__ == "__main__":
    cli.run(main)
