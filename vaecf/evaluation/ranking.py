"""The one scoring path: scores → seen items masked → top k, on the device.

Evaluation, recommendation and export all rank through `rank_batch`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vaecf.errors import VaecfError
from vaecf.models import likelihood, sparse_batch
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes


class Scorer(NamedTuple):
    """Something that scores all items for a batch of users.

    Attributes:
      apply: (params, batch, user_B) -> float32 [B, I], this item shard's
        scores inside shard_map, and all items' on one device, where there is
        no shard_map; -inf for padding items. `user_B` is the user's row in
        the split, for scorers that depend on the user (the oracle).
      partition: mesh axis of each dimension of a parameter, by its name.
      n_items: items of the catalogue.
      casts: dtypes that the parameters' matrices are cast to, one after the
        other, before `apply` sees them: once a set of parameters, not once a
        query. Empty leaves them as they are.
      kept: names of parameters that are not cast.
    """

    apply: Callable[[Any, SparseBatch, jax.Array], jax.Array]
    partition: Mapping[str, tuple[str | None, ...]]
    n_items: int
    casts: tuple[Any, ...] = ()
    kept: frozenset[str] = frozenset()


class RankedLists(NamedTuple):
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
) -> RankedLists:
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
      RankedLists with [B, k] arrays, the same on every item shard.
    """
    n_local = scores_BI.shape[1]
    offset = mesh_lib.item_offset(n_local, item_axis)
    real_I = jnp.arange(n_local) + offset < n_items
    scores_BI = jnp.where(real_I[None, :], scores_BI, -jnp.inf)
    # top_k puts 0 before -0, whatever their indices.
    scores_BI = jnp.where(scores_BI == 0, 0.0, scores_BI)
    max_B = jnp.max(scores_BI, axis=1)
    max_B = jnp.maximum(max_B, jnp.finfo(jnp.float32).min)  # all padding
    sum_B = jnp.sum(jnp.exp(scores_BI - max_B[:, None]), axis=1)
    log_total_B, _ = likelihood.over_shards(
        max_B, sum_B, jnp.zeros_like(sum_B), item_axis
    )
    # What a mask overwrites is what the sum has read, no other array made from
    # the product: for 2,000 users each costs a CPU 0.1 s to touch first.
    if allowed_I is not None:
        scores_BI = jnp.where(allowed_I[None, :], scores_BI, -jnp.inf)
    if exclude_seen:
        item_N = batch.item_N - offset
        # Another shard's item must not wrap around to the end of this one.
        item_N = jnp.where(item_N >= 0, item_N, n_local)
        scores_BI = scores_BI.at[batch.row_N, item_N].set(-jnp.inf, mode="drop")
    score_BK, item_BK = lax.top_k(scores_BI, min(k, n_local))
    item_BK += offset
    if item_axis:
        # Shards come in item order and each list is sorted by (score, index),
        # so the merged top k keeps the lower index first among equals.
        gather = functools.partial(
            lax.all_gather,
            axis_name=item_axis,
            axis=1,
            tiled=True,
            to="invarying",
        )
        score_BC, item_BC = gather(score_BK), gather(item_BK)
        score_BK, choice_BK = lax.top_k(score_BC, min(k, score_BC.shape[1]))
        item_BK = jnp.take_along_axis(item_BC, choice_BK, axis=1)
    missing = k - score_BK.shape[1]
    if missing > 0:
        score_BK = jnp.pad(
            score_BK, ((0, 0), (0, missing)), constant_values=-jnp.inf
        )
        item_BK = jnp.pad(item_BK, ((0, 0), (0, missing)), constant_values=-1)
    item_BK = jnp.where(score_BK == -jnp.inf, -1, item_BK)
    return RankedLists(item_BK, score_BK, log_total_B)


def rank_batch(
    apply: Callable[[Any, SparseBatch, jax.Array], jax.Array],
    params: Any,
    batch: SparseBatch,
    user_B: jax.Array,
    allowed_I: jax.Array | None,
    *,
    mesh: Mesh,
    partition: Mapping[str, tuple[str | None, ...]],
    k: int,
    n_items: int,
    exclude_seen: bool = True,
) -> RankedLists:
    """Scores and ranks a global batch over the mesh.

    An axis of one device has no collectives.

    Args:
      apply: see `Scorer`.
      params: its parameters.
      batch: the concatenation of the data shards' batches.
      user_B: int32 [B], rows of the users.
      allowed_I: bool [padded items]; None allows all.
      mesh: ('data', 'item').
      partition: see `Scorer`.
      k: list length.
      n_items: items of the catalogue.
      exclude_seen: leave out the items of the history.

    Returns:
      RankedLists with global [B, k] arrays.
    """

    def local(
        params: Any,
        batch: SparseBatch,
        user_B: jax.Array,
        allowed_I: jax.Array | None,
    ) -> RankedLists:
        return rank_local(
            apply(params, batch, user_B),
            batch,
            allowed_I,
            k=k,
            n_items=n_items,
            exclude_seen=exclude_seen,
            item_axis=mesh_lib.axis(mesh, mesh_lib.ITEM),
        )

    users = P(mesh_lib.DATA)
    return mesh_lib.on_mesh(
        mesh,
        local,
        in_specs=(
            mesh_lib.specs(params, partition),
            SparseBatch(users, users, users),
            users,
            P(mesh_lib.ITEM),
        ),
        out_specs=RankedLists(users, users, users),
    )(params, batch, user_B, allowed_I)


class _Casts:
    """Cast arrays, each made once and kept for as long as its original lives.

    All rankers share them: a model that is ranked to several depths is not
    cast again, and a training loop that moves on leaves nothing behind.
    """

    def __init__(self) -> None:
        self._held: dict[tuple, tuple[weakref.ref, jax.Array]] = {}

    def __call__(self, x: jax.Array, dtypes: tuple[Any, ...]) -> jax.Array:
        """x in the first dtype, that in the second, and so on."""
        key = id(x), dtypes
        held = self._held.get(key)
        if held is not None and held[0]() is x:
            return held[1]
        cast = x
        for dtype in dtypes:
            # Programs of their own: within one, XLA may leave out a rounding
            # whose result it casts back.
            cast = cast.astype(dtype)
        if cast is not x:
            # A reference that did not die with x would keep it from being
            # donated; `cast` is a copy, and holds none.
            forget = functools.partial(_forget, self._held, key)
            self._held[key] = weakref.ref(x, forget), cast
        return cast

    def __len__(self) -> int:
        return len(self._held)


def _forget(held: dict, key: tuple, _: weakref.ref) -> None:
    held.pop(key, None)


_casts = _Casts()

# Histories shorter than the smallest bucket of a batch get buckets of powers
# of two: a single query's slots are work that is seen.
_MIN_SLOTS = 16
_BATCH_SLOTS = sparse_batch.bucket(1)


def _bucket(n: int) -> int:
    """Slots for n interactions."""
    if n > _BATCH_SLOTS // 2:
        return sparse_batch.bucket(n)
    return max(_MIN_SLOTS, sparse_batch.bucket_users(n))


class _Shape(NamedTuple):
    """What a program is compiled for, besides the parameters' types."""

    users: int  # over all data shards
    slots: int  # of one data shard


def _pack(
    indptr: np.ndarray, indices: np.ndarray, first: int, shape: _Shape, n: int
) -> np.ndarray:
    """Users first, first + 1, ... as one array, int32 [n shards, ...].

    A row is a shard's item_N, row_N, count_B and user_B. Users behind the
    last are padding users, marked by the number of users.
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


def _unpack(packed: jax.Array, shape: _Shape) -> tuple[SparseBatch, jax.Array]:
    """(batch, user_B) of `_pack`, over all shards."""
    size = shape.users // packed.shape[0]
    ends = np.cumsum([shape.slots, shape.slots, size])
    item_N, row_N, count_B, user_B = (
        x.reshape(-1) for x in jnp.split(packed, ends, axis=1)
    )
    return SparseBatch(item_N, row_N, count_B), user_B


class Ranker:
    """Compiled `rank_batch` for one scorer, mesh and list length.

    Programs are compiled ahead of time and kept per (users, slots); slots come
    from a few bucket sizes, so that histories of about the same length share
    one, and new parameters of the same shapes (a later epoch's) reuse it. A
    block is one array to the device and one array back.
    """

    def __init__(
        self, scorer: Scorer, mesh: Mesh, k: int, *, exclude_seen: bool = True
    ) -> None:
        self.mesh, self.k, self.n_items = mesh, k, scorer.n_items
        self._scorer = scorer
        self._exclude_seen = exclude_seen
        self._shards = mesh.shape[mesh_lib.DATA]
        self._by_user = mesh_lib.shardings(mesh, P(mesh_lib.DATA))
        self._everywhere = mesh_lib.shardings(mesh, P())
        self._programs: dict[tuple, Callable[..., jax.Array]] = {}
        self._places: dict[tuple, list[Any]] = {}

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def place(self, params: Any) -> Any:
        """Returns host parameters, padded for the mesh, on its devices."""
        rows = mesh_lib.padded_items(
            self.n_items, self.mesh.shape[mesh_lib.ITEM]
        )
        partition = self._scorer.partition
        params = mesh_lib.resize_items(params, partition, rows)
        specs = mesh_lib.specs(params, partition)
        return processes.put(params, mesh_lib.shardings(self.mesh, specs))

    def allow(self, allowed: np.ndarray) -> jax.Array:
        """bool [items] as a device array over the padded items."""
        shards = self.mesh.shape[mesh_lib.ITEM]
        padded = np.zeros(mesh_lib.padded_items(self.n_items, shards), bool)
        padded[: self.n_items] = allowed
        spec = mesh_lib.shardings(self.mesh, P(mesh_lib.ITEM))
        return processes.put(padded, spec)

    def compile(self, params: Any, users: int, interactions: int) -> None:
        """Compiles what a query of such a size needs, ahead of the first.

        Args:
          params: parameters of the scorer.
          users: users of the query; it must not be divided into blocks, nor
            have allowed items.
          interactions: items of the histories of a device's users together.
        """
        resident, types = self._resident(params)
        size = self._round(sparse_batch.bucket_users(users))
        self._program(
            resident, types, _Shape(size, _bucket(interactions)), None
        )

    def __call__(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> RankedLists:
        """RankedLists lists for all users of a CSR, as NumPy arrays [U, k]."""
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
            return RankedLists(
                np.zeros((0, self.k), np.int32),
                np.zeros((0, self.k), np.float32),
                np.zeros(0, np.float32),
            )
        return RankedLists(*(np.concatenate(parts) for parts in zip(*blocks)))

    def blocks(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> Iterator[RankedLists]:
        """RankedLists lists block by block; the next block is always under way.

        Args:
          params: parameters of the scorer.
          indptr: int64 [U + 1].
          indices: int32 [interactions], the histories.
          batch_size: users a block, over all devices.
          allowed_I: result of `allow`; None allows every item.

        Yields:
          RankedLists of at most `batch_size` users, in order, as NumPy arrays.

        Raises:
          VaecfError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise VaecfError(f"batch_size={batch_size} must be at least 1")
        n_users = len(indptr) - 1
        if n_users == 0:
            return
        size = self._round(min(batch_size, sparse_batch.bucket_users(n_users)))
        first_B = range(0, n_users, size)
        # Interactions of the fullest shard of any block.
        edge = np.arange(0, len(first_B) * size + 1, size // self._shards)
        fullest = int(np.diff(indptr[np.minimum(edge, n_users)]).max())
        shape = _Shape(size, _bucket(fullest))
        resident, types = self._resident(params)
        program = self._program(resident, types, shape, allowed_I)
        pending: tuple[jax.Array, int] | None = None
        alone = processes.alone()
        for first in first_B:
            packed = _pack(indptr, indices, first, shape, self._shards)
            if not alone:
                packed = processes.put(packed, self._by_user)
            ranked = program(resident, packed, allowed_I)
            if pending is not None:
                yield _fetch(*pending)
            pending = ranked, min(size, n_users - first)
        if pending is not None:
            yield _fetch(*pending)

    def _round(self, users: int) -> int:
        """Whole users a shard."""
        return -(-users // self._shards) * self._shards

    def _resident(self, params: Any) -> tuple[Any, tuple]:
        """(parameters as the programs take them, their types).

        What lies where it should and as it should is used as it is, without
        another reference to it.
        """
        leaves, structure = jax.tree.flatten(params)
        types = structure, tuple((x.shape, x.dtype) for x in leaves)
        if types not in self._places:
            specs = mesh_lib.specs(params, self._scorer.partition)
            places = mesh_lib.shardings(self.mesh, specs)
            is_cast = [
                x.ndim > 1 and path[-1].key not in self._scorer.kept
                for path, x in jax.tree_util.tree_leaves_with_path(params)
            ]
            self._places[types] = list(zip(jax.tree.leaves(places), is_cast))
        casts = self._scorer.casts
        for i, (place, is_cast) in enumerate(self._places[types]):
            x = leaves[i]
            if not _lies_at(x, place):
                x = processes.put(x, place)
            leaves[i] = _casts(x, casts) if casts and is_cast else x
        return jax.tree.unflatten(structure, leaves), types

    def _program(
        self,
        resident: Any,
        types: tuple,
        shape: _Shape,
        allowed_I: jax.Array | None,
    ) -> Callable[..., jax.Array]:
        """(resident, packed, allowed_I) -> packed lists, compiled once."""
        key = types, shape, allowed_I is None
        if key not in self._programs:
            packed = jax.ShapeDtypeStruct(
                (
                    self._shards,
                    2 * (shape.slots + shape.users // self._shards),
                ),
                jnp.int32,
                sharding=self._by_user,
            )
            rank = functools.partial(self._rank, shape)
            # Every process gets all lists; alone, it fetches the shards.
            lists = None if processes.alone() else self._everywhere
            self._programs[key] = (
                jax.jit(rank, out_shardings=lists)
                .lower(resident, packed, allowed_I)
                .compile()
            )
        return self._programs[key]

    def _rank(
        self,
        shape: _Shape,
        params: Any,
        packed: jax.Array,
        allowed_I: jax.Array | None,
    ) -> jax.Array:
        """int32 [B, 2 k + 1]: items, bits of the scores and of log_total."""
        batch, user_B = _unpack(packed, shape)
        ranked = rank_batch(
            self._scorer.apply,
            params,
            batch,
            user_B,
            allowed_I,
            mesh=self.mesh,
            partition=self._scorer.partition,
            k=self.k,
            n_items=self.n_items,
            exclude_seen=self._exclude_seen,
        )
        bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)
        return jnp.concatenate(
            [
                ranked.item_UK,
                bits(ranked.score_UK),
                bits(ranked.log_total_U)[:, None],
            ],
            axis=1,
        )


def _lies_at(x: Any, place: jax.sharding.Sharding) -> bool:
    return isinstance(x, jax.Array) and (
        # Of the two the cheaper, which mostly is enough.
        x.sharding == place or x.sharding.is_equivalent_to(place, x.ndim)
    )


def _fetch(ranked: jax.Array, n_users: int) -> RankedLists:
    lists = np.asarray(ranked)[:n_users]
    k = lists.shape[1] // 2
    scores = lists[:, k:].view(np.float32)
    return RankedLists(lists[:, :k], scores[:, :k], scores[:, k])
