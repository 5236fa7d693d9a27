"""Metrics against sets and loops, and against the paper's formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import csr_of, ndcg, recall, refuses

from vaecf.evaluation import metrics


def padded(lists, depth):
    out = np.full((len(lists), depth), -1, np.int32)
    for row, items in zip(out, lists):
        row[: len(items)] = items
    return out


def per_user(kind, ranked_UK, held_out, k):
    indptr, indices = csr_of([*map(sorted, held_out)])
    hits_UK = metrics.hits(ranked_UK, indptr, indices)
    return metrics.HIT_METRICS[kind](hits_UK, np.diff(indptr), k)


# Other metrics of one user by definition: `items` is the ranked list, `held`
# the set of held-out items, not empty.


def precision(items, held, k):
    return len(held.intersection(items[:k])) / k


def hit_rate(items, held, k):
    return float(bool(held.intersection(items[:k])))


def mrr(items, held, k):
    for rank, item in enumerate(items[:k], 1):
        if item in held:
            return 1 / rank
    return 0.0


def average_precision(items, held, k):
    found, total = 0, 0.0
    for rank, item in enumerate(items[:k], 1):
        if item in held:
            found += 1
            total += found / rank
    return total / min(k, len(held))


def plain_recall(items, held, k):
    return len(held.intersection(items[:k])) / len(held)


BRUTE_FORCE = {
    "ndcg": ndcg,
    "recall": recall,
    "calibrated_recall": recall,
    "plain_recall": plain_recall,
    "precision": precision,
    "hit_rate": hit_rate,
    "mrr": mrr,
    "map": average_precision,
}


@st.composite
def users(draw):
    """Lists of any length up to a depth, and held-out sets."""
    item = st.integers(0, draw(st.integers(0, 11)))
    depth = draw(st.integers(0, 10))
    pairs = draw(
        st.lists(
            st.tuples(
                st.lists(item, max_size=depth, unique=True), st.sets(item)
            ),
            max_size=6,
        )
    )
    return [p[0] for p in pairs], [p[1] for p in pairs], depth


@given(users(), st.integers(1, 14), st.sampled_from([1, 30, metrics._TABLE]))
def test_against_sets_and_loops(args, k, table):
    lists, held_out, depth = args
    ranked_UK = padded(lists, depth)
    assert BRUTE_FORCE.keys() == metrics.HIT_METRICS.keys()
    for kind, reference in BRUTE_FORCE.items():
        expected = [
            reference(items, held, k) if held else math.nan
            for items, held in zip(lists, held_out)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "_TABLE", table)
            got = per_user(kind, ranked_UK, held_out, k)
        assert got.dtype == np.float64
        np.testing.assert_allclose(
            got, np.array(expected, float), rtol=1e-12, err_msg=kind
        )


def liang_ndcg(score_UI, held_out_UI, k):
    """NDCG_binary_at_k_batch of Liang et al.'s notebook, dense."""
    top_UK = np.argsort(-score_UI, axis=1)[:, :k]
    tp = 1.0 / np.log2(np.arange(2, k + 2))
    dcg = (np.take_along_axis(held_out_UI, top_UK, 1) * tp).sum(axis=1)
    idcg = np.array([tp[: min(n, k)].sum() for n in held_out_UI.sum(axis=1)])
    return dcg / idcg


def liang_recall(score_UI, held_out_UI, k):
    """Recall_at_k_batch of the notebook: the k best as a mask."""
    best_UI = np.zeros(score_UI.shape, bool)
    part = np.argpartition(-score_UI, k, axis=1)[:, :k]
    np.put_along_axis(best_UI, part, True, axis=1)
    found = (best_UI & (held_out_UI > 0)).sum(axis=1)
    return found / np.minimum(k, held_out_UI.sum(axis=1))


def light_gcn(score_UI, held_out_UI, k):
    """Means of NDCG and recall as in LightGCN's evaluation, from matrices.

    Its ideal list has min(k, n) hits; recall divides by n.
    """
    top_UK = np.argsort(-score_UI, axis=1)[:, :k]
    hit_UK = np.take_along_axis(held_out_UI, top_UK, 1).astype(float)
    n_U = held_out_UI.sum(axis=1)
    ideal_UK = np.arange(k) < np.minimum(n_U, k)[:, None]
    discount = np.log2(np.arange(2, k + 2))
    ndcg_U = (hit_UK / discount).sum(1) / (ideal_UK / discount).sum(1)
    return ndcg_U.mean(), (hit_UK.sum(1) / n_U).mean()


@pytest.mark.parametrize("k", [1, 5, 20, 59])
def test_against_the_papers_formulas(k):
    rng = np.random.default_rng(3)
    score_UI = rng.random((40, 60))
    held_out_UI = rng.random((40, 60)) < 0.3
    held_out_UI[:, 0] = True
    ranked_UK = np.argsort(-score_UI, axis=1)[:, :59].astype(np.int32)
    held_out = [set(np.flatnonzero(row)) for row in held_out_UI]
    # The values of k cover both sides of min(k, n).
    for kind, reference in (("ndcg", liang_ndcg), ("recall", liang_recall)):
        np.testing.assert_allclose(
            per_user(kind, ranked_UK, held_out, k),
            reference(score_UI, held_out_UI, k),
            rtol=1e-12,
        )
    means = [
        per_user(kind, ranked_UK, held_out, k).mean()
        for kind in ("ndcg", "plain_recall")
    ]
    assert means == pytest.approx(light_gcn(score_UI, held_out_UI, k))


@pytest.mark.parametrize(
    ("kind", "k", "expected"),
    [
        # Hits at ranks 2 and 3 of five; three items are held out.
        ("ndcg", 2, (1 / math.log2(3)) / (1 + 1 / math.log2(3))),
        ("ndcg", 5, (1 / math.log2(3) + 0.5) / (1.5 + 1 / math.log2(3))),
        ("recall", 1, 0.0),
        ("recall", 2, 1 / 2),
        ("recall", 5, 2 / 3),
        ("plain_recall", 2, 1 / 3),
        ("precision", 5, 2 / 5),
        ("hit_rate", 1, 0.0),
        ("hit_rate", 2, 1.0),
        ("mrr", 1, 0.0),
        ("mrr", 5, 1 / 2),
        ("map", 5, (1 / 2 + 2 / 3) / 3),
        ("map", 2, (1 / 2) / 2),
    ],
)
def test_by_hand(kind, k, expected):
    ranked_UK = np.array([[9, 4, 7, 1, 0]])
    assert per_user(kind, ranked_UK, [{4, 7, 8}], k) == pytest.approx(expected)


def test_hits():
    """A catalogue of which the table holds one user, and more than one part."""
    top = metrics._TABLE + 5
    ranked_UK = np.array([[top, 0, -1]] * 3 + [[0, top, 7]], np.int32)
    np.testing.assert_array_equal(
        metrics.hits(ranked_UK, *csr_of([[], [top], [1], [7, top]])),
        [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]],
    )
    # User 0's item 9 must not be taken for user 1's item 4.
    ranked_UK = np.array([[9, 5], [9, 5]])
    assert not metrics.hits(ranked_UK, *csr_of([[0], [4]])).any()
    with pytest.raises(ValueError, match="2 ranked lists for 1 held-out users"):
        metrics.hits(ranked_UK, *csr_of([[0]]))


def test_parse_and_depth():
    for kind in metrics.METRICS:
        assert metrics.parse(f"{kind}@100") == (kind, 100)
    assert metrics.parse("auc")[0] == "auc" and metrics.depth(["auc"]) == 1
    assert metrics.depth(["ndcg@100", "recall@20", "coverage@7"]) == 100


@pytest.mark.parametrize(
    "name",
    [
        *("ndcg", "@10", "", "ndcg@0", "ndcg@-1", "ndcg@1.5", "ndgc@10"),
        *("ndcg@1@2", "auc@10"),
    ],
)
def test_parse_refuses(name):
    with refuses(f"'{name}' is not a metric"):
        metrics.parse(name)
