"""The input layer against loops and dense NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import ITEMS, batch_of, dense, kept, random_histories

from vaecf.models import bag_of_items
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

UNITS = 3
KERNEL, COTANGENT = (
    oracles.normal(0, ITEMS, UNITS),
    oracles.normal(1, oracles.USERS, UNITS),
)
KEY = jax.random.key_data(jax.random.key(5))
LOWERINGS = pytest.mark.parametrize(
    ("lowering", "platform"),
    [("gather", "cpu"), ("dense", "cpu"), ("gather", "gpu")],
)


def normalised(users, rate=0.0, first_row=0):
    """Normalised first, then dropped out, as in the authors' code."""
    x = dense(users)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
    rows = first_row + np.arange(len(users))
    return x * kept(KEY, rows, ITEMS, rate) / (1 - rate)


@functools.partial(jax.jit, static_argnames="rate")
def keep_interactions(batch, first_row, key=KEY, *, rate):
    dropout = bag_of_items.Dropout(key, rate, first_row)
    return bag_of_items.keep_interactions(batch, dropout)


@settings(deadline=None, max_examples=40)
@given(oracles.histories, st.data())
def test_dropout_does_not_depend_on_the_layout(users, data):
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    first = data.draw(st.sampled_from([0, 7, 10_000]))
    users = [data.draw(st.permutations(items)) for items in users]
    batch = batch_of(
        users, data.draw(st.sampled_from([oracles.SLOTS, 2 * oracles.SLOTS]))
    )
    keep = np.asarray(keep_interactions(batch, first, rate=rate))
    pairs = set(zip(batch.row_N[keep], batch.item_N[keep]))
    rows = first + np.arange(len(users))
    expected = dense(users) * kept(KEY, rows, ITEMS, rate)
    assert pairs == set(zip(*np.nonzero(expected)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_is_independent_between_users_items_and_steps(rate):
    shape = 200, 400
    batch = batch_of([range(shape[1])] * shape[0], shape[0] * shape[1])
    keys = jax.random.key_data(jax.random.split(jax.random.key(0)))
    first, second = (
        np.asarray(keep_interactions(batch, 0, key, rate=rate)).reshape(shape)
        for key in keys
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


@functools.partial(
    jax.jit, static_argnames=("name", "lowering", "platform", "rate", "dtype")
)
def bag_and_gradient(
    batch,
    cotangent,
    *,
    name,
    lowering,
    platform,
    rate=None,
    dtype=jnp.float32,
):
    out, pullback = jax.vjp(
        functools.partial(
            getattr(bag_of_items, name),
            batch=batch,
            dropout=rate and bag_of_items.Dropout(KEY, rate, 3),
            lowering=lowering,
            platform=platform,
            dtype=dtype,
            precision=lax.Precision.HIGHEST,
        ),
        KERNEL,
    )
    return out, pullback(cotangent)[0]


def test_the_two_lowerings_are_different_programs():
    batch = batch_of(random_histories(0))
    for lowering, multiplies in (("gather", False), ("dense", True)):
        bag = functools.partial(bag_of_items.normalised_bag, lowering=lowering)
        program = str(jax.make_jaxpr(bag)(KERNEL, batch))
        assert ("dot_general" in program) == multiplies
    with pytest.raises(ValueError, match="'sum' is unknown: use 'gather'"):
        bag_of_items.bag_of_items(KERNEL, batch, lowering="sum")


def test_the_lowering_is_chosen_by_platform_and_size():
    choose = functools.partial(bag_of_items.choose_lowering, "auto")
    assert choose(24_576, 20_224, "cpu") == choose(1, 50, "gpu") == "gather"
    assert choose(24_576, 20_224, "gpu") == "gather"
    assert choose(500, 3584, "gpu") == "dense"
    assert choose(24_576, 20_224, "old_gpu") == "dense"


@LOWERINGS
@pytest.mark.parametrize(
    ("name", "rate"),
    [("bag_of_items", None), ("normalised_bag", None), ("normalised_bag", 0.5)],
)
@settings(deadline=None, max_examples=25)
@given(users=oracles.histories)
def test_bag_equals_the_dense_product(lowering, platform, name, rate, users):
    x = normalised(users, rate or 0.0, 3)
    if name == "bag_of_items":
        x = dense(users)
    out, gradient = bag_and_gradient(
        batch_of(users),
        COTANGENT,
        name=name,
        lowering=lowering,
        platform=platform,
        rate=rate,
    )
    assert out.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ KERNEL, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, x.T @ COTANGENT, rtol=1e-5, atol=1e-5)
    empty = [not items for items in users]
    assert not np.asarray(out)[empty].any()


@LOWERINGS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bag_in_half_precision(lowering, platform, dtype):
    """Only the kernel is rounded."""
    users = random_histories(3)
    out, gradient = bag_and_gradient(
        batch_of(users),
        COTANGENT,
        name="normalised_bag",
        lowering=lowering,
        platform=platform,
        dtype=dtype,
    )
    x, rounded = normalised(users), np.asarray(KERNEL.astype(dtype), float)
    assert out.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ rounded, rtol=1e-5, atol=1e-5)
    assert np.abs(out - x @ KERNEL).max() > 1e-4
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gradient, x.T @ COTANGENT, rtol=0, atol=4 * eps)


@LOWERINGS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_popular_item_gets_the_gradient_of_all_its_users(
    lowering, platform, dtype
):
    """In half precision the sum of 4,096 ones would be 256 or 2,048."""
    n = 4096
    _, gradient = bag_and_gradient(
        batch_of([[0]] * n, n),
        jnp.ones((n, UNITS)),
        name="bag_of_items",
        lowering=lowering,
        platform=platform,
        dtype=dtype,
    )
    assert (gradient[0] == n).all() and not gradient[1:].any()


def test_one_user_on_a_gpu():
    batch = batch_of([[4, 0, 7]], 8)
    kernel = jnp.asarray(KERNEL)
    out = bag_of_items.bag_of_items(kernel, batch, platform="gpu")
    np.testing.assert_allclose(out, [KERNEL[[4, 0, 7]].sum(0)], rtol=1e-6)


def test_one_user_of_each_gpu():
    """Gradients of two users' items, on two shards of each axis."""

    def local(kernel, batch):
        def total(kernel):
            return bag_of_items.bag_of_items(
                kernel, batch, item_axis=mesh_lib.ITEM, platform="gpu"
            ).sum()

        return jax.grad(total)(kernel)

    parts = [batch_of([items], 4) for items in ([4, 0, 7], [7, 11])]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    users, items = P(mesh_lib.DATA), P(mesh_lib.ITEM)
    gradient = mesh_lib.on_mesh(
        mesh_lib.make_mesh(2, 2),
        local,
        in_specs=(items, SparseBatch(users, users, users)),
        out_specs=items,
    )(KERNEL, batch)
    counts = np.bincount([4, 0, 7, 7, 11], minlength=ITEMS)
    np.testing.assert_array_equal(gradient[:, 0], counts)
