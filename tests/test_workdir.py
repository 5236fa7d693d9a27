"""The lock and identity of a run's directory, and atomic writes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.data import synthetic
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLDER = """
import os, pathlib, sys
from vaecf import workdir as workdir_lib
with workdir_lib.locked(pathlib.Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


# Settings that may differ between a run and its resumption.
RESUMABLE = {
    "data.dir": "elsewhere",
    "data.feed": "streamed",
    "train.epochs": 9,
    "train.microbatch": 7,
    "train.warm_up_epochs": 0,
    "eval.every_epochs": 2,
    "eval.batch_size": 8,
    "eval.metrics": ("mrr@5",),
    "eval.patience": 3,
    "mesh.data": 2,
    "mesh.item": 2,
    "mesh.zero": True,
    "precision.max_skipped_in_a_row": 3,
}


def config(changes: dict[str, object] | None = None) -> config_lib.Config:
    return config_lib.replace(config_lib.Config(), changes or {})


def make(seed: int) -> Dataset:
    return synthetic.make(
        "synthetic",
        seed=seed,
        n_train_users=12,
        n_held_out_users=2,
        n_items=20,
        n_groups=3,
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make(0)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


# --- Lock -------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert int(process.stdout.readline()) == process.pid
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("end", ["dies", "exits"])
def test_second_process_is_refused(tmp_path, holder, end):
    for _ in range(2):
        with (
            pytest.raises(VaecfError, match="in use") as e,
            workdir_lib.locked(tmp_path),
        ):
            pytest.fail("two processes hold the workdir")
        assert f"process {holder.pid}:" in str(e.value)
        assert f"workdir {tmp_path}" in str(e.value)
    if end == "dies":
        holder.kill()
    else:
        holder.stdin.close()
    holder.wait()
    with workdir_lib.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_lock_is_released_after_an_error_and_between_runs(tmp_path):
    path = tmp_path / "made" / "on" / "demand"
    with pytest.raises(RuntimeError), workdir_lib.locked(path):
        # The same process does not get it twice either.
        with (
            pytest.raises(VaecfError, match="in use"),
            workdir_lib.locked(path),
        ):
            pass
        raise RuntimeError
    with workdir_lib.locked(path):
        pass


def test_workdir_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(VaecfError, match="cannot be written"),
            workdir_lib.locked(path),
        ):
            pass


# --- Identity ---------------------------------------------------------------


def begin(folder, dataset) -> dict[str, bytes]:
    """Makes `folder` the workdir of a run with a checkpoint."""
    workdir_lib.check_or_create(folder, config(), dataset)
    (folder / "checkpoints").mkdir()
    return files(folder)


def test_same_run_resumes(tmp_path, dataset):
    before = begin(tmp_path, dataset)
    assert set(before) == {"config.json", "dataset.json", "items.parquet"}
    assert json.loads(before["config.json"]) == config().to_dict()
    assert json.loads(before["dataset.json"]) == dataset.manifest
    workdir_lib.check_or_create(tmp_path, config(), dataset)
    assert files(tmp_path) == before


def test_another_config_is_refused(tmp_path, dataset):
    """The message names all keys that change the numbers of a step."""
    before = begin(tmp_path, dataset)
    changes = {
        "seed": 8,
        "model.hidden": (6, 5),
        "model.dropout_rate": 0.4,
        "train.batch_size": 17,
        "train.drop_remainder": True,
        "loss.weight_decay": 0.1,
        "loss.total_anneal_steps": 21,
        "eval.best_metric": "ndcg@5",
        "precision.policy": "bf16",
        "mesh.reduce": "compute",
    }
    other = config({**changes, **RESUMABLE})
    with pytest.raises(VaecfError) as e:
        workdir_lib.check_or_create(tmp_path, other, dataset)
    message = str(e.value)
    assert f"workdir {tmp_path}" in message and "\n" not in message
    assert "config.model.hidden was [600] and is [6, 5]" in message
    named = re.findall(r"config\.(\S+) was", message)
    assert named == sorted(changes)
    assert files(tmp_path) == before


def test_what_may_change_between_runs(tmp_path, dataset):
    before = begin(tmp_path, dataset)
    workdir_lib.check_or_create(tmp_path, config(RESUMABLE), dataset)
    after = files(tmp_path)
    assert json.loads(after["config.json"]) == config(RESUMABLE).to_dict()
    assert after["dataset.json"] == before["dataset.json"]


def test_scoring_may_use_another_precision_and_writes_nothing(
    tmp_path, dataset
):
    before = begin(tmp_path, dataset)
    other = config({"precision.policy": "bf16"})
    workdir_lib.check_or_create(tmp_path, other, dataset, train=False)
    assert files(tmp_path) == before


def test_another_dataset_is_refused(tmp_path, dataset):
    before = begin(tmp_path, dataset)
    with pytest.raises(VaecfError, match="another dataset"):
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
    [("members.csv", "a population"), ("sweep.json", "a sweep")],
)
def test_directory_of_another_kind(tmp_path, dataset, file, kind):
    (tmp_path / file).touch()
    with pytest.raises(VaecfError, match=f"holds {kind} .{file}"):
        workdir_lib.check_or_create(tmp_path, config(), dataset)
    own = kind.split()[1]
    workdir_lib.require_no_other(tmp_path, own)
    (tmp_path / file).unlink()
    begin(tmp_path, dataset)
    with pytest.raises(VaecfError, match=r"holds a run .config\.json"):
        workdir_lib.require_no_other(tmp_path, own)


# --- Files ------------------------------------------------------------------


def test_missing_and_damaged_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(VaecfError, match="no such file"):
        workdir_lib.read_json(path)
    with pytest.raises(VaecfError, match="is a directory"):
        workdir_lib.read_json(tmp_path)
    for content in (b"", b"{", b"\xff\xfe\x00", b"not json"):
        path.write_bytes(content)
        with pytest.raises(VaecfError, match="not JSON") as e:
            workdir_lib.read_json(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_write_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    workdir_lib.write_json(path, {"é": [1, None, 0.5]})
    assert json.loads(path.read_bytes()) == {"é": [1, None, 0.5]}
    before = path.read_bytes()
    with pytest.raises(ValueError):
        workdir_lib.write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        workdir_lib.write_json(path, {"x": object()})
    replaced = []

    def replace(source, target):
        # The new file is complete, in the same directory, and the old one is
        # still there.
        assert json.loads(pathlib.Path(source).read_bytes()) == {"x": 2}
        assert pathlib.Path(source).parent == path.parent
        assert path.read_bytes() == before
        replaced.append(target)
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(VaecfError, match=f"{path}: killed here"):
        workdir_lib.write_json(path, {"x": 2})
    assert replaced == [path]
    assert files(path.parent) == {"a.json": before}


def test_atomic_directory(tmp_path):
    target = tmp_path / "parent" / "made"
    for content in ("first", "second"):
        with workdir_lib.atomic_directory(target) as fresh:
            (fresh / "a").write_text(content)
            (fresh / content).touch()
        assert (target / "a").read_text() == content
        assert set(files(target)) == {"a", content}
    with (
        pytest.raises(RuntimeError),
        workdir_lib.atomic_directory(target) as fresh,
    ):
        (fresh / "a").write_text("third")
        raise RuntimeError
    assert (target / "a").read_text() == "second"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_directory_restores_the_old_one(tmp_path, monkeypatch):
    """The old directory comes back if the new one cannot take its place."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def fail_for_the_new(source, new):
        if ".tmp-" in str(source):
            raise OSError("disk full")
        rename(source, new)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with (
        pytest.raises(VaecfError, match="disk full"),
        workdir_lib.atomic_directory(target) as fresh,
    ):
        (fresh / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
