"""Preparing MovieLens 20M's size, beside the recipe's way.

    python experiments/benchmark/preparation.py --json=out.json
    python experiments/benchmark/preparation.py --rows=200000

Generates a ratings.csv, prepares it with experiments/prepare_dataset.py and
with pandas as NVIDIA's recipe does (preparation_pandas.py), in turns and each
in a process of its own, from start to exit; checks that both give the same
five matrices and ids.
"""

from __future__ import annotations

import json
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

from vaecf import cli

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_ROWS = flags.DEFINE_integer(
    "rows", 20_000_263, "Rows to generate.", lower_bound=20_000
)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Turns; medians.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the rows and of the splits.")
_DIR = flags.DEFINE_string("dir", None, "Folder for scratch files.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
_HERE = ROOT / "experiments" / "benchmark"
_HELD_OUT_SHARE = 10_000 / 138_493  # of the users, as in the recipe


def run_measured(command: Sequence[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of a command, which must succeed.

    The peak starts with what this process has when it forks, so nothing large
    is imported here before the last measurement.
    """
    from vaecf.errors import VaecfError

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise VaecfError(
                f"{pathlib.Path(command[1]).name} failed with status "
                f"{process.returncode}: {' '.join(last)}"
            )
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * unit,
    }


def same(ours: pathlib.Path, theirs: pathlib.Path) -> bool:
    """Whether two directories hold the same matrices and ids."""
    import numpy as np

    from vaecf.data.dataset import open_dataset

    a, b = open_dataset(ours), open_dataset(theirs)
    pairs = [
        (x, y)
        for p, q in zip(
            (a.train, *a.validation, *a.test),
            (b.train, *b.validation, *b.test),
            strict=True,
        )
        for x, y in ((p.indptr, q.indptr), (p.indices, q.indices))
    ]
    pairs += [(a.items.ids, b.items.ids), (a.users.ids, b.users.ids)]
    return all(np.array_equal(x, y) for x, y in pairs)


def measure(scratch: pathlib.Path) -> dict[str, Any]:
    """Generates, runs both in turns, compares."""
    ratings = scratch / "ratings.csv"
    seed, python = str(_SEED.value), sys.executable
    cli.log(f"generating {_ROWS.value:,} rows")
    run_measured(
        [python, str(_HERE / "preparation_rows.py"), str(ratings),
         str(_ROWS.value), seed]
    )  # fmt: skip
    users = _ROWS.value / 144.4
    held_out = str(max(int(users * _HELD_OUT_SHARE), 1))
    turns: dict[str, list[dict[str, float]]] = {"vaecf": [], "pandas": []}
    outputs: dict[str, pathlib.Path] = {}
    for turn in range(_REPEATS.value):
        for name, runs in turns.items():
            outputs[name] = scratch / f"{name}-{turn}"
            config = {
                "vaecf": [
                    str(ROOT / "experiments" / "prepare_dataset.py"),
                    f"--ratings={ratings}",
                    "--user_column=userId",
                    "--item_column=movieId",
                    "--rating_column=rating",
                    "--min_rating=4",
                    "--protocol=recipe",
                    f"--held_out_users={held_out}",
                    f"--seed={seed}",
                    f"--output={outputs[name]}",
                ],
                "pandas": [
                    str(_HERE / "preparation_pandas.py"),
                    str(ratings),
                    str(outputs[name]),
                    held_out,
                    seed,
                ],
            }[name]
            runs.append(run_measured([python, *config]))
            cli.log(
                f"{name}: {runs[-1]['seconds']:.2f} s, "
                f"{runs[-1]['peak_rss_bytes'] / 2**30:.2f} GiB"
            )
    medians = {
        name: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        for name, runs in turns.items()
    }
    identical = same(outputs["vaecf"], outputs["pandas"])
    return {
        **medians,
        "ratio": medians["pandas"]["seconds"] / medians["vaecf"]["seconds"],
        "identical": identical,
        "rows": _ROWS.value,
        "file_bytes": ratings.stat().st_size,
        "held_out_users": int(held_out),
        "repeats": _REPEATS.value,
        "seed": _SEED.value,
    }


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table and writes the JSON."""
    del argv
    from experiments.benchmark import machine

    with tempfile.TemporaryDirectory(dir=_DIR.value) as scratch:
        result = measure(pathlib.Path(scratch))
    result["processor"] = machine.processor()
    result["versions"] = machine.versions(
        ("vaecf", "polars", "pandas", "numpy", "scipy")
    )
    cli.log(f"\n{'':<22}{'seconds':>9}{'peak GiB':>10}")
    for name, title in (("vaecf", "vaecf"), ("pandas", "pandas, recipe's way")):
        run = result[name]
        cli.log(
            f"{title:<22}{run['seconds']:>9.2f}"
            f"{run['peak_rss_bytes'] / 2**30:>10.2f}"
        )
    cli.log(
        f"{result['ratio']:.1f} times as fast; matrices "
        f"{'identical' if result['identical'] else 'DIFFER'}; "
        f"{result['rows']:,} rows; {result['processor']}"
    )
    if _JSON.value is not None:
        pathlib.Path(_JSON.value).write_text(
            json.dumps(result, indent=2) + "\n"
        )
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    cli.run(main)
