"""The latency measurement with a fake clock."""

import numpy as np
import pytest

from vaecf.serving import latency


class Clock:
    """A clock by which the queries take 1, 2, 3, ... s."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def perf_counter(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.calls // 2
        return self.now


@pytest.mark.parametrize("batch_size", [1, 4])
def test_figures(shop, monkeypatch, batch_size):
    monkeypatch.setattr(latency, "time", Clock())
    figures = latency.measure(
        shop.recommender._model, batch_size=batch_size, repeats=8, warm_up=3
    )
    measured = np.arange(4, 12)  # the first three are left out
    prefix = f"batch_{batch_size}"
    expected = {
        f"{prefix}_mean_throughput": batch_size / measured.mean(),
        f"{prefix}_mean_latency": measured.mean(),
    }
    for p in (50, 90, 95, 99):
        expected[f"{prefix}_p{p}_latency"] = np.percentile(measured, p)
    assert figures == pytest.approx(expected)


def test_queries(shop, monkeypatch):
    """Histories are random, of known items, and of the given length."""
    model = shop.recommender._model
    calls = []

    class Recorder:
        def ranker(self, k):
            calls.append(k)
            return lambda params, indptr, indices, batch_size: calls.append(
                (batch_size, indptr.tolist(), indices)
            )

        items, scorer_params = model.items, model.params

    for items_per_user, k in ((5, 10), (1000, 100)):
        calls.clear()
        latency.measure(
            Recorder(), batch_size=2, repeats=3, warm_up=1, k=k,
            items_per_user=items_per_user,
        )  # fmt: skip
        depth, *queries = calls
        length = min(items_per_user, 30)
        assert depth == min(k, 30) and len(queries) == 4
        for batch_size, indptr, indices in queries:
            assert (batch_size, indptr) == (2, [0, length, 2 * length])
            assert indices.dtype == np.int32
            for history in np.split(indices, 2):
                assert history[0] >= 0 and history[-1] < 30
                assert (np.diff(history) > 0).all()
        if length < 30:
            assert len({q[2].tobytes() for q in queries}) == 4
