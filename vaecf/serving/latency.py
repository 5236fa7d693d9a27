"""How long a query takes: history in, ranked item ids out."""

from __future__ import annotations

import time

import numpy as np

from vaecf.serving.trained_model import TrainedModel


def measure(
    model: TrainedModel,
    *,
    batch_size: int = 1,
    k: int = 100,
    items_per_user: int = 10,
    repeats: int = 200,
    warm_up: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Latency and throughput of a batch of random histories.

    What the recipe measures: random items of the catalogue, the call from the
    host's ids to the host's ranked ids, compiled beforehand.

    Args:
      model: loaded model.
      batch_size: users a query.
      k: list length.
      items_per_user: history length; at most the catalogue.
      repeats: measured queries, after `warm_up` others.
      warm_up: queries left out.
      seed: of the histories.

    Returns:
      {'batch_1_mean_throughput': users/s, 'batch_1_mean_latency': s,
      'batch_1_p50_latency', 'batch_1_p90_latency', 'batch_1_p95_latency',
      'batch_1_p99_latency': s}, for batch_size 1.
    """
    n_items = len(model.items)
    length = min(items_per_user, n_items)
    rng = np.random.Generator(np.random.PCG64(seed))
    ranker = model.ranker(min(k, n_items))
    indptr = np.arange(batch_size + 1, dtype=np.int64) * length
    seconds = []
    for _ in range(warm_up + repeats):
        indices = np.concatenate(
            [
                np.sort(rng.choice(n_items, length, replace=False))
                for _ in range(batch_size)
            ]
        ).astype(np.int32)
        began = time.perf_counter()
        ranker(model.scorer_params, indptr, indices, batch_size=batch_size)
        seconds.append(time.perf_counter() - began)
    measured = np.array(seconds[warm_up:])
    prefix = f"batch_{batch_size}"
    return {
        f"{prefix}_mean_throughput": float(batch_size / measured.mean()),
        f"{prefix}_mean_latency": float(measured.mean()),
        **{
            f"{prefix}_p{p}_latency": float(np.percentile(measured, p))
            for p in (50, 90, 95, 99)
        },
    }


def unit(name: str) -> str:
    """Returns the unit of a figure that `measure` returns."""
    return "users/s" if name.endswith("throughput") else "s"
