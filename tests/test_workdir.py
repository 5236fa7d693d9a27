"""The lock and identity of a run's directory, and atomic writes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from oracles import ROOT, generated, refuses

from vaecf import config as config_lib
from vaecf import files as files_lib
from vaecf import workdir as workdir_lib

HOLDER = """
import os, pathlib, sys
from vaecf import workdir as workdir_lib
with workdir_lib.locked(pathlib.Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


# Settings that may differ between a run and its resumption, of each type.
RESUMABLE = {
    "data.dir": "elsewhere",
    "data.feed": "streamed",
    "train.epochs": 9,
    "train.microbatch": 7,
    "eval.batch_size": 8,
    "eval.metrics": ("mrr@5",),
    "eval.patience": 3,
    "mesh.item": 2,
    "mesh.zero": True,
    "precision.max_skipped_in_a_row": 3,
}


def config(changes=None):
    return config_lib.replace(config_lib.Config(), changes or {})


def make(seed):
    return generated(12, 2, 20, 3, seed)


@pytest.fixture(scope="module")
def dataset():
    return make(0)


def values(content: bytes) -> dict[str, object]:
    """The values of a JSON file without the digests of the directory."""
    loaded = json.loads(content)
    return {k: v for k, v in loaded.items() if k not in ("sha256", "tables")}


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_the_lock_of_another_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as holder:
        assert int(holder.stdout.readline()) == holder.pid
        with (
            refuses(f"use by process {holder.pid}:"),
            workdir_lib.locked(tmp_path),
        ):
            pytest.fail("two processes hold the workdir")
        holder.kill()
    with workdir_lib.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_lock_is_released_after_an_error(tmp_path):
    path = tmp_path / "made" / "on" / "demand"
    with (
        refuses("in use"),
        workdir_lib.locked(path),
        workdir_lib.locked(path),  # not twice in a process either
    ):
        pass
    with workdir_lib.locked(path):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_workdir_that_cannot_be_created(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        refuses("cannot be written"),
        workdir_lib.locked(tmp_path / name),
    ):
        pass


def begin(folder, dataset):
    """Makes `folder` the workdir of a run with a checkpoint."""
    workdir_lib.check_or_create(folder, config(), dataset)
    (folder / "checkpoints").mkdir()
    return files(folder)


def test_a_run_resumes_with_what_may_change(tmp_path, dataset):
    before = begin(tmp_path, dataset)
    assert set(before) == {"config.json", "dataset.json", "items.parquet"}
    assert values(before["config.json"]) == config().to_dict()
    assert values(before["dataset.json"]) == dataset.manifest
    workdir_lib.check_or_create(tmp_path, config(), dataset)
    assert files(tmp_path) == before
    workdir_lib.check_or_create(tmp_path, config(RESUMABLE), dataset)
    after = files(tmp_path)
    assert values(after["config.json"]) == config(RESUMABLE).to_dict()
    assert after["dataset.json"] == before["dataset.json"]
    # Scoring may use another precision, and writes nothing.
    other = config({**RESUMABLE, "precision.policy": "bf16"})
    workdir_lib.check_or_create(tmp_path, other, dataset, train=False)
    assert files(tmp_path) == after


def test_another_config_or_dataset_is_refused(tmp_path, dataset):
    """The message names all keys that change the numbers of a step."""
    before = begin(tmp_path, dataset)
    changes = {
        "seed": 8,
        "model.hidden": (6, 5),
        "train.batch_size": 17,
        "eval.best_metric": "ndcg@5",
        "precision.policy": "bf16",
        "mesh.reduce": "compute",
    }
    other = config({**changes, **RESUMABLE})
    with refuses() as e:
        workdir_lib.check_or_create(tmp_path, other, dataset)
    message = str(e.value)
    assert f"workdir {tmp_path}" in message and "\n" not in message
    assert "config.model.hidden was [600] and is [6, 5]" in message
    named = re.findall(r"config\.(\S+) was", message)
    assert named == [*changes]
    with refuses("another dataset"):
        workdir_lib.check_or_create(tmp_path, config(), make(1))
    assert files(tmp_path) == before


def test_before_the_first_checkpoint_anything_may_change(tmp_path, dataset):
    begin(tmp_path, dataset)
    weights = tmp_path / "linear" / "weights.json"
    weights.parent.mkdir()
    weights.touch()
    workdir_lib.check_or_create(tmp_path, config(), dataset)
    assert weights.exists()
    (tmp_path / "checkpoints").rmdir()
    workdir_lib.check_or_create(tmp_path, config({"seed": 8}), dataset)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 8
    # The blend weights were those of the earlier model.
    assert not weights.exists()


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("members.csv", "population"),
        ("sweep.json", "sweep"),
        ("manifest.json", "dataset"),  # a run would replace its items.parquet
    ],
)
def test_directory_of_another_kind(tmp_path, dataset, file, kind):
    (tmp_path / file).touch()
    with refuses(f"holds a {kind} .{file}"):
        workdir_lib.check_or_create(tmp_path, config(), dataset)
    workdir_lib.require_no_other(tmp_path, kind)
    (tmp_path / file).unlink()
    begin(tmp_path, dataset)
    with refuses(r"holds a run .config\.json"):
        workdir_lib.require_no_other(tmp_path, kind)


def test_missing_and_damaged_json(tmp_path):
    path = tmp_path / "config.json"
    for place, message in ((path, "no such file"), (tmp_path, "is a direct")):
        with refuses(message):
            workdir_lib.read_json(place)
    for content in (b"", b"{", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with refuses(f"{path}: not JSON"):
            workdir_lib.read_json(path)


def test_write_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    workdir_lib.write_json(path, {"é": [1, None, 0.5]})
    before = path.read_bytes()
    assert json.loads(before) == {"é": [1, None, 0.5]}
    for bad, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            workdir_lib.write_json(path, {"x": bad})

    def replace(source, target):
        # The new file is complete, in the same directory.
        assert json.loads(pathlib.Path(source).read_bytes()) == {"x": 2}
        assert pathlib.Path(source).parent == path.parent and target == path
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", replace)
    with refuses(f"{path}: killed here"):
        workdir_lib.write_json(path, {"x": 2})
    assert files(path.parent) == {"a.json": before}


def test_atomic_directory(tmp_path):
    target = tmp_path / "parent" / "made"
    for content in ("first", "second"):
        with workdir_lib.atomic_directory(target) as fresh:
            (fresh / content).touch()
        assert set(files(target)) == {content}
    with (
        pytest.raises(RuntimeError),
        workdir_lib.atomic_directory(target) as fresh,
    ):
        (fresh / "third").touch()
        raise RuntimeError
    assert set(files(target)) == {"second"}
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """As on Linux, and as on a file system that cannot exchange."""
    if request.param == "two renames":
        monkeypatch.setattr(files_lib.ctypes, "CDLL", lambda name: object())


def test_a_directory_is_never_absent(tmp_path, monkeypatch):
    target, seen = tmp_path / "made", []
    sync = files_lib._sync
    monkeypatch.setattr(
        files_lib, "_sync", lambda p: (seen.append(target.exists()), sync(p))
    )
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: pytest.fail(f"{a}, {b}") if b != target
        else rename(a, b)
    )  # fmt: skip
    for content in ("first", "second"):
        with workdir_lib.atomic_directory(target) as fresh:
            (fresh / content).touch()
        assert set(files(target)) == {content}
    assert seen[-2:] == [True, True]
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_directory_comes_back(tmp_path, monkeypatch, exchange):
    """If the new one cannot take its place."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def fail_for_the_new(source, new):
        if ".tmp-" in str(source):
            raise OSError(28, "disk full")
        rename(source, new)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with (
        refuses("disk full"),
        workdir_lib.atomic_directory(target) as fresh,
    ):
        (fresh / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


DIES = """
import ctypes, os, pathlib, signal, sys
from vaecf import files
where, target = sys.argv[1], pathlib.Path(sys.argv[2])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if where == "between the renames":
    ctypes.CDLL = lambda name: object()
    rename = os.rename
    def dying(a, b):
        rename(a, b)
        if ".old-" in str(b):
            die()
    os.rename = dying
with files.atomic_directory(target) as fresh, files.atomic_file(target.parent / "f"):
    (fresh / "a").write_text("new")
    if where == "in the block":
        die()
"""


@pytest.mark.parametrize("where", ["in the block", "between the renames"])
def test_a_killed_writer(tmp_path, where):
    """Nothing is lost, and the next writer removes what is left."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "a").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", DIES, where, str(target)], cwd=ROOT, check=False
    )
    assert done.returncode == -9 and len([*tmp_path.iterdir()]) > 1
    files_lib.recover(target)
    assert (target / "a").read_text() == "old"
    with (
        workdir_lib.atomic_directory(target) as fresh,
        workdir_lib.atomic_file(tmp_path / "f") as file,
    ):
        (fresh / "a").write_text("newer")
        file.write_text("x")
    assert {p.name for p in tmp_path.iterdir()} == {"made", "f"}
    assert (target / "a").read_text() == "newer"


def test_two_writers_of_a_directory(tmp_path):
    """The second one is refused; it takes nothing from the first one."""
    target = tmp_path / "made"
    with workdir_lib.atomic_directory(target) as fresh:
        (fresh / "a").write_text("first")
        with (
            refuses("another process is writing"),
            workdir_lib.atomic_directory(target),
        ):
            pytest.fail("two writers")
        # One that came and went meanwhile, as on another host.
        target.mkdir()
        (target / "b").touch()
        files_lib.remove_leftovers(target)  # but not those of the living
    assert set(files(target)) == {"a"}
    with (
        refuses("has written"),
        workdir_lib.atomic_directory(target, replace=False),
    ):
        pass
    assert set(files(target)) == {"a"}
    assert list(tmp_path.iterdir()) == [target]


def test_digests_in_json_files(tmp_path):
    path = tmp_path / "a.json"
    value = {"é": [1, 0.1, None], "b": {"sha256": "x"}}
    workdir_lib.write_json(path, value, digest=True)
    assert workdir_lib.read_json(path) == value
    text = path.read_text()
    for old, new in (('"sha256": "', '"sha;56": "'), ("0.1", "0.2")):
        path.write_text(new.join(text.rsplit(old, 1)))
        with refuses(r"a\.json: damaged, or changed"):
            workdir_lib.read_json(path)
    changed = json.loads(path.read_text())
    del changed["sha256"]  # as the message says
    path.write_text(json.dumps(changed))
    assert workdir_lib.read_json(path) == {**value, "é": [1, 0.2, None]}
    for text in ("[" * 100_000, "1" * 5000):
        path.write_text(text)
        with refuses("not JSON"):
            workdir_lib.read_json(path)


def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path):
    values = config().to_dict()
    del values["loss"]["gamma"], values["mesh"]
    workdir_lib.write_json(tmp_path / "config.json", values)
    assert workdir_lib.read_config(tmp_path) == config()


def test_a_setting_has_another_name_in_an_older_run(tmp_path):
    values = config().to_dict()
    del values["train"]["alternating_epochs"]
    values["train"]["alternate"] = [3, 1]
    path = tmp_path / "config.json"
    workdir_lib.write_json(path, values)
    assert workdir_lib.read_config(tmp_path).train.alternating_epochs == (3, 1)
    values["train"]["alternates"] = 1
    workdir_lib.write_json(path, values)
    with refuses(r"config\.json: config\.train\.alternates is not a known key"):
        workdir_lib.read_config(tmp_path)
