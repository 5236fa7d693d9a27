"""Preparing a file of MovieLens 20M's size, beside the recipe's way in pandas.

    python experiments/benchmark/preparation.py --json=out.json
    python experiments/benchmark/preparation.py --rows=200000

Generates a ratings.csv and prepares it with experiments/prepare_dataset.py and
with preparation_pandas.py, in turns, each in a process of its own from start to
exit. Checks that both give the same five matrices and ids.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, tables
from vaecf import cli
from vaecf.errors import VaecfError

FLAGS = flags.FLAGS
common.define_json()
flags.DEFINE_integer(
    "rows", 20_000_263, "Rows to generate.", lower_bound=20_000
)
flags.DEFINE_integer("repeats", 1, "Turns; medians count.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the rows and of the splits.")
flags.DEFINE_string("dir", None, "Folder for temporary files.")

_HERE = pathlib.Path(__file__).parent
# MovieLens 20M: users by its README, held-out users as in the recipe.
_USERS_PER_ROW = 138_493 / 20_000_263
_HELD_OUT_SHARE = 10_000 / 138_493


def benchmark() -> dict[str, Any]:
    """Generates the rows, runs both ways in turns, and compares the results.

    Raises:
      VaecfError: a process failed, or the results differ.
    """
    with tempfile.TemporaryDirectory(dir=FLAGS.dir) as folder:
        return _benchmark(pathlib.Path(folder))


def _benchmark(folder: pathlib.Path) -> dict[str, Any]:
    ratings, seed = folder / "ratings.csv", str(FLAGS.seed)
    cli.log(f"generating {FLAGS.rows:,} rows")
    # In another process, so that our memory does not count for the children.
    pandas = str(_HERE / "preparation_pandas.py")
    run_measured([pandas, "generate", str(ratings), str(FLAGS.rows), seed])
    held_out = max(int(FLAGS.rows * _USERS_PER_ROW * _HELD_OUT_SHARE), 1)
    turns: dict[str, list[dict[str, float]]] = {"vaecf": [], "pandas": []}
    for turn in range(FLAGS.repeats):
        commands = {
            "vaecf": [
                str(common.ROOT / "experiments" / "prepare_dataset.py"),
                f"--ratings={ratings}",
                "--user_column=userId",
                "--item_column=movieId",
                "--rating_column=rating",
                "--min_rating=4",
                "--protocol=recipe",
                f"--held_out_users={held_out}",
                f"--seed={seed}",
                f"--output={folder / f'vaecf-{turn}'}",
            ],
            "pandas": [
                pandas,
                "prepare",
                str(ratings),
                str(folder / f"pandas-{turn}"),
                str(held_out),
                seed,
            ],
        }
        for name, command in commands.items():
            turns[name].append(run_measured(command))
            cli.log(f"{name}: {turns[name][-1]['seconds']:.2f} s")
    if not same(folder / "vaecf-0", folder / "pandas-0"):
        raise VaecfError("vaecf and pandas prepared different matrices")
    medians = {name: common.medians(runs) for name, runs in turns.items()}
    return {
        **medians,
        "ratio": medians["pandas"]["seconds"] / medians["vaecf"]["seconds"],
        "rows": FLAGS.rows,
        "file_bytes": ratings.stat().st_size,
        "held_out_users": held_out,
        "repeats": FLAGS.repeats,
        "seed": FLAGS.seed,
        "processor": common.processor(),
        "versions": common.versions(
            ("vaecf", "polars", "pandas", "numpy", "scipy")
        ),
    }


def run_measured(command: Sequence[str]) -> dict[str, float]:
    """Returns the seconds and peak memory of a Python script.

    Raises:
      VaecfError: the script failed; with its last line.
    """
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise VaecfError(
                f"{pathlib.Path(command[0]).name} failed with status "
                f"{process.returncode}: {' '.join(last)}"
            )
    return {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def same(ours: pathlib.Path, theirs: pathlib.Path) -> bool:
    """Returns whether two directories hold the same matrices and ids."""
    import numpy as np

    from vaecf.data.dataset import open_dataset

    a, b = open_dataset(ours), open_dataset(theirs)
    pairs = [(a.items.ids, b.items.ids), (a.users.ids, b.users.ids)]
    for p, q in zip(
        (a.train, *a.validation, *a.test),
        (b.train, *b.validation, *b.test),
        strict=True,
    ):
        pairs += [(p.indptr, q.indptr), (p.indices, q.indices)]
    return all(np.array_equal(x, y) for x, y in pairs)


main = common.main_of(benchmark, tables.preparation)

if __name__ == "__main__":
    cli.run(main)
