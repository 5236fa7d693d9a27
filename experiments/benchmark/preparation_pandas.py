"""Preparation as NVIDIA's VAE-CF recipe goes about it, in plain pandas.

The whole file in one DataFrame, one group of it per held-out user, ids
mapped row by row through dictionaries, matrices by SciPy. Written from the
description of its steps for comparison; `preparation.py` runs it.

    python preparation_pandas.py RATINGS_CSV OUTPUT_DIR HELD_OUT_USERS SEED
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pandas as pd
import scipy.sparse

MIN_RATING = 4
MIN_ITEMS_PER_USER = 5
TEST_PROPORTION = 0.2


def prepare(
    source: pathlib.Path, output: pathlib.Path, held_out_users: int, seed: int
) -> None:
    """Reads the ratings, writes five `.npz` files and two id maps."""
    np.random.seed(seed)
    rows = pd.read_csv(source).drop("timestamp", axis=1)
    rows = rows[rows["rating"] >= MIN_RATING]
    per_user = rows.groupby("userId").size()
    enough = per_user.index[per_user >= MIN_ITEMS_PER_USER]
    rows = rows[rows["userId"].isin(enough)]

    users = rows.groupby("userId").size().index
    users = users[np.random.permutation(users.size)]
    n_train = users.size - 2 * held_out_users
    train = rows.loc[rows["userId"].isin(users[:n_train])]
    items = pd.unique(train["movieId"])
    item_index = {raw: index for index, raw in enumerate(items)}
    user_index = {raw: index for index, raw in enumerate(users)}

    parts = {"train_data": train}
    blocks = {
        "vad": users[n_train : n_train + held_out_users],
        "test": users[n_train + held_out_users :],
    }
    for name, block in blocks.items():
        plays = rows.loc[rows["userId"].isin(block)]
        plays = plays.loc[plays["movieId"].isin(items)]
        fold_in, held_out = _split(plays)
        parts[f"{name}_data_true"] = fold_in
        parts[f"{name}_data_test"] = held_out

    numbers = {
        name: pd.DataFrame(
            {
                "uid": part["userId"].map(lambda raw: user_index[raw]),
                "sid": part["movieId"].map(lambda raw: item_index[raw]),
            }
        )
        for name, part in parts.items()
    }
    output.mkdir(parents=True)
    for first, second in (
        ("train_data", "train_data"),
        ("vad_data_true", "vad_data_test"),
        ("test_data_true", "test_data_test"),
    ):
        start = 0
        if first != second:
            start = min(numbers[n]["uid"].min() for n in (first, second))
        stop = max(numbers[n]["uid"].max() for n in (first, second)) + 1
        for name in {first, second}:
            uid, sid = numbers[name]["uid"], numbers[name]["sid"]
            matrix = scipy.sparse.csr_matrix(
                (np.ones_like(uid), (uid - start, sid)),
                dtype="float64",
                shape=(stop - start, len(items)),
            )
            scipy.sparse.save_npz(output / f"{name}.npz", matrix)
    for name, index in (("show2id", item_index), ("profile2id", user_index)):
        with open(output / f"{name}.json", "w") as stream:
            json.dump({str(raw): at for raw, at in index.items()}, stream)


def _split(plays: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Holds out a fifth of each user's rows, a user at a time."""
    fold_in, held_out = [], []
    for _, group in plays.groupby("userId"):
        size = len(group)
        if size < MIN_ITEMS_PER_USER:
            fold_in.append(group)
            continue
        held = np.zeros(size, bool)
        count = int(TEST_PROPORTION * size)
        held[np.random.choice(size, size=count, replace=False)] = True
        fold_in.append(group[~held])
        held_out.append(group[held])
    return pd.concat(fold_in), pd.concat(held_out)


if __name__ == "__main__":
    prepare(
        pathlib.Path(sys.argv[1]),
        pathlib.Path(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
