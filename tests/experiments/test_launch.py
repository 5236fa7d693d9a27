"""Several processes that are one run, as people start them."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from vaecf.workdir import read_json

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "experiments" / "launch"
MAIN = ROOT / "experiments" / "main.py"
MESH = "--config.mesh.item=2"
# What a process works out for all of them.
SHARED = ("--config.model.init=spectral", "--config.linear.l2=20")


def environment(devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def flags_of(tiny, data_dir, workdir, *more: str) -> list[str]:
    kept = [flag for flag in tiny if "mesh.data" not in flag]
    return [
        *kept,
        f"--config.data.dir={data_dir}",
        f"--workdir={workdir}",
        MESH,
        *SHARED,
        "--config.linear.rank=3",
        *more,
    ]


def run(command: list, devices: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=200,
    )


def start(flags: list[str], process: int, address: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            MAIN,
            *flags,
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={process}",
        ],
        env=environment(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("", 0))
        return f"localhost:{s.getsockname()[1]}"


def records(workdir: pathlib.Path, name: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r[name] for r in map(json.loads, lines) if name in r]


def summary(workdir: pathlib.Path) -> dict:
    results = read_json(workdir / "results.json")
    del results["ease"]["fit_seconds"]
    return {key: results[key] for key in ("validation", "test", "ease")}


@pytest.fixture(scope="module")
def alone(tiny, data_dir, tmp_path_factory) -> pathlib.Path:
    """The run in one process, on four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    more = ("--train", "--test", "--baselines=ease")
    done = run(
        [sys.executable, MAIN, *flags_of(tiny, data_dir, workdir, *more)], 4
    )
    assert done.returncode == 0, done.stderr
    return workdir


def test_two_processes_are_one_run(tiny, data_dir, tmp_path, alone):
    """Two of two devices give the numbers of one of four."""
    workdir = tmp_path / "run"
    per_user = tmp_path / "users.csv"
    done = run(
        [
            LAUNCH / "local.sh",
            "2",
            *flags_of(
                tiny,
                data_dir,
                workdir,
                "--train",
                "--test",
                "--baselines=ease",
                f"--per_user={per_user}",
            ),
        ],
        2,
    )
    other = (workdir / "process-1.log").read_text()
    assert done.returncode == 0, done.stdout + other
    losses = records(workdir, "train/loss")
    assert len(losses) == 3
    np.testing.assert_allclose(losses, records(alone, "train/loss"), rtol=1e-6)
    assert summary(workdir) == summary(alone)
    assert "4 x " in done.stdout and "every process reads" in done.stdout
    assert "Test users" in done.stdout and "Test users" not in other
    assert len(per_user.read_text().splitlines()) == 41
    # One process of the run is enough to use the model.
    again = run(
        [
            sys.executable,
            MAIN,
            f"--workdir={workdir}",
            "--test",
            "--baselines=ease",
            "--config.mesh.item=1",
        ],
        1,
    )
    assert again.returncode == 0, again.stderr
    for name, metric in summary(alone)["test"].items():
        value = read_json(workdir / "results.json")["test"][name]["mean"]
        assert value == pytest.approx(metric["mean"], abs=1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_alone(
    tiny, data_dir, tmp_path, alone
):
    workdir = tmp_path / "run"
    long = flags_of(tiny, data_dir, workdir, "--train", "--epochs=100000")
    address = free_address()
    processes = [start(long, i, address) for i in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        # By its fourth epoch the third is saved, whatever is being written.
        while not (workdir / "metrics.jsonl").exists() or (
            len(records(workdir, "train/loss")) < 4
        ):
            assert all(p.poll() is None for p in processes)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        out, _ = processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 60
        assert processes[0].returncode not in (0, None)
        # Of a broken connection, or of the runtime that misses a heartbeat.
        assert "another process of the run died" in out or (
            "another task died" in out
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    kept = records(workdir, "train/loss")
    # Alone, on one device: a few epochs more, if any are needed for three.
    epochs = max(3, len(kept) + 1)
    on = [f for f in long if not f.startswith("--epochs")]
    done = run(
        [
            sys.executable,
            MAIN,
            *on,
            f"--epochs={epochs}",
            "--config.mesh.item=1",
        ],
        1,
    )
    assert done.returncode == 0, done.stderr
    assert "going on from epoch" in done.stdout
    losses = records(workdir, "train/loss")
    assert len(losses) == epochs
    np.testing.assert_allclose(
        losses[:3], records(alone, "train/loss"), rtol=1e-5
    )


def test_sigterm_of_one_process_saves_and_ends_both(tiny, data_dir, tmp_path):
    """Its signal is everybody's, after the same step."""
    workdir = tmp_path / "run"
    long = flags_of(tiny, data_dir, workdir, "--train", "--epochs=100000")
    address = free_address()
    processes = [start(long, i, address) for i in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists():
            assert all(p.poll() is None for p in processes)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        outs = [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [p.returncode for p in processes] == [130, 130], outs
    for out in outs:
        assert "the same command goes on from here" in out


def test_processes_of_different_configs_do_not_start(tiny, data_dir, tmp_path):
    address = free_address()
    flags = flags_of(tiny, data_dir, tmp_path / "run", "--train")
    processes = [
        start([*flags, f"--config.seed={i}"], i, address) for i in (0, 1)
    ]
    outs = [p.communicate(timeout=100)[0] for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    for out in outs:
        assert "process 1 has another config.seed than process 0" in out
    assert not (tmp_path / "run").exists()


# --- Recipes ----------------------------------------------------------------


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch"])
def test_scripts_are_valid_shell(script):
    done = subprocess.run(
        ["bash", "-n", LAUNCH / script], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_local_script_says_how_it_is_used():
    for arguments in ([], ["--train"], ["0"]):
        done = run([LAUNCH / "local.sh", *arguments], 1)
        assert done.returncode == 2
        assert done.stderr.startswith("error: usage:")


def test_the_batch_script_asks_for_a_process_a_gpu(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(
        shlex.split(line)[1].lstrip("-").split("=", 1)
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert asked["ntasks-per-node"] == asked["gres"].removeprefix("gpu:")
    # What it would run, with a stand-in for Slurm's launcher.
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--train", "--workdir=a b"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-3:] == [
        "experiments/main.py",
        "--train",
        "--workdir=a b",
    ]


def test_the_job_set_names_its_own_process_0(parsed):
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (spec["kind"], spec["apiVersion"]) == (
        "JobSet",
        "jobset.x-k8s.io/v1alpha2",
    )
    [job] = spec["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["completionMode"] == "Indexed"
    [container] = pods["template"]["spec"]["containers"]
    python, script, *flags = container["command"]
    assert (python, script) == ("python", "experiments/main.py")
    assert pods["parallelism"] == pods["completions"]
    assert f"--num_processes={pods['parallelism']}" in flags
    # <jobset>-<job>-<replica>-<index>.<subdomain, the jobset's name>
    name = spec["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    host = f"{name}-{job['name']}-0-0.{name}"
    assert f"--coordinator_address={host}:{port}" in flags
    given = [f.replace("$(JOB_COMPLETION_INDEX)", "1") for f in flags]
    with parsed("main", *given) as module:
        assert module.flags.FLAGS.process_id == 1
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pods["template"]["spec"]["volumes"]}
