"""The output layer of an autoencoder: logits and multinomial likelihood.

Shapes in names: B users, I items (the local shard of them), H hidden units,
N slots for interactions, K items of a block or interactions of a chunk.
`item_axis` is used as in `bag_of_items`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from vaecf.models import gpu_kernels, logsumexp
from vaecf.models.bag_of_items import compact
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel.mesh import item_offset, vary, varying_axes


def logits(
    hidden_BH: jax.Array,
    kernel_HI: jax.Array,
    bias_I: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    output_dtype: DTypeLike = jnp.float32,
    precision: lax.Precision | None = None,
) -> jax.Array:
    """Returns hidden · kernel + bias, [B, I] of `output_dtype`.

    The operands have `dtype`; sums are float32.
    """
    product_BI = lax.dot(
        hidden_BH.astype(dtype),
        kernel_HI.astype(dtype),
        precision=precision,
        preferred_element_type=output_dtype,
    )
    return product_BI + bias_I.astype(output_dtype)[None, :]


class _Head(NamedTuple):
    """Static settings of the likelihood, hashable for jit and custom_vjp."""

    dtype: Any
    precision: Any
    item_axis: str | None
    block: int
    on_cpu: bool


def _product(
    head: _Head, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int
) -> jax.Array:
    """Returns the float32 product that sums over one axis of each matrix."""
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=head.precision,
        preferred_element_type=jnp.float32,
    )


def _transpose(head: _Head, x_BH: jax.Array) -> jax.Array:
    """Returns the transpose [H, B], as a gather where that is faster.

    XLA folds a transpose into the product that follows. On a CPU, a half
    precision product with a transposed left operand falls back to float32,
    which is 1.8 times slower. XLA does not fold a gather.
    """
    if not head.on_cpu or x_BH.dtype.itemsize >= 4:
        return x_BH.T
    rows, columns = x_BH.shape
    place_HB = (
        jnp.arange(rows)[None, :] * columns + jnp.arange(columns)[:, None]
    )
    return jnp.take(x_BH.reshape(-1), place_HB, mode="clip")


def _local_items(head: _Head, batch: SparseBatch, n_local: int) -> jax.Array:
    """Returns the item indices within this shard, int32 [N].

    Padding and items of other shards get n_local, which scatters drop.
    """
    n_users = batch.count_B.shape[0]
    item_N = batch.item_N - item_offset(n_local, head.item_axis)
    local_N = (item_N >= 0) & (item_N < n_local) & (batch.row_N < n_users)
    return jnp.where(local_N, item_N, n_local)


def _dense_forward(head: _Head, *inputs: Any) -> tuple[jax.Array, tuple]:
    hidden_BH, kernel_HI, bias_I, batch = inputs
    n_users, n_local = hidden_BH.shape[0], kernel_HI.shape[1]
    hidden_BH = hidden_BH.astype(head.dtype)
    # Logits of the compute dtype halve the memory traffic. On a CPU, however,
    # bfloat16 products are twice as fast if they write float32.
    slow = head.on_cpu and head.dtype == jnp.bfloat16
    logits_BI = logits(
        hidden_BH,
        kernel_HI,
        bias_I,
        dtype=head.dtype,
        output_dtype=jnp.float32 if slow else head.dtype,
        precision=head.precision,
    )
    item_N = _local_items(head, batch, n_local)
    target_N = logits_BI.at[batch.row_N, item_N].get(mode="fill", fill_value=0)
    target_B = jax.ops.segment_sum(
        target_N.astype(jnp.float32),
        batch.row_N,
        num_segments=n_users,
        indices_are_sorted=True,
    )
    max_B, sum_B = logsumexp.max_and_sum(logits_BI, head.on_cpu)
    logsumexp_B, target_B = logsumexp.over_shards(
        max_B, sum_B, target_B, head.item_axis
    )
    nll_B = batch.count_B.astype(jnp.float32) * logsumexp_B - target_B
    saved = (hidden_BH, kernel_HI, bias_I, logits_BI, logsumexp_B, batch)
    return nll_B, saved


def _dense_backward(head: _Head, saved: tuple, g_B: jax.Array) -> tuple:
    hidden_BH, kernel_HI, bias_I, logits_BI, logsumexp_B, batch = saved
    n_users, n_local = logits_BI.shape
    # d nll_u / d logit_i = n_u softmax_i - x_ui, one pass over B x I.
    weight_B = g_B * batch.count_B.astype(jnp.float32)
    d_BI = (
        jnp.exp(logits_BI.astype(jnp.float32) - logsumexp_B[:, None])
        * weight_B[:, None]
    )
    item_N = _local_items(head, batch, n_local)
    minus_g_N = -g_B.at[batch.row_N].get(mode="fill", fill_value=0)
    d_BI = (
        d_BI.astype(logits_BI.dtype)
        .at[batch.row_N, item_N]
        .add(minus_g_N.astype(logits_BI.dtype), mode="drop")
        .astype(head.dtype)
    )
    d_hidden_BH = _product(head, d_BI, kernel_HI.astype(head.dtype), 1, 1)
    if head.on_cpu:
        d_kernel_HI = _product(head, _transpose(head, hidden_BH), d_BI, 1, 0)
        # The column sum is a matrix product, because XLA's CPU reduction over
        # the major axis takes ten times as long (0.29 s and 0.03 s for 4,096 x
        # 20,108).
        ones_8B = jnp.ones((8, n_users), head.dtype)
        d_bias_I = _product(head, ones_8B, d_BI, 1, 0)[0]
    else:
        factor_BH = _with_ones(hidden_BH)
        d_kernel_HI, d_bias_I = _kernel_and_bias(head, factor_BH, d_BI)
    d_kernel_HI = d_kernel_HI.astype(kernel_HI.dtype)
    return d_hidden_BH, d_kernel_HI, d_bias_I.astype(bias_I.dtype), None


def _with_ones(hidden_BH: jax.Array) -> jax.Array:
    """Returns the hidden units and, for the biases, eight that are 1."""
    ones_B8 = jnp.ones((hidden_BH.shape[0], 8), hidden_BH.dtype)
    return jnp.concatenate([hidden_BH, ones_B8], axis=1)


def _kernel_and_bias(
    head: _Head, factor_BH: jax.Array, d_BI: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of output weights and biases, for a GPU.

    `factor_BH` is `_with_ones`, so that the biases cost nothing.
    """
    d_HI = _product(head, factor_BH, d_BI, 0, 0)
    return d_HI[:-8], d_HI[-8]


def _bias_rows(head: _Head, bias_I: jax.Array) -> jax.Array:
    """Returns rows of weights for the ones of `_with_ones`, [8, I].

    Adding the bias to the logits would read as much again. The first row has 8
    significant bits of it, which operands in bfloat16 and TF32 keep; the second
    one has the rest.
    """
    # XLA leaves out a conversion to bfloat16 and back on a GPU: the second row
    # would be 0.
    high_I = lax.reduce_precision(bias_I, exponent_bits=8, mantissa_bits=7)
    low_I = jnp.where(jnp.isfinite(bias_I), bias_I - high_I, 0)
    rows_2I = jnp.stack([high_I, low_I]).astype(head.dtype)
    return jnp.pad(rows_2I, ((0, 6), (0, 0)))


def _fused_forward(head: _Head, *inputs: Any) -> tuple[jax.Array, tuple]:
    """Puts the gradient where the logits were, in one pass over B x I.

    The backward pass then needs no other pass over B x I than its products.
    """
    hidden_BH, kernel_HI, bias_I, batch = inputs
    hidden_BH = _with_ones(hidden_BH.astype(head.dtype))
    kernel_HI = kernel_HI.astype(head.dtype)
    logits_BI = lax.dot(
        hidden_BH,
        jnp.concatenate([kernel_HI, _bias_rows(head, bias_I)]),
        precision=head.precision,
        preferred_element_type=head.dtype,
    )
    nll_B, d_BI = gpu_kernels.nll_and_gradient(logits_BI, batch)
    return nll_B, (hidden_BH, kernel_HI, d_BI)


def _fused_backward(head: _Head, saved: tuple, g_B: jax.Array) -> tuple:
    hidden_BH, kernel_HI, d_BI = saved
    d_hidden_BH = _product(head, d_BI, kernel_HI, 1, 1)
    # The gradients g of a mean over users are all the same. As shares of the
    # largest one they are exact in half precision.
    top = jnp.maximum(jnp.max(jnp.abs(g_B)), jnp.finfo(jnp.float32).tiny)
    share_B1 = (g_B / top)[:, None].astype(head.dtype)
    d_kernel_HI, d_bias_I = _kernel_and_bias(head, share_B1 * hidden_BH, d_BI)
    return g_B[:, None] * d_hidden_BH, top * d_kernel_HI, top * d_bias_I, None


def _over_blocks(
    n_items: int, size: int, body: Callable[..., Any], carry: Any
) -> Any:
    """Folds body(carry, first item, block size) over all blocks of items."""
    size = min(size, n_items)
    whole, rest = divmod(n_items, size)
    carry = lax.fori_loop(
        0, whole, lambda b, carry: body(carry, b * size, size), carry
    )
    return body(carry, whole * size, rest) if rest else carry


def _block_logits(
    head: _Head, inputs: tuple, first: jax.Array | int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns a block's logits, float32 [B, K], and its part of the kernel."""
    hidden_BH, kernel_HI, bias_I = inputs
    kernel_HK = lax.dynamic_slice_in_dim(kernel_HI, first, size, axis=1)
    bias_K = lax.dynamic_slice_in_dim(bias_I, first, size)
    settings = {"dtype": head.dtype, "precision": head.precision}
    return logits(hidden_BH, kernel_HK, bias_K, **settings), kernel_HK


def _take(
    head: _Head,
    rounded_BH: jax.Array,
    kernel_HI: jax.Array,
    row_K: jax.Array,
    item_K: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns (rows [K, H], columns [H, K]) of rounded values, float32."""
    kernel_HK = jnp.take(kernel_HI, item_K, axis=1, mode="clip")
    kernel_HK = kernel_HK.astype(head.dtype).astype(jnp.float32)
    hidden_KH = jnp.take(rounded_BH, row_K, axis=0, mode="clip")
    return hidden_KH.astype(jnp.float32), kernel_HK


def _blocked_forward(head: _Head, *inputs: Any) -> tuple[jax.Array, tuple]:
    """Online logsumexp (Milakov & Gimelshein 2018), one block after another."""
    hidden_BH, kernel_HI, bias_I, batch = inputs
    n_users, n_local = hidden_BH.shape[0], kernel_HI.shape[1]
    axes = varying_axes(hidden_BH, kernel_HI, batch.item_N)
    lowest = jnp.finfo(jnp.float32).min  # finite, because -inf - -inf is nan

    def add_block(
        carry: tuple[jax.Array, jax.Array], first: Any, size: int
    ) -> tuple[jax.Array, jax.Array]:
        max_B, sum_B = carry
        logits_BK, _ = _block_logits(head, inputs[:3], first, size)
        new_B = jnp.maximum(max_B, jnp.max(logits_BK, axis=1))
        block_B = jnp.sum(jnp.exp(logits_BK - new_B[:, None]), axis=1)
        return new_B, sum_B * jnp.exp(max_B - new_B) + block_B

    nothing = (jnp.full(n_users, lowest), jnp.zeros(n_users, jnp.float32))
    max_B, sum_B = _over_blocks(
        n_local, head.block, add_block, vary(nothing, axes)
    )

    item_N = _local_items(head, batch, n_local)
    targets = compact(
        item_N < n_local,
        item_N,
        batch.row_N,
        n_users,
        "cpu" if head.on_cpu else "gpu",
    )
    rounded_BH = hidden_BH.astype(head.dtype).astype(jnp.float32)

    def add_targets(c: jax.Array, target_B: jax.Array) -> jax.Array:
        item_K, row_K = targets.item_CK[c], targets.row_CK[c]
        hidden_KH, kernel_HK = _take(head, rounded_BH, kernel_HI, row_K, item_K)
        logit_K = jnp.sum(hidden_KH.T * kernel_HK, axis=0)
        return target_B.at[row_K].add(logit_K + bias_I[item_K], mode="drop")

    zeros_B = vary(jnp.zeros(n_users, jnp.float32), axes)
    target_B = lax.fori_loop(0, targets.chunks, add_targets, zeros_B)
    logsumexp_B, target_B = logsumexp.over_shards(
        max_B, sum_B, target_B, head.item_axis
    )
    nll_B = batch.count_B.astype(jnp.float32) * logsumexp_B - target_B
    saved = (hidden_BH, kernel_HI, bias_I, logsumexp_B, batch, targets)
    return nll_B, saved


def _blocked_backward(head: _Head, saved: tuple, g_B: jax.Array) -> tuple:
    """Recomputes the logits block by block."""
    hidden_BH, kernel_HI, bias_I, logsumexp_B, batch, targets = saved
    n_local = kernel_HI.shape[1]
    weight_B = g_B * batch.count_B.astype(jnp.float32)
    rounded_BH = hidden_BH.astype(head.dtype)
    rounded_HB = _transpose(head, rounded_BH)

    def add_block(carry: tuple, first: Any, size: int) -> tuple:
        d_hidden_BH, d_kernel_HI, d_bias_I = carry
        logits_BK, kernel_HK = _block_logits(head, saved[:3], first, size)
        d_BK = jnp.exp(logits_BK - logsumexp_B[:, None]) * weight_B[:, None]
        d_bias_K = jnp.sum(d_BK, axis=0)
        d_BK = d_BK.astype(head.dtype)
        kernel_HK = kernel_HK.astype(head.dtype)
        d_hidden_BH += _product(head, d_BK, kernel_HK, 1, 1)
        d_kernel_HK = _product(head, rounded_HB, d_BK, 1, 0)
        return (
            d_hidden_BH,
            lax.dynamic_update_slice_in_dim(d_kernel_HI, d_kernel_HK, first, 1),
            lax.dynamic_update_slice_in_dim(d_bias_I, d_bias_K, first, 0),
        )

    def add_targets(c: jax.Array, carry: tuple) -> tuple:
        d_hidden_BH, d_kernel_HI, d_bias_I = carry
        item_K, row_K = targets.item_CK[c], targets.row_CK[c]
        # After the last target the row is out of bounds and gives 0.
        g_K = g_B.at[row_K].get(mode="fill", fill_value=0)
        hidden_KH, kernel_HK = _take(head, rounded_BH, kernel_HI, row_K, item_K)
        d_hidden_KH = (g_K[None, :] * kernel_HK).T
        return (
            d_hidden_BH.at[row_K].add(-d_hidden_KH, mode="drop"),
            d_kernel_HI.at[:, item_K].add(-g_K[None, :] * hidden_KH.T),
            d_bias_I.at[item_K].add(-g_K),
        )

    axes = varying_axes(hidden_BH, kernel_HI, batch.item_N, g_B)
    carry = tuple(
        vary(jnp.zeros(x.shape, jnp.float32), axes)
        for x in (hidden_BH, kernel_HI, bias_I)
    )
    carry = _over_blocks(n_local, head.block, add_block, carry)
    carry = lax.fori_loop(0, targets.chunks, add_targets, carry)
    d_hidden_BH, d_kernel_HI, d_bias_I = carry
    return d_hidden_BH, d_kernel_HI.astype(kernel_HI.dtype), d_bias_I, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_nll(head: _Head, *inputs: Any) -> jax.Array:
    return _dense_forward(head, *inputs)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_nll(head: _Head, *inputs: Any) -> jax.Array:
    return _blocked_forward(head, *inputs)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_nll(head: _Head, *inputs: Any) -> jax.Array:
    return _fused_forward(head, *inputs)[0]


_dense_nll.defvjp(_dense_forward, _dense_backward)
_fused_nll.defvjp(_fused_forward, _fused_backward)
_blocked_nll.defvjp(_blocked_forward, _blocked_backward)


def multinomial_nll(
    hidden_BH: jax.Array,
    kernel_HI: jax.Array,
    bias_I: jax.Array,
    batch: SparseBatch,
    *,
    dtype: DTypeLike = jnp.float32,
    precision: lax.Precision | None = None,
    item_axis: str | None = None,
    block: int = 0,
    platform: str | None = None,
) -> jax.Array:
    """Returns the negative multinomial log-likelihood of each user's items.

    nll_u = n_u · logsumexp_i(logit_ui) - sum over items i of u of logit_ui,

    Liang et al. 2018, equation 2, without the multinomial coefficient, which
    does not depend on the parameters. All items of the user are targets, also
    those that dropout removed from the input.

    Args:
      hidden_BH: float [B, H], last hidden layer, the same on all item shards.
      kernel_HI: float32 [H, I], output weights.
      bias_I: float32 [I], output biases; -inf excludes an item.
      dtype: dtype of the logits and of the products' operands; exponentials
        and sums are float32.
      item_axis: see the module's docstring.
      block: items per block, 0 for a single block. The backward pass computes
        the logits of a block again, so that memory is B x block instead of
        B x I. The values are equal to float tolerance.
      platform: the platform to write the program for, as in
        `parallel.mesh.platform_of`; None for JAX's default. The values are
        equal to float tolerance.

    Returns:
      float32 [B]; 0 for users without items.
    """
    on_cpu = mesh_lib.on_cpu(platform)
    head = _Head(dtype, precision, item_axis, block, on_cpu)
    # The backward pass returns sums over this shard only. Because the inputs
    # are marked as varying, shard_map sums them over the shards.
    axes = varying_axes(hidden_BH, kernel_HI, batch.item_N)
    hidden_BH, kernel_HI, bias_I = vary((hidden_BH, kernel_HI, bias_I), axes)
    # Parameters stay float32 here, so that their cotangents are float32 too.
    nll = _dense_nll
    if block:
        nll = _blocked_nll
    elif (
        mesh_lib.has_triton(platform)
        and item_axis is None  # the logsumexp needs no other shard
        # float16 needs the loss scale in the gradient of the logits.
        and dtype != jnp.float16
        and gpu_kernels.fits(hidden_BH.shape[0] * bias_I.shape[0])
    ):
        nll = _fused_nll
    return nll(head, hidden_BH.astype(jnp.float32), kernel_HI, bias_I, batch)


def mask_padding_items(
    bias_I: jax.Array, n_items: int, item_axis: str | None
) -> jax.Array:
    """Returns the bias with -inf for padding items, index >= n_items."""
    n_local = bias_I.shape[0]
    index_I = jnp.arange(n_local) + item_offset(n_local, item_axis)
    return jnp.where(index_I < n_items, bias_I, -jnp.inf)
