"""recommend.py: what it writes, and every way to get it wrong."""

import pandas as pd
import polars as pl
import pytest

import vaecf
from vaecf.data.dataset import open_dataset


@pytest.fixture(scope="module")
def histories(oracle_dir):
    data = open_dataset(oracle_dir)
    rows = [
        (user, data.items.ids[i])
        for user in (9, 2, 5)
        for i in data.train.row(user)
    ]
    return pd.DataFrame([*rows, (2, "item-99")], columns=["who", "what"])


@pytest.fixture
def here(tmp_path, monkeypatch, histories):
    monkeypatch.chdir(tmp_path)
    histories.to_csv("h.csv", index=False)
    return tmp_path


OWN = ("--user_column=who", "--item_column=what")


@pytest.mark.parametrize("seen", [True, False])
def test_the_file_is_what_the_library_recommends(
    here, trained, histories, command, seen
):
    done = command(
        "recommend", f"--workdir={trained.workdir}", "--histories=h.csv", "--k=4",
        "--output=new/out.parquet", *OWN, f"--exclude_seen={seen}",
        "--batch_size=2",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "3 users, 12 recommendations: new/out.parquet" in done.out
    assert "skipped 1 unknown items" in done.out
    made = pl.read_parquet("new/out.parquet")
    lists = {
        user: histories.loc[histories["who"] == user, "what"].tolist()
        for user in (9, 2, 5)
    }
    expected = vaecf.Recommender.load(trained.workdir).recommend(
        lists, k=4, exclude_seen=seen
    )
    for column in ("user", "rank", "item"):
        assert made[column].to_list() == expected[column].tolist()
    assert made["score"].to_list() == pytest.approx(expected["score"], rel=1e-5)
    assert made["user"].to_list() == [9] * 4 + [2] * 4 + [5] * 4
    overlap = [i for u, i in zip(made["user"], made["item"]) if i in lists[u]]
    assert bool(overlap) is not seen


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"workdir": None}, ["--workdir"]),
        ({"histories": None}, ["--histories"]),
        ({"output": None}, ["--output"]),
        ({"histories": "nope.csv"}, ["nope.csv", "no such file"]),
        ({"item_column": "wht"}, ["'wht'", "did you mean", "--item_column"]),
        ({"k": "ten"}, ["--k=ten"]),
        ({"output": "file/out.parquet"}, ["file/out.parquet"]),
        ({"output": "./h.csv"}, ["h.csv is the file of the histories"]),
    ],
)
def test_refused(here, trained, refused, changes, messages):
    (here / "file").write_text("mine")
    flags = {
        "workdir": str(trained.workdir),
        "histories": "h.csv",
        "output": "out.parquet",
        "user_column": "who",
        "item_column": "what",
        **changes,
    }
    given = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    refused("recommend", given, *messages)
