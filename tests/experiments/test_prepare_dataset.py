"""prepare_dataset.py: a mistake is one line, and nothing is written.

tests/data/test_readers.py has the bad rows and files.
"""

import pathlib
import re
import shlex

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


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ("--ratings=rating.csv", ["rating.csv", "ratings.csv"]),
        ("--ratings=empty.csv", ["empty.csv is empty"]),
        ("--user_column=usr", ["no column 'usr'", "did you mean user"]),
        ("--min_items_per_user=99", ["--min_items_per_user"]),
        ("--min_users_per_item=99", ["--min_users_per_item"]),
        ("--rating_column=stars --min_rating=9",
         ["rating of at least 9", "lower --min_rating"]),
        ("--held_out_users=20", ["--held_out_users"]),
        ("--held_out_users=-1", ["held_out_users"]),
        ("--min_items_per_user=-1",
         ["--min_items_per_user=-1 must not be negative"]),
        ("--dataset=ml-1n", ["did you mean ml-1m"]),
        ("--protocol=papre", ["did you mean paper"]),
        ("--min_item_per_user=3",
         ["min_item_per_user", "Did you mean", "min_items_per_user"]),
        ("--held_out_users=few", ["--held_out_users=few"]),
        ("--fold_in_proportion=1", ["--fold_in_proportion=1"]),
        ("--min_rating=3", ["rating_column"]),
        ("--seed=-1", ["--seed=-1"]),
        ("--data_dir=x", ["--data_dir=DIR, not both"]),
        ("--output=mine", ["mine is a file"]),
        ("--output=folder", ["folder", "no vaecf dataset"]),
        ("--output=mine/out", ["mine/out"]),
    ],
)  # fmt: skip
def test_refused(tmp_path, refused, flags, messages):
    table().to_csv(tmp_path / "ratings.csv", index=False)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    given = ["--ratings=ratings.csv", "--output=out", *flags.split()]
    refused("prepare_dataset", given, *messages)


def test_output_exists(refused, succeeds):
    table().to_csv("ratings.csv", index=False)
    given = ("prepare_dataset", "--ratings=ratings.csv", "--output=out")
    out = succeeds(*given)
    [command_line] = re.findall("^next: python (.*)$", out, re.M)
    script, *words = shlex.split(command_line)
    assert pathlib.Path(script).is_file() and {"--train", "--test"} <= {*words}
    assert f"--config.data.dir={pathlib.Path('out').absolute()}" in words
    first = open_dataset("out").manifest_hash
    script, *again = *given, "--seed=4"
    refused(script, again, "out holds a dataset already", "--overwrite")
    succeeds(script, *again, "--overwrite")
    assert open_dataset("out", verify=True).manifest_hash != first
    assert {p.name for p in pathlib.Path().iterdir()} == {"ratings.csv", "out"}
