"""What layers keep in memory in half precision on a GPU, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaecf.models import layers

X = np.linspace(-3, 3, 240, dtype=np.float32).reshape(12, 20)
G = np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
VALUES = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}
SLOPES = {"tanh": lambda x: np.cosh(x) ** -2.0, "relu": lambda x: x > 0}


def activate(name, dtype, platform):
    return lambda x: layers.activate(name, x, dtype=dtype, platform=platform)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", VALUES)
def test_a_rounded_activation(name, dtype):
    eps, x = float(jnp.finfo(dtype).eps), X.astype(np.float64)
    # A population maps over its members.
    y, backward = jax.vjp(jax.vmap(activate(name, dtype, "gpu")), X)
    (gradient,) = backward(G.astype(dtype))
    assert y.dtype == dtype and gradient.dtype == jnp.float32
    np.testing.assert_allclose(y, VALUES[name](x), rtol=eps / 2)
    np.testing.assert_allclose(gradient, G * SLOPES[name](x), atol=4 * eps)
    # Nothing else is kept for the backward pass.
    kept = jax.tree.leaves(backward)
    assert [(k.shape, k.dtype) for k in kept] == [(X.shape, dtype)]


@pytest.mark.parametrize(
    ("dtype", "platform"),
    [
        (jnp.float32, "gpu"),
        (jnp.bfloat16, "cpu"),
        (jnp.float16, "old_gpu"),
    ],
)
def test_other_activations_are_not_rounded(dtype, platform):
    y, backward = jax.vjp(activate("tanh", dtype, platform), X)
    expected, expected_backward = jax.vjp(jnp.tanh, X)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(backward(G), expected_backward(G))
    same = layers.rounded(X, dtype=dtype, platform=platform)
    np.testing.assert_array_equal(same, X)


def test_the_gradient_alone_is_rounded():
    dtype = jnp.bfloat16
    y, backward = jax.vjp(
        lambda x: layers.round_gradient(x, dtype=dtype, platform="gpu"), X
    )
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(backward(G)[0], G.astype(dtype))


@pytest.mark.parametrize(
    ("n_users", "dtype"),
    [(3, jnp.bfloat16), (3, jnp.float32), (5000, jnp.bfloat16)],
)
def test_gradients_of_rows_are_sums_over_the_users(n_users, dtype):
    vectors = {"a": jnp.arange(4.0), "b": [jnp.ones(2), jnp.zeros(3)]}
    weights = jax.tree.map(
        lambda x: jnp.outer(jnp.arange(n_users) % 7, x + 1.0), vectors
    )

    def loss(vectors):
        rows = layers.rows(vectors, n_users, dtype=dtype, platform="gpu")
        product = jax.tree.map(lambda r, w: (r * w).sum(), rows, weights)
        return sum(jax.tree.leaves(product))

    found = jax.grad(loss)(vectors)
    total = (np.arange(n_users) % 7).sum()
    expected = jax.tree.map(lambda x: total * (x + 1), vectors)
    jax.tree.map(np.testing.assert_allclose, found, expected)


def test_an_array_that_several_layers_read():
    """Its value is rounded, and the sum of its gradients is not."""
    x = jnp.asarray(X)
    y, backward = jax.vjp(
        lambda x: layers.rounded(x, dtype=jnp.bfloat16, platform="gpu"), x
    )
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(backward(G)[0], G)
