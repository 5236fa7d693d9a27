"""Processes that run as one; tests/experiments/test_launch.py starts them."""

import shutil
import socket
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from oracles import process, refuses

from vaecf.errors import VaecfError
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

ALL = {"coordinator_address": "h:1234", "num_processes": 2, "process_id": 1}
SLURM = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
MPI = "OMPI_COMM_WORLD_SIZE"
# What the mpirun of Open MPI 4.1.4 and 5.0.11 sets for rank 1 of 2.
MPI_4 = {
    MPI: "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1145044992.0;tcp://192.0.2.2:42343;"
    "tcp6://[fd00::2]:35907",
    "PMIX_NAMESPACE": "1145044993",
}
MPI_5 = {
    **{k: v for k, v in MPI_4.items() if k.startswith("OMPI_COMM")},
    "PMIX_NAMESPACE": "prterun-node-7-8611@1",
}
OTHER_HOST = {
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
KUBERNETES = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"


@pytest.fixture
def started(monkeypatch):
    """Records the calls that start JAX's runtime."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    for name in (*SLURM, *MPI_4, *KUBERNETES):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_start_with_arguments(started):
    processes.start()
    processes.start(num_processes=1)
    assert started == []
    processes.start(**ALL)
    assert started[0][0] == ("h:1234", 2, 1, None)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        (dict(zip(SLURM, ("3", "16"))), True),
        # A shell inside an allocation, and a step of one task.
        ({SLURM[1]: "4"}, False),
        (dict(zip(SLURM, ("0", "1"))), False),
        ({MPI: "1"}, False),
        ({KUBERNETES[0]: "10.0.0.1"}, False),
        # The package that JAX needs for Kubernetes is missing.
        (dict(zip(KUBERNETES, ("1.1.1.1", "0"))), False),
    ],
)
def test_start_by_a_launcher(started, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert [args for args, _ in started] == [(None,) * 4] * joins
    processes.start(num_processes=1)
    assert len(started) == joins


@pytest.mark.parametrize(
    ("environment", "host", "gpu"),
    [
        (MPI_4, "localhost", 1),
        (MPI_5, "localhost", 1),
        (MPI_4 | OTHER_HOST, "192.0.2.2", 0),
        (MPI_5 | OTHER_HOST, "node-7", 0),
    ],
)
def test_start_by_open_mpi(started, monkeypatch, environment, host, gpu):
    def start(rank, job, **given):
        here = {"OMPI_COMM_WORLD_RANK": rank, "PMIX_NAMESPACE": job}
        for name, value in (environment | here).items():
            monkeypatch.setenv(name, value)
        processes.start(**given)
        return started[-1][0]

    job = environment["PMIX_NAMESPACE"]
    address, n, number, devices = start("1", job)
    assert (n, number, devices) == (2, 1, [gpu])
    found, _, port = address.rpartition(":")
    # Not a port that Linux gives to clients (32768 to 60999).
    assert found == host and 61000 <= int(port) < 65536
    with mock.patch.object(processes, "_check_port"):
        assert start("0", job)[0] == address
    assert start("1", job.replace("1", "2"))[0] != address  # another job
    given = {"coordinator_address": "h:1234"}
    assert start("1", job, **given) == ("h:1234", 2, 1, [gpu])
    started.clear()
    processes.start(num_processes=1)
    assert not started


def test_another_open_mpi_needs_an_address(started, monkeypatch):
    for name, value in (MPI_5 | OTHER_HOST | {"PMIX_NAMESPACE": "7"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VaecfError, match=r"^coordinator_address missing"):
        processes.start()
    assert not started


MPIRUN = shutil.which("mpirun")
JOINED = r"""
from vaecf.parallel import processes
processes.start()
ranks = processes.gather(processes.jax.process_index())
# One write each: mpirun may mix the output of its processes.
processes.os.write(1, f"ranks {ranks[0]} {ranks[1]}\n".encode())
"""


@pytest.mark.skipif(MPIRUN is None, reason="needs Open MPI")
def test_mpirun():
    """The options of the recipe's README, but for two processes."""
    command = [MPIRUN, "--bind-to", "numa", "--allow-run-as-root", "-np", "2"]
    done = process(*command, "-H", "localhost:8", sys.executable, "-c", JOINED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks 0 1\n") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_id": None}, "^process_id missing"),
        *(
            ({"coordinator_address": address}, "must be host:port")
            for address in ("h", ":1234", "h:port", "h:70000")
        ),
        ({"num_processes": 0}, "num_processes=0 must"),
        ({"process_id": 2}, "process_id=2 must"),
        ({"process_id": -1}, "process_id=-1 must"),
        ({"num_processes": 1}, "process_id=1 must"),
    ],
)
def test_invalid_arguments(started, changes, message):
    with refuses(message):
        processes.start(**(ALL | changes))
    assert started == []


def test_other_processes_are_missing(started, monkeypatch):
    error = RuntimeError("DEADLINE_EXCEEDED: waiting\nfor tasks")
    fail = mock.Mock(side_effect=error)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with refuses(r"connect at h:1234.*waiting\)"):
        processes.start(**ALL)


def test_the_port_is_taken(started):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        taken = {"coordinator_address": f"h:{s.getsockname()[1]}"}
        with refuses(r"port \d+ is not available"):
            processes.start(**(ALL | taken | {"process_id": 0}))
        processes.start(**(ALL | taken))  # only process 0 needs the port
    assert len(started) == 1


ABSENT = """
from vaecf.parallel import processes
processes._START_SECONDS = 3
processes.start("localhost:%d", 2, %d)
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_exits_with_one_line(number):
    """The runtime itself would abort with the stacks of all threads."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    done = process(sys.executable, "-c", ABSENT % (port, number))
    assert done.returncode == 2
    lines = [x for x in done.stderr.splitlines() if x.startswith(("w", "e"))]
    assert lines[0].startswith("waiting for the other processes at localhost")
    assert "did not connect" in lines[1] and len(lines) == 2


def test_one_process_agrees_with_itself():
    assert processes.alone() and processes.is_lead()
    np.testing.assert_array_equal(processes.gather([1, 2]), [[1, 2]])
    processes.require_same({"config.seed": 1})
    numbers = [0.1, -1e300, 3.0]
    assert processes.from_lead(numbers) == numbers
    with processes.agreement():
        pass
    with refuses("mine"), processes.agreement():
        raise VaecfError("mine")


@pytest.fixture
def three(monkeypatch):
    """Plays process 1 of 3; the list has the values of the others."""
    others = []

    def gather(value):
        return np.stack([others[0], np.asarray(value), others[1]])

    monkeypatch.setattr(processes, "gather", gather)
    return others


def test_an_error_of_one_process_is_raised_in_all(three):
    three[:] = False, False
    with processes.agreement():
        pass
    three[:] = False, True
    for own, message in ((None, "process 2"), (VaecfError("mine"), "mine")):
        with refuses(message), processes.agreement():
            if own:
                raise own


def test_another_value_is_named(three, monkeypatch):
    digests = []
    with monkeypatch.context() as m:
        m.setattr(processes, "gather", lambda x: digests.append(x) or x[None])
        for value in (1, 2):
            processes.require_same({"same": "x", "seed": value})
    three[:] = digests[0], digests[0]
    processes.require_same({"same": "x", "seed": 1})
    for seed, last, other in ((2, 0, 1), (1, 1, 2)):
        three[:] = digests[0], digests[last]
        message = f"process {other} has another seed than"
        with refuses(message):
            processes.require_same({"same": "x", "seed": seed})


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_from_shards(shape):
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
    done = process(sys.executable, "-c", LATE)
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
    with refuses("another directory here than"):
        processes.require_shared_directory(tmp_path)
