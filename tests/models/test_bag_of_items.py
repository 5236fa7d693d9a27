"""Both ends of the autoencoder against dense float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from vaecf.models import bag_of_items, likelihood, noise
from vaecf.models.sparse_batch import SparseBatch
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


def batch_of(users, n_slots=SLOTS) -> SparseBatch:
    counts = [len(items) for items in users]
    item = np.zeros(n_slots, np.int32)
    row = np.full(n_slots, len(users), np.int32)
    item[: sum(counts)] = [i for items in users for i in items]
    row[: sum(counts)] = np.repeat(np.arange(len(users)), counts)
    return SparseBatch(item, row, np.array(counts, np.int32))


def sharded_batch(users, shards, n_slots=SLOTS) -> SparseBatch:
    """Each shard's rows count from its own first user."""
    size = len(users) // shards
    parts = [
        batch_of(users[k * size : (k + 1) * size], n_slots)
        for k in range(shards)
    ]
    return SparseBatch(*(np.concatenate(x) for x in zip(*parts)))


def dense(users, n_items=ITEMS) -> np.ndarray:
    x = np.zeros((len(users), n_items))
    for u, items in enumerate(users):
        x[u, items] = 1
    return x


def random_histories(seed, n_users=USERS, n_items=ITEMS):
    """Any lengths; the second user has no items."""
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


# --- random numbers ----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known answers of the Random123 library, threefry2x32 20.
        ((0, 0), (0, 0), 0x6B200159),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, 0x1CB996FC),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            0xC4923A9C,
        ),
    ],
)
def test_counter_bits_are_threefry(threefry, key, counter, expected):
    key = np.array(key, np.uint32)
    row, column = np.array(counter, np.uint32).view(np.int32)[:, None]
    assert noise.counter_bits(key, row, column).tolist() == [expected]
    assert threefry(key, row, column).tolist() == [expected]


def test_counter_bits_of_any_shape(threefry):
    row, column = np.mgrid[0:7, 0:5].astype(np.int32)
    bits = noise.counter_bits(KEY, row, column)
    assert bits.dtype == jnp.uint32
    np.testing.assert_array_equal(bits, threefry(KEY, row, column))
    assert len(np.unique(bits)) == row.size


def test_counter_normal_equals_its_definition(threefry):
    rows = np.array([3, 0, 2**31 - 1], np.int32)
    bits = threefry(KEY, rows[:, None], np.arange(50)[None, :])
    uniform = ((bits >> 9) + 0.5) / 2**22 - 1
    expected = np.sqrt(2) * scipy.special.erfinv(uniform)
    got = noise.counter_normal(KEY, rows, 50)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_counter_normal_is_standard_normal():
    x = np.asarray(
        noise.counter_normal(KEY, np.arange(500, dtype=np.int32), 200)
    ).astype(float)
    n = x.size
    assert abs(x.mean()) < 4.5 / n**0.5
    assert abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    # Neighbouring users, and neighbouring dimensions, share nothing.
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 / n**0.5
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4.5 / n**0.5


def test_counter_normal_depends_on_key_row_and_column_alone():
    rows = np.arange(8, dtype=np.int32)
    whole = np.asarray(noise.counter_normal(KEY, rows, 6))
    order = np.array([5, 1, 7], np.int32)
    part = noise.counter_normal(KEY, order, 4)
    np.testing.assert_array_equal(part, whole[order, :4])
    other = jax.random.key_data(jax.random.key(6))
    assert not np.isin(noise.counter_normal(other, rows, 6), whole).any()


@pytest.mark.parametrize("jitted", [False, True])
def test_counter_normal_is_never_infinite(monkeypatch, jitted):
    extremes = jnp.array([[0, 2**32 - 1, 2**31, 2**31 - 1]], jnp.uint32)
    monkeypatch.setattr(noise, "counter_bits", lambda *_: extremes)
    draw = functools.partial(noise.counter_normal, n_columns=4)
    got = np.asarray((jax.jit(draw) if jitted else draw)(KEY, jnp.zeros(1)))[0]
    furthest = np.sqrt(2) * scipy.special.erfinv(1 - 2.0**-23)
    nearest = np.sqrt(2) * scipy.special.erfinv(2.0**-23)
    expected = [-furthest, furthest, nearest, -nearest]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


# --- dropout -----------------------------------------------------------------


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
def test_what_is_dropped_does_not_depend_on_the_layout(threefry, users, data):
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    first = data.draw(st.sampled_from([0, 7, 10_000]))
    users = [data.draw(st.permutations(items)) for items in users]
    batch = batch_of(users, data.draw(st.sampled_from([SLOTS, 2 * SLOTS])))
    keep = keep_interactions(batch, first, rate=rate)
    assert kept_pairs(batch, keep, first) == expected_pairs(
        threefry, users, rate, first
    )


@pytest.mark.parametrize("shape", MESHES)
def test_what_is_dropped_does_not_depend_on_the_mesh(threefry, shape):
    mesh = mesh_lib.make_mesh(*shape)
    users = random_histories(2, n_users=8)
    size = 8 // shape[0]

    def local(batch):
        first = lax.axis_index("data") * size
        return bag_of_items.keep_interactions(
            batch, bag_of_items.Dropout(KEY, 0.5, first)
        )

    batch = sharded_batch(users, shape[0])
    keep = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    )(batch)
    assert keep.sharding.device_set == set(mesh.devices.flat)
    shard_N = np.arange(len(keep)) // SLOTS
    batch = batch._replace(row_N=batch.row_N + shard_N * size)
    expected = expected_pairs(threefry, users, 0.5)
    assert kept_pairs(batch, keep) == expected
    assert 0 < len(expected) < sum(map(len, users))


def test_nothing_is_dropped_without_dropout_or_at_rate_zero():
    batch = batch_of(random_histories(0))
    for dropout in (None, bag_of_items.Dropout(KEY, 0.0, 0)):
        keep = bag_of_items.keep_interactions(batch, dropout)
        np.testing.assert_array_equal(keep, batch.row_N < USERS)


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
    # Variance of a user's and of an item's number of kept interactions.
    for axis in (0, 1):
        totals, n = first.sum(axis=axis), first.shape[axis]
        ratio = totals.var() / (n * rate * (1 - rate))
        assert abs(ratio - 1) < 5 * (2 / len(totals)) ** 0.5
    for other in (second, np.roll(first, 1, 0), np.roll(first, 1, 1)):
        both = ((first - (1 - rate)) * (other - (1 - rate))).mean()
        assert abs(both) < 4.5 * rate * (1 - rate) / first.size**0.5


# --- bag of items ------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("name", "lowering", "rate"))
def bag_and_gradient(batch, kernel, cotangent, *, name, lowering, rate=None):
    dropout = None if rate is None else bag_of_items.Dropout(KEY, rate, 3)

    def weighted(kernel):
        out = getattr(bag_of_items, name)(
            kernel,
            batch,
            dropout=dropout,
            lowering=lowering,
            precision=HIGHEST,
        )
        return jnp.sum(out * cotangent), out

    gradient, out = jax.grad(weighted, has_aux=True)(kernel)
    return out, gradient


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
@few(max_examples=25)
@given(users=histories)
def test_bag_of_items_equals_a_loop(lowering, users):
    expected = np.zeros((USERS, UNITS))
    expected_gradient = np.zeros((ITEMS, UNITS))
    for u, items in enumerate(users):
        for i in items:
            expected[u] += KERNEL[i]
            expected_gradient[i] += COTANGENT[u]
    out, gradient = bag_and_gradient(
        batch_of(users),
        KERNEL,
        COTANGENT,
        name="bag_of_items",
        lowering=lowering,
    )
    assert out.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("rate", [None, 0.5])
@few(max_examples=25)
@given(users=histories)
def test_normalised_bag_normalises_then_drops(threefry, lowering, rate, users):
    x = dense(users)
    norm = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
    if rate:
        kept = expected_pairs(threefry, users, rate, 3)
        x *= [[(u + 3, i) in kept for i in range(ITEMS)] for u in range(USERS)]
        x /= 1 - rate
    out, gradient = bag_and_gradient(
        batch_of(users),
        KERNEL,
        COTANGENT,
        name="normalised_bag",
        lowering=lowering,
        rate=rate,
    )
    np.testing.assert_allclose(out, x / norm @ KERNEL, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        gradient, (x / norm).T @ COTANGENT, rtol=1e-5, atol=1e-5
    )
    empty = [not items for items in users]
    assert not np.asarray(out)[empty].any()


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bag_in_half_precision(lowering, dtype):
    """The kernel is rounded once; everything else is float32."""
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
    """Summed in half precision, 4,096 ones are 256 or 2,048."""
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
    many, many_out = weighted(sharded)(KERNEL, sharded_batch(users, shape[0]))
    assert len(many_out.sharding.device_set) == 4
    assert len(one_out.sharding.device_set) == 1
    np.testing.assert_allclose(many_out, one_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    assert np.abs(one).max() > 0.1


# --- likelihood --------------------------------------------------------------

HIDDEN, OUTPUT, BIAS = (
    normal(6, USERS, UNITS),
    normal(7, UNITS, ITEMS),
    normal(8, ITEMS),
)
WEIGHT = normal(9, USERS)
# All items at once; blocks with a rest, without one, larger than the items.
BLOCKS = [0, 5, 8, 100]


def nll_by_definition(x, hidden, kernel, bias) -> np.ndarray:
    """-sum_i x_i log softmax_i, float64."""
    z = hidden.astype(float) @ kernel.astype(float) + bias
    log_softmax = z - scipy.special.logsumexp(z, axis=1, keepdims=True)
    # Padding items: 0 · -inf is nothing.
    return -np.where(x > 0, log_softmax, 0).sum(1)


def gradients_by_definition(x, hidden, kernel, bias, weight):
    z = hidden.astype(float) @ kernel.astype(float) + bias
    share = scipy.special.softmax(z, axis=1)
    d = weight[:, None] * (x.sum(1, keepdims=True) * share - x)
    return d @ kernel.T.astype(float), hidden.T.astype(float) @ d, d.sum(0)


@functools.partial(jax.jit, static_argnames=("dtype", "block"))
def nll_and_gradients(
    hidden, kernel, bias, batch, weight, dtype=jnp.float32, block=0
):
    def weighted(hidden, kernel, bias):
        nll = likelihood.multinomial_nll(
            hidden,
            kernel,
            bias,
            batch,
            dtype=dtype,
            precision=HIGHEST,
            block=block,
        )
        return jnp.sum(weight * nll), nll

    gradients, nll = jax.grad(weighted, (0, 1, 2), has_aux=True)(
        hidden, kernel, bias
    )
    return nll, gradients


@pytest.mark.parametrize("block", BLOCKS)
@few(max_examples=40)
@given(users=histories, seed=st.integers(0, 99))
def test_nll_and_gradients_equal_their_definitions(block, users, seed):
    x = dense(users)
    arrays = [
        normal(seed + k, *a.shape)
        for k, a in enumerate((HIDDEN, OUTPUT, BIAS, WEIGHT))
    ]
    *inputs, weight = arrays
    nll, gradients = nll_and_gradients(
        *inputs, batch_of(users), weight, block=block
    )
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(
        nll, nll_by_definition(x, *inputs), rtol=1e-5, atol=1e-5
    )
    expected = gradients_by_definition(x, *inputs, weight)
    for got, want in zip(gradients, expected):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    empty = [not items for items in users]
    assert not np.asarray(nll)[empty].any()
    assert not np.asarray(gradients[0])[empty].any()


def test_gradients_equal_finite_differences():
    users = random_histories(5)
    x = dense(users)
    inputs = [a.astype(float) for a in (HIDDEN, OUTPUT, BIAS)]
    _, gradients = nll_and_gradients(
        HIDDEN, OUTPUT, BIAS, batch_of(users), WEIGHT
    )
    step = 1e-5
    for array, gradient in zip(inputs, gradients):
        numeric = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            saved, values = array[at], []
            for side in (step, -step):
                array[at] = saved + side
                values.append(WEIGHT @ nll_by_definition(x, *inputs))
            array[at] = saved
            numeric[at] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)


def test_gradients_equal_automatic_ones_of_the_dense_form():
    users = random_histories(6)
    x = jnp.asarray(dense(users), jnp.float32)

    def plain(hidden, kernel, bias):
        logits = jnp.dot(hidden, kernel, precision=HIGHEST) + bias[None, :]
        return -jnp.sum(WEIGHT[:, None] * x * jax.nn.log_softmax(logits))

    expected = jax.grad(plain, (0, 1, 2))(HIDDEN, OUTPUT, BIAS)
    _, got = nll_and_gradients(HIDDEN, OUTPUT, BIAS, batch_of(users), WEIGHT)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_padding_items_have_no_probability_and_no_gradient(dtype, block):
    real = 11
    users = random_histories(7, n_items=real)
    batch = batch_of(users)
    # Wild values where nobody should look.
    kernel = np.where(np.arange(ITEMS) < real, OUTPUT, 100.0)
    bias = np.asarray(
        likelihood.mask_padding_items(jnp.asarray(BIAS), real, None)
    )
    assert np.isneginf(bias[real:]).all() and np.isfinite(bias[:real]).all()
    nll, gradients = nll_and_gradients(
        HIDDEN, kernel, bias, batch, WEIGHT, dtype, block
    )
    alone, alone_gradients = nll_and_gradients(
        HIDDEN, OUTPUT[:, :real], BIAS[:real], batch, WEIGHT, dtype, block
    )
    eps = max(float(jnp.finfo(dtype).eps), 1e-6)
    np.testing.assert_allclose(nll, alone, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], alone_gradients[0], atol=8 * eps)
    for got, want in zip(gradients[1:], alone_gradients[1:]):
        np.testing.assert_allclose(got[..., :real], want, atol=8 * eps)
        assert not np.asarray(got)[..., real:].any()
    np.testing.assert_allclose(
        nll,
        nll_by_definition(
            dense(users, real), HIDDEN, OUTPUT[:, :real], BIAS[:real]
        ),
        rtol=8 * eps,
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_users_without_items_give_nothing(block):
    batch = batch_of([[]] * USERS)
    nll, gradients = nll_and_gradients(
        HIDDEN, OUTPUT, BIAS, batch, WEIGHT, block=block
    )
    for array in (nll, *gradients):
        assert not np.asarray(array).any()


@pytest.mark.parametrize("block", BLOCKS)
def test_nll_of_far_away_logits_is_that_of_near_ones(block):
    """Without the maximum taken out, exp(3e4) is infinite."""
    users = random_histories(8)
    near = nll_and_gradients(HIDDEN, OUTPUT, BIAS, batch_of(users), WEIGHT)
    for shift in (-3e4, 3e4):
        far = nll_and_gradients(
            HIDDEN,
            OUTPUT,
            BIAS + np.float32(shift),
            batch_of(users),
            WEIGHT,
            block=block,
        )
        for a, b in zip(jax.tree.leaves(far), jax.tree.leaves(near)):
            np.testing.assert_allclose(a, b, atol=0.1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_nll_in_half_precision(dtype, block):
    users = random_histories(9)
    x, batch = dense(users), batch_of(users)
    nll, gradients = nll_and_gradients(
        HIDDEN, OUTPUT, BIAS, batch, WEIGHT, dtype, block
    )
    single, _ = nll_and_gradients(HIDDEN, OUTPUT, BIAS, batch, WEIGHT)
    eps = float(jnp.finfo(dtype).eps)
    logits = np.abs(HIDDEN @ OUTPUT + BIAS).max()
    assert nll.dtype == jnp.float32
    assert (
        np.abs(nll - nll_by_definition(x, HIDDEN, OUTPUT, BIAS))
        <= 2 * eps * logits * x.sum(1)
    ).all()
    assert np.abs(nll - single).max() > eps / 10
    expected = gradients_by_definition(x, HIDDEN, OUTPUT, BIAS, WEIGHT)
    for got, want in zip(gradients, expected):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 4 * eps * np.linalg.norm(want)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_gradients_sum_over_many_users_in_float32(dtype, block):
    n = 4096
    _, (_, kernel, bias) = nll_and_gradients(
        jnp.ones((n, 1)),
        jnp.zeros((1, 2)),
        jnp.zeros(2),
        batch_of([[0]] * n, n),
        jnp.ones(n),
        dtype,
        block,
    )
    assert bias.tolist() == [-n / 2, n / 2]
    assert kernel.tolist() == [[-n / 2, n / 2]]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("real", [13, 3])
@pytest.mark.parametrize("block", [0, 3])
def test_nll_on_a_mesh_equals_one_device(shape, real, block):
    """Padding cuts a shard (13) or fills whole shards (3)."""
    mesh = mesh_lib.make_mesh(*shape)
    users = random_histories(10, n_users=8, n_items=real)
    hidden, weight = normal(11, 8, UNITS), normal(12, 8)

    def loss(hidden, kernel, bias, batch, item_axis=None):
        bias = likelihood.mask_padding_items(bias, real, item_axis)
        return likelihood.multinomial_nll(
            hidden,
            kernel,
            bias,
            batch,
            precision=HIGHEST,
            item_axis=item_axis,
            block=block if item_axis else 0,
        )

    def gradients(loss, batch):
        def weighted(*inputs):
            nll = loss(*inputs, batch)
            return jnp.sum(weight * nll), nll

        return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(
            hidden, OUTPUT, BIAS
        )

    sharded = jax.shard_map(
        functools.partial(loss, item_axis="item"),
        mesh=mesh,
        in_specs=(P("data"), P(None, "item"), P("item"), P("data")),
        out_specs=P("data"),
    )
    one, one_nll = gradients(loss, batch_of(users))
    many, many_nll = gradients(sharded, sharded_batch(users, shape[0]))
    assert len(many_nll.sharding.device_set) == 4
    assert len(one_nll.sharding.device_set) == 1
    np.testing.assert_allclose(many_nll, one_nll, rtol=1e-5, atol=1e-5)
    for a, b in zip(many, one):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.abs(b).max() > 0.1
    x = dense(users, real)
    inputs = hidden, OUTPUT[:, :real], BIAS[:real]
    np.testing.assert_allclose(
        many_nll, nll_by_definition(x, *inputs), rtol=1e-5, atol=1e-5
    )
    for got, want in zip(many, gradients_by_definition(x, *inputs, weight)):
        padded = np.zeros(got.shape)
        padded[..., : want.shape[-1]] = want
        np.testing.assert_allclose(got, padded, rtol=1e-4, atol=1e-4)


def test_logits_accumulate_in_the_output_dtype():
    """1 + 2^-12 is not a bfloat16, and what the sum must not lose."""
    hidden = jnp.array([[1.0, 2.0**-12]])
    kernel, bias = jnp.ones((2, 1)), jnp.array([2.0**-13])
    whole = likelihood.logits(hidden, kernel, bias, dtype=jnp.bfloat16)
    half = likelihood.logits(
        hidden,
        kernel,
        bias,
        dtype=jnp.bfloat16,
        output_dtype=jnp.bfloat16,
    )
    assert whole.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    assert whole.tolist() == [[1 + 2.0**-12 + 2.0**-13]]
    assert half.tolist() == [[1.0]]
