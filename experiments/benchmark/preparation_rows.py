"""A ratings.csv of MovieLens 20M's shape, generated.

    python preparation_rows.py RATINGS_CSV ROWS SEED

A process of its own, so that its memory is not taken for anybody else's.
"""

from __future__ import annotations

import sys

import numpy as np

# Of MovieLens 20M (its README): 20,000,263 ratings of 26,744 movies by
# 138,493 users with at least 20 ratings each, ordered by user and movie.
RATINGS_PER_USER = 20_000_263 / 138_493
ITEMS = 26_744
LEAST = 20
# Shares of 0.5, 1.0 ... 5.0 stars, rounded: half of the ratings are 4 or more.
STARS = (0.012, 0.034, 0.014, 0.072, 0.044, 0.214, 0.110, 0.278, 0.077, 0.145)


def write(path: str, n_rows: int, seed: int) -> None:
    """Writes ``userId,movieId,rating,timestamp`` without repeated pairs."""
    import polars as pl

    rng = np.random.Generator(np.random.PCG64(seed))
    n_users = max(round(n_rows / RATINGS_PER_USER), 1)
    n_items = min(ITEMS, max(n_rows // 20, 100))
    # A log-normal tail above the least; median near 68 as in the original.
    counts = LEAST + rng.lognormal(3.85, 1.25, n_users)
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
    if len(keys) > n_rows:
        keys = np.sort(rng.permutation(keys)[:n_rows])
    n = len(keys)
    frame = pl.DataFrame(
        {
            "userId": keys // n_items + 1,
            "movieId": raw[keys % n_items],
            "rating": rng.choice(10, n, p=STARS) / 2 + 0.5,
            "timestamp": rng.integers(789_652_009, 1_427_784_002, n),
        }
    ).sort("userId", "movieId")
    frame.write_csv(path)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
