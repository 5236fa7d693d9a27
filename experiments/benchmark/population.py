"""A population beside the same runs, one after the other.

    python experiments/benchmark/population.py --json=out.json

Trains the members of --members on generated data in two ways, in turns: with
`experiments/main.py --train` in a process each, and with
`experiments/population.py`. Both start each turn with an empty compilation
cache.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, tables
from vaecf import cli

FLAGS = flags.FLAGS
common.define_json()
flags.DEFINE_string(
    "config", str(common.ROOT / "configs" / "ml100k.py"), "Config file."
)
flags.DEFINE_integer("epochs", 50, "Epochs per member.", lower_bound=1)
flags.DEFINE_list("rates", ["5e-4", "1e-3", "2e-3", "4e-3"], "Learning rates.")
flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
flags.DEFINE_integer("users", 743, "Training users.", lower_bound=1)
flags.DEFINE_integer("items", 1300, "Items.", lower_bound=20)
flags.DEFINE_integer("repeats", 3, "Turns; medians count.", lower_bound=1)


def benchmark() -> dict[str, Any]:
    """Generates the data and trains in turns.

    Raises:
      VaecfError: a run failed.
    """
    from vaecf import __version__
    from vaecf.data import dataset, synthetic

    made = synthetic.make(
        "synthetic",
        n_train_users=FLAGS.users,
        n_held_out_users=100,
        n_items=FLAGS.items,
    )
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data"
        dataset.write_dataset(data, made)
        for turn in range(FLAGS.repeats):
            turns.append({})
            for way in ("processes", "population"):
                place = pathlib.Path(folder) / f"{way}-{turn}"
                turns[-1][way] = _measure(way, data, place)
                cli.log(f"{way}: {turns[-1][way]['seconds']:.1f} s")
    return {
        "members": len(FLAGS.rates) * len(FLAGS.seeds),
        "users": made.train.n_users,
        "items": made.n_items,
        "ways": {
            way: common.medians([turn[way] for turn in turns])
            for way in turns[0]
        },
        "processor": common.processor(),
        "versions": {"vaecf": __version__, **common.versions(("jax",))},
    }


def _measure(
    way: str, data: pathlib.Path, folder: pathlib.Path
) -> dict[str, float]:
    """Returns the seconds of everything, of the steps and of compiling them."""
    shared = [
        f"--config={FLAGS.config}",
        f"--data_dir={data}",
        f"--config.train.epochs={FLAGS.epochs}",
        "--config.data.feed=resident",
        "--config.mesh.data=1",
    ]
    began = time.perf_counter()
    if way == "population":
        rates = f"--members=optimizer.learning_rate={','.join(FLAGS.rates)}"
        seeds = f"--members=seed={','.join(FLAGS.seeds)}"
        _run(folder, "population", *shared, rates, seeds, f"--workdir={folder}")
    else:
        for rate in FLAGS.rates:
            for seed in FLAGS.seeds:
                _run(
                    folder,
                    "main",
                    *shared,
                    f"--config.optimizer.learning_rate={rate}",
                    f"--seed={seed}",
                    f"--workdir={folder / f'{rate}-{seed}'}",
                    "--train",
                )
    seconds = time.perf_counter() - began
    found = [
        json.loads(path.read_text())["train"]
        for path in folder.glob("*/results.json")
    ]
    training = sum(member["seconds"] for member in found)
    compiling = [member["compile_seconds"] for member in found]
    # All members of a population report the compilation of the one program.
    compilation = max(compiling) if way == "population" else sum(compiling)
    return {
        "seconds": seconds,
        "training_seconds": training,
        "compile_seconds": compilation,
        "other_seconds": seconds - training - compilation,
    }


def _run(folder: pathlib.Path, script: str, *arguments: str) -> None:
    from vaecf.errors import VaecfError

    done = subprocess.run(
        [
            sys.executable,
            str(common.ROOT / "experiments" / f"{script}.py"),
            *arguments,
        ],
        env=os.environ
        | {
            "PYTHONPATH": str(common.ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise VaecfError(f"{script}.py ended with {done.returncode}: {last}")


main = common.main_of(benchmark, tables.population)

if __name__ == "__main__":
    cli.run(main)
