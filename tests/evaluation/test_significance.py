"""Paired comparisons against SciPy, plain loops and hand computation."""

import numpy as np
import pytest
from scipy import stats

from vaecf.evaluation import significance


def values(n_users=60):
    rng = np.random.default_rng(5)
    reference = rng.random(n_users)
    others = {
        name: reference + rng.normal(shift, 0.1, n_users)
        for name, shift in (("a", 0.05), ("b", 0.0), ("c", -0.02))
    }
    return reference, others


def test_difference_and_p_are_scipys():
    reference, others = values()
    found = significance.paired(others, reference, resamples=100)
    assert list(found) == ["a", "b", "c"]
    for name, result in found.items():
        d = others[name] - reference
        assert result.difference == pytest.approx(d.mean(), abs=1e-15)
        assert result.stderr == pytest.approx(stats.sem(d), rel=1e-12)
        expected = stats.ttest_rel(others[name], reference).pvalue
        assert result.p == pytest.approx(expected, rel=1e-10)
    assert found["a"].p < 0.01 < found["b"].p


def test_bootstrap_against_a_loop():
    reference, others = values(20)
    d = others["a"] - reference
    rng = np.random.default_rng(3)
    means = [
        np.mean([d[u] for u in drawn])
        for drawn in rng.integers(0, 20, (500, 20))
    ]
    found = significance.paired(others, reference, resamples=500, seed=3)["a"]
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=1e-12)
    assert found.low < found.difference < found.high
    again = significance.paired(others, reference, resamples=500, seed=4)["a"]
    assert again.low != found.low and again.p == found.p


def test_bootstrap_in_several_blocks_of_draws():
    """70,000 users: 59 resamples per block."""
    d = np.random.default_rng(0).normal(1, 2, (70_000, 1))
    low, high = significance.bootstrap(d, resamples=130, seed=0)
    half = 1.96 * 2 / 70_000**0.5
    np.testing.assert_allclose(low, d.mean() - half, atol=half / 2)
    np.testing.assert_allclose(high, d.mean() + half, atol=half / 2)


def test_holm_by_hand():
    """.01 · 4, .02 · 3, .03 · 2 (below the one before it), .5 · 1."""
    p = np.array([0.03, 0.5, 0.01, 0.02])
    np.testing.assert_allclose(
        significance.holm(p), [0.06, 0.5, 0.04, 0.06], rtol=1e-12
    )
    np.testing.assert_allclose(significance.holm(np.array([0.6, 0.7])), [1, 1])
    reference, others = values()
    found = significance.paired(others, reference, resamples=100)
    corrected = significance.holm(np.array([r.p for r in found.values()]))
    assert [r.p_holm for r in found.values()] == corrected.tolist()


def test_nothing_to_compare():
    def compared(value, reference):
        return significance.paired({"x": value}, reference, resamples=9)["x"]

    assert significance.paired({}, np.ones(3)) == {}
    same = compared(np.ones(3), np.ones(3))
    assert same == (0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    shifted = compared(np.ones(3), np.zeros(3))
    assert (shifted.difference, shifted.p) == (1.0, 0.0)
    one = compared(np.ones(1), np.zeros(1))
    assert one.stderr is None and one.p == 1.0
