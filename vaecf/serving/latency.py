"""Measures how long a query takes, from histories to ranked items."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

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
    """Returns latency and throughput of queries with random histories.

    As in NVIDIA's recipe, a query takes item indices on the host and returns
    ranked item indices on the host. The `warm_up` queries before the `repeats`
    measured ones are not measured, and so compilation is not either.

    Returns:
      For batch_size 1: {'batch_1_mean_throughput': users/s,
      'batch_1_mean_latency': s, 'batch_1_p50_latency', 'batch_1_p90_latency',
      'batch_1_p95_latency', 'batch_1_p99_latency': s}.
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


def measure_all(
    model: TrainedModel,
    batch_sizes: Iterable[int],
    *,
    k: int,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Logs and returns the figures of `measure` for several batch sizes."""
    figures: dict[str, float] = {}
    for batch_size in batch_sizes:
        figures |= measure(model, batch_size=batch_size, k=k)
    for name, value in figures.items():
        log(f"{name}: {value:.6g} {unit(name)}")
    return figures


def unit(name: str) -> str:
    """Returns the unit of a figure that `measure` returns."""
    return "users/s" if name.endswith("throughput") else "s"
