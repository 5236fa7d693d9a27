"""Ranks all items for batches of users: scores, masks, top k, on the device.

Evaluation and recommendation both rank through `Ranker`.

Shapes in names: U users, B users of a batch, I items (of one item shard inside
`shard_map`), K ranks, N slots of interactions.
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

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import packing, selection
from vaecf.evaluation.auc import Auc
from vaecf.models import logsumexp
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

DIVERGED = (
    "the model diverged; train it again, with a lower "
    "config.optimizer.learning_rate, in a new workdir"
)


class Scorer(NamedTuple):
    """A function that scores all items for a batch of users."""

    # (params, batch, user_B) -> float32 [B, I]. With several devices it is
    # called inside `shard_map` and scores the items of one shard. Scores of
    # padding items are ignored. `user_B` is the user's row in the split, for
    # scorers that depend on the user (the oracle).
    apply: Callable[[Any, SparseBatch, jax.Array], jax.Array]
    # Mesh axis of each dimension of a parameter, by its name.
    partition: Mapping[str, tuple[str | None, ...]]
    n_items: int  # number of items, without padding
    # Dtypes that matrices among the parameters are cast to in turn, once per
    # set of parameters rather than in every query.
    casts: tuple[Any, ...] = ()
    kept: frozenset[str] = frozenset()  # names of parameters that are not cast


class RankedLists(NamedTuple):
    """Ranked items of each user, best first."""

    item_UK: Any  # int32 [U, K], item indices; -1 after the end of a list
    score_UK: Any  # float32 [U, K]; -inf after the end of a list
    # float32 [U], logsumexp of the user's scores over all items. If the scores
    # are logits, score - log_total is a log-probability. Not finite if a score
    # is not, or if its size is above `selection.LARGEST_SCORE`.
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
    platform: str | None = None,
) -> RankedLists:
    """Returns the exact top k of each user; ties are ranked by item index.

    Args:
      scores_BI: float32 [B, I], scores of this shard's items.
      allowed_I: bool [I], items that may be ranked; None allows all.
      n_items: number of items over all shards, without padding.
      exclude_seen: do not rank the items of the history, `batch`.
      item_axis: mesh axis of the items; None if they are not sharded.
      platform: as in `mesh.platform_of`; None takes JAX's default.
    """
    n_local = scores_BI.shape[1]
    offset = mesh_lib.item_offset(n_local, item_axis)
    seen = None
    if exclude_seen:
        item_N = batch.item_N - offset
        # Items of lower shards must not wrap around to the end of this one.
        seen = batch.row_N, jnp.where(item_N >= 0, item_N, n_local)
    masks = selection.Masks(n_items - offset, allowed_I, seen)
    max_B, sum_B, score_BK, item_BK = selection.select(
        scores_BI, masks, min(k, n_local), platform
    )
    log_total_B, _ = logsumexp.over_shards(
        max_B, sum_B, jnp.zeros_like(sum_B), item_axis
    )
    item_BK += offset
    if item_axis:
        # Shards are in item order and their lists are sorted by (score, index),
        # so that the merged top k also ranks the lower index first.
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


class _Casts:
    """Casts arrays once and keeps the results as long as the originals live.

    All rankers share the casts: rankers of different depth do not cast the same
    model again, and parameters of earlier epochs are not kept alive.
    """

    def __init__(self) -> None:
        self.held: dict[tuple, tuple[weakref.ref, jax.Array]] = {}

    def __call__(self, x: jax.Array, dtypes: tuple[Any, ...]) -> jax.Array:
        key = id(x), dtypes
        held = self.held.get(key)
        if held is not None and held[0]() is x:
            return held[1]
        cast = x
        for dtype in dtypes:
            # Separate programs: within one, XLA may skip a rounding whose
            # result is cast back.
            cast = cast.astype(dtype)
        if cast is not x:
            # A weak reference: a strong one would prevent the donation of x.
            alive = weakref.ref(x, lambda _: self.held.pop(key, None))
            self.held[key] = alive, cast
        return cast


_casts = _Casts()


class Ranker:
    """Compiled ranking of one scorer on one mesh, to one list length.

    A program is compiled for each (users, slots) of a batch and kept. Slots
    come from few bucket sizes, so that batches with about the same number of
    interactions share a program; new parameters of the same shapes do not
    compile again. Each batch is one transfer to the device and one back.
    """

    def __init__(
        self, scorer: Scorer, mesh: Mesh, k: int, *, exclude_seen: bool = True
    ) -> None:
        """Initialises a ranker of lists of length k.

        `exclude_seen` leaves the items of the history out of the lists.
        """
        self.mesh, self.k, self.n_items = mesh, k, scorer.n_items
        self.scorer, self._exclude_seen = scorer, exclude_seen
        self._shards = mesh.shape[mesh_lib.DATA]
        self._by_user = mesh_lib.shardings(mesh, P(mesh_lib.DATA))
        self._programs: dict[tuple, Callable[..., jax.Array]] = {}
        self._places: dict[tuple, list[Any]] = {}
        self._auc = Auc(scorer, mesh)

    def place(self, params: Any) -> Any:
        """Returns host parameters on the mesh, padded for its item shards."""
        partition = self.scorer.partition
        params = mesh_lib.resize_items(params, partition, self._padded_items())
        specs = mesh_lib.specs(params, partition)
        return processes.put(params, mesh_lib.shardings(self.mesh, specs))

    def allow(self, allowed: np.ndarray) -> jax.Array:
        """Returns bool [items] on the mesh, as the `allowed_I` of a call."""
        padded = np.zeros(self._padded_items(), bool)
        padded[: self.n_items] = allowed
        spec = mesh_lib.shardings(self.mesh, P(mesh_lib.ITEM))
        return processes.put(padded, spec)

    def _padded_items(self) -> int:
        shards = self.mesh.shape[mesh_lib.ITEM]
        return mesh_lib.padded_items(self.n_items, shards)

    def __call__(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> RankedLists:
        """Returns the lists of all users as NumPy arrays; see `blocks`."""
        blocks = self.blocks(
            params, indptr, indices, batch_size=batch_size, allowed_I=allowed_I
        )
        parts = zip(*(list(blocks) or [self.no_lists()]))
        return RankedLists(*(np.concatenate(part) for part in parts))

    def no_lists(self) -> RankedLists:
        """Returns the lists of no users."""
        item_UK = np.zeros((0, self.k), np.int32)
        score_UK = np.zeros((0, self.k), np.float32)
        return RankedLists(item_UK, score_UK, np.zeros(0, np.float32))

    def blocks(
        self,
        params: Any,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        batch_size: int,
        allowed_I: jax.Array | None = None,
    ) -> Iterator[RankedLists]:
        """Yields ranked lists batch by batch, as NumPy arrays.

        The device computes the next batch while the caller uses the last one.

        Args:
          indptr: int64 [U + 1], row pointers of the histories.
          indices: int32 [interactions], their items.
          batch_size: users per batch, over all devices.
          allowed_I: result of `allow`; None allows every item.

        Raises:
          VaecfError: `batch_size` is below 1, or scores are not finite.
        """
        if batch_size < 1:
            raise VaecfError(f"batch_size={batch_size} must be at least 1")
        n_users = len(indptr) - 1
        if n_users == 0:
            return
        shape = packing.shape(indptr, batch_size, self._shards)
        size = shape.users
        resident, types = self.resident(params)
        program = self._program(resident, types, shape, allowed_I)
        pending: tuple[jax.Array, int] | None = None
        for first in range(0, n_users, size):
            packed = packing.pack(indptr, indices, first, shape, self._shards)
            if not processes.alone():
                packed = processes.put(packed, self._by_user)
            ranked = program(resident, packed, allowed_I)
            if pending is not None:
                yield _fetch(*pending)
            pending = ranked, min(size, n_users - first)
        if pending is not None:
            yield _fetch(*pending)

    def auc(
        self,
        params: Any,
        fold_in: Interactions,
        held_out: Interactions,
        *,
        batch_size: int,
    ) -> np.ndarray:
        """Returns the AUC of each user, float64 [U]; see `auc.Auc`."""
        resident, _ = self.resident(params)
        return self._auc(resident, fold_in, held_out, batch_size)

    def resident(self, params: Any) -> tuple[Any, tuple]:
        """Returns (parameters as the programs take them, their types).

        `params` lie on the host or on the mesh, padded as `place` pads them.

        Arrays that already have the right sharding and dtype are used without
        a copy.
        """
        leaves, structure = jax.tree.flatten(params)
        types = structure, tuple((x.shape, x.dtype) for x in leaves)
        if types not in self._places:
            specs = mesh_lib.specs(params, self.scorer.partition)
            places = mesh_lib.shardings(self.mesh, specs)
            is_cast = [
                x.ndim > 1 and path[-1].key not in self.scorer.kept
                for path, x in jax.tree_util.tree_leaves_with_path(params)
            ]
            self._places[types] = list(zip(jax.tree.leaves(places), is_cast))
        casts = self.scorer.casts
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
        shape: packing.Shape,
        allowed_I: jax.Array | None,
    ) -> Callable[..., jax.Array]:
        key = types, shape, allowed_I is None
        if key not in self._programs:
            self._programs[key] = self.compile(resident, shape, allowed_I)
        return self._programs[key]

    def compile(
        self,
        params: Any,
        shape: packing.Shape,
        allowed_I: jax.Array | None = None,
    ) -> jax.stages.Compiled:
        """Returns the compiled ranking of packed batches of these sizes.

        `params` are on the mesh, of the dtypes that the scorer takes, or they
        are shapes with shardings.
        """
        size = 2 * (shape.slots + shape.users // self._shards)
        packed = jax.ShapeDtypeStruct(
            (self._shards, size), jnp.int32, sharding=self._by_user
        )
        rank = functools.partial(self._rank, shape)
        # Several processes each need all lists; a single one fetches the
        # shards.
        lists = None
        if not processes.alone():
            lists = mesh_lib.shardings(self.mesh, P())
        ranked = jax.jit(rank, out_shardings=lists)
        return ranked.lower(params, packed, allowed_I).compile()

    def _rank(
        self,
        shape: packing.Shape,
        params: Any,
        packed: jax.Array,
        allowed_I: jax.Array | None,
    ) -> jax.Array:
        """Returns int32 [B, 2 k + 1]: items, bits of scores and log_total."""

        def local(
            params: Any, batch: SparseBatch, user_B: Any, allowed_I: Any
        ) -> RankedLists:
            return rank_local(
                self.scorer.apply(params, batch, user_B),
                batch,
                allowed_I,
                k=self.k,
                n_items=self.n_items,
                exclude_seen=self._exclude_seen,
                item_axis=mesh_lib.axis(self.mesh, mesh_lib.ITEM),
                platform=mesh_lib.platform(self.mesh),
            )

        batch, user_B = packing.unpack(packed, shape)
        users = P(mesh_lib.DATA)
        ranked = mesh_lib.on_mesh(
            self.mesh,
            local,
            in_specs=(
                mesh_lib.specs(params, self.scorer.partition),
                SparseBatch(users, users, users),
                users,
                P(mesh_lib.ITEM),
            ),
            out_specs=RankedLists(users, users, users),
        )(params, batch, user_B, allowed_I)
        bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)
        score_UK, log_total_U = bits(ranked.score_UK), bits(ranked.log_total_U)
        return jnp.concatenate(
            [ranked.item_UK, score_UK, log_total_U[:, None]], axis=1
        )


def _lies_at(x: Any, place: jax.sharding.Sharding) -> bool:
    return isinstance(x, jax.Array) and (
        # Equality is the cheaper test and usually enough.
        x.sharding == place or x.sharding.is_equivalent_to(place, x.ndim)
    )


def _fetch(ranked: jax.Array, n_users: int) -> RankedLists:
    lists = np.asarray(ranked)[:n_users]
    k = lists.shape[1] // 2
    scores = lists[:, k:].view(np.float32)
    require_finite(scores[:, k])
    return RankedLists(lists[:, :k], scores[:, :k], scores[:, k])


def require_finite(log_total_U: np.ndarray) -> None:
    """Raises VaecfError if the scores of any user are not finite.

    `log_total_U` is that of `RankedLists`.
    """
    bad = np.count_nonzero(~np.isfinite(log_total_U))
    if bad:
        raise VaecfError(
            f"the scores of {bad:,} of {len(log_total_U):,} users are not "
            f"finite, or too large to rank: {DIVERGED}"
        )
