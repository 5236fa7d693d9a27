"""Kills commands at random moments, and checks that nothing is lost.

    python tests/soak/kills.py --kills=120 --seed=0

Each command runs to its end once, as the reference. Then it is killed with
SIGKILL at random moments, and called again until it ends. After every kill, the
files that it replaces are whole: the old ones or the new ones. At the end the
result is the reference's, and no temporary file is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vaecf.data import dataset as datasets
from vaecf.evaluation import per_user
from vaecf.reporting.writers import read_records
from vaecf.workdir import read_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SMALL = (
    *("--config=configs/synthetic.py", "--config.model.hidden=(12,)"),
    *("--config.model.latent=6", "--config.mesh.data=1"),
    *("--config.linear.l2=20.0", "--config.train.batch_size=50"),
    *("--config.eval.batch_size=16", "--config.eval.every_epochs=1"),
)
_SAVE = (
    "import sys; from vaecf import Recommender; "
    "Recommender.load(sys.argv[1]).save(sys.argv[2], overwrite=True)"
)
_SPACE = (
    "def get_space():\n"
    "    return {'optimizer.learning_rate': {'low': 1e-4, 'high': 1e-2, "
    "'log': True}}\n"
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command that writes to the folder `out` of its directory."""

    command: tuple[str, ...]  # with {out} for the folder
    # Returns what the command has made, and raises if that is not whole.
    result: Callable[[pathlib.Path], Any]
    # Whether there is a result at every moment after the first one.
    always: bool = False
    # Statuses of a call after one that ended just before it was killed.
    done_statuses: tuple[int, ...] = (0,)
    # A sweep gives up a trial that has lost three workers.
    kills_in_a_row: int = 4


def _dataset(out: pathlib.Path) -> str:
    return datasets.open_dataset(out / "data", verify=True).manifest_hash


def _run(out: pathlib.Path) -> Any:
    results = read_json(out / "run" / "results.json")
    epochs = [
        {k: v for k, v in record.items() if "/" not in k or "loss" in k}
        for record in read_records(out / "run" / "metrics.jsonl")
        if "train/loss" in record
    ]
    for record in epochs:
        del record["time"]
    return results["test"], results["linear"], epochs


def _pooled(out: pathlib.Path) -> Any:
    results = read_json(out / "run" / "results.json")
    frames = per_user.read(out / "run" / "per_user.parquet")
    return results["test"], {n: f.rows() for n, f in frames.items()}


def _recommended(out: pathlib.Path) -> str:
    return (out / "recommended.csv").read_text()


def _model(out: pathlib.Path) -> Any:
    code = (
        "import sys; from vaecf import Recommender; "
        "print(Recommender.load(sys.argv[1]).recommend([[1, 2]], k=5))"
    )
    return _call([sys.executable, "-c", code, str(out / "model")]).stdout


def _trials(out: pathlib.Path) -> Any:
    lines = (out / "sweep" / "trials.csv").read_text().splitlines()
    states = [line.split(",")[1] for line in lines[1:]]
    best = json.loads((out / "sweep" / "best.json").read_text())
    return sorted(states), best["params"], best["value"]


def scenarios(inputs: pathlib.Path) -> dict[str, Scenario]:
    """Returns the commands by name; `inputs` is the result of `make_inputs`."""
    main = ("experiments/main.py", *_SMALL, "--train", "--test")
    data, run = inputs / "data", inputs / "run"
    prepare = (
        *("experiments/prepare_dataset.py", f"--ratings={inputs / 'h.csv'}"),
        *("--held_out_users=20", "--output={out}/data"),
    )
    recommend = (
        *("experiments/recommend.py", f"--workdir={run}", "--k=20"),
        *(f"--histories={inputs / 'h.csv'}", "--output={out}/recommended.csv"),
    )
    sweep = (
        *("experiments/sweep.py", *_SMALL, f"--config.data.dir={data}"),
        *("--config.train.epochs=3", f"--space={inputs / 'space.py'}"),
        *("--workdir={out}/sweep", "--trials=3"),
    )
    train = (*main, f"--data_dir={data}", "--epochs=6", "--workdir={out}/run")
    folds = (*main, f"--data_dir={inputs / 'folds'}", "--epochs=3")
    folds = (*folds, "--baselines=ease", "--workdir={out}/run")
    return {
        "prepare": Scenario(prepare, _dataset, done_statuses=(0, 2)),
        "replace": Scenario((*prepare, "--overwrite"), _dataset, always=True),
        "train": Scenario(train, _run),
        "folds": Scenario(folds, _pooled),
        "recommend": Scenario(recommend, _recommended, always=True),
        "save": Scenario(
            ("-c", _SAVE, str(run), "{out}/model"), _model, always=True
        ),
        "sweep": Scenario(sweep, _trials, kills_in_a_row=2),
    }


def make_inputs(folder: pathlib.Path) -> pathlib.Path:
    """Writes ratings, a search space, a dataset and a trained run."""
    rng = np.random.default_rng(0)
    rows = [
        f"{user},{item}"
        for user in range(600)
        for item in sorted(rng.choice(60, 12, replace=False))
    ]
    (folder / "h.csv").write_text("\n".join(["user,item", *rows]))
    (folder / "space.py").write_text(_SPACE)
    made = scenarios(folder)
    prepare = _filled(made["prepare"], folder)
    _call(prepare)
    _call([*prepare[:-1], "--folds=2", f"--output={folder / 'folds'}"])
    _call([*_filled(made["train"], folder), "--epochs=2"])
    return folder


# --- Kills ------------------------------------------------------------------


def _filled(scenario: Scenario, out: pathlib.Path) -> list[str]:
    words = (word.replace("{out}", str(out)) for word in scenario.command)
    return [sys.executable, *words]


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def _call(
    command: list[str], statuses: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess[str]:
    process = _start(command)
    out, err = process.communicate()
    assert process.returncode in statuses, f"{command}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _leftovers(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if "tmp" in path.name]


def soak(
    name: str,
    scenario: Scenario,
    n_kills: int,
    rng: random.Random,
    folder: pathlib.Path,
) -> None:
    """Kills one command `n_kills` times; raises if anything is lost."""
    (folder / "reference").mkdir(parents=True)
    began = time.monotonic()
    _call(_filled(scenario, folder / "reference"))
    seconds = time.monotonic() - began
    reference = scenario.result(folder / "reference")
    out = folder / "out"
    out.mkdir()
    command, calls = _filled(scenario, out), 0
    exists = False
    for number in range(n_kills):
        process = _start(command)
        # More often towards the end, where most of the writing is done.
        moment = seconds * rng.random() ** rng.choice([1.0, 0.3])
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        calls += 1
        place = f"{name}, kill {number} after {moment:.2f} s"
        if scenario.always and exists:
            assert scenario.result(out) == reference, place
        if calls == scenario.kills_in_a_row or number == n_kills - 1:
            _call(command, scenario.done_statuses)
            found = scenario.result(out)
            assert found == reference, (place, found, reference)
            assert not _leftovers(out), (place, _leftovers(out))
            calls, exists = 0, scenario.always
            if not scenario.always:  # begin anew
                shutil.rmtree(out)
                out.mkdir()
    print(f"{name}: {n_kills} kills, nothing lost", flush=True)


def main() -> None:
    """Runs all scenarios, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaecf-soak-") as temporary:
        folder = pathlib.Path(temporary)
        (folder / "inputs").mkdir()
        made = scenarios(make_inputs(folder / "inputs"))
        names = args.names or [*made]
        for name in names:
            rng = random.Random(f"{name} {args.seed}")
            n_kills = -(-args.kills // len(names))
            soak(name, made[name], n_kills, rng, folder / name)


if __name__ == "__main__":
    main()
