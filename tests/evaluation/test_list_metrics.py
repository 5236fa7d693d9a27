"""Metrics of listed items against sets and loops, and by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import csr_of, from_sets

from vaecf.evaluation import list_metrics, metrics
from vaecf.evaluation.list_metrics import Items, Lists

NAN = math.nan


def padded(lists, depth):
    out = np.full((len(lists), depth), -1, np.int32)
    for row, items in zip(out, lists):
        row[: len(items)] = items
    return out


def evaluate(kind, k, lists, held_out, histories, train, depth, n_items):
    """Lists of users without held-out items are empty, as in the evaluator."""
    lists = [items if held else [] for items, held in zip(lists, held_out)]
    ranked_UK = padded(lists, depth)
    arrays = csr_of([*map(sorted, held_out)])
    found = Lists(
        ranked_UK,
        metrics.hits(ranked_UK, *arrays),
        np.diff(arrays[0]),
        from_sets(histories, n_items),
        Items(from_sets(train, n_items)),
    )
    return metrics.LIST_METRICS[kind](found, k)


# By definition. `lists` are the first k items of the users with held-out
# items, `have[i]` is the set of training users of item i.


def coverage(lists, have, n_users):
    return len({i for items in lists for i in items}) / len(have)


def shares(lists, have):
    places = [i for items in lists for i in items]
    return [places.count(i) / len(places) for i in range(len(have))]


def gini(lists, have, n_users):
    """Half the mean absolute difference over the mean, scaled to 0..1."""
    n, p = len(have), shares(lists, have)
    if n == 1:
        return 0.0
    pairs = itertools.product(p, p)
    return sum(abs(a - b) for a, b in pairs) / (2 * n * sum(p)) * n / (n - 1)


def entropy(lists, have, n_users):
    return sum(p * math.log2(1 / p) for p in shares(lists, have) if p)


OF_ALL = {"coverage": coverage, "gini": gini, "entropy": entropy}


def cosine(have, i, j):
    norm = math.sqrt(len(have[i]) * len(have[j]))
    return len(have[i] & have[j]) / norm if norm else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else NAN


def user_coverage(items, k, have, n_users, held, history):
    return float(len(items) == k)


def popularity(items, k, have, n_users, held, history):
    return mean(len(have[i]) / n_users for i in items)


def novelty(items, k, have, n_users, held, history):
    return mean(math.log2(n_users / (len(have[i]) or 1)) for i in items)


def long_tail(items, k, have, n_users, held, history):
    by_count = sorted(range(len(have)), key=lambda i: (-len(have[i]), i))
    total, head = sum(map(len, have)), []
    while sum(len(have[i]) for i in head) < 4 * total / 5 or not head:
        head.append(by_count[len(head)])
    return mean(i not in head for i in items)


def diversity(items, k, have, n_users, held, history):
    pairs = itertools.combinations(items, 2)
    return mean(1 - cosine(have, i, j) for i, j in pairs)


def serendipity(items, k, have, n_users, held, history):
    if not history:
        return NAN
    found = (i for i in items if i in held)
    return sum(1 - mean(cosine(have, i, h) for h in history) for i in found) / k


PER_USER = {
    "user_coverage": user_coverage,
    "popularity": popularity,
    "novelty": novelty,
    "long_tail": long_tail,
    "diversity": diversity,
    "serendipity": serendipity,
}


@st.composite
def evaluations(draw):
    n_items = draw(st.integers(1, 9))
    item = st.integers(0, n_items - 1)
    depth = draw(st.integers(0, 7))
    user = st.tuples(
        st.lists(item, max_size=depth, unique=True),
        st.sets(item),
        st.sets(item),
    )
    users = draw(st.lists(user, min_size=1, max_size=5))
    train = draw(st.lists(st.sets(item), min_size=1, max_size=6))
    return *zip(*users, strict=True), train, depth, n_items


@settings(deadline=None)  # the first call imports SciPy
@given(
    evaluations(),
    st.integers(1, 8),
    st.sampled_from([1, 5, list_metrics._BLOCK]),
)
def test_against_sets_and_loops(made, k, block):
    lists, held_out, histories, train, _, n_items = made
    have = [{u for u, s in enumerate(train) if i in s} for i in range(n_items)]
    counted = [items[:k] for items, held in zip(lists, held_out) if held]
    assert {*OF_ALL, *PER_USER} == metrics.LIST_METRICS.keys()
    with pytest.MonkeyPatch.context() as patch:
        # Similarities are computed in one part or in many.
        patch.setattr(list_metrics, "_BLOCK", block)
        got = {kind: evaluate(kind, k, *made) for kind in metrics.LIST_METRICS}
    for kind, reference in OF_ALL.items():
        assert got[kind].shape == ()
        if kind != "coverage" and not any(counted):
            assert np.isnan(got[kind])
        else:
            expected = reference(counted, have, len(train))
            assert got[kind] == pytest.approx(expected, abs=1e-12), kind
    for kind, reference in PER_USER.items():
        expected = [
            reference(items[:k], k, have, len(train), held, history)
            if held
            else NAN
            for items, held, history in zip(lists, held_out, histories)
        ]
        np.testing.assert_allclose(
            got[kind],
            np.array(expected, float),
            rtol=1e-9,
            atol=1e-12,
            err_msg=kind,
        )


# Users of items: 0 has four, 1 has two, 2 and 3 one each, 4 none.
TRAIN = [{0, 1}, {0, 1}, {0, 2}, {0, 3}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coverage@2", 2 / 5),
        # Places: item 0 and item 1 two each, item 4 one.
        ("gini@3", (0 * 0.2 + 2 * 0.4 + 4 * 0.4) / 4),
        ("entropy@3", 0.8 * math.log2(2.5) + 0.2 * math.log2(5)),
        ("user_coverage@3", [1, 0, NAN]),
        ("popularity@3", [(1 + 1 / 2 + 0) / 3, (1 / 2 + 1) / 2, NAN]),
        # Item 4, which nobody has, counts like an item of one user.
        ("novelty@3", [(0 + 1 + 2) / 3, (1 + 0) / 2, NAN]),
        # 80 % of the eight interactions: items 0, 1 and 2.
        ("long_tail@3", [1 / 3, 0, NAN]),
        ("diversity@2", [1 - 2 / math.sqrt(8)] * 2 + [NAN]),
        ("diversity@3", [1 - 2 / math.sqrt(8) / 3, 1 - 2 / math.sqrt(8), NAN]),
        # The hits are 1 and 0; the histories are {2, 3} and {3}.
        ("serendipity@2", [1 / 2, (1 - 1 / 2) / 2, NAN]),
    ],
)
def test_by_hand(name, expected):
    lists = [[0, 1, 4], [1, 0], [3, 2, 4]]
    held_out, histories = [{1}, {0}, {}], [{2, 3}, {3}, {0}]
    kind, k = metrics.parse(name)
    got = evaluate(kind, k, lists, held_out, histories, TRAIN, 3, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
