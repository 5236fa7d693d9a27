"""A disk that takes no more bytes: one line, status 2, the old files."""

import contextlib
import re
import resource
import shutil

import pandas as pd
import pytest

from vaecf.data.dataset import open_dataset
from vaecf.serving import trained_model


@contextlib.contextmanager
def full_disk(n_bytes):
    """Lets no file become longer than that, as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def ratings(tmp_path):
    rows = [(u, (u + i) % 30) for u in range(90) for i in range(8)]
    path = tmp_path / "ratings.csv"
    pd.DataFrame(rows, columns=["user", "item"]).to_csv(path, index=False)
    return path


def refused(done):
    assert done.status == 2, done
    errors = [x for x in done.err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1, done.err
    assert re.search("File too large|No space left", errors[0])
    assert "Traceback" not in done.err
    return errors[0]


def test_preparation(tmp_path, ratings, command):
    flags = (f"--ratings={ratings}", f"--output={tmp_path / 'data'}")
    assert command("prepare_dataset", *flags).status == 0
    before = open_dataset(tmp_path / "data").manifest
    with full_disk(500):
        done = command("prepare_dataset", *flags, "--overwrite", "--seed=3")
    assert str(tmp_path / "data") in refused(done)
    assert open_dataset(tmp_path / "data", verify=True).manifest == before
    assert {p.name for p in tmp_path.iterdir()} == {"data", "ratings.csv"}


def test_training(tmp_path, trained, command):
    """The next call resumes from the last checkpoint."""
    workdir = shutil.copytree(trained.workdir, tmp_path / "run")
    flags = (*trained.training, f"--workdir={workdir}", "--epochs=4")
    with full_disk(4000):
        done = command("main", *flags)
    assert str(workdir) in refused(done)
    assert trained_model.load(workdir).progress["epoch"] <= 3
    done = command("main", *flags)
    assert done.status == 0 and "resuming from epoch 3" in done.out
    assert not [p for p in workdir.rglob("*") if "tmp" in p.name]


def test_recommendations(tmp_path, ratings, trained, command):
    output = tmp_path / "out.csv"
    output.write_text("old")
    flags = (f"--histories={ratings}", f"--output={output}")
    with full_disk(500):
        done = command("recommend", f"--workdir={trained.workdir}", *flags)
    assert str(output) in refused(done)
    assert output.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"out.csv", "ratings.csv"}
