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
from collections.abc import Callable
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common
from vaecf import cli

FLAGS = flags.FLAGS
common.define_flags(batch_size=2000)
flags.DEFINE_integer("users", 10_000, "Held-out users.", lower_bound=1)
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=20)


def benchmark() -> dict[str, Any]:
    """Generates the users, compiles, and measures in turns."""
    from experiments.benchmark import workloads
    from vaecf.data import synthetic
    from vaecf.evaluation.evaluator import Evaluator

    config = common.config_from_flags()
    batch_size = config.eval.batch_size
    model = workloads.random_model(config, FLAGS.items)
    dataset = synthetic.make(
        "ml-20m-shape",
        seed=FLAGS.seed,
        # Training users only count items here, and every item needs one.
        n_train_users=max(FLAGS.users, FLAGS.items // 10),
        n_held_out_users=FLAGS.users,
        n_items=FLAGS.items,
    )
    evaluator = Evaluator.for_split(
        dataset, "validation", config.eval, model.mesh
    )
    ranker, params = model.ranker(evaluator.depth), model.scorer_params
    fold_in = evaluator.fold_in

    def rank() -> Any:
        return ranker(
            params, fold_in.indptr, fold_in.indices, batch_size=batch_size
        )

    began = time.perf_counter()
    evaluator(ranker, params)
    first = time.perf_counter() - began
    lists = rank()
    rates = common.in_turns(
        {
            "ceiling": workloads.decoder_product(
                config, model.mesh, batch_size, FLAGS.items
            ),
            "evaluation": _users_per_second(lambda: evaluator(ranker, params)),
            "ranking": _users_per_second(rank),
            "metrics": _users_per_second(
                lambda: evaluator.evaluate_lists(lists)
            ),
        }
    )
    flop = 2 * config.model.hidden[0] * FLAGS.items
    users_per_second = statistics.median(rates["evaluation"])
    fraction = common.ratio(rates["evaluation"], rates["ceiling"])
    return {
        "users_per_second": users_per_second,
        "seconds": FLAGS.users / users_per_second,
        "ranking_seconds": FLAGS.users / statistics.median(rates["ranking"]),
        "metrics_seconds": FLAGS.users / statistics.median(rates["metrics"]),
        "ceiling_gflops": statistics.median(rates["ceiling"]),
        "fraction_of_ceiling": 1e-9 * flop * fraction,
        "first_seconds": first,
        "users": FLAGS.users,
        "items": FLAGS.items,
        "batch_size": batch_size,
        "k": evaluator.depth,
        "flop_per_user": flop,
        "interactions_per_user": fold_in.nnz / fold_in.n_users,
        "input": model.module.input_lowering,
        **common.describe(config, model.mesh),
        "rates": rates,
    }


def _users_per_second(call: Callable[[], Any]) -> Callable[[float], float]:
    return lambda seconds: (
        FLAGS.users / statistics.mean(common.timings(call, seconds))
    )


main = common.main_of("evaluation", benchmark)

if __name__ == "__main__":
    cli.run(main)
