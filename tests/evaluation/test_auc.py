"""AUC against all pairs of items, on one and on four devices."""

import numpy as np
import pytest
from oracles import from_sets

from vaecf.evaluation import auc
from vaecf.evaluation.evaluator import Evaluator
from vaecf.evaluation.ranking import Scorer
from vaecf.parallel import mesh as mesh_lib

N_USERS, N_ITEMS = 13, 60


def all_pairs(score_UI, seen, held):
    """One pair of a held-out and another unseen item after the other."""
    values = []
    for score_I, old, new in zip(score_UI, seen, held):
        others = set(range(len(score_I))) - old - new
        won = [
            (score_I[i] > score_I[j]) + (score_I[i] == score_I[j]) / 2
            for i in new
            for j in others
        ]
        values.append(np.mean(won) if won else np.nan)
    return values


@pytest.fixture(scope="module")
def users():
    """Few distinct scores, so that many are equal; sets that do not meet."""
    rng = np.random.default_rng(0)
    score_UI = rng.integers(-3, 4, (N_USERS, N_ITEMS)).astype(np.float32)
    kind_UI = rng.random((N_USERS, N_ITEMS))
    seen = [set(np.flatnonzero(row < 0.3)) for row in kind_UI]
    held = [set(np.flatnonzero(row > 0.8)) for row in kind_UI]
    held[2] = set()  # left out
    seen[5] = set()
    seen[6] = set(range(N_ITEMS)) - held[6]  # no other unseen item
    return score_UI, seen, held


@pytest.mark.parametrize("block", [1, 150, auc._BLOCK])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_against_all_pairs(users, mesh, block, monkeypatch):
    score_UI, seen, held = users
    monkeypatch.setattr(auc, "_BLOCK", block)
    # Padding items score the most, and must not count.
    table_UI = np.full(
        (N_USERS, mesh_lib.padded_items(N_ITEMS)), 1e9, np.float32
    )
    table_UI[:, :N_ITEMS] = score_UI
    scorer = Scorer(
        lambda params, batch, user_B: (
            params["table"].at[user_B].get(mode="fill", fill_value=0)
        ),
        {"table": (None, "item")},
        N_ITEMS,
    )
    evaluate = Evaluator(
        from_sets(seen, N_ITEMS),
        from_sets(held, N_ITEMS),
        from_sets(seen, N_ITEMS),
        ("auc", "ndcg@5"),
        *("auc", 5, mesh_lib.make_mesh(*mesh)),
    )
    ranker = evaluate.compile(scorer)
    params = ranker.place({"table": table_UI})
    result = evaluate(ranker, params)
    expected = all_pairs(score_UI, seen, held)
    np.testing.assert_allclose(result.per_user["auc"], expected, rtol=1e-12)
    assert np.isnan(expected).sum() == 2
    mean = pytest.approx(np.nanmean(expected))
    assert evaluate.best_value(ranker, params) == mean
    with pytest.raises(ValueError, match="AUC needs"):
        evaluate.evaluate_lists(result.lists)
