"""Batches against brute force, on the device and on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import csr_of, refuses

from vaecf.models import sparse_batch

USERS, BATCH, SLOTS = 9, 8, 48

histories = st.lists(
    st.lists(st.integers(0, 99), max_size=6), min_size=USERS, max_size=USERS
)
# The padding user, USERS, may come anywhere and often; users may repeat.
drawn_users = st.lists(
    st.integers(0, USERS), min_size=BATCH, max_size=BATCH
).map(lambda users: np.array(users, np.int32))


def brute_force(users, user_B, n_slots):
    item, row, counts = [], [], []
    for r, u in enumerate(user_B):
        items = users[u] if u < len(users) else []
        item += items
        row += [r] * len(items)
        counts.append(len(items))
    padding = n_slots - len(item)
    return item + [0] * padding, row + [len(user_B)] * padding, counts


def assert_batch(batch, item, row, counts):
    for got, want in zip(batch, (item, row, counts), strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


assemble = jax.jit(sparse_batch.assemble, static_argnums=(2, 3))


def device_csr(users):
    """As many items for every draw, so that one program serves them all."""
    csr = sparse_batch.as_csr(*csr_of(users))
    items = np.full(6 * USERS, 77, np.int32)
    items[: len(csr.item_M)] = csr.item_M
    return csr._replace(item_M=items)


@settings(deadline=None)
@given(histories, drawn_users)
def test_both_assemblers_equal_brute_force(users, user_B):
    expected = brute_force(users, user_B, SLOTS)
    for platform in ("cpu", "gpu"):
        batch = assemble(device_csr(users), user_B, SLOTS, platform)
        assert_batch(batch, *expected)
    host = sparse_batch.assemble_on_host(*csr_of(users), user_B, SLOTS)
    assert all(isinstance(x, np.ndarray) for x in host)
    assert_batch(host, *expected)
    for shards in (2, 4):
        parts = [
            brute_force(users, part, SLOTS) for part in np.split(user_B, shards)
        ]
        expected = [np.concatenate(lists) for lists in zip(*parts)]
        host = sparse_batch.assemble_on_host(
            *csr_of(users), user_B, SLOTS, shards
        )
        assert_batch(host, *expected)


def test_many_slots_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sparse_batch, "_FEW_SLOTS", 0)
    users = [[3, 1], [], [], [4, 1, 5], [2], []]
    for user_B in ([1, 3, 0, 4], [3, 2, 6, 5], [6, 6, 6, 6], [0, 3, 4, 1]):
        batch = jax.jit(lambda *x: sparse_batch.assemble(*x, SLOTS, "gpu"))(
            device_csr(users), np.array(user_B)
        )
        assert_batch(batch, *brute_force(users, user_B, SLOTS))


def test_a_full_batch_and_one_slot_too_few():
    csr, user_B = csr_of([[3, 1], [], [4, 1, 5]]), np.array([2, 1, 0, 3])
    on_host = functools.partial(sparse_batch.assemble_on_host, *csr, user_B)
    on_device = [
        assemble(sparse_batch.as_csr(*csr), user_B, 5, platform)
        for platform in ("cpu", "gpu")
    ]
    for batch in (*on_device, on_host(5)):
        assert_batch(batch, [4, 1, 5, 3, 1], [0, 0, 0, 2, 2], [3, 0, 2, 0])
    # The fullest shard counts: 3 interactions of the first, 2 of the second.
    on_host(3, parts=2)
    for slots, parts, message in (
        (4, 1, "5 interactions do not fit 4 slots"),
        (2, 2, "3 interactions do not fit 2 slots"),
        (5, 3, "reshape"),
    ):
        with pytest.raises(ValueError, match=message):
            on_host(slots, parts)


@pytest.mark.parametrize("users", [[], [[]], [[], []]])
def test_users_without_items(users):
    user_B = np.array([len(users), 0], np.int32)
    csr = sparse_batch.as_csr(*csr_of(users))
    host = sparse_batch.assemble_on_host(*csr_of(users), user_B, 4)
    for batch in (assemble(csr, user_B, 4), host):
        assert_batch(batch, [0] * 4, [2] * 4, [0, 0])


@settings(deadline=None)
@given(histories, drawn_users, st.sampled_from([1, 2, 4]))
def test_a_window_holds_its_users_shard_by_shard(users, user_B, shards):
    user_DU = user_B.reshape(shards, -1)
    window = sparse_batch.window(*csr_of(users), user_DU, SLOTS)
    assert [x.dtype for x in window] == [np.int32] * 3
    assert window.item_M.shape == (shards * SLOTS,)
    by_shard = [np.split(x, shards) for x in window]
    for shard, (start_U, count_U, item_M) in enumerate(zip(*by_shard)):
        for u, user in enumerate(user_DU[shard]):
            start, count = start_U[u], count_U[u]
            history = users[user] if user < len(users) else []
            assert item_M[start : start + count].tolist() == history
            assert 0 <= start <= SLOTS
        assert item_M[count_U.sum() :].tolist() == [0] * (SLOTS - count_U.sum())
    fullest = max(count_U.sum() for _, count_U, _ in zip(*by_shard))
    if fullest:
        with pytest.raises(ValueError, match=f"{fullest} interactions do not"):
            sparse_batch.window(*csr_of(users), user_DU, fullest - 1)


def test_a_map_beyond_int32(tmp_path):
    """A sparse file of more than 2^31 items, 8 GiB that use no disk."""
    size = 2**31 + 7
    items = np.memmap(tmp_path / "items", np.int32, "w+", shape=size)
    items[-2:] = 40, 41
    indptr = np.array([0, size - 2, size], np.int64)
    window = sparse_batch.window(indptr, items, np.array([[1, 2]]), 3)
    assert [x.tolist() for x in window] == [[0, 2], [2, 0], [40, 41, 0]]
    batch = sparse_batch.assemble_on_host(indptr, items, np.array([1, 2]), 3)
    assert_batch(batch, [40, 41, 0], [0, 0, 2], [2, 0])


def test_as_csr():
    """Appends the padding user, and starts below 2^31."""
    csr = sparse_batch.as_csr(*csr_of([[3, 1], [], [4]]))
    for got, want in zip(csr, ([0, 2, 2, 3], [2, 0, 1, 0], [3, 1, 4])):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)
    nothing = np.zeros(0, np.int32)
    for total in (2**31, 10**10):
        with refuses(rf"^{total}.*feed='streamed'"):
            sparse_batch.as_csr(np.array([0, total]), nothing)
    csr = sparse_batch.as_csr(np.array([0, 5, 2**31 - 1]), nothing)
    np.testing.assert_array_equal(csr.start_U, [0, 5, 2**31 - 1])
    np.testing.assert_array_equal(csr.count_U, [5, 2**31 - 6, 0])


def test_the_last_position_of_int32_is_reached():
    """Positions of padding slots overflow; they must not read an item."""
    last = 2**31 - 1
    csr = sparse_batch.Csr(
        np.array([last - 1, last], np.int32),
        np.array([1, 0], np.int32),
        np.array([7, 8], np.int32),
    )
    batch = assemble(csr, jnp.array([0, 1]), 6)
    # The position is clipped to the last item of this small array.
    assert_batch(batch, [8] + [0] * 5, [0] + [2] * 5, [1, 0])


def test_buckets_are_few():
    sizes = {sparse_batch.bucket(n) for n in range(1, 60_000, 7)}
    # Six per doubling at most, over less than eight doublings.
    assert len(sizes) <= 6 * 8


@given(st.integers(0, 2**40))
def test_a_bucket_is_the_smallest_size_that_fits(n):
    size = sparse_batch.bucket(n)
    least = max(256, -(-n // 256) * 256)
    assert n <= size <= 1.125 * least and size % 256 == 0
    assert sparse_batch.bucket(size) == size < sparse_batch.bucket(size + 1)
    assert sparse_batch.bucket(max(0, n - 1)) <= size
    power = sparse_batch.bucket_users(n)
    assert power >= max(n, 1) and power & (power - 1) == 0
    assert power == 1 or power < 2 * n


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_slots_hold_the_fullest_shard(data, steps, shards):
    count = st.integers(0, 2000)
    counts = data.draw(st.lists(count, min_size=4 * steps, max_size=4 * steps))
    count_SB = np.array(counts, np.int32).reshape(steps, 4)
    fullest = count_SB.reshape(-1, 4 // shards).sum(axis=1).max()
    expected = sparse_batch.bucket(int(fullest))
    assert sparse_batch.slots_for(count_SB, shards) == expected


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=200),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_expected_slots_hold_any_users(counts, users, seed):
    counts = np.array(counts, np.int32)
    slots = sparse_batch.slots_to_expect(counts, users)
    fullest = int(np.sort(counts)[::-1][:users].sum())
    assert slots <= sparse_batch.bucket(fullest)
    if users >= len(counts):
        assert slots == sparse_batch.bucket(fullest)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(counts)[:users].sum() for _ in range(20)]
    n = min(users, len(counts))
    usual = n * counts.mean() + 6 * np.sqrt(n) * counts.std()
    assert slots >= min(max(drawn), int(usual))


def test_expected_slots_are_tight():
    """A little more than the fullest of many batches, as in MovieLens-20M."""
    rng = np.random.default_rng(0)
    counts = np.minimum(rng.lognormal(3.6, 1.1, 116_677), 3000).astype(int) + 3
    for users in (500, 1024, 24_576):
        slots = sparse_batch.slots_to_expect(counts, users)
        drawn = max(
            int(rng.choice(counts, users, replace=False).sum())
            for _ in range(100)
        )
        assert drawn <= slots < 1.4 * drawn
    assert sparse_batch.slots_to_expect(np.zeros(0, int), 9) == 256
    assert sparse_batch.slots_for(np.zeros((0, 4), np.int32)) == 256
    # Sums do not overflow int32.
    assert sparse_batch.slots_for(np.full((1, 4), 2**30, np.int32)) >= 2**32
