"""experiments/population.py, and what other entry points make of its runs."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(tmp_path, data_dir) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'synthetic.py'}",
        f"--data_dir={data_dir}",
        "--config.model.hidden=()",
        "--config.model.latent=6",
        "--config.mesh.data=1",
        "--config.train.batch_size=50",
        "--config.train.epochs=2",
        "--config.eval.every_epochs=1",
        f"--workdir={tmp_path / 'pop'}",
    ]


def test_members_are_tested_and_compared(flags, tmp_path, command) -> None:
    done = command("population", *flags, "--members=seed=0,1")
    assert done.status == 0, done.err
    folders = [tmp_path / "pop" / f"seed={s}" for s in (0, 1)]
    for folder in folders:
        assert str(folder.name) in done.out
        done_test = command("main", f"--workdir={folder}", "--test")
        assert done_test.status == 0, done_test.err
    compared = tmp_path / "compared.json"
    done = command("compare", *folders, "--nobaselines", f"--json={compared}")
    assert done.status == 0, done.err
    assert json.loads(compared.read_text())["groups"]["mult_vae"]["seeds"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--members=model.latent=3,4", "model.latent changes the program"),
        ("--config.mesh.data=2", "--config.mesh.data=1 --config.mesh.item=1"),
        ("--config.seeed=1", "seeed"),
        ("--data_dir=nosuch", "nosuch"),
        ("--workdir=/proc/nosuch", "cannot be written"),
    ],
)
def test_mistakes_are_one_line(changed, message, flags, command) -> None:
    done = command("population", *flags, "--members=seed=0,1", changed)
    assert done.status == 2
    assert message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.slow
def test_an_interrupt_saves(flags, tmp_path) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments" / "population.py"),
        *flags,
        "--members=seed=0,1",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [*command, "--config.train.epochs=100000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = tmp_path / "pop" / "seed=1" / "checkpoints" / "latest"
    end = time.monotonic() + 100
    while not saved.exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    steps = [
        {int(p.name) for p in (folder / "checkpoints" / "latest").iterdir()}
        for folder in (tmp_path / "pop").glob("seed=*")
    ]
    assert len(steps) == 2 and steps[0] == steps[1] and len(steps[0]) == 1
