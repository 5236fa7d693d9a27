"""Scores from item-item weights of which most are zero.

Memory and time of a query grow with the weights that are not zero, so that
catalogues of which no items x items matrix fits into memory are possible.

Shapes in names: B users of a batch, N slots for interactions, I items (the
local shard of them), W entries that are stored beside an item, T tiles of a
chunk, E entries of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib

if TYPE_CHECKING:
    import scipy.sparse

PARTITION: dict[str, tuple[str | None, ...]] = {
    "neighbour": ("item", None),
    "weight": ("item", None),
}

# The weights of an item fill tiles of so many entries: 64 bytes.
_TILE = 16
# Tiles that are added at once: about four for every slot of the batch, so that
# a query of one user has little to do, within these bounds.
_LEAST_TILES, _MOST_TILES = 2**9, 2**16
_BLOCK = 1024  # rows that `nearest` multiplies at once
_NO_ITEM = np.iinfo(np.int32).max  # out of bounds: scatters drop it


def pack(weights: Any, k: int | None = None) -> dict[str, np.ndarray]:
    """Returns item-item weights as the parameters of `scores`.

    The weights of an item are stored in consecutive tiles, so that an item
    with many weights costs the others nothing. The tiles of all items, one
    after the other, are cut into equal rows, one for each item, so that item
    shards can hold equal parts of them.

    Args:
      weights: scipy.sparse matrix [I, I]. Row i holds what item i of a
        history adds to the scores of all items.
      k: keep the k largest weights of each row, see `largest`; None keeps all.

    Returns:
      'neighbour', int32 [padded I, W], and 'weight', float32 [padded I, W],
      the entries of all tiles, and 'first_tile', int32 [I + 1], the position
      of each item's first tile.
    """
    csr = weights.tocsr()
    csr.sum_duplicates()
    if k is not None:
        csr = largest(csr, k)
    n_items = csr.shape[0]
    counts = np.diff(csr.indptr)
    first_tile = np.append(0, np.cumsum(-(-counts // _TILE)))
    # The position of an entry is that of its item plus its place in the row.
    shift = np.repeat(first_tile[:-1] * _TILE - csr.indptr[:-1], counts)
    position = np.arange(csr.nnz) + shift
    rows = mesh_lib.padded_items(n_items)
    width = -(-int(first_tile[-1]) // rows) * _TILE or _TILE
    neighbour = np.full(rows * width, _NO_ITEM, np.int32)
    neighbour[position] = csr.indices
    weight = np.zeros(rows * width, np.float32)
    weight[position] = csr.data
    return {
        "neighbour": neighbour.reshape(rows, width),
        "weight": weight.reshape(rows, width),
        "first_tile": first_tile.astype(np.int32),
    }


def unpack(params: dict[str, np.ndarray]) -> scipy.sparse.csr_matrix:
    """Returns the weights that `pack` has packed, float32 [I, I]."""
    import scipy.sparse  # slow to import

    first = np.asarray(params["first_tile"], np.int64) * _TILE
    neighbour = np.ravel(params["neighbour"])[: first[-1]]
    weight = np.ravel(params["weight"])[: first[-1]]
    real = neighbour != _NO_ITEM
    indptr = np.append(0, np.cumsum(real))[first]
    shape = (len(first) - 1,) * 2
    return scipy.sparse.csr_matrix(
        (weight[real], neighbour[real], indptr), shape
    )


def largest(csr: Any, k: int) -> Any:
    """Returns a CSR matrix of the k entries of each row with largest size.

    The size of an entry is its absolute value. Of entries of equal size those
    of the lower columns are kept. The columns of a row must ascend.
    """
    kept = np.ones(csr.nnz, bool)
    size = np.abs(csr.data)
    for row in np.flatnonzero(np.diff(csr.indptr) > k):
        own = slice(csr.indptr[row], csr.indptr[row + 1])
        bound = np.partition(size[own], -k)[-k] if k else np.inf
        kept[own] = size[own] > bound
        room = k - np.count_nonzero(kept[own])
        equal = np.flatnonzero(size[own] == bound)[:room]
        kept[own.start + equal] = True
    indptr = np.append(0, np.cumsum(kept))[csr.indptr]
    entries = csr.data[kept], csr.indices[kept], indptr
    return type(csr)(entries, shape=csr.shape)


def nearest(
    left: Any,
    right: Any,
    k: int,
    scale: Callable[..., np.ndarray] | None = None,
) -> scipy.sparse.csr_matrix:
    """Returns the k largest entries of each row of left · right.

    Entries on the diagonal, and those that are 0, are left out. Ties go to the
    lower column. Memory holds the product of `_BLOCK` rows.

    Args:
      left, right: CSR matrices [I, U] and [U, I], not negative.
      scale: receives (value, row, column) of entries, and returns the values
        to use instead.
    """
    import scipy.sparse  # slow to import

    kept = []
    for first in range(0, left.shape[0], _BLOCK):
        product = (left[first : first + _BLOCK] @ right).tocoo()
        row = first + product.row
        if scale is not None:
            product.data = scale(product.data, row, product.col)
        product.data[product.col == row] = 0
        near = product.tocsr()
        near.eliminate_zeros()
        near.sort_indices()
        kept.append(largest(near, k))
    return scipy.sparse.vstack(kept, format="csr")


def scores(
    params: dict[str, jax.Array],
    batch: SparseBatch,
    user_B: jax.Array,
    platform: str | None = None,
) -> jax.Array:
    """Returns x · B of this shard's items, float32 [B, I].

    An item shard adds the tiles that it holds to the scores of all items.
    Every shard then receives the sums for its own items.
    """
    (n_users,), n_local = batch.count_B.shape, params["weight"].shape[0]
    axis = mesh_lib.item_axis(params["weight"])
    n_items = n_local * (lax.axis_size(axis) if axis else 1)
    neighbour_TE = params["neighbour"].reshape(-1, _TILE)
    weight_TE = params["weight"].reshape(-1, _TILE)
    n_tiles = len(weight_TE)
    offset = mesh_lib.item_offset(n_tiles, axis)
    first_I = params["first_tile"]
    first_N = first_I[batch.item_N]
    count_N = first_I[batch.item_N + 1] - first_N
    end_N = jnp.cumsum(jnp.where(batch.row_N < n_users, count_N, 0))
    shift_N = first_N + count_N - end_N - offset
    (n_slots,) = end_N.shape
    step = core.max_dim(4 * n_slots, _LEAST_TILES)
    step = core.min_dim(step, _MOST_TILES)

    def add(c: jax.Array, sum_BI: jax.Array) -> jax.Array:
        tile_T = c * step + jnp.arange(step, dtype=jnp.int32)
        slot_T = _first_above(end_N, tile_T)
        row_T = batch.row_N.at[slot_T].get(mode="fill", fill_value=n_users)
        tile_T += shift_N.at[slot_T].get(mode="clip")
        is_local = (tile_T >= 0) & (tile_T < n_tiles)
        row_T = jnp.where(is_local, row_T, n_users)
        item_TE = neighbour_TE.at[tile_T].get(mode="clip")
        added_TE = weight_TE.at[tile_T].get(mode="clip")
        return sum_BI.at[row_T[:, None], item_TE].add(added_TE, mode="drop")

    zeros = mesh_lib.vary(
        jnp.zeros((n_users, n_items), jnp.float32),
        mesh_lib.varying_axes(weight_TE, *batch),
    )
    sum_BI = lax.fori_loop(0, -(-end_N[-1] // step), add, zeros)
    if axis:
        return lax.psum_scatter(sum_BI, axis, scatter_dimension=1, tiled=True)
    return sum_BI


def _first_above(end_N: jax.Array, tile_T: jax.Array) -> jax.Array:
    """Returns the first slot whose end is above each tile, int32 [T].

    N for a tile above all ends. The ends ascend.
    """
    (n_slots,) = end_N.shape
    if isinstance(n_slots, int):
        return jnp.searchsorted(end_N, tile_T, side="right")

    # A program of any number of slots, for which JAX has no searchsorted.
    def halve(bounds: tuple[jax.Array, jax.Array]) -> Any:
        low_T, high_T = bounds
        middle_T = (low_T + high_T) // 2
        is_above_T = end_N[middle_T] > tile_T
        return (
            jnp.where(is_above_T, low_T, middle_T + 1),
            jnp.where(is_above_T, middle_T, high_T),
        )

    low_T = jnp.zeros_like(tile_T)
    bounds = low_T, jnp.full_like(tile_T, n_slots)
    return lax.while_loop(
        lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, bounds
    )[1]
