"""The order of training: a permutation that (seed, epoch) decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaecf.errors import VaecfError
from vaecf.training import input_pipeline

sizes = st.tuples(st.integers(1, 200), st.integers(1, 60))


@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10_000), st.booleans())
def test_every_user_once(sizes, seed, epoch, drop_remainder):
    n_users, batch_size = sizes
    if drop_remainder and batch_size > n_users:
        return
    order = input_pipeline.epoch_order(
        seed, epoch, n_users, batch_size, drop_remainder=drop_remainder
    )
    steps = input_pipeline.steps_per_epoch(n_users, batch_size, drop_remainder)
    assert order.shape == (steps, batch_size) and order.dtype == np.int32
    flat = order.ravel()
    if drop_remainder:
        assert steps == n_users // batch_size
        assert len(set(flat)) == len(flat) and max(flat) < n_users
    else:
        assert steps == -(-n_users // batch_size)
        assert sorted(flat[:n_users]) == list(range(n_users))
        # Padding comes last, and there is no batch of nothing else.
        assert np.all(flat[n_users:] == n_users)
        assert len(flat) - n_users < batch_size


@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10_000))
def test_seed_and_epoch_decide(sizes, seed, epoch):
    n_users, batch_size = sizes[0] + 50, sizes[1]

    def users(seed, epoch, batch_size=batch_size):
        order = input_pipeline.epoch_order(seed, epoch, n_users, batch_size)
        return list(order.ravel()[:n_users])

    first = users(seed, epoch)
    assert users(seed, epoch) == first
    # 50! orders: the same one twice means that it does not matter.
    assert users(seed + 1, epoch) != first
    assert users(seed, epoch + 1) != first
    # Neither (0, 1) against (1, 0) nor a larger batch is the same question.
    if seed != epoch:
        assert users(epoch, seed) != first
    assert users(seed, epoch, batch_size + 1) == first


def test_every_user_is_as_likely_to_come_first():
    first = [input_pipeline.epoch_order(3, e, 4, 4)[0, 0] for e in range(4000)]
    counts = np.bincount(first)
    # Binomial(4000, 1/4): five standard deviations are 137.
    assert np.all(np.abs(counts - 1000) < 137)


def test_drop_remainder_leaves_out_others_each_epoch():
    left_out = [
        frozenset(range(50))
        - set(
            input_pipeline.epoch_order(
                0, e, 50, 16, drop_remainder=True
            ).ravel()
        )
        for e in range(40)
    ]
    assert {len(users) for users in left_out} == {2}
    assert len(set(left_out)) > 30
    assert len(frozenset().union(*left_out)) > 30


def test_no_batch_left():
    with pytest.raises(VaecfError, match=r"batch_size=16.*15 training users"):
        input_pipeline.epoch_order(0, 0, 15, 16, drop_remainder=True)
    assert (
        input_pipeline.epoch_order(0, 0, 16, 16, drop_remainder=True).size == 16
    )
    assert input_pipeline.epoch_order(0, 0, 15, 16).shape == (1, 16)


@given(sizes, st.integers(1, 8), st.booleans())
def test_shards_add_padding_behind_each_batch(sizes, shards, drop_remainder):
    n_users, batch_size = sizes
    if drop_remainder and batch_size > n_users:
        return
    how = {"drop_remainder": drop_remainder}
    plain = input_pipeline.epoch_order(1, 2, n_users, batch_size, **how)
    order = input_pipeline.epoch_order(
        1, 2, n_users, batch_size, **how, parts=shards
    )
    np.testing.assert_array_equal(order[:, :batch_size], plain)
    assert np.all(order[:, batch_size:] == n_users)
    assert order.shape[1] % shards == 0
    assert order.shape[1] - batch_size < shards
