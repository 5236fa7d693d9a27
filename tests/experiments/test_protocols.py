"""Data of a protocol with known users, through all commands."""

import collections

import numpy as np
import pandas as pd
import polars as pl
import pytest
from oracles import ndcg

from vaecf.data.dataset import open_dataset
from vaecf.workdir import read_json


def log_of(n_users=60, n_items=30):
    """Users, items and distinct moments of a user, popular items first."""
    rng = np.random.default_rng(5)
    share = 1 / np.arange(2, n_items + 2)
    rows = [
        (f"u{u:02d}", f"i{i:02d}", f"2024-01-{day:02d}")
        for u in range(n_users)
        for day, i in enumerate(
            rng.choice(n_items, 8, replace=False, p=share / share.sum()), 1
        )
    ]
    return pd.DataFrame(rows, columns=["who", "what", "when"])


COLUMNS = ["--user_column=who", "--item_column=what", "--time_column=when"]


def test_from_a_log_to_a_comparison(tmp_path, monkeypatch, succeeds, tiny):
    monkeypatch.chdir(tmp_path)
    frame = log_of()
    frame.sample(frac=1, random_state=0).to_csv("log.csv", index=False)
    out = succeeds(
        "prepare_dataset", "--ratings=log.csv", "--protocol=leave_last",
        "--output=data", *COLUMNS,
    )  # fmt: skip
    assert "protocol leave_last" in out
    # By hand: the last day is the test, the last but one the validation.
    histories = {
        user: rows.sort_values("when")["what"].tolist()
        for user, rows in frame.groupby("who")
    }
    known = {item for items in histories.values() for item in items[:-1]}
    last = {u: items[-1] for u, items in histories.items()}
    last = {user: item for user, item in last.items() if item in known}
    trained = collections.Counter(
        item for items in histories.values() for item in items[:-2]
    )
    out = succeeds(
        "main", *tiny, "--epochs=1", "--data_dir=data", "--workdir=run",
        "--train", "--test", "--baselines=popularity", "--per_user=users.csv",
    )  # fmt: skip
    # Popularity, ranked in plain Python; ids ascend, and ties are by id.
    order = sorted(known, key=lambda item: (-trained[item], item))
    values = {}
    for user, item in last.items():
        seen = set(histories[user][:-1])
        ranked = [other for other in order if other not in seen]
        values[user] = ndcg(ranked, {item}, 100)
    users = pl.read_csv("users.csv").filter(pl.col("model") == "popularity")
    assert users["user"].to_list() == sorted(last)
    assert (users["fold_in"] == 7).all() and (users["held_out"] == 1).all()
    np.testing.assert_allclose(
        users["ndcg@100"], [values[user] for user in sorted(last)], atol=1e-12
    )
    results = read_json(tmp_path / "run" / "results.json")
    assert results["test"]["ndcg@100"]["users"] == len(last)
    assert results["validation"]["ndcg@100"]["users"] == 60
    about = f"protocol leave_last, {len(last)} users"
    assert about in out and about in succeeds("compare", "run")
    assert about in (tmp_path / "run" / "report.html").read_text()
    succeeds(
        "recommend", "--workdir=run", "--histories=log.csv", "--k=3",
        "--user_column=who", "--item_column=what", "--output=top.csv",
    )  # fmt: skip
    top = pd.read_csv("top.csv")
    assert len(top) == 180 and set(top["item"]) <= known


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ("--protocol=leave_last", ["no column 'time'", "--time_column"]),
        ("--protocol=temporal --time_column=what",
         ["one column cannot be two things"]),
        ("--protocol=given", ["no column 'split'", "--split_column"]),
        ("--protocol=given --test_ratings=none.csv", ["no such file: none.csv"]),
        ("--test_items=2", ["--test_items has no effect", "--protocol=leave_last"]),
        ("--protocol=weak --test_share=2", ["--test_share=2.0 must be"]),
        ("--protocol=temporal --time_column=when --test_time=2025-01-01",
         ["--test_time='2025-01-01'", "2024-01-08"]),
    ],
)  # fmt: skip
def test_refused(tmp_path, refused, flags, messages):
    log_of().to_csv("log.csv", index=False)
    given = ["--ratings=log.csv", "--output=out", *flags.split(), *COLUMNS[:2]]
    refused("prepare_dataset", given, *messages)


def test_flags_of_the_protocols(tmp_path, monkeypatch, succeeds):
    monkeypatch.chdir(tmp_path)
    frame = log_of().rename(columns={"who": "user", "what": "item"})
    frame.to_csv("log.csv", index=False)
    is_last = frame["when"] >= "2024-01-07"
    frame[~is_last].to_csv("train.csv", index=False)
    frame[is_last].to_csv("test.csv", index=False)
    sizes = {}
    for name, flags in {
        "temporal": "log.csv --protocol=temporal --time_column=when "
        "--test_time=2024-01-07",
        "share": "log.csv --protocol=temporal --time_column=when "
        "--test_share=0.25",
        "given": "train.csv --protocol=given --test_ratings=test.csv",
        "last": "log.csv --protocol=leave_last --time_column=when "
        "--test_items=2 --held_out_users=5",
    }.items():
        given = f"--ratings={flags} --output={name}".split()
        out = succeeds("prepare_dataset", *given)
        made = open_dataset(tmp_path / name)
        assert f"protocol {made.protocol}, seed 0, test: " in out
        test = made.test.held_out
        sizes[name] = test.nnz, test.indices.tolist(), made.split_sizes[1]
    # Two days of eight, whichever way they are named.
    assert sizes["temporal"] == sizes["share"]
    assert sizes["temporal"][:2] == sizes["given"][:2] == sizes["last"][:2]
    assert sizes["temporal"][2] == 6 and sizes["last"][2] == 5
