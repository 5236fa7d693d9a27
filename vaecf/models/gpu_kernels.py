"""Kernels for GPUs, written in Pallas for Triton.

XLA makes slow kernels of these two parts of a training step. Programs for GPUs
of compute capability 8.0 or higher (`mesh.has_triton`) use them. Where such a
program is compiled for a CPU, as in tests, the definitions are computed. Pallas
is imported only for the kernels, because that takes .1 s.

Shapes in names: B users, I items, H columns, N slots for indices, S sums,
T tiles of their lists, K rows or items of a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel.mesh import vary, varying_axes

# Measured on an H100 with 20,224 items, and lists of 36 rows of 600 columns.
_ITEMS, _TARGETS = 8192, 128  # most items, and targets, of a block
_WARPS = 8
_FEW_USERS = 2048  # whose counts each program adds up for itself
# Indices of a tile; rows and columns that a program of `sum_lists` adds up at
# once.
_TILE, _ROWS, _COLUMNS, _LIST_WARPS = 256, 16, 128, 2


def fits(size: int) -> bool:
    """Returns whether int32 positions reach all of an array of this size."""
    return size < 2**31


def nll_and_gradient(
    logits_BI: jax.Array, batch: SparseBatch
) -> tuple[jax.Array, jax.Array]:
    """Returns each user's negative log-likelihood, and its gradient.

    With the logits y and the 0/1 rows x of the batch, they are

      nll_u = n_u logsumexp_i(y_ui) - Σ_i x_ui y_ui,
      d nll_u / d y_ui = n_u softmax_i(y_ui) - x_ui.

    The kernel reads and writes users x items once.

    Args:
      logits_BI: [B, I] of any floating dtype, -inf for padding items; the
        gradient takes their place in memory.

    Returns:
      (float32 [B], [B, I] of the dtype of the logits).
    """
    args = vary((logits_BI, batch), varying_axes(logits_BI, *batch))
    return lax.platform_dependent(
        *args, cuda=nll_kernel, default=_nll_by_definition
    )


def _nll_by_definition(
    logits_BI: jax.Array, batch: SparseBatch
) -> tuple[jax.Array, jax.Array]:
    y_BI = logits_BI.astype(jnp.float32)
    logsumexp_B1 = jax.nn.logsumexp(y_BI, axis=1, keepdims=True)
    count_B1 = batch.count_B.astype(jnp.float32)[:, None]
    softmax_BI = count_B1 * jnp.exp(y_BI - logsumexp_B1)
    place = batch.row_N, batch.item_N
    target_N = y_BI.at[place].get(mode="fill", fill_value=0)
    target_B = jnp.zeros_like(batch.count_B, jnp.float32)
    target_B = target_B.at[batch.row_N].add(target_N, mode="drop")
    gradient_BI = softmax_BI.astype(logits_BI.dtype).at[place].add(-1)
    return (count_B1 * logsumexp_B1)[:, 0] - target_B, gradient_BI


def nll_kernel(
    logits_BI: jax.Array,
    batch: SparseBatch,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `nll_and_gradient`; a program of the kernel takes a user.

    The sum is online (Milakov & Gimelshein 2018). Users with several blocks of
    items are read twice, the second time from the cache of the GPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    n_users, n_items = logits_BI.shape
    size = min(_ITEMS, pl.next_power_of_2(n_items))
    start_B = None
    if n_users > _FEW_USERS:
        start_B = jnp.cumsum(batch.count_B) - batch.count_B
    return pl.pallas_call(
        functools.partial(_nll_program, size, interpret),
        grid=(n_users,),
        out_shape=(
            _shape((n_users,), jnp.float32, logits_BI),
            _shape(logits_BI.shape, logits_BI.dtype, logits_BI),
        ),
        input_output_aliases={0: 1},
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="nll_and_gradient",
    )(logits_BI, batch.item_N, batch.count_B, start_B)


def _nll_program(
    size: int,
    interpret: bool,
    logits_ref: Any,
    item_ref: Any,
    count_ref: Any,
    start_ref: Any,
    nll_ref: Any,
    out_ref: Any,
) -> None:
    """Computes the likelihood of a user, in blocks of `size` items."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    n_items, last = logits_ref.shape[1], item_ref.shape[0] - 1
    n_blocks = pl.cdiv(n_items, size)
    user = pl.program_id(0)
    n_targets = count_ref[user]
    count = n_targets.astype(jnp.float32)
    if start_ref is None:
        user_K = jnp.arange(pl.next_power_of_2(count_ref.shape[0]))
        start = jnp.sum(
            plgpu.load(count_ref.at[user_K], mask=user_K < user, other=0)
        )
    else:
        start = start_ref[user]

    def block(b: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        item_K = b * size + jnp.arange(size)
        is_item_K = item_K < n_items
        y_K = plgpu.load(
            logits_ref.at[user, item_K], mask=is_item_K, other=-jnp.inf
        )
        return item_K, y_K.astype(jnp.float32)

    def targets(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot_K = b * _TARGETS + jnp.arange(_TARGETS)
        is_target_K = slot_K < n_targets
        place_K = jnp.minimum(start + slot_K, last)
        # Interpreted, a masked entry writes what it has read.
        return is_target_K, plgpu.load(
            item_ref.at[place_K], mask=is_target_K, other=n_items
        )

    def add_targets(b: jax.Array, sum_K: jax.Array) -> jax.Array:
        is_target_K, item_K = targets(b)
        y_K = plgpu.load(logits_ref.at[user, item_K], mask=is_target_K, other=0)
        return sum_K + y_K.astype(jnp.float32)

    def add_block(
        y_K: jax.Array, top: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        new = jnp.maximum(top, jnp.max(y_K))
        return new, total * jnp.exp(top - new) + jnp.sum(jnp.exp(y_K - new))

    def write(item_K: jax.Array, y_K: jax.Array) -> None:
        softmax_K = count * jnp.exp(y_K - logsumexp)
        plgpu.store(
            out_ref.at[user, item_K],
            softmax_K.astype(out_ref.dtype),
            mask=item_K < n_items,
        )

    def subtract_targets(b: jax.Array, _: None) -> None:
        is_target_K, item_K = targets(b)
        place = out_ref.at[user, item_K]
        softmax_K = plgpu.load(place, mask=is_target_K, other=0)
        plgpu.store(place, softmax_K - 1, mask=is_target_K)

    # The targets are read before any of the logits is overwritten.
    target_blocks = pl.cdiv(n_targets, _TARGETS)
    target = jnp.sum(
        lax.fori_loop(
            0, target_blocks, add_targets, jnp.zeros(_TARGETS, jnp.float32)
        )
    )
    # Finite, because -inf - -inf is nan.
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    carry = lowest, jnp.float32(0)
    if n_blocks == 1:
        only = block(0)
        top, total = add_block(only[-1], *carry)
    else:
        top, total = lax.fori_loop(
            *(0, n_blocks, lambda b, c: add_block(block(b)[-1], *c), carry)
        )
    logsumexp = top + jnp.log(total)
    if n_blocks == 1:
        write(*only)
    else:
        lax.fori_loop(0, n_blocks, lambda b, _: write(*block(b)), None)
    if not interpret:
        plgpu.debug_barrier()  # all that is written is seen
    lax.fori_loop(0, target_blocks, subtract_targets, None)
    nll_ref[user] = count * logsumexp - target


class Lists(NamedTuple):
    """Lists of indices into the rows of a table, one for each of S sums."""

    index_N: jax.Array  # int32 [N], list after list; out of bounds adds nothing
    start_S: jax.Array  # int32 [S], position of each list's first index
    count_S: jax.Array  # int32 [S]


def sum_lists(table_RH: jax.Array, lists: Lists) -> jax.Array:
    """Returns the sum of each list's rows of a table, float32 [S, H]."""
    args = vary((table_RH, lists), varying_axes(table_RH, *lists))
    return lax.platform_dependent(
        *args, cuda=sum_lists_kernel, default=_sums_by_definition
    )


def sum_uneven_lists(table_RH: jax.Array, lists: Lists) -> jax.Array:
    """Returns `sum_lists` where a few lists have most of the indices.

    A program of the kernel takes a list. What a list has beyond its first
    `_TILE` indices is therefore cut into lists of at most as many, whose sums
    are added to that of the first.
    """
    (n_slots,), (n_sums,) = lists.index_N.shape, lists.start_S.shape
    extra_S = jnp.maximum(lists.count_S - 1, 0) // _TILE
    n_extra = n_slots // _TILE
    if n_extra == 0:
        return sum_lists(table_RH, lists)
    end_S = jnp.cumsum(extra_S)
    # The owner of an extra list is the number of sums without extra lists
    # after it.
    ends_E = vary(jnp.zeros(n_extra, jnp.int32), varying_axes(*lists))
    owner_E = jnp.cumsum(ends_E.at[end_S].add(1, mode="drop"))
    extra_E = jnp.arange(n_extra, dtype=jnp.int32)

    def of_owner(value_S: jax.Array) -> jax.Array:
        return jnp.take(value_S, owner_E, mode="clip")

    place_E = extra_E - of_owner(end_S - extra_S)  # 0 for an owner's first
    done_E = (place_E + 1) * _TILE
    left_E = jnp.clip(of_owner(lists.count_S) - done_E, 0, _TILE)
    first = lists._replace(count_S=jnp.minimum(lists.count_S, _TILE))
    extra = Lists(
        lists.index_N,
        of_owner(lists.start_S) + done_E,
        jnp.where(owner_E < n_sums, left_E, 0),
    )
    sum_EH = sum_lists(table_RH, extra)
    # All extra lists of an owner are added to its sum together.
    is_first_E = (place_E == 0) & (owner_E < n_sums)
    count_E = jnp.where(is_first_E, of_owner(extra_S), 0)
    sum_EH = sum_lists(sum_EH, Lists(extra_E, extra_E, count_E))
    target_E = jnp.where(is_first_E, owner_E, n_sums + extra_E)
    return (
        sum_lists(table_RH, first)
        .at[target_E]
        .add(sum_EH, mode="drop", unique_indices=True)
    )


def _sums_by_definition(table_RH: jax.Array, lists: Lists) -> jax.Array:
    """Takes a list after the other, index after index: slow, for tests."""
    n_rows, n_columns = table_RH.shape
    zeros_H = vary(jnp.zeros(n_columns), varying_axes(table_RH))

    def sum_list(list_: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, count = list_

        def add(n: jax.Array, sum_H: jax.Array) -> jax.Array:
            index = lists.index_N[start + n]
            row_H = table_RH[jnp.clip(index, 0, n_rows - 1)]
            is_row = (index >= 0) & (index < n_rows)
            return sum_H + jnp.where(is_row, row_H.astype(jnp.float32), 0)

        return lax.fori_loop(0, count, add, zeros_H)

    return lax.map(sum_list, (lists.start_S, lists.count_S))


def sum_lists_kernel(
    table_RH: jax.Array, lists: Lists, *, interpret: bool = False
) -> jax.Array:
    """Returns `sum_lists`; a program takes some columns of a list's sum."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (n_rows, n_columns), (n_sums,) = table_RH.shape, lists.start_S.shape
    last = lists.index_N.shape[0] - 1

    def kernel(
        index_ref: Any,
        start_ref: Any,
        count_ref: Any,
        table_ref: Any,
        out_ref: Any,
    ) -> None:
        s = pl.program_id(0)
        column_H = pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS)
        start, count = start_ref[s], count_ref[s]

        def add(b: jax.Array, sum_KH: jax.Array) -> jax.Array:
            slot_K = b * _ROWS + jnp.arange(_ROWS)
            index_K = plgpu.load(
                index_ref.at[jnp.minimum(start + slot_K, last)],
                mask=slot_K < count,
                other=n_rows,
            )
            is_row_K = (index_K >= 0) & (index_K < n_rows)
            rows_KH = plgpu.load(
                table_ref.at[index_K[:, None], column_H[None, :]],
                mask=is_row_K[:, None] & (column_H < n_columns)[None, :],
                other=0,
            )
            return sum_KH + rows_KH.astype(jnp.float32)

        zeros_KH = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
        sum_KH = lax.fori_loop(0, pl.cdiv(count, _ROWS), add, zeros_KH)
        plgpu.store(
            out_ref.at[s, column_H],
            jnp.sum(sum_KH, axis=0),
            mask=column_H < n_columns,
        )

    return pl.pallas_call(
        kernel,
        grid=(n_sums, pl.cdiv(n_columns, _COLUMNS)),
        out_shape=_shape((n_sums, n_columns), jnp.float32, table_RH),
        compiler_params=plgpu.CompilerParams(num_warps=_LIST_WARPS),
        interpret=interpret,
        name="sum_lists",
    )(*lists, table_RH)


def _shape(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> Any:
    """Returns a shape that varies over the same mesh axes as an array."""
    axes = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
