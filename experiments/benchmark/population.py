"""A population beside the same runs one after the other.

    python experiments/benchmark/population.py --json=out.json

The members of --members are trained in three ways, in turns, because a shared
machine drifts: by `experiments/main.py --train`, a process each; by
`loop.train` in one process; and by `experiments/population.py`. Every process
starts without compiled programs of an earlier turn, but finds those of its own
turn, as a user's would. Data are generated.
"""

from __future__ import annotations

import ast
import json
import os
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_CONFIG = flags.DEFINE_string(
    "config", str(_ROOT / "configs" / "ml100k.py"), "Config file."
)
_CHANGES = flags.DEFINE_multi_string(
    "change", [], "A key of the config and its value, such as train.epochs=5."
)
_MEMBERS = flags.DEFINE_multi_string(
    "members",
    ["optimizer.learning_rate=0.0005,0.001,0.002,0.004", "seed=0,1"],
    "As of experiments/population.py.",
)
_USERS = flags.DEFINE_integer("users", 743, "Training users.", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer(
    "held_out_users", 100, "Users of validation and of test.", lower_bound=1
)
_ITEMS = flags.DEFINE_integer("items", 1300, "Items.", lower_bound=20)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Turns.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the data.")

WAYS = ("processes", "one_process", "population")
_CHILD = "from experiments.benchmark import population; population.child()"


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table and writes the JSON."""
    del argv
    from vaecf import workdir as workdir_lib

    result = benchmark(cli.log)
    cli.log(table(result))
    if _JSON.value is not None:
        text = json.dumps(result, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


def benchmark(log: Callable[[str], None]) -> dict[str, Any]:
    """Generates, trains in turns: what the JSON holds.

    Raises:
      VaecfError: a config or members that do not fit, or a run that failed.
    """
    import jax

    from experiments.benchmark import machine
    from vaecf import __version__
    from vaecf.data import dataset, synthetic
    from vaecf.tuning.population import grid

    made = synthetic.make(
        "synthetic",
        seed=_SEED.value,
        n_train_users=_USERS.value,
        n_held_out_users=_HELD_OUT.value,
        n_items=_ITEMS.value,
    )
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "data"
        dataset.write_dataset(data, made)
        base = _base(data)
        members = grid(_MEMBERS.value, base)
        log(
            f"{len(members)} members, {made.train.n_users:,} users, "
            f"{made.n_items:,} items, {made.train.nnz:,} interactions"
        )
        turns = []
        for turn in range(_REPEATS.value):
            turns.append(
                {
                    way: _measure(
                        way,
                        pathlib.Path(folder) / f"{turn}-{way}",
                        base,
                        members,
                    )
                    for way in WAYS
                }
            )
            log(f"turn {turn + 1}: {_line(turns[-1])}")
    ways = {
        way: {
            key: statistics.median(turn[way][key] for turn in turns)
            for key in turns[0][way]
        }
        for way in WAYS
    }
    return {
        "members": len(members),
        "varied": _MEMBERS.value,
        "config": pathlib.Path(_CONFIG.value).name,
        "changes": _CHANGES.value,
        "users": made.train.n_users,
        "items": made.n_items,
        "interactions": made.train.nnz,
        "ways": ways,
        # Of each turn: what drifts between turns is left out.
        "times_faster": {
            way: {
                key: statistics.median(
                    turn[way][key] / turn["population"][key] for turn in turns
                )
                for key in ("seconds", "training_seconds")
            }
            for way in WAYS[:2]
        },
        "device": jax.devices()[0].device_kind,
        "host": machine.processor(),
        "versions": {
            "vaecf": __version__,
            **machine.versions(("jax", "jaxlib", "flax", "optax", "numpy")),
        },
        "turns": turns,
    }


def table(result: dict[str, Any]) -> str:
    """A few lines for the person."""
    lines = [
        f"{result['host']}, {result['members']} members",
        f"{'':<12} {'all':>9} {'steps':>9} {'compile':>9} {'other':>9}",
    ]
    for way, figures in result["ways"].items():
        shown = (
            f"{figures[key]:>7.1f} s"
            for key in (
                "seconds",
                "training_seconds",
                "compile_seconds",
                "other_seconds",
            )
        )
        lines.append(f"{way:<12} {' '.join(shown)}")
    for way, ratios in result["times_faster"].items():
        lines.append(
            f"the population is {ratios['seconds']:.2f} x as fast as {way}, "
            f"its steps {ratios['training_seconds']:.2f} x"
        )
    return "\n".join(lines)


def _line(turn: dict[str, Any]) -> str:
    return ", ".join(f"{way} {turn[way]['seconds']:.1f} s" for way in WAYS)


def _base(data: pathlib.Path) -> Any:
    """Options of the config file with its changes."""
    from vaecf import config as config_lib

    sys.path.append(str(_ROOT))  # configs import each other
    config = runpy.run_path(_CONFIG.value)["get_config"]()
    changes = {"data.dir": str(data), "data.feed": "resident", "mesh.data": 1}
    for change in _CHANGES.value:
        key, _, value = change.partition("=")
        changes[key] = ast.literal_eval(value)
    return config_lib.replace(config_lib.from_mapping(config), changes)


def _measure(
    way: str, folder: pathlib.Path, base: Any, members: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of everything, of steps, of compiling steps, and of the rest."""
    folder.mkdir()
    scripts, runs = _ROOT / "experiments", folder / "runs"
    commands = []
    if way == "population":
        flags_of_all = [f"--members={flag}" for flag in _MEMBERS.value]
        commands = [
            [
                str(scripts / "population.py"),
                *_config_flags(base),
                *flags_of_all,
                f"--workdir={runs}",
            ]
        ]
    elif way == "processes":
        commands = [
            [
                str(scripts / "main.py"),
                *_config_flags(config),
                f"--workdir={runs / name}",
                "--train",
            ]
            for name, config in members.items()
        ]
    else:
        configs = {str(runs / n): o.to_dict() for n, o in members.items()}
        commands = [["-c", _CHILD, json.dumps(configs)]]
    began = time.perf_counter()
    for command in commands:
        _run(command, folder / "programs")
    seconds = time.perf_counter() - began
    summaries = [
        json.loads((runs / name / "results.json").read_text())["train"]
        for name in members
    ]
    training = sum(s["seconds"] for s in summaries)
    compiling = [s["compile_seconds"] for s in summaries]
    # Of a population all say the same.
    compilation = max(compiling) if way == "population" else sum(compiling)
    return {
        "seconds": seconds,
        "training_seconds": training,
        "compile_seconds": compilation,
        "other_seconds": seconds - training - compilation,
    }


def _config_flags(config: Any) -> list[str]:
    """All of it: the config file itself is not looked at again."""
    from vaecf.config import flatten

    values = flatten(config.to_dict())
    return [
        f"--config={_CONFIG.value}",
        *(
            f"--config.{key}={tuple(v) if isinstance(v, list) else v}"
            for key, v in values.items()
            if v is not None
        ),
    ]


def _run(command: list[str], programs: pathlib.Path) -> None:
    from vaecf.errors import VaecfError

    environment = os.environ | {
        "PYTHONPATH": str(_ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise VaecfError(f"a run ended with {done.returncode}: {last}")


def child() -> None:
    """The runs of `sys.argv[1]` in this process, each by `loop.train`."""
    from vaecf import config as config_lib
    from vaecf import workdir as workdir_lib
    from vaecf.data.dataset import find_dataset
    from vaecf.training import loop

    for name, config in json.loads(sys.argv[1]).items():
        config, folder = config_lib.from_mapping(config), pathlib.Path(name)
        dataset = find_dataset(config.data.dir)
        with workdir_lib.locked(folder):
            workdir_lib.check_or_create(folder, config, dataset)
            summary = loop.train(config, dataset, folder).summary
            workdir_lib.write_json(
                folder / workdir_lib.RESULTS, {"train": summary}
            )


if __name__ == "__main__":
    cli.run(main)
