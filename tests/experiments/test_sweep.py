"""experiments/sweep.py, in processes of its own."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from oracles import ROOT, recorded

from vaecf.workdir import read_json

METRIC = "validation/ndcg@10"
SPACE = """
def get_space():
    return {
        "optimizer.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.hidden": {"choices": [(), (6,)]},
    }
"""


@pytest.fixture
def flags(tmp_path, data_dir):
    (tmp_path / "space.py").write_text(SPACE)
    return [
        f"--config={ROOT / 'configs' / 'synthetic.py'}",
        f"--config.data.dir={data_dir}",
        "--config.model.latent=6",
        "--config.mesh.data=1",
        "--config.train.batch_size=50",
        "--config.train.epochs=2",
        "--config.eval.every_epochs=1",
        "--config.eval.best_metric=ndcg@10",
        f"--space={tmp_path / 'space.py'}",
        f"--workdir={tmp_path / 'sweep'}",
        "--trials=3",
    ]


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed(flags, tmp_path, succeeds):
    """Three trials in all, none twice; best.json's command is one of main.py."""
    workdir = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "sweep.py"), *flags,
         "--workers=2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    lock = workdir / "trials" / "00001" / ".lock"
    metrics = lock.with_name("metrics.jsonl")
    end = time.monotonic() + 100
    # In the midst of its training.
    while not metrics.exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    victim = int(lock.read_text())
    assert victim != process.pid
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "ended with status -9" in out
    frame = pd.read_csv(workdir / "trials.csv")
    assert len(frame) == 3
    assert frame["number"].is_unique
    assert set(frame["state"]) <= {"complete", "pruned"}
    assert 1 not in frame["number"].tolist()  # tried again under another
    assert len(frame.drop_duplicates("optimizer.learning_rate")) == 3
    for number, value in zip(frame["number"], frame["value"]):
        folder = workdir / "trials" / f"{number:05d}"
        values = [*recorded(folder, METRIC).values()]
        assert value in (max(values), values[-1])
    out = succeeds("sweep", *flags)
    assert "3 of 3 trials are finished" in out

    best = read_json(workdir / "best.json")
    script, *words = shlex.split(
        best["command"].replace("\\\n", "").removeprefix("python ")
    )
    assert script == str(ROOT / "experiments" / "main.py")
    best_run = f"--workdir={pathlib.Path('runs/best').absolute()}"
    words[words.index(best_run)] = f"--workdir={tmp_path / 'run'}"
    succeeds("main", *words)
    values = recorded(tmp_path / "run", METRIC).values()
    assert max(values) == pytest.approx(best["value"], rel=1e-5)
    mine = read_json(tmp_path / "run" / "config.json")
    theirs = pathlib.Path(best["folder"]) / "config.json"
    assert mine == read_json(theirs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--space=nosuch.py", "--space=nosuch.py: no such file"),
        ("--trials=0", "--trials=0 must be at least 1"),
        ("--pruner=mean", "--pruner=mean must be one of median"),
        ("--storage=here", "--storage=here must be a file ending in .journal"),
        ("--config.model.laten=3", "latent"),
        ("--workdir=/proc/nosuch", "cannot be written"),
    ],
)
def test_mistakes_are_one_line(changed, message, flags, refused):
    refused("sweep", [*flags, changed], message)


def test_without_optuna(flags, refused, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("vaecf.tuning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused("sweep", flags, "pip install 'vaecf[tune]'")
