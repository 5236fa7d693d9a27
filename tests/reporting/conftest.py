"""One small run as plain values, with figures that nobody measured."""

import math

import pytest


@pytest.fixture
def records():
    """Twelve epochs; validated every third, best at epoch 9."""
    lines = []
    validated = {3: 0.20, 6: 0.30, 9: 0.40, 12: 0.40}
    for epoch in range(1, 13):
        kl = 10.0 * (1 - math.exp(-epoch / 4))
        anneal = min(0.2, epoch / 30)
        lines.append(
            {
                "step": epoch * 5,
                "epoch": epoch,
                "train/loss": 500 - 10 * epoch + anneal * kl,
                "train/nll": 500.0 - 10 * epoch,
                "train/kl": kl,
                "train/anneal": anneal,
                "train/users_per_second": 1000.0 + epoch,
            }
        )
        if epoch in validated:
            lines.append(
                {
                    "step": epoch * 5,
                    "epoch": epoch,
                    "validation/ndcg@100": validated[epoch],
                    "validation/ndcg@100_stderr": 0.01,
                    "validation/recall@20": validated[epoch] - 0.05,
                }
            )
    return lines


def _cell(mean, stderr):
    return {"mean": mean, "stderr": stderr, "users": 500}


@pytest.fixture
def results():
    return {
        "test": {
            "ndcg@100": _cell(0.40124, 0.00612),
            "recall@20": _cell(0.3411, 0.0071),
            "coverage@100": _cell(0.61, None),
        },
        "users_left_out": 3,
        "validation": {"ndcg@100": _cell(0.4, 0.01)},
        "train": {"users_per_second": 20731.4, "seconds": 192.3},
        "baselines": {
            "EASE": {
                "test": {
                    "ndcg@100": _cell(0.4207, 0.0061),
                    "recall@20": _cell(0.31, 0.007),
                },
                "validation": {"ndcg@100": _cell(0.42, 0.006)},
            },
            "popularity": {"test": {"ndcg@100": _cell(0.21, 0.005)}},
        },
        "references": {
            "planted truth": {"test": {"ndcg@100": _cell(0.4655, 0.006)}}
        },
    }
