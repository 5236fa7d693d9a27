"""The input layer of an autoencoder: a normalised bag of items times W.

Shapes in names: B users, I items (the local shard of them), H hidden units,
N slots for interactions, K interactions of a chunk.

Inside `jax.shard_map`, `item_axis` names the mesh axis over which the items
are sharded. I is then this shard's part, and collectives over that axis
complete the sums over items. Outside, `item_axis` is None.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.typing import DTypeLike

from vaecf.models import gpu_kernels, noise
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel.mesh import (
    has_triton,
    item_offset,
    on_cpu,
    vary,
    varying_axes,
)

_LARGE = 2**25  # users x items from which a GPU gathers rows


class TracedRate(NamedTuple):
    """A dropout rate that a compiled program takes as an argument.

    The host computes both attributes, as it does for a constant rate. The
    float32 rate itself would give another threshold.
    """

    threshold: Any  # uint32 scalar; random bits below it drop an interaction
    kept: Any  # float32 scalar, 1 - rate


def traced_rate(rate: float | TracedRate) -> TracedRate:
    """Returns a rate in [0, 1) as host arrays, a traced rate unchanged."""
    if isinstance(rate, TracedRate):
        return rate
    return TracedRate(np.uint32(round(rate * 2**32)), np.float32(1.0 - rate))


class Dropout(NamedTuple):
    """Dropout of interactions that does not depend on the batch's layout."""

    key: jax.Array  # uint32 [2], raw threefry key data
    # Probability of dropping an interaction, in [0, 1).
    rate: float | TracedRate
    # int32 scalar, row of this batch's first user in the global batch, so that
    # a user loses the same items on every mesh.
    first_row: jax.Array | int


def keep_interactions(batch: SparseBatch, dropout: Dropout | None) -> jax.Array:
    """Returns the real interactions that survive dropout, bool [N]."""
    n_users = batch.count_B.shape[0]
    keep_N = batch.row_N < n_users
    # A traced rate draws bits even if it is 0: its value is unknown here.
    if dropout is not None and dropout.rate != 0.0:
        bits_N = noise.counter_bits(
            dropout.key, batch.row_N + dropout.first_row, batch.item_N
        )
        keep_N &= bits_N >= jnp.uint32(traced_rate(dropout.rate).threshold)
    return keep_N


class Kept(NamedTuple):
    """Interactions without gaps between them, in chunks of K."""

    item_CK: jax.Array  # int32 [chunks, K]; 0 after the last interaction
    # int32 [chunks, K]; after the last interaction n_users, which is out of
    # bounds, so that scatters drop it.
    row_CK: jax.Array
    chunks: jax.Array  # int32 scalar, chunks that hold any interactions


def compact(
    keep_N: jax.Array,
    item_N: jax.Array,
    row_N: jax.Array,
    n_users: int,
    platform: str | None = None,
) -> Kept:
    """Returns the kept interactions without gaps, in their order."""
    size = keep_N.shape[0]
    if on_cpu(platform):
        # The rows of a chunk should stay in the cache: the sums are nine times
        # faster. Chunks also skip the work for dropped interactions.
        size = core.min_dim(size, 2048)
    shape = (-(-keep_N.shape[0] // size), size)
    place_N = jnp.cumsum(keep_N, dtype=jnp.int32) - 1
    place_N = jnp.where(keep_N, place_N, shape[0] * size)
    axes = varying_axes(place_N, item_N, row_N)

    def pack(values_N: jax.Array, empty: int) -> jax.Array:
        packed = vary(jnp.full(shape[0] * size, empty, jnp.int32), axes)
        return packed.at[place_N].set(values_N, mode="drop").reshape(shape)

    n_kept = jnp.sum(keep_N, dtype=jnp.int32)
    return Kept(pack(item_N, 0), pack(row_N, n_users), -(-n_kept // size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_rows(
    n_users: int, dtype: Any, kernel_IH: jax.Array, kept: Kept
) -> jax.Array:
    """Returns the sum of each user's kernel rows of `dtype`, float32 [B, H]."""

    def add(c: jax.Array, sum_BH: jax.Array) -> jax.Array:
        rows_KH = jnp.take(kernel_IH, kept.item_CK[c], axis=0, mode="clip")
        rows_KH = rows_KH.astype(dtype).astype(jnp.float32)
        return sum_BH.at[kept.row_CK[c]].add(rows_KH, mode="drop")

    zeros = jnp.zeros((n_users, kernel_IH.shape[1]), jnp.float32)
    zeros = vary(zeros, varying_axes(kernel_IH, *kept))
    return lax.fori_loop(0, kept.chunks, add, zeros)


def _sum_rows_forward(*args: Any) -> tuple[jax.Array, tuple]:
    return _sum_rows(*args), args[2:]


def _sum_rows_backward(
    n_users: int, dtype: Any, saved: tuple, g_BH: jax.Array
) -> tuple:
    """Sums in float32: a popular item's gradient has many users' terms."""
    kernel_IH, kept = saved

    def add(c: jax.Array, sum_IH: jax.Array) -> jax.Array:
        # After the last interaction the row is out of bounds and gives 0.
        rows_KH = g_BH.at[kept.row_CK[c]].get(mode="fill", fill_value=0)
        return sum_IH.at[kept.item_CK[c]].add(rows_KH)

    zeros = vary(
        jnp.zeros(kernel_IH.shape, jnp.float32),
        varying_axes(kernel_IH, g_BH, *kept),
    )
    return lax.fori_loop(0, kept.chunks, add, zeros), None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _sum_of_one(
    dtype: Any, precision: Any, kernel_IH: jax.Array, item_N: jax.Array
) -> jax.Array:
    """Returns `_sum_items` of a single user, in a product of few rows."""
    table_IH = kernel_IH.astype(dtype)
    rows_NH = table_IH.at[item_N].get(mode="fill", fill_value=0)
    ones_2N = jnp.ones((2, item_N.shape[0]), dtype)  # as in `layers.dense`
    ones_2N = vary(ones_2N, varying_axes(rows_NH))
    return product(dtype, precision, ones_2N, rows_NH)[:1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_items(
    dtype: Any, kernel_IH: jax.Array, item_N: jax.Array, batch: SparseBatch
) -> jax.Array:
    """Returns the sum of each user's kernel rows, with Triton.

    `item_N` are local items, the number of local items for what is left out.
    """
    start_B = jnp.cumsum(batch.count_B) - batch.count_B
    lists = gpu_kernels.Lists(item_N, start_B, batch.count_B)
    return gpu_kernels.sum_lists(kernel_IH.astype(dtype), lists)


def _sum_items_forward(dtype: Any, *args: Any) -> tuple[jax.Array, tuple]:
    return _sum_items(dtype, *args), args


def _sum_items_backward(dtype: Any, saved: tuple, g_BH: jax.Array) -> tuple:
    """Sums each item's rows of the cotangent, rounded to `dtype`."""
    kernel_IH, item_N, batch = saved
    n_items = kernel_IH.shape[0]
    if n_items < 2**16:  # fewer digits to sort by
        item_N = item_N.astype(jnp.uint16)
    item_N, row_N = lax.sort((item_N, batch.row_N), num_keys=1)
    edge = jnp.arange(n_items + 1, dtype=item_N.dtype)
    edge_I = jnp.searchsorted(
        item_N, edge, side="left", method="scan_unrolled"
    ).astype(jnp.int32)
    lists = gpu_kernels.Lists(row_N, edge_I[:-1], jnp.diff(edge_I))
    return gpu_kernels.sum_uneven_lists(g_BH.astype(dtype), lists), None, None


_sum_items.defvjp(_sum_items_forward, _sum_items_backward)


def _multi_hot(
    row_N: jax.Array, item_N: jax.Array, shape: tuple[int, int], dtype: Any
) -> jax.Array:
    """Returns zeros of the shape with 1 at (row, item); rows may be outside.

    No pair may occur twice.
    """
    n_users, n_items = shape
    axes = varying_axes(row_N, item_N)
    if dtype.itemsize != 2 or n_items % 2:
        x_BI = vary(jnp.zeros(shape, dtype), axes)
        return x_BI.at[row_N, item_N].set(1, mode="drop")
    # A GPU writes words of two entries almost twice as fast as entries (H100).
    words = vary(jnp.zeros((n_users, n_items // 2), jnp.uint32), axes)
    one = int(np.ones((), dtype).view(np.uint16))
    word_N = jnp.where(item_N % 2 == 0, one, one << 16).astype(jnp.uint32)
    words = words.at[row_N, item_N // 2].add(word_N, mode="drop")
    return lax.bitcast_convert_type(words, dtype).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    dtype: Any, precision: Any, x_BI: jax.Array, kernel_IH: jax.Array
) -> jax.Array:
    """Returns x · kernel, float32; the operands are rounded to `dtype`.

    In the backward pass the cotangent is rounded, too. JAX's own transpose
    would convert the operands to float32 instead, and such products take four
    times as long on a GPU.
    """
    return _sum_over(1, 0, dtype, precision, x_BI, kernel_IH)


def _sum_over(
    a_axis: int,
    b_axis: int,
    dtype: Any,
    precision: Any,
    a: jax.Array,
    b: jax.Array,
) -> jax.Array:
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _product_forward(
    dtype: Any, precision: Any, *args: jax.Array
) -> tuple[jax.Array, Any]:
    return product(dtype, precision, *args), args


def _product_backward(
    dtype: Any, precision: Any, saved: Any, g_BH: jax.Array
) -> tuple:
    x_BI, kernel_IH = saved
    d_x_BI = _sum_over(1, 1, dtype, precision, g_BH, kernel_IH)
    d_kernel_IH = _sum_over(0, 0, dtype, precision, x_BI, g_BH)
    return d_x_BI.astype(x_BI.dtype), d_kernel_IH.astype(kernel_IH.dtype)


product.defvjp(_product_forward, _product_backward)


def choose_lowering(
    lowering: str, n_users: int, n_items: int, platform: str | None = None
) -> str:
    """Returns a lowering of `bag_of_items`; 'auto' is the faster one.

    A CPU is faster at gathering rows. The matrix units of a GPU make the dense
    product cheap, but a large array of users x items passes through memory
    several times. A query of one user would read all rows of the matrix.
    """
    if lowering != "auto":
        return lowering
    large = has_triton(platform) and n_users * n_items >= _LARGE
    gather = large or n_users == 1 or on_cpu(platform)
    return "gather" if gather else "dense"


def bag_of_items(
    kernel_IH: jax.Array,
    batch: SparseBatch,
    *,
    dropout: Dropout | None = None,
    lowering: str = "gather",
    dtype: DTypeLike = jnp.float32,
    precision: lax.Precision | None = None,
    item_axis: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Returns the sum of each user's kept kernel rows, float32 [B, H].

    Args:
      kernel_IH: float [I, H], one row per item.
      dropout: which interactions to drop; None keeps all.
      lowering: 'gather' sums gathered rows; 'dense' scatters the batch into a
        0/1 array [B, I] of `dtype` and multiplies. They are equal to float
        tolerance. 'auto' is `choose_lowering`.
      dtype: dtype of the operands; sums are float32, also in the gradient.
        The gradient of 'dense', and on a GPU of 'gather', rounds the cotangent
        to this dtype.
      item_axis: see the module's docstring; the sum is over all item shards.
      platform: the platform to write the program for, as in
        `parallel.mesh.platform_of`; None for JAX's default.

    Raises:
      ValueError: `lowering` is unknown.
    """
    n_users, n_local = batch.count_B.shape[0], kernel_IH.shape[0]
    keep_N = keep_interactions(batch, dropout)
    item_N = batch.item_N - item_offset(n_local, item_axis)
    keep_N &= (item_N >= 0) & (item_N < n_local)
    lowering = choose_lowering(lowering, n_users, n_local, platform)
    is_query = n_users == 1 and not on_cpu(platform)
    kernels = has_triton(platform) and gpu_kernels.fits(kernel_IH.size)
    if lowering == "gather" and (is_query or kernels):
        item_N = jnp.where(keep_N, item_N, n_local)
        kernel_IH = vary(kernel_IH, varying_axes(kernel_IH, item_N))
        if is_query:
            sum_BH = _sum_of_one(jnp.dtype(dtype), precision, kernel_IH, item_N)
        else:
            sum_BH = _sum_items(jnp.dtype(dtype), kernel_IH, item_N, batch)
    elif lowering == "gather":
        kept = compact(keep_N, item_N, batch.row_N, n_users, platform)
        # The gradient of a replicated kernel sums over this shard's users
        # only. Marked as varying, shard_map sums it over the shards.
        kernel_IH = vary(kernel_IH, varying_axes(kernel_IH, *kept))
        sum_BH = _sum_rows(n_users, dtype, kernel_IH, kept)
    elif lowering == "dense":
        # The scatter drops rows out of bounds.
        row_N = jnp.where(keep_N, batch.row_N, n_users)
        x_BI = _multi_hot(row_N, item_N, (n_users, n_local), jnp.dtype(dtype))
        kernel_IH = vary(kernel_IH, varying_axes(kernel_IH, x_BI))
        sum_BH = product(x_BI.dtype, precision, x_BI, kernel_IH)
    else:
        raise ValueError(
            f"lowering={lowering!r} is unknown: use 'gather', 'dense' or 'auto'"
        )
    return lax.psum(sum_BH, item_axis) if item_axis else sum_BH


def normalised_bag(
    kernel_IH: jax.Array,
    batch: SparseBatch,
    *,
    dropout: Dropout | None = None,
    **settings: Any,
) -> jax.Array:
    """Returns the L2-normalised, dropped-out bag of items times a matrix.

    h_u = 1 / (|x_u|_2 (1 - rate)) · sum over kept items i of u of kernel_i,

    float32 [B, H], with |x_u|_2 = sqrt(n_u) because x is binary; 0 for users
    without items. As in the authors' code of Liang et al. 2018, normalisation
    comes before dropout. Arguments as in `bag_of_items`.

    The norm and the scale of the dropout are factors per row outside the sum,
    so that x is exactly 0/1 in any dtype.
    """
    sum_BH = bag_of_items(kernel_IH, batch, dropout=dropout, **settings)
    kept = traced_rate(dropout.rate if dropout is not None else 0.0).kept
    norm_B = jnp.sqrt(jnp.maximum(batch.count_B, 1).astype(jnp.float32))
    return sum_BH / (norm_B * jnp.float32(kept))[:, None]
