"""Fixed-shape sparse batches of users, assembled on the device or the host.

Shapes in names: B users, N slots for interactions (real ones first, then
padding), U users of a split, D data shards, M interactions.

The shape of a batch is (users, slots). The number of slots is one of a few
bucket sizes, chosen so that the fullest batch fits. Nothing is ever truncated.

A batch in several parts (data shards, microbatches) is the concatenation of
the parts' batches: part k has the slots item_N[k·n : (k+1)·n], and its rows
count from its own first user.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.errors import VaecfError
from vaecf.parallel.mesh import on_cpu, vary, varying_axes

# Bucket sizes grow by an eighth. At most an eighth of the slots is padding,
# and the number of compiled shapes stays logarithmic.
_BUCKETS_PER_DOUBLING = 6
_SLOT_MULTIPLE = 256
_FEW_SLOTS = 2**18  # slots whose rows a GPU searches in a single kernel


class SparseBatch(NamedTuple):
    """A batch of users as a flat list of interactions.

    Arrays of the device or the host, or their shapes or PartitionSpecs.
    """

    item_N: Any  # int32 [N], item index of each interaction; 0 in padding slots
    # int32 [N], ascending row (user within the batch) of each interaction; B in
    # padding slots, so that scatters drop them.
    row_N: Any
    # int32 [B], interactions of each user; 0 for padding users and users with
    # an empty history.
    count_B: Any


class Csr(NamedTuple):
    """The interactions of many users as arrays for the device."""

    # int32 [U], position of each user's first interaction.
    start_U: jax.Array | np.ndarray
    # int32 [U], interactions of each user; 0 for padding users.
    count_U: jax.Array | np.ndarray
    # int32 [interactions], items, user after user.
    item_M: jax.Array | np.ndarray


def as_csr(indptr: np.ndarray, indices: np.ndarray) -> Csr:
    """Returns the interactions of all users, and an empty padding user.

    `indptr` is int64 [n_users + 1], and `indices` int32 [interactions].

    Raises:
      VaecfError: there are 2^31 interactions or more, which int32 positions
        cannot address.
    """
    if indptr[-1] >= 2**31:
        raise VaecfError(
            f"{indptr[-1]} interactions are too many for a resident feed "
            "(2**31): set config.data.feed='streamed'"
        )
    start = indptr.astype(np.int32)
    count = np.append(np.diff(indptr), 0).astype(np.int32)
    # Gathering from an empty array is an error.
    items = indices if len(indices) else np.zeros(1, np.int32)
    return Csr(start, count, np.ascontiguousarray(items, dtype=np.int32))


def window(
    indptr: np.ndarray,
    indices: np.ndarray,
    user_DU: np.ndarray,
    n_slots: int,
) -> Csr:
    """Returns the interactions of some users, one block per data shard.

    Args:
      indptr, indices: as in `as_csr`; indices usually are a memory map.
      user_DU: int32 [shards, users per shard]; n_users marks padding users.
        Within a shard, users are numbered from 0 in this order.
      n_slots: slots for interactions per shard.

    Returns:
      start_U and count_U int32 [shards * users per shard], item_M int32
      [shards * n_slots]; starts count from the first slot of the shard.

    Raises:
      ValueError: a shard has more than `n_slots` interactions.
    """
    real_DU = user_DU < len(indptr) - 1
    safe_DU = np.where(real_DU, user_DU, 0)
    start_DU = indptr[safe_DU]
    count_DU = indptr[safe_DU + real_DU] - start_DU
    end_DU = np.cumsum(count_DU, axis=1)
    if end_DU.size and end_DU[:, -1].max() > n_slots:
        raise ValueError(
            f"{end_DU[:, -1].max()} interactions do not fit {n_slots} slots"
        )
    item_DM = np.zeros((len(user_DU), n_slots), np.int32)
    # Slicing a plain view costs a tenth of slicing the memory map itself.
    indices = np.asarray(indices)
    for shard, starts in enumerate(start_DU.tolist()):
        stops = (start_DU[shard] + count_DU[shard]).tolist()
        histories = [indices[a:b] for a, b in zip(starts, stops, strict=True)]
        np.concatenate(histories, out=item_DM[shard, : end_DU[shard, -1]])
    return Csr(
        (end_DU - count_DU).astype(np.int32).ravel(),
        count_DU.astype(np.int32).ravel(),
        item_DM.ravel(),
    )


def slots_for(count_SB: np.ndarray, parts: int = 1) -> int:
    """Returns the bucket size that fits the fullest part of any batch.

    `count_SB` are the users' interactions, int [steps, batch size].
    """
    steps, batch_size = count_SB.shape
    by_part = count_SB.reshape(steps, parts, batch_size // parts)
    totals = by_part.sum(axis=2, dtype=np.int64)
    return bucket(int(np.max(totals, initial=1)))


def slots_to_expect(count_U: np.ndarray, users: int) -> int:
    """Returns the bucket size that fits random users in practice.

    One size for all epochs means one compilation. The size allows for six
    standard deviations above the mean of a random part of `users` users.
    `slots_for` still gives the size of a part that exceeds it.
    """
    if not len(count_U):
        return bucket(1)
    users = min(users, len(count_U))
    usual = users * count_U.mean() + 6.0 * np.sqrt(users) * count_U.std()
    fullest = np.partition(count_U, len(count_U) - users)[-users:].sum()
    return bucket(int(np.ceil(min(usual, fullest))))


def bucket(n: int) -> int:
    """Returns the smallest bucket size that is at least n."""
    size = _SLOT_MULTIPLE
    exponent = 0
    while size < n:
        exponent += 1
        exact = _SLOT_MULTIPLE * 2 ** (exponent / _BUCKETS_PER_DOUBLING)
        size = -(-int(np.ceil(exact)) // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    return size


def bucket_users(n: int) -> int:
    """Returns the smallest power of two >= n: few compiled batch sizes."""
    return 1 << max(0, n - 1).bit_length()


def assemble(
    csr: Csr, user_B: jax.Array, n_slots: int, platform: str | None = None
) -> SparseBatch:
    """Returns the batch of some users, gathered on the device.

    `user_B`, int32 [B], marks padding users by n_users. The static `n_slots` is
    at least the number of the users' interactions. `platform` is as
    in `mesh.platform_of`; None takes JAX's default.
    """
    count_B = csr.count_U[user_B]
    end_B = jnp.cumsum(count_B)
    first_B = end_B - count_B
    n_users = user_B.shape[0]
    slot_N = jnp.arange(n_slots, dtype=jnp.int32)
    if on_cpu(platform):
        # repeat() fills the slots after the total with the last user's row.
        row_N = jnp.repeat(
            jnp.arange(n_users, dtype=jnp.int32),
            count_B,
            total_repeat_length=n_slots,
        )
    elif n_slots <= _FEW_SLOTS:  # one kernel instead of eight
        row_N = jnp.searchsorted(
            end_B, slot_N, side="right", method="scan_unrolled"
        ).astype(jnp.int32)
    else:  # the number of users that end before: .03 instead of .08 ms (H100)
        ends_N = vary(jnp.zeros(n_slots, jnp.int32), varying_axes(end_B))
        row_N = jnp.cumsum(ends_N.at[end_B].add(1, mode="drop"))
    real_N = slot_N < end_B[-1]
    position_N = (csr.start_U[user_B] - first_B)[row_N] + slot_N
    item_N = jnp.take(csr.item_M, position_N, mode="clip")
    return SparseBatch(
        item_N=jnp.where(real_N, item_N, 0),
        row_N=jnp.where(real_N, row_N, n_users),
        count_B=count_B,
    )


def assemble_on_host(
    indptr: np.ndarray,
    indices: np.ndarray,
    user_B: np.ndarray,
    n_slots: int,
    parts: int = 1,
) -> SparseBatch:
    """Returns the batch that `assemble` returns, gathered on the host.

    Args:
      indptr, indices: as in `window`.
      user_B: int32 [B]; n_users marks padding users.
      n_slots: slots of one part.
      parts: data shards times microbatches; the batch has parts · n_slots
        slots.

    Raises:
      ValueError: a part has more than `n_slots` interactions.
    """
    csr = window(indptr, indices, user_B.reshape(parts, -1), n_slots)
    count_PU = np.asarray(csr.count_U).reshape(parts, -1)
    size = count_PU.shape[1]
    row_PN = np.full((parts, n_slots), size, np.int32)
    for row_N, count_U in zip(row_PN, count_PU, strict=True):
        row_N[: np.sum(count_U)] = np.repeat(np.arange(size), count_U)
    return SparseBatch(csr.item_M, row_PN.ravel(), csr.count_U)
