"""Speed of evaluation, in turns with the machine's own ceiling.

    python experiments/benchmark/evaluation.py --json=out.json

Evaluates generated held-out users with the shape of MovieLens-20M as the
training loop does, with a random model. The ceiling is the one product that
every implementation computes: the scores of all items.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
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


def main(argv: list[str]) -> None:
    """Generates the users, compiles, and measures in turns."""
    from experiments.benchmark import gpu_compile, workloads
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
    histories = (fold_in.indptr, fold_in.indices)

    def rate(call: Callable[[], Any]) -> Callable[[float], float]:
        return lambda t: FLAGS.users / statistics.mean(common.timings(call, t))

    lists = evaluator(ranker, params).lists  # compiles
    rates = common.in_turns(
        {
            "ceiling": workloads.decoder_product(
                config, model.mesh, batch_size, FLAGS.items
            ),
            "evaluation": rate(lambda: evaluator(ranker, params)),
            "ranking": rate(
                lambda: ranker(params, *histories, batch_size=batch_size)
            ),
            "metrics": rate(lambda: evaluator.evaluate_lists(lists)),
        }
    )
    median = {name: statistics.median(turns) for name, turns in rates.items()}
    flop = 2 * config.model.hidden[0] * FLAGS.items
    ratio = common.ratio(rates["evaluation"], rates["ceiling"])
    result = {
        "users_per_second": median["evaluation"],
        "seconds": FLAGS.users / median["evaluation"],
        "ranking_seconds": FLAGS.users / median["ranking"],
        "metrics_seconds": FLAGS.users / median["metrics"],
        "ceiling_gflops": median["ceiling"],
        "fraction_of_ceiling": 1e-9 * flop * ratio,
        "batch_size": batch_size,
        "k": evaluator.depth,
        "flop_per_user": flop,
        "interactions_per_user": fold_in.nnz / fold_in.n_users,
        "input": gpu_compile.input_of(config, model.mesh, FLAGS.items),
        **common.describe(config, model.mesh),
        "rates": rates,
    }
    common.report("evaluation", result)


if __name__ == "__main__":
    cli.run(main)
