"""The output layer against dense float64 NumPy, and its passes in XLA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import ITEMS, batch_of, dense, normal, random_histories

from vaecf.models import likelihood
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

UNITS = 3
SHAPES = (oracles.USERS, UNITS), (UNITS, ITEMS), (ITEMS,), (oracles.USERS,)
*INPUTS, WEIGHT = (normal(6 + k, *shape) for k, shape in enumerate(SHAPES))
HIDDEN, OUTPUT, BIAS = INPUTS
# A single block; with a remainder; without one; larger than the items.
BLOCKS = pytest.mark.parametrize("block", [0, 5, 8, 100])


def nll_by_definition(x, hidden, kernel, bias):
    """-sum_i x_i log softmax_i, float64."""
    z = hidden.astype(float) @ kernel.astype(float) + bias
    log_softmax = z - scipy.special.logsumexp(z, axis=1, keepdims=True)
    # 0 · -inf of padding items counts as 0.
    return -np.where(x > 0, log_softmax, 0).sum(1)


def gradients_by_definition(x, hidden, kernel, bias, weight):
    z = hidden.astype(float) @ kernel.astype(float) + bias
    share = scipy.special.softmax(z, axis=1)
    d = weight[:, None] * (x.sum(1, keepdims=True) * share - x)
    return d @ kernel.T.astype(float), hidden.T.astype(float) @ d, d.sum(0)


@functools.partial(jax.jit, static_argnames=("dtype", "block", "platform"))
def nll_and_gradients(
    inputs, batch, weight, dtype=jnp.float32, block=0, platform=None
):
    def weighted(inputs):
        nll = likelihood.multinomial_nll(
            *inputs,
            batch,
            dtype=dtype,
            precision=lax.Precision.HIGHEST,
            block=block,
            platform=platform,
        )
        return jnp.sum(weight * nll), nll

    gradients, nll = jax.grad(weighted, has_aux=True)(inputs)
    return nll, gradients


@BLOCKS
@settings(deadline=None, max_examples=40)
@given(users=oracles.histories, seed=st.integers(0, 99))
@example(users=[[]] * oracles.USERS, seed=0)
def test_nll_and_gradients_equal_their_definitions(block, users, seed):
    *inputs, weight = (normal(seed + k, *n) for k, n in enumerate(SHAPES))
    nll, gradients = nll_and_gradients(
        inputs, batch_of(users), weight, block=block
    )
    assert nll.dtype == jnp.float32
    x = dense(users)
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
    if not x.any():
        assert not any(np.asarray(g).any() for g in gradients)


def test_gradients_equal_finite_differences():
    users = random_histories(5)
    _, gradients = nll_and_gradients(INPUTS, batch_of(users), WEIGHT)

    def reference(inputs):
        return WEIGHT @ nll_by_definition(dense(users), *inputs)

    oracles.assert_gradients(reference, INPUTS, gradients, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        *((jnp.float32, block) for block in (0, 5, 8, 100)),
        *((half, n) for half in (jnp.bfloat16, jnp.float16) for n in (0, 5)),
    ],
)
def test_padding_items_have_no_probability_and_no_gradient(dtype, block):
    real = 11
    users = random_histories(7, n_items=real)
    batch = batch_of(users)
    # Large values that must not matter.
    kernel = np.where(np.arange(ITEMS) < real, OUTPUT, 100.0)
    bias = np.asarray(
        likelihood.mask_padding_items(jnp.asarray(BIAS), real, None)
    )
    assert np.isneginf(bias[real:]).all() and np.isfinite(bias[:real]).all()
    nll, gradients = nll_and_gradients(
        (HIDDEN, kernel, bias), batch, WEIGHT, dtype, block
    )
    alone = HIDDEN, OUTPUT[:, :real], BIAS[:real]
    alone_nll, expected = nll_and_gradients(alone, batch, WEIGHT, dtype, block)
    eps = max(float(jnp.finfo(dtype).eps), 1e-6)
    np.testing.assert_allclose(nll, alone_nll, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], expected[0], atol=8 * eps)
    for got, want in zip(gradients[1:], expected[1:]):
        np.testing.assert_allclose(got[..., :real], want, atol=8 * eps)
        assert not np.asarray(got)[..., real:].any()
    np.testing.assert_allclose(
        nll, nll_by_definition(dense(users, real), *alone), rtol=8 * eps
    )


@BLOCKS
def test_nll_of_large_logits(block):
    """exp(3e4) overflows unless the maximum is subtracted first."""
    batch = batch_of(random_histories(8))
    near = nll_and_gradients(INPUTS, batch, WEIGHT, block=block)
    for shift in (-3e4, 3e4):
        inputs = HIDDEN, OUTPUT, BIAS + np.float32(shift)
        far = nll_and_gradients(inputs, batch, WEIGHT, block=block)
        for a, b in zip(jax.tree.leaves(far), jax.tree.leaves(near)):
            np.testing.assert_allclose(a, b, atol=0.1)


@pytest.mark.parametrize("block", [0, 5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_nll_in_half_precision(dtype, block):
    users = random_histories(9)
    x, batch = dense(users), batch_of(users)
    nll, gradients = nll_and_gradients(INPUTS, batch, WEIGHT, dtype, block)
    single, _ = nll_and_gradients(INPUTS, batch, WEIGHT)
    eps = float(jnp.finfo(dtype).eps)
    largest = np.abs(HIDDEN @ OUTPUT + BIAS).max()
    assert nll.dtype == jnp.float32
    error = np.abs(nll - nll_by_definition(x, *INPUTS))
    assert (error <= 2 * eps * largest * x.sum(1)).all()
    assert np.abs(nll - single).max() > eps / 10
    expected = gradients_by_definition(x, *INPUTS, WEIGHT)
    for got, want in zip(gradients, expected):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 4 * eps * np.linalg.norm(want)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_gradients_sum_over_many_users_in_float32(dtype, block):
    n = 4096
    inputs = jnp.ones((n, 1)), jnp.zeros((1, 2)), jnp.zeros(2)
    _, (_, kernel, bias) = nll_and_gradients(
        inputs, batch_of([[0]] * n, n), jnp.ones(n), dtype, block
    )
    assert bias.tolist() == [-n / 2, n / 2]
    assert kernel.tolist() == [[-n / 2, n / 2]]


@pytest.mark.parametrize(
    ("shape", "real", "block", "platform"),
    [
        *(((1, 4), real, b, "cpu") for real in (13, 3) for b in (0, 3)),
        *(((2, 2), 13, 3, "cpu"), ((4, 1), 13, 0, "cpu")),
        *(((4, 1), 3, 3, "cpu"), ((2, 2), 3, 0, "gpu")),
    ],
)
def test_nll_on_a_mesh_equals_one_device(shape, real, block, platform):
    """Padding fills a part of a shard (13), or whole shards (3)."""
    users = random_histories(10, n_users=8, n_items=real)
    inputs = normal(11, 8, UNITS), OUTPUT, BIAS
    weight = normal(12, 8)

    def loss(hidden, kernel, bias, batch, item_axis=None):
        bias = likelihood.mask_padding_items(bias, real, item_axis)
        return likelihood.multinomial_nll(
            hidden,
            kernel,
            bias,
            batch,
            precision=lax.Precision.HIGHEST,
            item_axis=item_axis,
            block=block if item_axis else 0,
            platform=platform,
        )

    sharded = jax.shard_map(
        functools.partial(loss, item_axis="item"),
        mesh=mesh_lib.make_mesh(*shape),
        in_specs=(P("data"), P(None, "item"), P("item"), P("data")),
        out_specs=P("data"),
    )
    one = oracles.weighted_gradients(loss, weight, inputs, batch_of(users))
    many = oracles.weighted_gradients(
        sharded, weight, inputs, batch_of(users, shards=shape[0])
    )
    oracles.assert_same_on_mesh(many, one, 1e-5, 1e-5)
    assert all(np.abs(x).max() > 0.1 for x in jax.tree.leaves(one))
    x = dense(users, real)
    alone = inputs[0], OUTPUT[:, :real], BIAS[:real]
    np.testing.assert_allclose(
        many[1], nll_by_definition(x, *alone), rtol=1e-5, atol=1e-5
    )
    for got, want in zip(many[0], gradients_by_definition(x, *alone, weight)):
        padded = np.zeros(got.shape)
        padded[..., : want.shape[-1]] = want
        np.testing.assert_allclose(got, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_program_for_a_gpu_equals_the_definition(dtype):
    """Three segments of items; the last one holds padding items only."""
    real, n_items = 250, 384
    users = random_histories(13, n_items=real)
    batch = batch_of(users, sum(map(len, users)))
    shapes = (oracles.USERS, UNITS), (UNITS, n_items), (n_items,)
    hidden, kernel, bias = (normal(14 + k, *n) for k, n in enumerate(shapes))
    bias = likelihood.mask_padding_items(jnp.asarray(bias), real, None)
    nll, gradients = nll_and_gradients(
        (hidden, kernel, bias), batch, WEIGHT, dtype, platform="gpu"
    )
    x, eps = dense(users, real), max(float(jnp.finfo(dtype).eps), 1e-5)
    alone = hidden, kernel[:, :real], np.asarray(bias[:real])
    expected = nll_by_definition(x, *alone)
    np.testing.assert_allclose(nll, expected, rtol=8 * eps)
    expected = gradients_by_definition(x, *alone, WEIGHT)
    for got, want in zip(gradients, expected):
        real_part = np.asarray(got)[..., : want.shape[-1]]
        error = np.linalg.norm(real_part - want)
        assert error < 4 * eps * np.linalg.norm(want)
    assert not any(np.asarray(g)[..., real:].any() for g in gradients[1:])


@pytest.mark.parametrize(("dtype", "lost"), [("float32", 0), ("bfloat16", 16)])
def test_rows_of_the_bias(dtype, lost):
    bias = jnp.asarray(np.append(normal(20, 400) * 5, -np.inf))
    head = likelihood._Head(jnp.dtype(dtype), None, None, 0, on_cpu=False)
    high, low, *rest = likelihood._bias_rows(head, bias).astype(float)
    # TF32 and bfloat16 keep the bits of bfloat16.
    np.testing.assert_array_equal(high, bias.astype(jnp.bfloat16))
    rtol = 2.0**-lost if lost else 0
    np.testing.assert_allclose(high + low, bias, rtol=rtol)
    assert not np.any(rest)


def test_logits_accumulate_in_the_output_dtype():
    """1 + 2^-12 is no bfloat16, but the float32 sum must keep it."""
    hidden = jnp.array([[1.0, 2.0**-12]])
    kernel, bias = jnp.ones((2, 1)), jnp.array([2.0**-13])
    logits = functools.partial(
        likelihood.logits, hidden, kernel, bias, dtype=jnp.bfloat16
    )
    whole, half = logits(), logits(output_dtype=jnp.bfloat16)
    assert whole.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    assert whole.tolist() == [[1 + 2.0**-12 + 2.0**-13]]
    assert half.tolist() == [[1.0]]


WIDE = (48, 384)  # users, items


def written(program):
    """Operations at the top level that write an array users x items."""
    found, inside = [], False
    for line in program.splitlines():
        if line.endswith("{"):
            inside = line.startswith("ENTRY")
        array = re.match(
            rf"\s+(?:ROOT )?%?(\S+) = \w+\[{WIDE[0]},{WIDE[1]}\]", line
        )
        if inside and array and " bitcast(" not in line:
            found.append(array[1])
    return found


@pytest.mark.parametrize(("dtype", "passes"), [("float32", 4), ("bfloat16", 5)])
def test_loss_and_gradients_write_few_arrays_of_users_by_items(dtype, passes):
    """Product, bias, gradient, targets; and a cast to half precision.

    The XLA of jax 0.10.0 does not fuse the exponentials into the gradient.
    """
    passes += jax.__version_info__ < (0, 10, 2)
    rng = np.random.default_rng(0)
    batch = SparseBatch(
        rng.integers(0, WIDE[1], 256).astype(np.int32),
        np.sort(rng.integers(0, WIDE[0], 256)).astype(np.int32),
        np.full(WIDE[0], 5, np.int32),
    )

    def loss(hidden_BH, kernel_HI, bias_I):
        nll_B = likelihood.multinomial_nll(
            hidden_BH, kernel_HI, bias_I, batch, dtype=jnp.dtype(dtype)
        )
        return jnp.sum(nll_B)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = program.lower(
        jnp.ones((WIDE[0], 16)), jnp.ones((16, WIDE[1])), jnp.ones(WIDE[1])
    ).compile()
    found = written(compiled.as_text())
    assert 1 <= len(found) <= passes, found


def test_the_count_sees_a_pass():
    """An additional array of that shape is an additional line."""
    x_BI = jnp.ones(WIDE)
    once = jax.jit(lambda x: jnp.exp(x)).lower(x_BI).compile().as_text()
    twice = jax.jit(lambda x: (jnp.exp(x), x[::-1] * 2)).lower(x_BI)
    assert len(written(once)) < len(written(twice.compile().as_text()))
