"""Means, standard errors, users left out, and published baselines."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from oracles import ease, from_sets, generated, ndcg, ranked, recall

from vaecf.config import EvalConfig
from vaecf.data.interactions import Interactions
from vaecf.evaluation import baselines, evaluator, scorers
from vaecf.evaluation.evaluator import Evaluator, by_history_length
from vaecf.evaluation.ranking import RankedLists
from vaecf.parallel import mesh as mesh_lib

NAN = math.nan


# Item i is in 5 - i of ten histories.
TRAIN = from_sets([range(5 - u) for u in range(5)] + [[]] * 5, 5)


def evaluate_lists(lists, held_out, *metrics):
    mesh = mesh_lib.make_mesh(1, 1)
    return Evaluator(
        held_out, held_out, TRAIN, metrics, metrics[0], 2, mesh
    ).evaluate_lists(lists)


@pytest.fixture
def four_users():
    """Lists of 2; user 2 has no held-out items, user 3's list is short."""
    item_UK = np.array([[0, 1], [2, 3], [4, 0], [1, -1]], np.int32)
    score_UK = np.where(item_UK >= 0, 1.0, -np.inf).astype(np.float32)
    lists = RankedLists(item_UK, score_UK, np.zeros(4, np.float32))
    return lists, from_sets([[1, 4], [2], [], [0, 2, 3]], 5)


def test_means_and_standard_errors_by_hand(four_users):
    lists, held_out = four_users
    result = evaluate_lists(
        lists,
        held_out,
        *("recall@2", "hit_rate@1", "popularity@2", "coverage@1"),
    )
    assert result.left_out == 1 and result.lists is lists
    per_user = {
        "recall@2": [1 / 2, 1.0, NAN, 0.0],
        "hit_rate@1": [0.0, 1.0, NAN, 0.0],
        "popularity@2": [0.45, 0.25, NAN, 0.4],
    }
    assert result.per_user.keys() == per_user.keys()
    for name, expected in per_user.items():
        np.testing.assert_allclose(result.per_user[name], expected)
    # Variances with n - 1: of (1/2, 1, 0) 1/4, of (0, 1, 0) 1/3.
    recall, hit_rate = result.summary["recall@2"], result.summary["hit_rate@1"]
    assert recall["mean"] == pytest.approx(1 / 2)
    assert recall["stderr"] == pytest.approx(math.sqrt(1 / 4 / 3))
    assert hit_rate["mean"] == pytest.approx(1 / 3)
    assert hit_rate["stderr"] == pytest.approx(math.sqrt(1 / 3 / 3))
    # Only the user who is left out sees item 4.
    coverage = {"mean": 3 / 5, "stderr": None, "users": 3}
    assert result.summary["coverage@1"] == coverage
    assert {s["users"] for s in result.summary.values()} == {3}


def test_mean_and_stderr_that_do_not_exist():
    one = {"mean": 0.25, "stderr": None, "users": 1}
    none = {"mean": None, "stderr": None, "users": 0}
    for values, expected in (([0.25], one), ([NAN, 0.25], one), ([], none)):
        assert evaluator.mean_and_stderr(np.array(values)) == expected


def test_lists_shorter_than_the_metric_are_refused(four_users):
    lists, held_out = four_users
    with pytest.raises(ValueError, match=r"lists of 2 items, .* need 3"):
        evaluate_lists(lists, held_out, "recall@3")
    # But a list cannot be longer than the catalogue.
    whole = lists._replace(
        item_UK=np.tile(np.arange(5, dtype=np.int32), (4, 1))
    )
    result = evaluate_lists(whole, held_out, "recall@100")
    assert result.summary["recall@100"]["mean"] == 1


def test_record_and_the_means_of_process_0(monkeypatch):
    summary = {
        "ndcg@5": {"mean": 0.5, "stderr": 0.1, "users": 3},
        "coverage@5": {"mean": 0.2, "stderr": None, "users": 3},
    }
    result = evaluator.Evaluation(summary, {}, 0, None)
    assert result.record("test") == {
        "test/ndcg@5": 0.5,
        "test/ndcg@5_stderr": 0.1,
        "test/coverage@5": 0.2,
    }
    assert evaluator._from_lead(summary) is summary
    monkeypatch.setattr(evaluator.processes, "alone", lambda: False)
    monkeypatch.setattr(
        evaluator.processes, "from_lead", lambda x: [2 * v for v in x]
    )
    assert evaluator._from_lead(summary) == {
        "ndcg@5": {"mean": 1.0, "stderr": 0.2, "users": 3},
        "coverage@5": {"mean": 0.4, "stderr": None, "users": 3},
    }


def test_for_split_of_a_dataset():
    """Only validation computes a best_metric that is not among the metrics."""
    dataset = generated(20, 4, 20, 2)
    config = EvalConfig(metrics=("recall@5",), best_metric="ndcg@7")
    validation, test = (
        Evaluator.for_split(dataset, split, config, mesh_lib.make_mesh(1, 1))
        for split in ("validation", "test")
    )
    assert test.held_out is dataset.test.held_out and not test.is_empty
    assert test.metrics == ("recall@5",) and test.depth == 5
    assert validation.metrics == ("recall@5", "ndcg@7")
    empty = dataclasses.replace(test, held_out=from_sets([[]] * 4, 20))
    ranker = empty.compile(scorers.fitted("popularity", 20))
    nothing = empty(ranker, None)
    assert empty.is_empty and nothing.summary == nothing.record("test") == {}
    assert nothing.left_out == 4 and nothing.lists.item_UK.shape == (0, 5)


def test_by_history_length_by_hand():
    values_U = np.array([0.1, 0.3, 0.5, NAN, 0.7, 0.9, 1.0, 0.0, 0.2])
    length_U = np.array([1, 2, 3, 99, 4, 5, 6, 7, 8])
    rows = by_history_length(values_U, length_U, buckets=4)
    assert [row["bucket"] for row in rows] == ["1-2", "3-4", "5-6", "7-8"]
    np.testing.assert_allclose([r["mean"] for r in rows], [0.2, 0.6, 0.95, 0.1])
    np.testing.assert_allclose([r["stderr"] for r in rows], [0.1, 0.1, 0.05, 0.1])  # fmt: skip
    assert [row["users"] for row in rows] == [2, 2, 2, 2]
    rows = by_history_length(np.array([0.0, 1.0, 1.0]), np.array([7, 7, 7]))
    assert [row["bucket"] for row in rows] == ["7"]


@given(
    st.lists(
        st.tuples(
            st.one_of(st.just(NAN), st.floats(0, 1)), st.integers(0, 500)
        ),
        max_size=30,
    ),
    st.integers(1, 6),
)
def test_every_user_is_in_one_bucket(users, buckets):
    values_U = np.array([v for v, _ in users], float)
    length_U = np.array([n for _, n in users], np.int64)
    rows = by_history_length(values_U, length_U, buckets)
    assert len(rows) <= buckets
    left = {u for u in range(len(users)) if not np.isnan(values_U[u])}
    above = -1
    for row in rows:
        low, *high = map(int, row["bucket"].split("-"))
        high = high[0] if high else low
        assert above < low <= high
        inside = {u for u in left if low <= length_U[u] <= high}
        assert row["users"] == len(inside)
        assert row["mean"] == pytest.approx(
            sum(values_U[u] for u in inside) / len(inside)
        )
        left -= inside
        above = high
    assert not left


def compare_with_numpy(kind, l2, matrices, names, batch_size, mesh):
    """Returns (evaluation of a baseline, the same metrics by dense NumPy)."""
    train, fold_in, held_out = map(Interactions.from_scipy, matrices)
    evaluate = Evaluator(
        fold_in, held_out, train, names, names[0], batch_size, mesh
    )
    settings = {"l2": l2} if kind == "ease" else {}
    ranker = evaluate.compile(scorers.fitted(kind, train.n_items))
    params = ranker.place(
        baselines.BASELINES[kind].model.fit(train, **settings)
    )
    result = evaluate(ranker, params)
    best_value = evaluate.best_value(ranker, params)
    assert best_value == result.summary[names[0]]["mean"]
    assert len(ranker._programs) == 1
    train, fold_in, held_out = matrices
    if kind == "ease":
        score_UI = fold_in @ ease(train.astype(float).toarray(), l2)
    else:
        score_UI = np.tile(train.sum(axis=0), (fold_in.shape[0], 1))
    return result, dense_metrics(
        np.asarray(score_UI), fold_in.toarray(), held_out.toarray(), names
    )


def dense_metrics(score_UI, fold_in, held_out, names):
    """By definition, user by user; NaN without held-out items."""
    seen, wanted = (
        [set(np.flatnonzero(row)) for row in x_UI]
        for x_UI in (fold_in, held_out)
    )
    lists = [ranked(score_I, s) for score_I, s in zip(score_UI, seen)]
    values = {}
    for name in names:
        kind, k = name.split("@")
        metric = {"ndcg": ndcg, "recall": recall}[kind]
        values[name] = [
            metric(items, w, int(k)) if w else NAN
            for items, w in zip(lists, wanted)
        ]
    return values


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(5)
    train = scipy.sparse.csr_matrix(rng.random((200, 30)) < 0.3, dtype=float)
    part = rng.random((40, 30))
    fold_in = scipy.sparse.csr_matrix(part < 0.3, dtype=float)
    held_out = (part > 0.85).astype(float)
    held_out[7] = 0
    return train, fold_in, scipy.sparse.csr_matrix(held_out)


NAMES = ("ndcg@10", "recall@3", "recall@50")


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [((1, 1), 3), ((1, 1), 64), ((2, 2), 16)],
)
@pytest.mark.parametrize("kind", ["popularity", "ease"])
def test_small_data(small, kind, mesh, batch_size):
    result, expected = compare_with_numpy(
        kind, 20.0, small, NAMES, batch_size, mesh_lib.make_mesh(*mesh)
    )
    assert result.left_out == 1
    for name in NAMES:
        assert result.per_user[name].shape == (40,)
        np.testing.assert_allclose(
            result.per_user[name], expected[name], rtol=1e-12
        )
        assert result.summary[name]["mean"] == pytest.approx(
            np.nanmean(expected[name])
        )
        assert result.summary[name]["stderr"] == pytest.approx(
            np.nanstd(expected[name], ddof=1) / math.sqrt(39)
        )


def test_groups(small):
    """By definition: hits are the held-out items of the group alone."""
    train, fold_in, held_out = (x.toarray().astype(int) for x in small)
    evaluate = Evaluator(
        *(Interactions.from_scipy(small[n]) for n in (1, 2, 0)),
        *(NAMES, "ndcg@10", 64, mesh_lib.make_mesh(1, 1)),
    )
    ranker = evaluate.compile(scorers.fitted("popularity", 30))
    model = baselines.BASELINES["popularity"].model
    result = evaluate(ranker, ranker.place(model.fit(evaluate.train)))
    groups = evaluate.groups(result)
    count_I = train.sum(axis=0)
    lists = [ranked(count_I, set(np.flatnonzero(row))) for row in fold_in]
    order, total = ranked(count_I, ()), count_I.sum()
    # Interactions with more popular items.
    before = {i: count_I[order[:n]].sum() for n, i in enumerate(order)}
    parts = {
        "head": {i for i in order if 5 * before[i] < total},
        "mid": {i for i in order if total <= 5 * before[i] < 4 * total},
        "tail": {i for i in order if 5 * before[i] >= 4 * total},
    }
    for row, (bucket, part) in zip(
        groups["item_popularity"], parts.items(), strict=True
    ):
        wanted = [part & set(np.flatnonzero(row)) for row in held_out]
        values = [ndcg(i, w, 10) for i, w in zip(lists, wanted) if w]
        assert row["bucket"] == bucket and row["items"] == len(part)
        assert row["users"] == len(values)
        assert row["mean"] == pytest.approx(np.mean(values))
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert row["stderr"] == pytest.approx(error)
    assert groups["history_length"] == by_history_length(
        result.per_user["ndcg@10"], fold_in.sum(axis=1)
    )
    other = dataclasses.replace(evaluate, best_metric="coverage@10")
    assert other.groups(result) == {}


@pytest.fixture(scope="module")
def ml_1m(realdata_dir):
    folder = realdata_dir / "ml-1m" / "paper_split"
    return [
        scipy.sparse.csr_matrix(scipy.sparse.load_npz(folder / f"{name}.npz"))
        for name in ("train", "test_fold_in", "test_held_out")
    ]


PUBLISHED = {
    "popularity": {"ndcg@100": 0.2105, "recall@20": 0.1614, "recall@50": 0.2333},
    "ease": {"ndcg@100": 0.4231, "recall@20": 0.3606, "recall@50": 0.4767},
}  # fmt: skip


@pytest.mark.realdata
@pytest.mark.parametrize(
    "kind", ["popularity", pytest.param("ease", marks=pytest.mark.slow)]
)
def test_baselines_on_movielens_1m(ml_1m, kind):
    names = tuple(PUBLISHED[kind])
    result, expected = compare_with_numpy(
        kind, 500.0, ml_1m, names, 500, mesh_lib.make_mesh(1, 1)
    )
    for name, published in PUBLISHED[kind].items():
        mean = result.summary[name]["mean"]
        assert mean == pytest.approx(np.nanmean(expected[name]), abs=1e-6)
        assert round(mean, 4) == published
