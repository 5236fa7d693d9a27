"""Sparse batches of users, and the input end of an autoencoder over items.

Shapes in names: B users, I items (the local shard of them), H hidden units,
N slots for interactions (real ones first, then padding).

Everything here runs on one device as it stands, and inside `jax.shard_map`
when `item_axis` names the mesh axis over which the items are sharded: then I
is this shard's part of the items and the sums over items are completed with
collectives over that axis.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import random as extended_random

from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel.mesh import item_offset, vary, varying_axes

INPUT_LOWERINGS = ("auto", "gather", "dense")


class TracedRate(NamedTuple):
    """A dropout rate that a compiled program takes as an argument.

    What a rate known to the program becomes in it, worked out on the host: in
    float32 the rate itself would draw the line elsewhere.

    Attributes:
      threshold: uint32 scalar, random bits below it drop an interaction.
      kept: float32 scalar, 1 - rate.
    """

    threshold: Any
    kept: Any


def traced_rate(rate: float | TracedRate) -> TracedRate:
    """A rate in [0, 1) as arrays of the host; one that is traced as it is."""
    if isinstance(rate, TracedRate):
        return rate
    return TracedRate(np.uint32(round(rate * 2**32)), np.float32(1.0 - rate))


class Dropout(NamedTuple):
    """Dropout of interactions that does not depend on the batch's layout.

    Attributes:
      key: uint32 [2], raw threefry key data.
      rate: probability of dropping an interaction, in [0, 1).
      first_row: int32 scalar, row of this batch's first user in the global
        batch. With it the same user loses the same items on any mesh.
    """

    key: jax.Array
    rate: float | TracedRate
    first_row: jax.Array | int


def counter_bits(
    key: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Random bits as a pure function of (key, row, column).

    `jax.random` draws by position in an array; here the position is the
    (global row, column) itself, so that the layout of the batch, the padding
    and the number of devices never change what a user draws.

    Args:
      key: uint32 [2], threefry key data (`jax.random.key_data`).
      row: int32, any shape.
      column: int32, same shape.

    Returns:
      uint32 bits, same shape. Threefry-2x32 (Salmon et al. 2011).
    """
    counters = jnp.stack([row, column]).astype(jnp.uint32)
    bits = extended_random.threefry_2x32(key, counters.reshape(-1))
    return bits.reshape(counters.shape)[0]


def counter_normal(
    key: jax.Array, row_B: jax.Array, n_columns: int
) -> jax.Array:
    """Standard normal noise [B, n_columns] float32, keyed by global row."""
    shape = (row_B.shape[0], n_columns)
    bits = counter_bits(
        key,
        jnp.broadcast_to(row_B[:, None], shape),
        jnp.broadcast_to(jnp.arange(n_columns, dtype=jnp.int32), shape),
    )
    # 23 bits into the middle of each of 2^23 cells of (-1, 1): never ±1, where
    # erf_inv is infinite.
    cell = (bits >> 9).astype(jnp.float32)
    uniform = (cell + 0.5) * jnp.float32(2.0**-22) - 1.0
    return jnp.float32(2.0**0.5) * lax.erf_inv(uniform)


def keep_interactions(batch: SparseBatch, dropout: Dropout | None) -> jax.Array:
    """bool [N]: real interactions that survive dropout."""
    n_users = batch.count_B.shape[0]
    keep_N = batch.row_N < n_users
    # A traced rate is never known to be 0.
    if dropout is not None and dropout.rate != 0.0:
        bits_N = counter_bits(
            dropout.key, batch.row_N + dropout.first_row, batch.item_N
        )
        keep_N &= bits_N >= jnp.uint32(traced_rate(dropout.rate).threshold)
    return keep_N


class Kept(NamedTuple):
    """Interactions that count, first and together, in whole chunks.

    Attributes:
      item_CK: int32 [chunks, K]; 0 behind the last one.
      row_CK: int32 [chunks, K]; n_users, which drops, behind the last one.
      chunks: int32 scalar, chunks that hold any.
    """

    item_CK: jax.Array
    row_CK: jax.Array
    chunks: jax.Array


class _Rows(NamedTuple):
    """Static settings of `_sum_rows` (hashable: jit and custom_vjp)."""

    n_users: int
    dtype: Any


def chunk_size(n_slots: int) -> int:
    """Interactions looked at together.

    On a CPU few enough that their rows stay in cache: gathering and adding
    them is then nine times faster than in one piece, and half of the work is
    never done at dropout rate 1/2. An accelerator takes them all at once.
    """
    return min(n_slots, 2048) if jax.default_backend() == "cpu" else n_slots


def compact(
    keep_N: jax.Array, item_N: jax.Array, row_N: jax.Array, n_users: int
) -> Kept:
    """The kept interactions without gaps, in their order."""
    n_slots = keep_N.shape[0]
    size = chunk_size(n_slots)
    shape = (-(-n_slots // size), size)
    place_N = jnp.cumsum(keep_N, dtype=jnp.int32) - 1
    place_N = jnp.where(keep_N, place_N, shape[0] * size)
    axes = varying_axes(place_N, item_N, row_N)

    def pack(values_N: jax.Array, empty: int) -> jax.Array:
        packed = vary(jnp.full(shape[0] * size, empty, jnp.int32), axes)
        return packed.at[place_N].set(values_N, mode="drop").reshape(shape)

    n_kept = jnp.sum(keep_N, dtype=jnp.int32)
    return Kept(pack(item_N, 0), pack(row_N, n_users), -(-n_kept // size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_rows(rows: _Rows, kernel_IH: jax.Array, kept: Kept) -> jax.Array:
    """Sum of each user's kernel rows, rounded to a dtype, float32 [B, H]."""

    def add(c: jax.Array, sum_BH: jax.Array) -> jax.Array:
        rows_KH = jnp.take(kernel_IH, kept.item_CK[c], axis=0, mode="clip")
        rows_KH = rows_KH.astype(rows.dtype).astype(jnp.float32)
        return sum_BH.at[kept.row_CK[c]].add(rows_KH, mode="drop")

    zeros = jnp.zeros((rows.n_users, kernel_IH.shape[1]), jnp.float32)
    zeros = vary(zeros, varying_axes(kernel_IH, *kept))
    return lax.fori_loop(0, kept.chunks, add, zeros)


def _sum_rows_forward(
    rows: _Rows, kernel_IH: jax.Array, kept: Kept
) -> tuple[jax.Array, tuple]:
    return _sum_rows(rows, kernel_IH, kept), (kernel_IH, kept)


def _sum_rows_backward(rows: _Rows, saved: tuple, g_BH: jax.Array) -> tuple:
    """Float32 sums: a popular item's gradient is one over many users."""
    kernel_IH, kept = saved

    def add(c: jax.Array, sum_IH: jax.Array) -> jax.Array:
        # Behind the last interaction the row is out of bounds: nothing.
        rows_KH = g_BH.at[kept.row_CK[c]].get(mode="fill", fill_value=0)
        return sum_IH.at[kept.item_CK[c]].add(rows_KH)

    zeros = vary(
        jnp.zeros(kernel_IH.shape, jnp.float32),
        varying_axes(kernel_IH, g_BH, *kept),
    )
    return lax.fori_loop(0, kept.chunks, add, zeros), None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def bag_of_items(
    kernel_IH: jax.Array,
    batch: SparseBatch,
    *,
    dropout: Dropout | None = None,
    lowering: str = "gather",
    dtype: jnp.dtype = jnp.float32,
    precision: lax.Precision | None = None,
    item_axis: str | None = None,
) -> jax.Array:
    """Sum of the kernel's rows over each user's (kept) items.

    Args:
      kernel_IH: float [I, H], one row an item.
      batch: users and their items.
      dropout: which interactions to leave out; None keeps all.
      lowering: 'gather' sums gathered rows; 'dense' scatters the batch into a
        0/1 array [B, I] in `dtype` and multiplies. Equal to float tolerance.
      dtype: dtype of the operands; sums are float32, the gradient's too.
      precision: matrix-product precision of the dense lowering.
      item_axis: mesh axis of the kernel's rows, None when not sharded.

    Returns:
      float32 [B, H], complete (the same on every item shard).
    """
    n_users, n_local = batch.count_B.shape[0], kernel_IH.shape[0]
    keep_N = keep_interactions(batch, dropout)
    item_N = batch.item_N - item_offset(n_local, item_axis)
    keep_N &= (item_N >= 0) & (item_N < n_local)
    if lowering == "gather":
        kept = compact(keep_N, item_N, batch.row_N, n_users)
        # The gradient is a partial sum of this shard's users: the mark is
        # what makes shard_map complete it.
        kernel_IH = vary(kernel_IH, varying_axes(kernel_IH, *kept))
        sum_BH = _sum_rows(_Rows(n_users, dtype), kernel_IH, kept)
    elif lowering == "dense":
        # A dropped interaction goes where padding goes: out of bounds.
        row_N = jnp.where(keep_N, batch.row_N, n_users)
        x_BI = jnp.zeros((n_users, n_local), dtype)
        x_BI = vary(x_BI, varying_axes(row_N, item_N))
        x_BI = x_BI.at[row_N, item_N].set(1, mode="drop")
        sum_BH = lax.dot(
            x_BI,
            kernel_IH.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
    else:
        raise ValueError(
            f"input lowering {lowering!r}: use 'gather' or 'dense'"
        )
    return lax.psum(sum_BH, item_axis) if item_axis else sum_BH


def normalised_bag(
    kernel_IH: jax.Array,
    batch: SparseBatch,
    *,
    dropout: Dropout | None = None,
    lowering: str = "gather",
    dtype: jnp.dtype = jnp.float32,
    precision: lax.Precision | None = None,
    item_axis: str | None = None,
) -> jax.Array:
    """L2-normalised, dropped-out bag of items times a matrix.

    h_u = 1 / (|x_u|_2 (1 - rate)) · sum over kept items i of u of kernel_i,
    with |x_u|_2 = sqrt(n_u) because x is binary: normalise, then drop, as the
    authors' code of Liang et al. 2018 does.

    The norm and the dropout's scale stay per-row factors outside the sum, so
    that x is exactly 0/1 in any dtype. Arguments as in `bag_of_items`.

    Returns:
      float32 [B, H], complete (the same on every item shard); zero for a user
      without items.
    """
    sum_BH = bag_of_items(
        kernel_IH,
        batch,
        dropout=dropout,
        lowering=lowering,
        dtype=dtype,
        precision=precision,
        item_axis=item_axis,
    )
    kept = traced_rate(dropout.rate if dropout is not None else 0.0).kept
    norm_B = jnp.sqrt(jnp.maximum(batch.count_B, 1).astype(jnp.float32))
    return sum_BH / (norm_B * jnp.float32(kept))[:, None]
