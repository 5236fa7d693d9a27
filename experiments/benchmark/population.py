"""A population beside the same runs, one after the other.

    python experiments/benchmark/population.py --json=out.json

Trains eight members (four learning rates, two seeds) of configs/ml100k.py on
generated data in two ways, in turns: with `experiments/main.py --train` in a
process each, and with `experiments/population.py`. Both start each turn with an
empty compilation cache.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, machine
from vaecf import cli

RATES, SEEDS = ("0.0005", "0.001", "0.002", "0.004"), ("0", "1")

FLAGS = flags.FLAGS
common.define_json()
flags.DEFINE_integer("epochs", 50, "Epochs per member.", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "Turns; medians count.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Generates the data and trains in turns."""
    from vaecf.data import dataset, synthetic

    made = synthetic.make(
        "synthetic", n_train_users=743, n_held_out_users=100, n_items=1300
    )
    turns: dict[str, list[Any]] = {"processes": [], "population": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        dataset.write_dataset(folder / "data", made)
        for turn in range(FLAGS.repeats):
            for way, measured in turns.items():
                workdir = folder / f"{way}-{turn}"
                measured.append(_measure(way, folder / "data", workdir))
                cli.log(f"{way}: {measured[-1]['seconds']:.1f} s")
    result = {
        "members": len(RATES) * len(SEEDS),
        "ways": {way: common.medians(turns[way]) for way in turns},
        "device": machine.processor(),
        "versions": machine.versions(),
    }
    common.report("population", result)


def _measure(
    way: str, data: pathlib.Path, folder: pathlib.Path
) -> dict[str, float]:
    """Returns the seconds of everything, of the steps and of compiling them."""
    if way == "population":
        rates, seeds = ",".join(RATES), ",".join(SEEDS)
        rates = f"--members=optimizer.learning_rate={rates}"
        seeds = f"--members=seed={seeds}"
        commands = [["population.py", rates, seeds, f"--workdir={folder}"]]
    else:
        commands = [
            [
                *("main.py", "--train", f"--lr={rate}", f"--seed={seed}"),
                f"--workdir={folder / f'{rate}-{seed}'}",
            ]
            for rate, seed in itertools.product(RATES, SEEDS)
        ]
    seconds = sum(
        machine.run_script(
            *command,
            f"--config={machine.ROOT / 'configs' / 'ml100k.py'}",
            f"--data_dir={data}",
            f"--config.train.epochs={FLAGS.epochs}",
            "--config.data.feed=resident",
            "--config.mesh.data=1",
            JAX_COMPILATION_CACHE_DIR=f"{folder}-programs",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )["seconds"]
        for command in commands
    )
    files = folder.glob("*/results.json")
    trained = [json.loads(file.read_text())["train"] for file in files]
    steps = sum(member["seconds"] for member in trained)
    # All members of a population report the compilation of its one program.
    total = max if way == "population" else sum
    compilation = total(member["compile_seconds"] for member in trained)
    return {
        "seconds": seconds,
        "training_seconds": steps,
        "compile_seconds": compilation,
        "other_seconds": seconds - steps - compilation,
    }


if __name__ == "__main__":
    cli.run(main)
