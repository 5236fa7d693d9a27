"""Generates ratings, and prepares them as NVIDIA's VAE-CF recipe does.

    python preparation_pandas.py generate RATINGS_CSV ROWS SEED
    python preparation_pandas.py prepare RATINGS_CSV OUTPUT_DIR HELD_OUT SEED

The recipe's way in plain pandas: the whole file in one DataFrame, one group per
held-out user, ids mapped row by row through dictionaries, matrices by SciPy.
Written from the description of the recipe's steps; `preparation.py` runs it.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pandas as pd
import scipy.sparse

# Shares of 0.5, 1.0 ... 5.0 stars in MovieLens 20M, rounded.
STARS = (0.012, 0.034, 0.014, 0.072, 0.044, 0.214, 0.110, 0.278, 0.077, 0.145)


def generate(path: str, rows: str, seed: str) -> None:
    """Writes ``userId,movieId,rating,timestamp`` without repeated pairs.

    The sizes are those of MovieLens 20M: 20,000,263 ratings of 26,744 movies by
    138,493 users with at least 20 ratings each, ordered by user and movie.
    """
    import polars as pl

    n_rows, rng = int(rows), np.random.Generator(np.random.PCG64(int(seed)))
    n_users = max(round(n_rows / 20_000_263 * 138_493), 1)
    n_items = min(26_744, max(n_rows // 20, 100))
    # A log-normal tail; the median is near 68 as in the original.
    counts = 20 + rng.lognormal(3.85, 1.25, n_users)
    counts *= n_rows / counts.sum()
    # Repeats are dropped below: draw more than is wanted.
    user = np.repeat(np.arange(n_users), np.ceil(counts * 1.5).astype(int))
    weights = (np.arange(n_items) + 30.0) ** -1.1
    weights[n_items // 2 :] *= 0.1
    cumulative = np.cumsum(weights / weights.sum())
    item = np.searchsorted(cumulative, rng.random(len(user)))
    # Popularity must not show in the ids, which have gaps as the real ones.
    raw = rng.permutation(n_items * 5)[:n_items] + 1
    keys = np.unique(user * n_items + np.minimum(item, n_items - 1))
    keys = np.sort(rng.permutation(keys)[:n_rows])
    n = len(keys)
    frame = pl.DataFrame(
        {
            "userId": keys // n_items + 1,
            "movieId": raw[keys % n_items],
            "rating": rng.choice(10, n, p=STARS) / 2 + 0.5,
            "timestamp": rng.integers(789_652_009, 1_427_784_002, n),
        }
    )
    frame.sort("userId", "movieId").write_csv(path)


def prepare(source: str, output_dir: str, held_out: str, seed: str) -> None:
    """Reads the ratings, and writes five `.npz` files and two id maps."""
    np.random.seed(int(seed))
    rows = pd.read_csv(source).drop("timestamp", axis=1)
    rows = rows[rows["rating"] >= 4]
    per_user = rows.groupby("userId").size()
    users = per_user.index[per_user >= 5]
    rows = rows[rows["userId"].isin(users)]
    users = users[np.random.permutation(users.size)]
    n_train = users.size - 2 * int(held_out)
    train = rows[rows["userId"].isin(users[:n_train])]
    items = pd.unique(train["movieId"])
    user_index = {raw: index for index, raw in enumerate(users)}
    item_index = {raw: index for index, raw in enumerate(items)}

    splits = [{"train_data": train}]
    for name, block in zip(("vad", "test"), np.split(users[n_train:], 2)):
        plays = rows[rows["userId"].isin(block)]
        plays = plays[plays["movieId"].isin(items)]
        names = f"{name}_data_true", f"{name}_data_test"
        splits.append(dict(zip(names, _split(plays))))

    output = pathlib.Path(output_dir)
    output.mkdir(parents=True)
    for parts in splits:
        uids = {
            name: part["userId"].map(lambda raw: user_index[raw])
            for name, part in parts.items()
        }
        start = min(uid.min() for uid in uids.values())
        stop = max(uid.max() for uid in uids.values()) + 1
        for name, uid in uids.items():
            sid = parts[name]["movieId"].map(lambda raw: item_index[raw])
            matrix = scipy.sparse.csr_matrix(
                (np.ones(len(uid)), (uid - start, sid)),
                shape=(stop - start, len(items)),
            )
            scipy.sparse.save_npz(output / f"{name}.npz", matrix)
    for name, index in (("show2id", item_index), ("profile2id", user_index)):
        text = json.dumps({str(raw): at for raw, at in index.items()})
        (output / f"{name}.json").write_text(text)


def _split(plays: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Holds out a fifth of the rows of each user, one user at a time."""
    fold_in, held_out = [], []
    for _, group in plays.groupby("userId"):
        n = len(group)
        held = np.zeros(n, bool)
        if n >= 5:
            held[np.random.choice(n, size=int(0.2 * n), replace=False)] = True
        fold_in.append(group[~held])
        held_out.append(group[held])
    return pd.concat(fold_in), pd.concat(held_out)


if __name__ == "__main__":
    {"generate": generate, "prepare": prepare}[sys.argv[1]](*sys.argv[2:])
