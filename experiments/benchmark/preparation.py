"""Preparing a file of MovieLens 20M's size, beside the recipe's way in pandas.

    python experiments/benchmark/preparation.py --json=out.json
    python experiments/benchmark/preparation.py --rows=200000

Generates a ratings.csv and prepares it with experiments/prepare_dataset.py and
with preparation_pandas.py, in turns, each in a process of its own from start to
exit. Checks that both give the same five matrices and ids.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, machine
from vaecf import cli
from vaecf.errors import VaecfError

FLAGS = flags.FLAGS
common.define_json()
flags.DEFINE_integer(
    "rows", 20_000_263, "Rows to generate.", lower_bound=20_000
)
flags.DEFINE_integer("repeats", 1, "Turns; medians count.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the rows and of the splits.")

_SETTINGS = (
    *("--user_column=userId", "--item_column=movieId"),
    *("--rating_column=rating", "--min_rating=4", "--protocol=recipe"),
)
# As in the recipe: 10,000 held-out users for the rows of MovieLens 20M.
_HELD_OUT_PER_ROW = 10_000 / 20_000_263


def main(argv: list[str]) -> None:
    """Generates the rows, runs both ways in turns, and compares the results."""
    from vaecf.data.dataset import open_dataset

    held_out = str(max(int(FLAGS.rows * _HELD_OUT_PER_ROW), 1))
    pandas, seed = "benchmark/preparation_pandas.py", str(FLAGS.seed)
    turns: dict[str, list[dict[str, float]]] = {"vaecf": [], "pandas": []}
    with tempfile.TemporaryDirectory() as folder:
        ratings = f"{folder}/ratings.csv"
        cli.log(f"generating {FLAGS.rows:,} rows")
        machine.run_script(pandas, "generate", ratings, str(FLAGS.rows), seed)
        for turn in range(FLAGS.repeats):
            ours, theirs = f"{folder}/vaecf-{turn}", f"{folder}/pandas-{turn}"
            commands = {
                "vaecf": (
                    "prepare_dataset.py",
                    *_SETTINGS,
                    *(f"--ratings={ratings}", f"--output={ours}"),
                    *(f"--held_out_users={held_out}", f"--seed={seed}"),
                ),
                "pandas": (pandas, "prepare", ratings, theirs, held_out, seed),
            }
            for name, command in commands.items():
                turns[name].append(machine.run_script(*command))
                cli.log(f"{name}: {turns[name][-1]['seconds']:.2f} s")
        a, b = (open_dataset(path).manifest for path in (ours, theirs))
        # Digests of all arrays and id tables.
        if (a["arrays"], a["ids"]) != (b["arrays"], b["ids"]):
            raise VaecfError("vaecf and pandas prepared different matrices")
    medians = {
        name: {k: statistics.median(turn[k] for turn in runs) for k in runs[0]}
        for name, runs in turns.items()
    }
    result = {
        **medians,
        "ratio": medians["pandas"]["seconds"] / medians["vaecf"]["seconds"],
        "rows": FLAGS.rows,
        "held_out_users": int(held_out),
        "device": machine.processor(),
        "versions": machine.versions(),
    }
    common.report("preparation", result)


if __name__ == "__main__":
    cli.run(main)
