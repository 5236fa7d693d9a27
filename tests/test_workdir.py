"""A workdir belongs to one process and one run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vaecf import workdir as workdir_lib
from vaecf.data import synthetic
from vaecf.errors import VaecfError

HOLDER = """
import os, pathlib, sys
from vaecf import workdir as workdir_lib
with workdir_lib.locked(pathlib.Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir until its input ends."""
    root = pathlib.Path(workdir_lib.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert int(process.stdout.readline()) == process.pid
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("end", ["dies", "leaves"])
def test_second_process_is_refused(tmp_path, holder, end):
    for _ in range(2):
        with (
            pytest.raises(VaecfError, match="is in use by process") as e,
            workdir_lib.locked(tmp_path),
        ):
            pytest.fail("two processes hold the workdir")
        assert f"process {holder.pid}:" in str(e.value)
        assert f"--workdir={tmp_path}" in str(e.value)
        assert "\n" not in str(e.value)
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


def test_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(VaecfError, match="cannot be written"),
            workdir_lib.locked(path),
        ):
            pass


def begun(tmp_path, config, dataset):
    """A claimed workdir with a checkpoint, and all of its other files."""
    workdir_lib.check_or_create(tmp_path, config, dataset)
    (tmp_path / "checkpoints").mkdir()
    return {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.is_file()
    }


def files(tmp_path):
    return {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_same_run_is_welcome(tmp_path, small, dataset):
    before = begun(tmp_path, small(), dataset)
    assert set(before) == {"config.json", "dataset.json", "items.parquet"}
    assert json.loads(before["config.json"]) == small().to_dict()
    assert json.loads(before["dataset.json"]) == dataset.manifest
    workdir_lib.check_or_create(tmp_path, small(), dataset)
    assert files(tmp_path) == before


def test_another_config_is_refused(tmp_path, small, dataset):
    before = begun(tmp_path, small(), dataset)
    other = small(
        seed=8,
        model={"hidden": (6, 5)},
        optimizer={"learning_rate": 0.5},
        train={"epochs": 99},
    )
    with pytest.raises(VaecfError) as e:
        workdir_lib.check_or_create(tmp_path, other, dataset)
    message = str(e.value)
    for part in (
        f"--workdir={tmp_path}",
        "config.seed was 7 and is 8",
        "config.model.hidden was [6] and is [6, 5]",
        "config.optimizer.learning_rate was 0.01 and is 0.5",
    ):
        assert part in message
    assert "epochs" not in message and "\n" not in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"epochs": 9, "warm_up_epochs": 0}},
        {"data": {"dir": "elsewhere", "feed": "streamed"}},
        {"mesh": {"data": 2, "item": 2}},
        {
            "eval": {
                "every_epochs": 2,
                "batch_size": 8,
                "metrics": ("mrr@5",),
                "patience": 3,
            }
        },
        {"precision": {"max_skipped_in_a_row": 3}},
    ],
)
def test_what_may_change_between_runs(tmp_path, small, dataset, changes):
    before = begun(tmp_path, small(), dataset)
    workdir_lib.check_or_create(tmp_path, small(**changes), dataset)
    after = files(tmp_path)
    assert json.loads(after["config.json"]) == small(**changes).to_dict()
    assert after["dataset.json"] == before["dataset.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"batch_size": 17}},
        {"train": {"drop_remainder": True}},
        {"loss": {"weight_decay": 0.1}},
        {"loss": {"total_anneal_steps": 21}},
        {"eval": {"best_metric": "ndcg@5"}},
        {"precision": {"policy": "bf16"}},
        {"model": {"dropout_rate": 0.4}},
    ],
)
def test_what_may_not_change(tmp_path, small, dataset, changes):
    begun(tmp_path, small(), dataset)
    ((section, values),) = changes.items()
    ((key, value),) = values.items()
    with pytest.raises(VaecfError, match=rf"config\.{section}\.{key} was") as e:
        workdir_lib.check_or_create(tmp_path, small(**changes), dataset)
    assert f"and is {value!r}" in str(e.value)


def test_another_dataset_is_refused(tmp_path, small, dataset):
    before = begun(tmp_path, small(), dataset)
    other = synthetic.make(
        "synthetic",
        seed=1,
        n_train_users=60,
        n_held_out_users=16,
        n_items=33,
        n_groups=3,
    )
    with pytest.raises(VaecfError, match="run on another dataset") as e:
        workdir_lib.check_or_create(tmp_path, small(), other)
    assert f"--workdir={tmp_path}" in str(e.value)
    assert "\n" not in str(e.value)
    assert files(tmp_path) == before


def test_before_the_first_checkpoint_anything_may_change(
    tmp_path, small, dataset
):
    workdir_lib.check_or_create(tmp_path, small(), dataset)
    workdir_lib.check_or_create(tmp_path, small(seed=8), dataset)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 8


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(VaecfError, match="not JSON") as e:
        workdir_lib.read_json(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_missing_json(tmp_path):
    with pytest.raises(VaecfError, match="no such file"):
        workdir_lib.read_json(tmp_path / "config.json")


def test_write_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    workdir_lib.write_json(path, {"é": [1, None, 0.5]})
    assert json.loads(path.read_bytes()) == {"é": [1, None, 0.5]}
    before = path.read_bytes()
    with pytest.raises(ValueError):
        workdir_lib.write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        workdir_lib.write_json(path, {"x": object()})
    assert path.read_bytes() == before

    replaced = []

    def replace(source, target):
        # What is about to appear is whole, on the same disk, and the old one
        # is still there.
        assert json.loads(pathlib.Path(source).read_bytes()) == {"x": 2}
        assert pathlib.Path(source).parent == path.parent
        assert path.read_bytes() == before
        replaced.append(target)
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="killed here"):
        workdir_lib.write_json(path, {"x": 2})
    assert replaced == [path] and path.read_bytes() == before


def test_a_run_from_before_a_key_was_goes_on(small, dataset, tmp_path):
    """Its config.json lacks keys, and a whole section."""
    config = small(linear={"dropout": 0.5, "user_exponent": 0.5})
    assert config.linear.rank is None
    workdir_lib.check_or_create(tmp_path, config, dataset)
    (tmp_path / "checkpoints").mkdir()
    config = config.to_dict()
    del config["linear"], config["train"]["ema"], config["loss"]["gamma"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    workdir_lib.check_or_create(tmp_path, config, dataset)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == config.to_dict()
    weights = tmp_path / "linear" / "weights.json"
    weights.parent.mkdir()
    weights.touch()
    workdir_lib.check_or_create(tmp_path, config, dataset)
    assert weights.exists()
    with pytest.raises(VaecfError, match=r"config\.linear\.l2 was 0\.0"):
        workdir_lib.check_or_create(
            tmp_path, small(linear={"l2": 3.0}), dataset
        )
    # Of a model that is gone are no weights either.
    (tmp_path / "checkpoints").rmdir()
    workdir_lib.check_or_create(tmp_path, config, dataset)
    assert not weights.exists()
