"""prepare_dataset.py: a mistake is one line, and nothing is written.

tests/data/test_readers.py has the bad rows and files.
"""

import pathlib

import numpy as np
import pandas as pd
import pytest

from vaecf.data.dataset import open_dataset


def table(n_users=40):
    rng = np.random.default_rng(0)
    rows = [
        (u, i, rng.integers(1, 6))
        for u in range(n_users)
        for i in rng.choice(20, rng.integers(6, 12), replace=False)
    ]
    return pd.DataFrame(rows, columns=["user", "item", "stars"])


BAD = {
    "missing-file": ("--ratings=rating.csv", table(), ["rating.csv", "ratings.csv"]),
    "empty-file": ("", "", ["ratings.csv is empty"]),
    "missing-column": ("--user_column=usr", table(),
                       ["no column 'usr'", "did you mean user"]),
    "all-users-filtered": ("--min_items_per_user=99", table(),
                           ["--min_items_per_user"]),
    "all-items-filtered": ("--min_users_per_item=99", table(),
                           ["--min_users_per_item"]),
    "all-rows-below": ("--rating_column=stars --min_rating=9", table(),
                       ["rating of at least 9", "lower --min_rating"]),
    "too-few-users": ("--held_out_users=20", table(), ["--held_out_users"]),
    "negative-users": ("--held_out_users=-1", table(), ["held_out_users"]),
    "negative-items": ("--min_items_per_user=-1", table(),
                       ["--min_items_per_user=-1 must not be negative"]),
    "unknown-dataset": ("--dataset=ml-1n", table(), ["did you mean ml-1m"]),
    "unknown-protocol": ("--protocol=papre", table(), ["did you mean paper"]),
    "unknown-flag": ("--min_item_per_user=3", table(),
                     ["min_item_per_user", "Did you mean", "min_items_per_user"]),
    "not-a-number": ("--held_out_users=few", table(), ["--held_out_users=few"]),
    "a-share-of-all": ("--fold_in_proportion=1", table(),
                       ["--fold_in_proportion=1"]),
    "rating-without-column": ("--min_rating=3", table(), ["rating_column"]),
    "bad-seed": ("--seed=-1", table(), ["--seed=-1"]),
    "two-sources": ("--data_dir=x", table(), ["--data_dir=DIR, not both"]),
    "output-is-a-file": ("--output=mine", table(), ["mine is a file"]),
    "output-is-not-ours": ("--output=folder", table(),
                           ["folder", "no vaecf dataset"]),
    "output-is-below-a-file": ("--output=mine/out", table(), ["mine/out"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "content", "messages"), BAD.values(), ids=BAD
)
def test_refused(tmp_path, monkeypatch, command, flags, content, messages):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ratings.csv"
    if isinstance(content, pd.DataFrame):
        content.to_csv(path, index=False)
    else:
        path.write_text(content)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    given = ["--ratings=ratings.csv", "--output=out", *flags.split()]
    done = command("prepare_dataset", *given)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    for message in messages:
        assert message in done.err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_output_exists(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    table().to_csv("ratings.csv", index=False)
    given = ("prepare_dataset", "--ratings=ratings.csv", "--output=out")
    done = command(*given)
    assert done.status == 0
    assert "next: python experiments/main.py --train --test" in done.out
    assert "--config.data.dir=out" in done.out
    first = open_dataset("out").manifest_hash
    done = command(*given, "--seed=4")
    assert done.status == 2
    assert (
        "out holds a dataset already" in done.err and "--overwrite" in done.err
    )
    assert open_dataset("out").manifest_hash == first
    assert command(*given, "--seed=4", "--overwrite").status == 0
    assert open_dataset("out", verify=True).manifest_hash != first
    assert {p.name for p in pathlib.Path().iterdir()} == {"ratings.csv", "out"}
