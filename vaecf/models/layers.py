"""Parts that the layers of all autoencoders share.

Shapes in names: B users, H and K units.

In half precision on a GPU that has Triton (`mesh.has_triton`), an array
between two layers is in memory only once, rounded as the products read it. The
backward pass reads the rounded values, too, and computes with them in float32.
XLA would otherwise keep a float32 copy for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vaecf.models.bag_of_items import product
from vaecf.parallel.mesh import has_triton, on_cpu

_MOST_ROWS = 2048  # users whose gradients of vectors a GPU sums together


class Activation(NamedTuple):
    """An activation, and its derivative as a function of its value."""

    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


ACTIVATIONS = {
    "tanh": Activation(jnp.tanh, lambda y: 1 - jnp.square(y)),
    "relu": Activation(nn.relu, lambda y: (y > 0).astype(y.dtype)),
    "identity": Activation(lambda x: x, jnp.ones_like),
}


class Layer(nn.Module):
    """Declares the parameters of a layer, named as those of Flax's layers."""

    shape: tuple[int, ...]
    first_init: Any
    bias_init: Any
    first: str = "kernel"  # name of the first parameter; 'bias' is the other

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns (kernel or scale of the shape, bias), float32."""
        return (
            self.param(self.first, self.first_init, self.shape),
            self.param("bias", self.bias_init, self.shape[-1:]),
        )


def dense(
    x_BH: jax.Array,
    kernel_HK: jax.Array,
    bias: jax.Array,
    *,
    dtype: Any,
    precision: Any,
    platform: str | None,
) -> jax.Array:
    """Returns x · kernel + bias; the operands have `dtype`.

    The result has `dtype` on a CPU. It is float32 for a GPU, which adds a
    float32 bias in the kernel of the product. `bias` are `rows`.
    """
    n_users = x_BH.shape[0]
    if not on_cpu(platform):
        if n_users == 1:
            # XLA would multiply a single row in one kernel, add the products
            # in another, and then the bias.
            x_BH = jnp.broadcast_to(x_BH, (2, x_BH.shape[1]))
        sum_BK = product(dtype, precision, x_BH, kernel_HK)
        return sum_BK[:n_users] + bias
    x_BH, kernel_HK = x_BH.astype(dtype), kernel_HK.astype(dtype)
    return lax.dot(x_BH, kernel_HK, precision=precision) + bias.astype(dtype)


def _store(dtype: Any, x_BH: jax.Array) -> jax.Array:
    """Returns x rounded to the dtype.

    Without the barrier, XLA leaves out roundings that nothing but float32
    operations read.
    """
    return lax.optimization_barrier(x_BH.astype(dtype))


def rounds(dtype: Any, platform: str | None) -> bool:
    """Returns whether layers round their outputs.

    GPUs that Triton does not know would take more kernels for RecVAE.
    """
    return has_triton(platform) and jnp.dtype(dtype).itemsize == 2


def activate(
    name: str, x_BH: jax.Array, *, dtype: Any, platform: str | None
) -> jax.Array:
    """Returns an activation's value: `dtype` if it is rounded, else x's dtype.

    See the module's docstring for when it is rounded.
    """
    if not rounds(dtype, platform):
        return ACTIVATIONS[name].value(x_BH)
    return _rounded(name, jnp.dtype(dtype), x_BH).astype(dtype)


def rounded(x_BH: jax.Array, *, dtype: Any, platform: str | None) -> jax.Array:
    """Returns float32 values, rounded to `dtype` if layers round.

    The gradient is float32, for arrays that several layers read.
    """
    if not rounds(dtype, platform):
        return x_BH
    return _rounded("identity", jnp.dtype(dtype), x_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(name: str, dtype: Any, x_BH: jax.Array) -> jax.Array:
    return _rounded_forward(name, dtype, x_BH)[0]


def _rounded_forward(
    name: str, dtype: Any, x_BH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y_BH = _store(dtype, ACTIVATIONS[name].value(x_BH))
    return y_BH.astype(jnp.float32), y_BH


def _rounded_backward(
    name: str, dtype: Any, y_BH: jax.Array, g_BH: jax.Array
) -> tuple[jax.Array]:
    return (g_BH * ACTIVATIONS[name].slope(y_BH.astype(jnp.float32)),)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def round_gradient(
    x_BH: jax.Array, *, dtype: Any, platform: str | None
) -> jax.Array:
    """Returns x; its gradient is rounded if layers round.

    Products read gradients rounded, too. Sums over the users and the layers
    before then need no float32 copy.
    """
    if not rounds(dtype, platform):
        return x_BH
    return _round_gradient(jnp.dtype(dtype), x_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _round_gradient(dtype: Any, x_BH: jax.Array) -> jax.Array:
    return x_BH


_round_gradient.defvjp(
    lambda dtype, x_BH: (x_BH, None),
    lambda dtype, _, g_BH: (_store(dtype, g_BH).astype(jnp.float32),),
)


def rows(
    vectors: Any, n_users: int | None, *, dtype: Any, platform: str | None
) -> Any:
    """Returns a tree of vectors as rows [1, size], for a GPU [B, size].

    The gradients of all of them are then the sums over the users of one array,
    which takes one kernel. What it reads is kept until the end of the backward
    pass, and the array is therefore not made for many users. `n_users` is None
    without gradients.
    """
    if n_users is None or on_cpu(platform) or n_users > _MOST_ROWS:
        return jax.tree.map(lambda x: x[None, :], vectors)
    structure: Any
    leaves, structure = jax.tree.flatten(vectors)
    if not rounds(dtype, platform):
        row = jnp.concatenate(leaves)[None, :]
        array = jnp.broadcast_to(row, (n_users, row.shape[1]))
        return structure.unflatten(
            lax.split(array, [x.size for x in leaves], 1)
        )
    # Beside each other in the last dimension, rounded gradients would first be
    # copied by kernels of their own.
    size = max(x.size for x in leaves)
    stack = jnp.stack([jnp.pad(x, (0, size - x.size)) for x in leaves])
    array = jnp.broadcast_to(stack[:, None, :], (len(leaves), n_users, size))
    return structure.unflatten(
        rows_BH[:, : x.size] for rows_BH, x in zip(array, leaves)
    )
