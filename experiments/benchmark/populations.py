"""Training speed of populations, whose members share one compiled program.

    python experiments/benchmark/populations.py --json=out.json

Members differ in their seeds, and are trained as `vaecf.tuning.population` does
it: in threads, as many at a time as there are cores. The data are generated
with the density of MovieLens-20M and, unless flags say otherwise, the size of
MovieLens-1M.
"""

from __future__ import annotations

import pathlib
import sys
import time
from concurrent import futures

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common
from vaecf import cli
from vaecf import config as config_lib

FLAGS = flags.FLAGS
common.define_flags(batch_size=500, seconds=3.0)
flags.DEFINE_list("members", ["1", "4", "16", "64"], "Sizes of populations.")
flags.DEFINE_integer("users", 5040, "Training users.", lower_bound=1)
flags.DEFINE_integer("items", 3502, "Items.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Generates the data, compiles once, and measures each population."""
    from experiments.benchmark import workloads
    from vaecf.data import synthetic
    from vaecf.parallel import workers
    from vaecf.training import shared_pipeline

    config = common.config_from_flags()
    dataset = synthetic.make(
        "ml-20m-shape",
        seed=FLAGS.seed,
        n_train_users=FLAGS.users,
        n_held_out_users=0,
        n_items=FLAGS.items,
    )
    shared = shared_pipeline.SharedPipeline([config], dataset)

    def trainer(seed: int) -> workloads.Trainer:
        own = config_lib.replace(config, {"seed": seed})
        return workloads.Trainer(own, dataset.train, shared.of_member(own))

    first = trainer(FLAGS.seed)
    first.epochs(2)  # compiles
    epoch_seconds = first.epochs(5) / 5
    populations = {}
    for size in map(int, FLAGS.members):
        members = [trainer(FLAGS.seed + m) for m in range(size)]
        epochs = max(2, round(FLAGS.seconds / (epoch_seconds * size)))
        with futures.ThreadPoolExecutor(len(workers.cores())) as threads:
            began = time.perf_counter()
            jobs = [threads.submit(m.epochs, epochs) for m in members]
            for job in jobs:
                job.result()
            seconds = time.perf_counter() - began
        users = first.users_per_epoch * epochs * size
        populations[str(size)] = {
            "epochs": epochs,
            "seconds": seconds,
            "users_per_second": users / seconds,
        }
        cli.log(f"{size} members: {users / seconds:,.0f} users/s")
    result = {
        "populations": populations,
        "threads": len(workers.cores()),
        "batch_size": config.train.batch_size,
        **common.describe(config, first.setup.mesh),
    }
    common.report("populations", result)


if __name__ == "__main__":
    cli.run(main)
