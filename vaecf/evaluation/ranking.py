"""The one scoring path: scores → seen items masked → top k, on the device.

Evaluation, recommendation and export all rank through `rank_batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vaecf.errors import VaecfError
from vaecf.models import batching, sharding
from vaecf.models.sparse import SparseBatch, item_offset


class Scorer(NamedTuple):
    """Something that scores all items for a batch of users.

    Attributes:
      apply: (params, batch, user_B) -> float32 [B, I], this item shard's
        scores inside shard_map; -inf for padding items. `user_B` is the
        user's row in the split, for those who know users (the planted truth).
      params: pytree of arrays, global.
      partition: mesh axis of each dimension of a parameter, by its name.
      n_items: items of the catalogue.
    """

    apply: Callable[[Any, SparseBatch, jax.Array], jax.Array]
    params: Any
    partition: Mapping[str, tuple[str | None, ...]]
    n_items: int


class Ranked(NamedTuple):
    """Lists, best first.

    Attributes:
      item_UK: int32 [U, K], item indices; -1 where no item was left.
      score_UK: float32 [U, K]; -inf where no item was left.
      log_total_U: float32 [U], logsumexp of the user's scores over the whole
        catalogue: score - log_total is a log-probability for models whose
        scores are logits.
    """

    item_UK: Any
    score_UK: Any
    log_total_U: Any


def rank_local(
    scores_BI: jax.Array,
    batch: SparseBatch,
    allowed_I: jax.Array | None,
    *,
    k: int,
    n_items: int,
    exclude_seen: bool = True,
    item_axis: str | None = None,
) -> Ranked:
    """Exact top k of each user, ties broken by item index.

    Args:
      scores_BI: float32 [B, I], this shard's items.
      batch: the users' histories.
      allowed_I: bool [I], items that may be recommended; None allows all.
      k: list length.
      n_items: items of the catalogue, over all shards.
      exclude_seen: leave out the items of the history.
      item_axis: mesh axis of the items, None when they are not sharded.

    Returns:
      Ranked with [B, k] arrays, the same on every item shard.
    """
    n_local = scores_BI.shape[1]
    offset = item_offset(n_local, item_axis)
    real_I = jnp.arange(n_local) + offset < n_items
    scores_BI = jnp.where(real_I[None, :], scores_BI, -jnp.inf)
    max_B = jnp.max(scores_BI, axis=1)
    if item_axis:
        max_B = lax.pmax(max_B, item_axis)
    sum_B = jnp.sum(jnp.exp(scores_BI - max_B[:, None]), axis=1)
    if item_axis:
        sum_B = lax.psum(sum_B, item_axis)
    log_total_B = max_B + jnp.log(sum_B)
    # top_k puts 0 before -0, whatever their indices.
    scores_BI = jnp.where(scores_BI == 0, 0.0, scores_BI)
    if exclude_seen:
        item_N = batch.item_N - offset
        # Another shard's item must not wrap around to the end of this one.
        item_N = jnp.where(item_N >= 0, item_N, n_local)
        scores_BI = scores_BI.at[batch.row_N, item_N].set(-jnp.inf, mode="drop")
    if allowed_I is not None:
        scores_BI = jnp.where(allowed_I[None, :], scores_BI, -jnp.inf)
    score_BK, item_BK = lax.top_k(scores_BI, min(k, n_local))
    item_BK += offset
    if item_axis:
        # Shards come in item order and each list is sorted by (score, index),
        # so the merged top k keeps the lower index first among equals.
        gather = functools.partial(
            lax.all_gather, axis_name=item_axis, axis=1, tiled=True
        )
        score_BC, item_BC = gather(score_BK), gather(item_BK)
        # An all_gather's result is the same on all shards, but its type does
        # not say so; a maximum over equal values does.
        score_BK, choice_BK = lax.top_k(score_BC, min(k, score_BC.shape[1]))
        item_BK = jnp.take_along_axis(item_BC, choice_BK, axis=1)
        score_BK = lax.pmax(score_BK, item_axis)
        item_BK = lax.pmax(item_BK, item_axis)
    missing = k - score_BK.shape[1]
    if missing > 0:
        score_BK = jnp.pad(
            score_BK, ((0, 0), (0, missing)), constant_values=-jnp.inf
        )
        item_BK = jnp.pad(item_BK, ((0, 0), (0, missing)), constant_values=-1)
    item_BK = jnp.where(score_BK == -jnp.inf, -1, item_BK)
    return Ranked(item_BK, score_BK, log_total_B)


def rank_batch(
    apply: Callable[[Any, SparseBatch, jax.Array], jax.Array],
    params: Any,
    batch: SparseBatch,
    user_B: jax.Array,
    allowed_I: jax.Array,
    *,
    mesh: Mesh,
    partition: Mapping[str, tuple[str | None, ...]],
    k: int,
    n_items: int,
    exclude_seen: bool = True,
) -> Ranked:
    """Scores and ranks a global batch over the mesh.

    Args:
      apply: see `Scorer`.
      params: its parameters.
      batch: the concatenation of the data shards' batches.
      user_B: int32 [B], rows of the users.
      allowed_I: bool [padded items].
      mesh: ('data', 'item').
      partition: see `Scorer`.
      k: list length.
      n_items: items of the catalogue.
      exclude_seen: leave out the items of the history.

    Returns:
      Ranked with global [B, k] arrays.
    """

    def local(
        params: Any, batch: SparseBatch, user_B: jax.Array, allowed_I: jax.Array
    ) -> Ranked:
        return rank_local(
            apply(params, batch, user_B),
            batch,
            allowed_I,
            k=k,
            n_items=n_items,
            exclude_seen=exclude_seen,
            item_axis=sharding.ITEM,
        )

    users = P(sharding.DATA)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            sharding.specs(params, partition),
            SparseBatch(users, users, users),
            users,
            P(sharding.ITEM),
        ),
        out_specs=Ranked(users, users, users),
    )(params, batch, user_B, allowed_I)


class Ranker:
    """Compiled `rank_batch` for one scorer, mesh and list length.

    Programs are kept per batch shape; new parameters of the same shapes (a
    later epoch's) reuse them.
    """

    def __init__(
        self, scorer: Scorer, mesh: Mesh, k: int, *, exclude_seen: bool = True
    ) -> None:
        self.mesh, self.k, self.n_items = mesh, k, scorer.n_items
        self._rank = jax.jit(
            functools.partial(
                rank_batch,
                scorer.apply,
                mesh=mesh,
                partition=scorer.partition,
                k=k,
                n_items=scorer.n_items,
                exclude_seen=exclude_seen,
            )
        )
        self._all_allowed = self.allow(np.ones(scorer.n_items, bool))

    def allow(self, allowed: np.ndarray) -> jax.Array:
        """bool [items] as a device array over the padded items."""
        padded = np.zeros(sharding.padded_items(self.n_items), bool)
        padded[: self.n_items] = allowed
        spec = sharding.shardings(self.mesh, P(sharding.ITEM))
        return jax.device_put(padded, spec)

    def __call__(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> Ranked:
        """Ranked lists for all users of a CSR, as NumPy arrays [U, k]."""
        blocks = list(
            self.blocks(
                params,
                indptr,
                indices,
                batch_size=batch_size,
                allowed_I=allowed_I,
            )
        )
        if not blocks:
            return Ranked(
                np.zeros((0, self.k), np.int32),
                np.zeros((0, self.k), np.float32),
                np.zeros(0, np.float32),
            )
        return Ranked(*(np.concatenate(parts) for parts in zip(*blocks)))

    def blocks(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> Iterator[Ranked]:
        """Ranked lists block by block; the next block is always under way.

        Args:
          params: parameters of the scorer.
          indptr: int64 [U + 1].
          indices: int32 [interactions], the histories.
          batch_size: users a block, over all devices.
          allowed_I: result of `allow`; None allows every item.

        Yields:
          Ranked of at most `batch_size` users, in order, as NumPy arrays.

        Raises:
          VaecfError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise VaecfError(f"batch_size={batch_size} must be at least 1")
        n_users = len(indptr) - 1
        if n_users == 0:
            return
        shards = self.mesh.shape[sharding.DATA]
        size = min(batch_size, batching.bucket_users(n_users))
        size = -(-size // shards) * shards
        order = np.arange(-(-n_users // size) * size, dtype=np.int32)
        order = np.minimum(order, n_users).reshape(-1, size)
        counts = np.append(np.diff(indptr), 0)[order]
        n_slots = batching.slots_for(counts, shards)
        allowed_I = self._all_allowed if allowed_I is None else allowed_I
        spec = sharding.shardings(self.mesh, P(sharding.DATA))
        pending: tuple[Ranked, int] | None = None
        for user_B in order:
            batch = batching.assemble_on_host(
                indptr, indices, user_B, n_slots, shards
            )
            batch, user_B_device = jax.device_put((batch, user_B), spec)
            ranked = self._rank(params, batch, user_B_device, allowed_I)
            if pending is not None:
                yield _fetch(*pending)
            pending = ranked, int((user_B < n_users).sum())
        if pending is not None:
            yield _fetch(*pending)


def _fetch(ranked: Ranked, n_users: int) -> Ranked:
    return Ranked(*(x[:n_users] for x in jax.device_get(ranked)))
