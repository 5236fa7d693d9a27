"""The input layer against loops and dense NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from vaecf.models import bag_of_items
from vaecf.models.sparse_batch import SparseBatch, assemble_on_host
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS, UNITS, SLOTS = 6, 16, 3, 100
HIGHEST = lax.Precision.HIGHEST
MESHES = [(1, 4), (2, 2), (4, 1)]

histories = st.lists(
    st.sets(st.integers(0, ITEMS - 1)).map(sorted),
    min_size=USERS,
    max_size=USERS,
)
few = functools.partial(settings, deadline=None)


def batch_of(users, n_slots=SLOTS, shards=1) -> SparseBatch:
    """Each shard has n_slots, and its rows count from its own first user."""
    indptr = np.cumsum([0, *map(len, users)])
    items = np.array([i for items in users for i in items], np.int32)
    every = np.arange(len(users))
    return assemble_on_host(indptr, items, every, n_slots, shards)


def dense(users, n_items=ITEMS) -> np.ndarray:
    x = np.zeros((len(users), n_items))
    for u, items in enumerate(users):
        x[u, items] = 1
    return x


def random_histories(seed, n_users=USERS, n_items=ITEMS):
    """Histories of random lengths; the second user has none."""
    rng = np.random.default_rng(seed)
    users = [
        sorted(rng.permutation(n_items)[: rng.integers(1, n_items)].tolist())
        for _ in range(n_users)
    ]
    users[1] = []
    return users


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL = normal(0, ITEMS, UNITS)
COTANGENT = normal(1, USERS, UNITS)
KEY = jax.random.key_data(jax.random.key(5))


# --- dropout ----


def kept_pairs(batch, keep, first_row=0) -> set[tuple[int, int]]:
    keep = np.asarray(keep)
    return set(
        zip(
            (np.asarray(batch.row_N)[keep] + first_row).tolist(),
            np.asarray(batch.item_N)[keep].tolist(),
        )
    )


def expected_pairs(threefry, users, rate, first_row=0):
    return {
        (first_row + u, i)
        for u, items in enumerate(users)
        for i in items
        if threefry(KEY, first_row + u, i) >= round(rate * 2**32)
    }


@functools.partial(jax.jit, static_argnames="rate")
def keep_interactions(batch, first_row, *, rate):
    return bag_of_items.keep_interactions(
        batch, bag_of_items.Dropout(KEY, rate, first_row)
    )


@few(max_examples=40)
@given(histories, st.data())
def test_dropout_does_not_depend_on_the_layout(threefry, users, data):
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    first = data.draw(st.sampled_from([0, 7, 10_000]))
    users = [data.draw(st.permutations(items)) for items in users]
    batch = batch_of(users, data.draw(st.sampled_from([SLOTS, 2 * SLOTS])))
    keep = keep_interactions(batch, first, rate=rate)
    assert kept_pairs(batch, keep, first) == expected_pairs(
        threefry, users, rate, first
    )


@pytest.mark.parametrize("shape", MESHES)
def test_dropout_does_not_depend_on_the_mesh(threefry, shape):
    mesh = mesh_lib.make_mesh(*shape)
    users = random_histories(2, n_users=8)
    size = 8 // shape[0]

    def local(batch):
        first = lax.axis_index("data") * size
        return bag_of_items.keep_interactions(
            batch, bag_of_items.Dropout(KEY, 0.5, first)
        )

    batch = batch_of(users, shards=shape[0])
    keep = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    )(batch)
    assert keep.sharding.device_set == set(mesh.devices.flat)
    shard_N = np.arange(len(keep)) // SLOTS
    batch = batch._replace(row_N=batch.row_N + shard_N * size)
    expected = expected_pairs(threefry, users, 0.5)
    assert kept_pairs(batch, keep) == expected
    assert 0 < len(expected) < sum(map(len, users))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_is_independent_between_users_items_and_steps(rate):
    n_users, n_items = 200, 400
    users = [range(n_items)] * n_users
    batch = batch_of(users, n_users * n_items)
    first, second = (
        np.asarray(
            bag_of_items.keep_interactions(
                batch,
                bag_of_items.Dropout(
                    jax.random.key_data(jax.random.key(seed)), rate, 0
                ),
            )
        ).reshape(n_users, n_items)
        for seed in (0, 1)
    )
    sigma = (rate * (1 - rate) / first.size) ** 0.5
    assert abs(first.mean() - (1 - rate)) < 4.5 * sigma
    # Variances of the kept interactions per user and per item.
    for axis in (0, 1):
        totals, n = first.sum(axis=axis), first.shape[axis]
        ratio = totals.var() / (n * rate * (1 - rate))
        assert abs(ratio - 1) < 5 * (2 / len(totals)) ** 0.5
    for other in (second, np.roll(first, 1, 0), np.roll(first, 1, 1)):
        both = ((first - (1 - rate)) * (other - (1 - rate))).mean()
        assert abs(both) < 4.5 * rate * (1 - rate) / first.size**0.5


# --- bag of items ----


@functools.partial(jax.jit, static_argnames=("name", "lowering", "rate"))
def bag_and_gradient(batch, kernel, cotangent, *, name, lowering, rate=None):
    out, pullback = jax.vjp(
        functools.partial(
            getattr(bag_of_items, name),
            batch=batch,
            dropout=rate and bag_of_items.Dropout(KEY, rate, 3),
            lowering=lowering,
            precision=HIGHEST,
        ),
        kernel,
    )
    return out, pullback(cotangent)[0]


def test_the_two_lowerings_are_different_programs():
    batch = batch_of(random_histories(0))
    programs = [
        str(
            jax.make_jaxpr(
                functools.partial(
                    bag_of_items.normalised_bag, lowering=lowering
                )
            )(KERNEL, batch)
        )
        for lowering in ("gather", "dense")
    ]
    assert ["dot_general" in p for p in programs] == [False, True]
    with pytest.raises(ValueError, match="'auto' is unknown: use 'gather'"):
        bag_of_items.bag_of_items(KERNEL, batch, lowering="auto")


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize(
    ("name", "rate"),
    [("bag_of_items", None), ("normalised_bag", None), ("normalised_bag", 0.5)],
)
@few(max_examples=25)
@given(users=histories)
def test_bag_equals_the_dense_product(threefry, lowering, name, rate, users):
    """Normalised first, then dropped out, as in the authors' code."""
    x = dense(users)
    if name == "normalised_bag":
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
    if rate:
        kept = expected_pairs(threefry, users, rate, 3)
        x *= [[(u + 3, i) in kept for i in range(ITEMS)] for u in range(USERS)]
        x /= 1 - rate
    out, gradient = bag_and_gradient(
        batch_of(users),
        KERNEL,
        COTANGENT,
        name=name,
        lowering=lowering,
        rate=rate,
    )
    assert out.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ KERNEL, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, x.T @ COTANGENT, rtol=1e-5, atol=1e-5)
    empty = [not items for items in users]
    assert not np.asarray(out)[empty].any()


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bag_in_half_precision(lowering, dtype):
    """Only the kernel is rounded."""
    users = random_histories(3)
    batch = batch_of(users)
    rounded = np.asarray(KERNEL.astype(dtype), float)

    def bag(kernel):
        return bag_of_items.normalised_bag(
            kernel, batch, lowering=lowering, dtype=dtype, precision=HIGHEST
        )

    out, pullback = jax.vjp(bag, jnp.asarray(KERNEL))
    x = dense(users)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ rounded, rtol=1e-5, atol=1e-5)
    assert np.abs(out - x @ KERNEL).max() > 1e-4
    (gradient,) = pullback(jnp.asarray(COTANGENT))
    assert gradient.dtype == jnp.float32
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gradient, x.T @ COTANGENT, rtol=0, atol=4 * eps)


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_popular_item_gets_the_gradient_of_all_its_users(lowering, dtype):
    """In half precision the sum of 4,096 ones would be 256 or 2,048."""
    n = 4096
    batch = batch_of([[0]] * n, n)
    gradient = jax.grad(
        lambda kernel: jnp.sum(
            bag_of_items.bag_of_items(
                kernel, batch, lowering=lowering, dtype=dtype
            )
        )
    )(jnp.ones((2, 1)))
    assert gradient.tolist() == [[n], [0]]


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("shape", MESHES)
def test_bag_on_a_mesh_equals_one_device(lowering, shape):
    mesh = mesh_lib.make_mesh(*shape)
    users = random_histories(4, n_users=8)
    cotangent = normal(5, 8, UNITS)
    size = 8 // shape[0]

    def weighted(bag):
        def loss(kernel, batch):
            out = bag(kernel, batch)
            return jnp.sum(out * cotangent), out

        return jax.jit(jax.grad(loss, has_aux=True))

    def bag(kernel, batch, first_row, item_axis=None):
        return bag_of_items.normalised_bag(
            kernel,
            batch,
            dropout=bag_of_items.Dropout(KEY, 0.3, first_row),
            lowering=lowering,
            precision=HIGHEST,
            item_axis=item_axis,
        )

    sharded = jax.shard_map(
        lambda kernel, batch: bag(
            kernel, batch, lax.axis_index("data") * size, "item"
        ),
        mesh=mesh,
        in_specs=(P("item", None), P("data")),
        out_specs=P("data"),
    )
    one, one_out = weighted(functools.partial(bag, first_row=0))(
        KERNEL, batch_of(users)
    )
    many, many_out = weighted(sharded)(KERNEL, batch_of(users, shards=shape[0]))
    assert len(many_out.sharding.device_set) == 4
    assert len(one_out.sharding.device_set) == 1
    np.testing.assert_allclose(many_out, one_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    assert np.abs(one).max() > 0.1
