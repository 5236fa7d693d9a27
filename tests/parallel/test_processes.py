"""What holds several processes together; the real thing is in test_launch."""

from __future__ import annotations

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from vaecf.errors import VaecfError
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

ALL = {"coordinator_address": "h:1234", "num_processes": 2, "process_id": 1}
LAUNCHERS = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "KUBERNETES_SERVICE_HOST",
    "JOB_COMPLETION_INDEX",
)


@pytest.fixture
def started(monkeypatch):
    """Arguments of every start of JAX's runtime."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_alone_unless_told(started):
    processes.start()
    processes.start(num_processes=1)
    assert started == []


def test_told_by_hand(started):
    processes.start(**ALL)
    assert started[0][0] == ("h:1234", 2, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_told_by_a_launcher(started, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert started[0][0] == (None, None, None)
    processes.start(num_processes=1)
    assert len(started) == 1


@pytest.mark.parametrize(
    "environment",
    [
        # A shell inside an allocation, and a step of one task.
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        # Without the package that JAX asks through.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_a_single_task_of_a_cluster_is_alone(started, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert started == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_id": None}, "--process_id missing"),
        (
            {"coordinator_address": None, "process_id": None},
            "--coordinator_address and --process_id missing",
        ),
        ({"coordinator_address": "h"}, "must be host:port"),
        ({"coordinator_address": ":1234"}, "must be host:port"),
        ({"coordinator_address": "h:port"}, "must be host:port"),
        ({"coordinator_address": "h:70000"}, "must be host:port"),
        ({"num_processes": 0}, "--num_processes=0 must be at least 1"),
        ({"process_id": 2}, "--process_id=2 must be from 0"),
        ({"process_id": -1}, "--process_id=-1 must be from 0"),
        ({"num_processes": 1}, "--process_id=1 must be from 0"),
    ],
)
def test_flags_that_do_not_fit(started, changes, message):
    with pytest.raises(VaecfError, match=message) as caught:
        processes.start(**(ALL | changes))
    assert "\n" not in str(caught.value)
    assert started == []


def test_the_others_are_not_there(started, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: waiting\nfor tasks")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(VaecfError, match=r"not met at h:1234.*waiting\)"):
        processes.start(**ALL)


def test_a_taken_port_is_said(started):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        taken = {"coordinator_address": f"h:{s.getsockname()[1]}"}
        with pytest.raises(VaecfError, match=r"port \d+ cannot be had here"):
            processes.start(**(ALL | taken | {"process_id": 0}))
        processes.start(**(ALL | taken))  # not this process's port
    assert len(started) == 1


ABSENT = """
from vaecf.parallel import processes
processes._START_SECONDS = 3
processes.start("localhost:%d", 2, %d)
"""


@pytest.mark.parametrize("process", [0, 1])
def test_who_waits_in_vain_says_so(process):
    """Of the runtime itself, which would end the process with its stacks."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", ABSENT % (port, process)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    lines = [x for x in done.stderr.splitlines() if x.startswith(("w", "e"))]
    assert lines[0].startswith("waiting for the other processes at localhost")
    assert "were not met" in lines[1] and len(lines) == 2


def test_one_process_agrees_with_itself():
    assert processes.alone() and processes.is_lead()
    np.testing.assert_array_equal(processes.gather([1, 2]), [[1, 2]])
    with processes.agreement():
        pass
    with (
        pytest.raises(VaecfError, match="mine"),
        processes.agreement(),
    ):
        raise VaecfError("mine")
    processes.require_same({"config.seed": 1})
    numbers = [0.1, -1e300, 3.0]
    assert processes.from_lead(numbers) == numbers


@pytest.fixture
def three(monkeypatch):
    """The second of three processes; the others' values come from a list."""
    others = []
    monkeypatch.setattr(
        processes,
        "gather",
        lambda value: np.stack([others[0], np.asarray(value), others[1]]),
    )
    return others


def test_anothers_error_is_everyones(three):
    three[:] = False, True
    with (
        pytest.raises(VaecfError, match="process 2 stopped"),
        processes.agreement(),
    ):
        pass
    with pytest.raises(VaecfError, match="mine"), processes.agreement():
        raise VaecfError("mine")
    three[:] = False, False
    with processes.agreement():
        pass


def test_who_has_another_value_is_named(three, monkeypatch):
    digests = []

    def record(x):
        digests.append(x)
        return x[None]

    with monkeypatch.context() as m:
        m.setattr(processes, "gather", record)
        for value in (1, 2):
            processes.require_same({"same": "x", "seed": value})
    three[:] = digests[0], digests[0]
    processes.require_same({"same": "x", "seed": 1})
    with pytest.raises(VaecfError, match="process 1 has another seed than"):
        processes.require_same({"same": "x", "seed": 2})
    three[:] = digests[0], digests[1]
    with pytest.raises(VaecfError, match="process 2 has another seed than"):
        processes.require_same({"same": "x", "seed": 1})


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_shards_are_put_where_they_belong(shape):
    mesh = mesh_lib.make_mesh(*shape)
    place = mesh_lib.shardings(mesh, jax.sharding.PartitionSpec("data"))
    shards = {d: np.full((3, 2), d) for d in range(shape[0])}
    x = processes.from_shards(shards, shape[0], place)
    assert x.sharding == place
    np.testing.assert_array_equal(x, np.concatenate(list(shards.values())))


LATE = """
import time
from vaecf.parallel import processes
processes.alone = lambda: False
with processes.deadline(30, "nothing"):
    pass
with processes.deadline(0, "for ever"):
    time.sleep(0.3)
print("so far", flush=True)
with processes.deadline(0.2, "a step"):
    time.sleep(60)
print("never")
"""


def test_a_deadline_ends_a_process_that_waits():
    done = subprocess.run(
        [sys.executable, "-c", LATE],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1
    assert done.stdout == "so far\n"
    assert "error: process 0: a step took more than 0.2 s" in done.stderr
    assert "config.mesh.peer_timeout" in done.stderr


@pytest.mark.parametrize("shared", [True, False])
def test_processes_must_see_one_directory(monkeypatch, tmp_path, shared):
    """In the second of two processes; the first has written its token."""
    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(processes, "is_lead", lambda: False)
    monkeypatch.setattr(processes, "_SHARED_SECONDS", 0.2)
    token = np.array([7, 8], np.uint32)
    monkeypatch.setattr(processes, "gather", lambda own: np.stack([token] * 2))
    where = tmp_path if shared else tmp_path / "on_another_host"
    where.mkdir(exist_ok=True)
    (where / ".processes").write_bytes(token.tobytes())
    if shared:
        processes.require_shared_directory(tmp_path)
        return
    with pytest.raises(VaecfError, match="another directory here than"):
        processes.require_shared_directory(tmp_path)
