"""Preparing a file of MovieLens 20M's size, beside the recipe's way in pandas.

    python experiments/benchmark/preparation.py --json=out.json
    python experiments/benchmark/preparation.py --rows=200000

Generates a ratings.csv and prepares it with experiments/prepare_dataset.py and
with preparation_pandas.py, each in a process of its own from start to exit.
Checks that both give the same five matrices and ids.
"""

from __future__ import annotations

import pathlib
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
_SEED = "0"  # of the rows and of the splits
# As in the recipe: 10,000 held-out users for the rows of MovieLens 20M.
_HELD_OUT_PER_ROW = 10_000 / 20_000_263


def main(argv: list[str]) -> None:
    """Generates the rows, runs both ways, and compares the results."""
    from vaecf.data.dataset import open_dataset

    held_out = str(max(int(FLAGS.rows * _HELD_OUT_PER_ROW), 1))
    pandas, rows = "benchmark/preparation_pandas.py", str(FLAGS.rows)
    with tempfile.TemporaryDirectory() as folder:
        ratings, ours, theirs = (
            f"{folder}/{name}" for name in ("ratings.csv", "vaecf", "pandas")
        )
        cli.log(f"generating {FLAGS.rows:,} rows")
        machine.run_script(pandas, "generate", ratings, rows, _SEED)
        measured = {
            "vaecf": machine.run_script(
                "prepare_dataset.py",
                *("--user_column=userId", "--item_column=movieId"),
                *("--rating_column=rating", "--min_rating=4"),
                *(f"--ratings={ratings}", f"--output={ours}"),
                *("--protocol=recipe", f"--seed={_SEED}"),
                f"--held_out_users={held_out}",
            ),
            "pandas": machine.run_script(
                pandas, "prepare", ratings, theirs, held_out, _SEED
            ),
        }
        a, b = (open_dataset(path).manifest for path in (ours, theirs))
        # Digests of all arrays and id tables.
        if (a["arrays"], a["ids"]) != (b["arrays"], b["ids"]):
            raise VaecfError("vaecf and pandas prepared different matrices")
    result = {
        **measured,
        "ratio": measured["pandas"]["seconds"] / measured["vaecf"]["seconds"],
        "rows": FLAGS.rows,
        "held_out_users": int(held_out),
        "device": machine.processor(),
        "versions": machine.versions(),
    }
    common.report("preparation", result)


if __name__ == "__main__":
    cli.run(main)
