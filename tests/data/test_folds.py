"""Folds: every user is a test user once. By brute force."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.data import folds, prepare
from vaecf.data.dataset import find_dataset, open_dataset, write_dataset
from vaecf.data.readers import read_ratings


def frame(n_users=23, n_items=12, seed=0):
    """Users with three items or more."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{u:02d}", int(item))
        for u in range(n_users)
        for item in rng.choice(
            n_items, rng.integers(3, n_items + 1), replace=False
        )
    ]
    return pd.DataFrame(rows, columns=["user", "item"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 30), st.integers(3, 25), st.data())
def test_every_user_is_a_test_user_once(seed, n_users, n_items, data):
    table = frame(n_users, n_items, seed)
    n_folds = data.draw(st.integers(2, n_users))
    largest = -(-n_users // n_folds)
    validation = data.draw(st.integers(0, n_users - largest - 1))
    ratings = read_ratings(table)
    made = list(
        folds.split(
            ratings, n_folds, validation, seed=seed, test_proportion=0.2
        )
    )
    assert len(made) == n_folds
    tested = []
    history = {u: set(g) for u, g in table.groupby("user")["item"]}
    for part in made:
        users = ratings.user_ids[part.user_codes].tolist()
        items = ratings.item_ids[part.item_codes]
        assert sorted(users) == sorted(history)  # so the parts are disjoint
        n_test = part.test.fold_in.n_users
        assert part.validation.fold_in.n_users == validation
        assert n_test in (n_users // n_folds, largest)
        train, test = users[: part.train.n_users], users[-n_test:]
        assert set(items) == set().union(*(history[u] for u in train))
        for row, user in enumerate(train):
            assert {*items[part.train.row(row)]} == history[user]
        for row, user in enumerate(test):
            fold_in = {*items[part.test.fold_in.row(row)]}
            held_out = {*items[part.test.held_out.row(row)]}
            assert fold_in | held_out == history[user] & set(items)
            assert not fold_in & held_out
        tested += test
    assert sorted(tested) == sorted(history)


def test_the_blocks_are_those_of_one_permutation():
    table = frame()
    ids = np.array(sorted(set(table["user"])))
    order = ids[np.random.default_rng(7).permutation(23)]
    ratings = read_ratings(table)
    for fold, part in enumerate(
        folds.split(ratings, 4, 3, seed=7, test_proportion=0.2)
    ):
        start, end = 23 * fold // 4, 23 * (fold + 1) // 4
        users = ratings.user_ids[part.user_codes]
        assert users[-(end - start) :].tolist() == order[start:end].tolist()
        before = [order[i % 23] for i in range(start - 3, start)]
        assert users[part.train.n_users :][:3].tolist() == before


def run(output, log=lambda line: None, **changes):
    known = {"ratings": frame(), "min_items_per_user": 3, "folds": 3}
    settings = prepare.Settings(output=output, **known | changes)
    return prepare.prepare(settings, log=log)


def test_written_and_opened(tmp_path):
    lines = []
    first = run(tmp_path / "out", lines.append)
    found = folds.open_all(tmp_path / "out", verify=True)
    assert first.path == tmp_path / "out" / "fold1" == found[0].path
    assert [d.protocol for d in found] == [
        f"vaecf, fold {i} of 3" for i in (1, 2, 3)
    ]
    assert [d.manifest["protocol_constants"]["fold"] for d in found] == [
        1, 2, 3,
    ]  # fmt: skip
    manifest = folds.read_manifest(tmp_path / "out")
    assert manifest["protocol"] == "vaecf, 3 folds"
    assert manifest["counts"]["users"] == 23
    assert "3 folds" in lines[0]
    for number, fold in enumerate(found, 1):
        row = next(x for x in lines if x.split()[:2] == ["fold", str(number)])
        assert [f"{n}" for n in fold.split_sizes] == [
            word for word in row.split()[3:] if word.isdigit()
        ]
    again = run(tmp_path / "again")
    assert again.manifest == first.manifest
    # No other reader takes the folder for a dataset.
    for reader in (find_dataset, open_dataset):
        with refuses(f"holds folds.*{tmp_path / 'out' / 'fold1'}"):
            reader(tmp_path / "out")
    with refuses("out holds a dataset already"):
        run(tmp_path / "out")
    with refuses("out holds a dataset already"):
        run(tmp_path / "out", folds=None)
    run(tmp_path / "out", folds=2, overwrite=True)
    assert len(folds.open_all(tmp_path / "out")) == 2


def test_all_folds_or_none(tmp_path, monkeypatch):
    made = []

    def fails(directory, dataset):
        made.append(directory)
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        return write_dataset(directory, dataset)

    monkeypatch.setattr(folds.dataset_lib, "write_dataset", fails)
    with refuses("out: No space"):
        run(tmp_path / "out")
    assert len(made) == 2 and list(tmp_path.iterdir()) == []


def test_a_fold_that_was_exchanged_is_refused(tmp_path):
    run(tmp_path / "out")
    run(tmp_path / "out" / "fold2", folds=None, overwrite=True)
    with refuses("fold2 holds another dataset"):
        folds.open_all(tmp_path / "out")
    path = tmp_path / "out" / "folds.json"
    path.write_text(json.dumps({"name": "x", "protocol": "vaecf"}))
    with refuses(f"{path} does not list 'folds'"):
        folds.open_all(tmp_path / "out")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"folds": 1}, "folds=1 must be 2 or more"),
        ({"folds": 2.5}, "folds=2.5 must be"),
        ({"folds": 24}, "too few for 24 folds"),
        ({"held_out_users": 15}, "too few for 3 folds with 15 validation"),
        ({"protocol": "paper"}, "folds has no effect with protocol=paper"),
        ({"dataset": "synthetic", "ratings": None}, "folds=3.*generated"),
    ],
)
def test_refused(tmp_path, changes, words):
    with refuses(words):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
