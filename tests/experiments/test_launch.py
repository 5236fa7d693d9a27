"""Several processes that are one run, started as users start them.

tests/parallel/test_processes.py checks what each of them refuses.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from oracles import ROOT, process

from vaecf.workdir import read_json

LAUNCH = ROOT / "experiments" / "launch"
MAIN = ROOT / "experiments" / "main.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
}


@pytest.fixture(scope="module")
def flags(tiny, data_dir):
    """flags(workdir, ...) of a run on two times two devices."""
    kept = [flag for flag in tiny if "mesh.data" not in flag]

    def flags(workdir, *more):
        return [
            *kept,
            f"--config.data.dir={data_dir}",
            f"--workdir={workdir}",
            "--config.mesh.item=2",
            # Process 0 computes these two for all processes.
            "--config.model.init=spectral",
            "--config.linear.l2=20",
            "--config.linear.rank=3",
            "--train",
            *more,
        ]

    return flags


@pytest.fixture(scope="module")
def alone(flags, succeeds, tmp_path_factory):
    """The same run in one process on four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    more = ("--test", "--baselines=ease", "--config.mesh.data=2")
    succeeds("main", *flags(workdir, *more))
    return workdir


@contextlib.contextmanager
def start(*flags):
    with socket.socket() as s:
        s.bind(("", 0))
        address = f"localhost:{s.getsockname()[1]}"
    common = (f"--coordinator_address={address}", "--num_processes=2")
    processes = [
        subprocess.Popen(
            [sys.executable, MAIN, *flags, *common, f"--process_id={i}"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = map(json.loads, lines)
    return [r["train/loss"] for r in records if "train/loss" in r]


def wait_for_epochs(n, workdir, processes):
    deadline = time.monotonic() + 120
    while len(losses(workdir)) < n:
        assert all(p.poll() is None for p in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def summary(workdir):
    results = read_json(workdir / "results.json")
    del results["ease"]["fit_seconds"]
    return {key: results[key] for key in ("validation", "test", "ease")}


def test_two_processes_are_one_run(flags, tmp_path, alone, succeeds):
    """Two processes with two devices each, against one with four."""
    workdir, per_user = tmp_path / "run", tmp_path / "users.csv"
    more = ("--test", "--baselines=ease", f"--per_user={per_user}")
    given = flags(workdir, *more)
    done = process(LAUNCH / "local.sh", "2", *given, **ENVIRONMENT)
    other = (workdir / "process-1.log").read_text()
    assert done.returncode == 0, done.stdout + other
    assert len(losses(workdir)) == 3
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-6)
    assert summary(workdir) == summary(alone)
    assert "4 x " in done.stdout
    assert "Test users" in done.stdout and "Test users" not in other
    assert len(per_user.read_text().splitlines()) == 41
    # A single process can use the model.
    again = ("--test", "--config.mesh.data=1", "--config.mesh.item=1")
    succeeds("main", f"--workdir={workdir}", *again)
    for name, metric in summary(alone)["test"].items():
        value = read_json(workdir / "results.json")["test"][name]["mean"]
        assert value == pytest.approx(metric["mean"], abs=1e-6)


@pytest.mark.slow
def test_sigterm_saves_and_a_killed_process_ends_the_run(
    flags, tmp_path, alone, succeeds
):
    """The run then resumes with another number of processes and devices."""
    workdir = tmp_path / "run"
    long = flags(workdir, "--epochs=100000")
    with start(*long) as processes:
        wait_for_epochs(3, workdir, processes)
        processes[1].send_signal(signal.SIGTERM)
        outs = [p.communicate(timeout=60)[0] for p in processes]
        assert [p.returncode for p in processes] == [130, 130], outs
        assert all("interrupted" in out for out in outs)
    saved = len(losses(workdir))
    with start(*long) as processes:
        # The checkpoint of the last epoch but one is complete.
        wait_for_epochs(saved + 2, workdir, processes)
        processes[1].send_signal(signal.SIGKILL)
        out, _ = processes[0].communicate(timeout=60)
        assert processes[0].returncode not in (0, None)
        # The connection broke, or the runtime missed a heartbeat.
        assert re.search("another (process of the run|task) died", out)
    epochs = len(losses(workdir)) + 1
    more = ("--config.mesh.data=1", "--config.mesh.item=1")
    succeeds("main", *flags(workdir, *more), f"--epochs={epochs}")
    assert len(losses(workdir)) == epochs
    np.testing.assert_allclose(losses(workdir)[:3], losses(alone), rtol=1e-5)


@pytest.mark.parametrize(
    "form", [["--checkpoint_dir=a b"], ["--workdir", "a b"]]
)
def test_the_local_script_logs_into_the_directory_of_the_run(tmp_path, form):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    done = process(
        *(LAUNCH / "local.sh", "2", "--train", *form),
        cwd=tmp_path,
        PYTHON=str(fake),
        PORT="1234",
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "a b" / "process-1.log").read_text()
    assert "--process_id=1" in text and "--process_id=0" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"a b", "python"}


@pytest.mark.parametrize("arguments", [[], ["--train"], ["0"]])
def test_the_local_script_prints_its_usage(arguments):
    done = process(LAUNCH / "local.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: usage:")


def test_the_slurm_script_starts_a_process_per_gpu(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    assert asked["ntasks-per-node"] == asked["gres"].removeprefix("gpu:")
    # A stand-in for Slurm's launcher prints the command.
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    command = ["bash", LAUNCH / "slurm.sbatch", "--train", "--workdir=a b"]
    done = process(*command, PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = ["experiments/main.py", "--train", "--workdir=a b"]
    assert done.stdout.splitlines()[-3:] == command


def test_the_job_set_names_its_own_process_0(parsed):
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    [job] = spec["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["completionMode"] == "Indexed"
    [container] = pods["template"]["spec"]["containers"]
    python, script, *flags = container["command"]
    assert (python, script) == ("python", "experiments/main.py")
    # <jobset>-<job>-<replica>-<index>.<subdomain, the jobset's name>
    name = spec["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    given = [f.replace("$(JOB_COMPLETION_INDEX)", "1") for f in flags]
    with parsed("main", *given) as module:
        values = module.flags.FLAGS
        assert values.process_id == 1
        assert pods["parallelism"] == pods["completions"]
        assert values.num_processes == pods["parallelism"]
        address = f"{name}-{job['name']}-0-0.{name}:{port}"
        assert values.coordinator_address == address
