"""What the benchmarks share: flags, settings, timing and output."""

from __future__ import annotations

import ast
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.benchmark import machine, tables
from vaecf import cli, files, workdir
from vaecf import config as config_lib
from vaecf.config import Config

FLAGS = flags.FLAGS


def define_json() -> None:
    """Defines --json."""
    flags.DEFINE_string("json", None, "File to write the results to.")


def define_flags(
    batch_size: int, seconds: float = 30.0, repeats: int = 5
) -> None:
    """Defines the flags of every benchmark of a model."""
    define_json()
    flags.DEFINE_string("precision", "fp32", "config.precision.policy.")
    flags.DEFINE_integer("batch_size", batch_size, "Users per batch.", 1)
    flags.DEFINE_float("seconds", seconds, "Time for each thing measured.", 0.0)
    flags.DEFINE_integer("repeats", repeats, "Turns to split the time into.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the data and of the model.")
    flags.DEFINE_multi_string("set", [], "Settings: --set=model.input=gather.")


def config_from_flags(**defaults: Any) -> Config:
    """Returns the default settings (Liang et al. 2018) with those of the flags.

    `--set` overrides `defaults`, the settings of the benchmark by dotted key.

    Raises:
      VaecfError: a key is unknown, or a value is not allowed on this device.
    """
    from vaecf.training import precision

    changes = {
        "seed": FLAGS.seed,
        "data.feed": "resident",
        "precision.policy": FLAGS.precision,
        "train.batch_size": FLAGS.batch_size,
        "eval.batch_size": FLAGS.batch_size,
        **defaults,
        **assignments(FLAGS.set),
    }
    config = config_lib.replace(Config(), changes)
    precision.policy(config.precision.policy)
    return config


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of assignments such as 'model.input=gather'."""
    changes: dict[str, Any] = {}
    for assignment in texts:
        key, _, text = assignment.partition("=")
        try:
            changes[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            changes[key] = text
    return changes


def interactions(users: int, items: int, seed: int) -> Any:
    """Returns interactions with the shape of MovieLens-20M.

    They are kept in the temporary directory for the next benchmark, as long as
    their generator stays the same.
    """
    import numpy as np

    from vaecf.data import synthetic
    from vaecf.data.interactions import Interactions

    version = files.file_sha256(pathlib.Path(synthetic.__file__))[:12]
    name = f"vaecf-{version}-{users}-{items}-{seed}.npz"
    path = pathlib.Path(tempfile.gettempdir()) / name
    if not path.exists():
        train = synthetic.make(
            "ml-20m-shape",
            seed=seed,
            n_train_users=users,
            n_held_out_users=0,
            n_items=items,
        ).train
        with files.atomic_file(path) as part, part.open("wb") as opened:
            np.savez(opened, indptr=train.indptr, indices=train.indices)
    with np.load(path) as arrays:
        return Interactions(arrays["indptr"], arrays["indices"], items)


def describe(config: Config, mesh: Any) -> dict[str, Any]:
    """Returns what every JSON holds: settings, devices, memory and versions."""
    import jax

    from vaecf.training import precision

    own = ("users", "items", "k", "items_per_user", "history", "repeats")
    host, devices = machine.processor(), jax.devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else host
    return {
        **{name: FLAGS[name].value for name in own if name in FLAGS},
        "config": config.to_dict(),
        # The policy that 'amp' stands for on this device.
        "precision": precision.policy(config.precision.policy).name,
        "device": kind if len(devices) == 1 else f"{len(devices)} x {kind}",
        "host": host,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "device_memory": devices[0].memory_stats(),
        "versions": machine.versions(),
    }


def timings(call: Callable[[], Any], seconds: float) -> list[float]:
    """Returns the seconds of a call, timed several times.

    Calls shorter than 0.05 s are timed in groups of this duration, so that
    dispatching and reading the clock do not count. At least one call is made;
    it may return arrays that are still being computed.
    """
    import jax

    def run(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    deadline = time.perf_counter() + seconds
    found = [run(1)]
    calls = min(1000, max(1, round(0.05 / found[0])))
    if calls > 1:
        found = [run(calls)]
    while time.perf_counter() < deadline:
        found.append(run(calls))
    return found


def in_turns(
    contestants: Mapping[str, Callable[[float], float]],
) -> dict[str, list[float]]:
    """Measures the contestants in turns, for --seconds each in --repeats turns.

    The speed of a shared machine drifts by a factor of two within hours, so
    only rates of the same turn are compared (`ratio`).

    Contestants are functions from seconds to a rate: users/s, or GFLOP/s.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(FLAGS.repeats):
        for name, measure in contestants.items():
            rates[name].append(measure(FLAGS.seconds / FLAGS.repeats))
            cli.log(f"turn {turn + 1}, {name}: {rates[name][-1]:,.1f}")
    return rates


def ratio(rates: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median over the turns of rate / reference."""
    return statistics.median(a / b for a, b in zip(rates, reference))


def report(benchmark: str, result: dict[str, Any]) -> None:
    """Prints the table of a benchmark of `tables.COLUMNS`; writes --json."""
    cli.log(f"\n{result['device']}\n\n{tables.table(benchmark, [result])}")
    if FLAGS.json is not None:
        workdir.write_json(pathlib.Path(FLAGS.json), result)
