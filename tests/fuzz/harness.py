"""Runs fuzz targets on generated inputs, and reports every fault by its seed.

    python tests/fuzz/harness.py --inputs=1000000
    python tests/fuzz/harness.py --targets=tables --seed=7 --only=4711

A target is a function of (random.Random, empty folder). It makes one input,
reads it, and compares what was read with an independent reference. It returns
a word for the statistics, such as "read" or "refused". A failed assertion and
every exception but VaecfError is a fault, and so is the end of the process:
inputs run in child processes. `TARGETS` lists the targets by name: to add one,
add a module and its entry.
"""

from __future__ import annotations

import argparse
import ast
import collections
import importlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import traceback

import shortcuts

from vaecf.errors import VaecfError

# Name -> module and function.
TARGETS = {
    "malformed_row": ("text_targets", "malformed_row"),
    "tables": ("text_targets", "tables"),
    "any_bytes": ("text_targets", "any_bytes"),
    "times": ("time_targets", "times"),
    "dataset": ("damage", "dataset"),
    "structure": ("damage", "structure"),
    "model": ("damage", "model"),
    "resume": ("damage", "resume"),
    "frames": ("frame_targets", "table"),
    "matrices": ("frame_targets", "matrix"),
    "junk": ("frame_targets", "junk"),
    "recipe": ("foreign", "recipe"),
    "pro_sg": ("foreign", "pro_sg"),
    "manifest": ("foreign", "manifest"),
    "arrays": ("foreign", "arrays"),
    "npy_bytes": ("foreign", "npy_bytes"),
    "id_table": ("foreign", "id_table"),
}
# Shares of the inputs; other targets have 1. The inputs of these cost least.
WEIGHTS = {"any_bytes": 18, "matrices": 12}
_PER_PROCESS = 5_000
# Inputs are small.
_ONE_THREAD = dict.fromkeys(
    ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)


def check(name: str, seed: int, number: int, folder: pathlib.Path) -> str:
    """Runs one input; returns the target's word, or "" and prints a fault."""
    module, function = TARGETS[name]
    target = getattr(importlib.import_module(module), function)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return target(random.Random(f"{name} {seed} {number}"), folder)
    except VaecfError as error:
        text = str(error)
        if "\n" in text or len(text) > 1500:
            print(f"FAULT {name} --seed={seed} --only={number}: not one line")
            return ""
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"FAULT {name} --seed={seed} --only={number}:")
        traceback.print_exc(limit=-4, file=sys.stdout)
        return ""


def run(
    name: str, seed: int, first: int, count: int, folder: pathlib.Path
) -> collections.Counter[str]:
    """Returns how many inputs had which outcome; "" counts the faults."""
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count):
        (folder / "number").write_text(str(number))
        outcomes[check(name, seed, number, folder / "input")] += 1
    return outcomes


def _run_in_children(
    name: str, seed: int, first: int, count: int, folder: pathlib.Path
) -> collections.Counter[str]:
    """Starts another process after every input that ends one."""
    environment = {**_ONE_THREAD, **os.environ, "TMPDIR": str(folder)}
    environment["RUST_BACKTRACE"] = "0"  # polars' panics take most of the time
    total: collections.Counter[str] = collections.Counter()
    last = first + count
    while first < last:
        size = min(_PER_PROCESS, last - first)
        options = f"--targets={name} --seed={seed} --first={first}"
        command = [sys.executable, __file__, "--child", *options.split()]
        command += [f"--inputs={size}", f"--folder={folder}"]
        (folder / "number").unlink(missing_ok=True)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            print("".join(f"{line}\n" for line in lines[:-1]), end="")
            total += ast.literal_eval(lines[-1])
            first += size
            continue
        if not (folder / "number").exists():
            raise RuntimeError(f"no input was tried: {done.stderr[-2000:]}")
        number = int((folder / "number").read_text())
        print(f"FAULT {name} --seed={seed} --only={number}: the process died")
        print(f"  with {done.returncode}: {done.stderr[-500:]}")
        total += collections.Counter({"": 1, "not counted": number - first})
        first = number + 1
    return total


def main() -> int:
    """Returns 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    names = args.targets.split(",")
    if args.only is not None:
        args.first, args.inputs, args.child = args.only, 1, True
    faults = 0
    weights = {name: WEIGHTS.get(name, 1) for name in names}
    if args.child and args.only is None:
        shortcuts.probe_in_forks()
        if {"model", "resume"} & {*names}:
            shortcuts.remember_checkpoints()
    # In memory: flushing to the disk would take most of the time.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        folder = args.folder or pathlib.Path(temporary)
        for name, weight in weights.items():
            count = -(-args.inputs * weight // sum(weights.values()))
            chosen = name, args.seed, args.first, count, folder
            if args.child:
                total = run(*chosen)
                print(dict(total))
            else:
                total = _run_in_children(*chosen)
                print(f"{name} --seed={args.seed}: {count:,}, {dict(total)}")
            faults += total[""]
    return 0 if args.child and args.only is None else int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
