"""Batches of histories as one array: one transfer to the device for each.

Users are in the order of a split. B users of a batch, N slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.models import sparse_batch
from vaecf.models.sparse_batch import SparseBatch

# Short histories get buckets of powers of two, from this size: in a query of a
# single user, unused slots cost time.
_MIN_SLOTS = 16


def bucket(n: int) -> int:
    """Returns the number of slots for n interactions."""
    if n > sparse_batch.bucket(1) // 2:
        return sparse_batch.bucket(n)
    return max(_MIN_SLOTS, sparse_batch.bucket_users(n))


class Shape(NamedTuple):
    """Sizes of a packed batch."""

    users: int  # over all data shards
    slots: int  # per data shard


def shape(indptr: np.ndarray, batch_size: int, n: int) -> Shape:
    """Returns the size of batches of at most about `batch_size` users.

    Every batch of consecutive users fits, over `n` data shards.
    """
    n_users = len(indptr) - 1
    size = min(batch_size, sparse_batch.bucket_users(n_users))
    size = -(-size // n) * n
    # Interactions of the fullest shard of any batch.
    edge = np.arange(0, n_users + size, size // n)
    fullest = int(np.diff(indptr[np.minimum(edge, n_users)]).max())
    return Shape(size, bucket(fullest))


def pack(
    indptr: np.ndarray, indices: np.ndarray, first: int, shape: Shape, n: int
) -> np.ndarray:
    """Returns users first, first + 1, ... as one array, int32 [n shards, ...].

    A row holds item_N, row_N, count_B and user_B of one data shard. Rows are
    filled up with padding users, whose user_B is the number of users.
    """
    n_users = len(indptr) - 1
    size, slots = shape.users // n, shape.slots
    packed = np.zeros((n, 2 * (slots + size)), np.int32)
    packed[:, slots : 2 * slots] = size
    for row in packed:
        last = min(first + size, n_users)
        n_real = max(0, last - first)
        row[2 * slots + size :] = n_users
        if n_real:
            begin, end = indptr[first], indptr[last]
            counts = np.diff(indptr[first : last + 1])
            row[: end - begin] = indices[begin:end]
            row[slots : slots + end - begin] = np.repeat(
                np.arange(n_real, dtype=np.int32), counts
            )
            row[2 * slots : 2 * slots + n_real] = counts
            row[2 * slots + size :][:n_real] = np.arange(first, last)
        first += size
    return packed


def unpack(packed: jax.Array, shape: Shape) -> tuple[SparseBatch, jax.Array]:
    """Returns (batch, user_B) over all shards, the inverse of `pack`."""
    size = shape.users // packed.shape[0]
    ends = np.cumsum([shape.slots, shape.slots, size])
    item_N, row_N, count_B, user_B = (
        x.reshape(-1) for x in jnp.split(packed, ends, axis=1)
    )
    return SparseBatch(item_N, row_N, count_B), user_B
