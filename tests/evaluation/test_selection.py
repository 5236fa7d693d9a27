"""The selection of items for a GPU, against a stable sort and logsumexp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from vaecf.evaluation import selection

USERS, ITEMS = 4, 128  # 8 groups


def masked(score_UI, masks):
    """Returns float64 scores with -inf for what must not be ranked."""
    score_UI = score_UI.astype(np.float64)
    score_UI[:, masks.n_real :] = -np.inf
    if masks.allowed_I is not None:
        score_UI[:, ~np.asarray(masks.allowed_I)] = -np.inf
    if masks.seen is not None:
        row_N, item_N = map(np.asarray, masks.seen)
        inside = (row_N < len(score_UI)) & (item_N < score_UI.shape[1])
        score_UI[row_N[inside], item_N[inside]] = -np.inf
    return score_UI


def some_masks(rng, n_items, n_real, some_seen, some_allowed):
    """Users without items, with all items, and with some; slots of padding."""
    is_seen = rng.random((USERS, n_real)) < 0.3
    is_seen[0], is_seen[1] = False, True
    row_N, item_N = np.nonzero(is_seen)
    slots = np.full((2, USERS * n_items), [[USERS], [0]], np.int32)
    slots[:, : len(row_N)] = row_N, item_N
    slots[:, -1] = 2, n_items
    seen = jnp.asarray(slots[0]), jnp.asarray(slots[1])
    allowed_I = jnp.asarray(rng.random(n_items) < 0.5)
    return selection.Masks(
        n_real, allowed_I if some_allowed else None, seen if some_seen else None
    )


@functools.partial(jax.jit, static_argnums=2)
def select(score_UI, masks, k):
    return selection.select(score_UI, masks, k, "gpu")


@pytest.mark.parametrize(
    ("k", "some"),
    [
        (1, (True, True)),
        (7, (True, False)),
        (7, (False, False)),
        (8, (True, True)),  # as many as groups
        (ITEMS, (True, False)),
    ],
)
@pytest.mark.parametrize("seed", range(10))
def test_select_is_the_stable_sort(k, some, seed):
    """With ties within and between groups, and few or no items left."""
    rng = np.random.default_rng(seed)
    values = np.array([0, -2, 1, 3], np.float32)[: 1 + seed % 4]
    n_real = int(rng.integers(1, ITEMS + 1))
    score_UI = rng.choice(values, (USERS, ITEMS))
    score_UI *= rng.choice([-1, 1], ITEMS)  # -0 as well
    score_UI[:, n_real:] = np.nan
    masks = some_masks(rng, ITEMS, n_real, *some)
    got = select(score_UI, masks, k)
    score_UI[:, n_real:] = -np.inf
    total_U = special.logsumexp(score_UI, axis=1)
    np.testing.assert_allclose(
        got.max_B + np.log(got.sum_B), total_U, rtol=1e-6, atol=1e-6
    )
    score_UI = masked(score_UI, masks)
    expected = np.argsort(-score_UI, axis=1, kind="stable")[:, :k]
    score_UK = np.take_along_axis(score_UI, expected, axis=1)
    np.testing.assert_array_equal(got.score_BK, score_UK)
    is_item = score_UK > -np.inf
    np.testing.assert_array_equal(
        np.asarray(got.item_BK)[is_item], expected[is_item]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e21])
@pytest.mark.parametrize("place", [0, 5])  # an item that was seen, or not
def test_an_unsound_score_makes_the_sum_unsound(bad, place):
    score_UI = np.zeros((2, ITEMS), np.float32)
    score_UI[1, place] = bad
    seen = jnp.asarray([1]), jnp.asarray([0])
    got = select(score_UI, selection.Masks(ITEMS, None, seen), 2)
    is_sound = np.isfinite(got.max_B + np.log(got.sum_B))
    np.testing.assert_array_equal(is_sound, [True, False])


@pytest.mark.parametrize("some_allowed", [False, True])
@pytest.mark.parametrize(("part", "n_real"), [(8, 250), (8, 0), (128, 320)])
def test_the_kernel(monkeypatch, part, n_real, some_allowed):
    """One part and three, of which the last or all have padding items alone."""
    monkeypatch.setattr(selection, "_PART", part)
    n_items = 20 * selection.GROUP
    rng = np.random.default_rng(0)
    score_UI = rng.normal(0, 30, (USERS, n_items)).astype(np.float32)
    score_UI[2] -= 1000  # no underflow
    score_UI[3, :20] = -0.0
    score_UI[:, n_real:] = np.nan
    masks = some_masks(rng, n_items, n_real, True, some_allowed)
    seen_UG = np.zeros((USERS, 20), np.int32)
    for row, item in zip(*map(np.asarray, masks.seen)):
        if row < USERS and item < n_items:
            seen_UG[row, item // 16] |= 1 << item % 16
    real_UI = score_UI[:, :n_real].astype(np.float64)
    best_UG = masked(score_UI, masks).reshape(USERS, 20, 16).max(axis=2)
    interpreted = functools.partial(selection.summary_kernel, interpret=True)
    for program in (interpreted, selection.summary_by_definition):
        args = score_UI, seen_UG, jnp.int32(n_real), masks.allowed_I
        max_U, sum_U, got_UG = jax.jit(program)(*args)
        assert np.isfinite(max_U).all()
        if n_real:
            total_U = special.logsumexp(real_UI, axis=1)
            np.testing.assert_allclose(
                max_U + np.log(sum_U), total_U, rtol=1e-6
            )
        np.testing.assert_array_equal(got_UG, best_UG.astype(np.float32))
        assert not np.signbit(got_UG)[got_UG == 0].any()
