"""AUC: how many of the unseen items each held-out item is ranked above.

Lists of the best items do not tell; the AUC needs the scores of all items.
They stay on the device, which counts for every held-out item the items that
score more.

Shapes in names: U users of a split, B users of a batch, I items (of one item
shard inside `shard_map`), T slots of held-out items.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vaecf.data.interactions import Interactions
from vaecf.evaluation import packing
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

if TYPE_CHECKING:
    from vaecf.evaluation.ranking import Scorer

_BLOCK = 1 << 22  # scores compared at once


class Auc:
    """Compiled AUC of one scorer on one mesh."""

    def __init__(self, scorer: Scorer, mesh: Mesh) -> None:
        """Initialises; a program is compiled for each shape of a batch."""
        self._scorer, self._mesh = scorer, mesh
        self._by_user = mesh_lib.shardings(mesh, P(mesh_lib.DATA))
        # Several processes each need the counts of all users.
        everywhere = mesh_lib.shardings(mesh, P())
        self._counts = jax.jit(
            self._count,
            static_argnums=(0, 1),
            out_shardings=None if processes.alone() else everywhere,
        )

    def __call__(
        self,
        params: Any,
        fold_in: Interactions,
        held_out: Interactions,
        batch_size: int,
    ) -> np.ndarray:
        """Returns the AUC of each user, float64 [U].

        The share of pairs (held-out item, unseen item that is not held out) in
        which the held-out item has the larger score; equal scores count one
        half. Rendle et al. 2009 (BPR), section 3.1, with the halves of Mann
        and Whitney. NaN for users without such a pair.

        Args:
          params: parameters on the mesh, as the scorer takes them.
          fold_in: histories of the users, whose items are no candidates.
          held_out: items of the same users to find, none of their history.
          batch_size: users per batch, over all devices.
        """
        shards = self._mesh.shape[mesh_lib.DATA]
        shape = packing.shape(fold_in.indptr, batch_size, shards)
        target_shape = packing.shape(held_out.indptr, batch_size, shards)
        counts = []
        for first in range(0, fold_in.n_users, shape.users):
            packed, targets = (
                packing.pack(x.indptr, x.indices, first, s, shards)
                for x, s in ((fold_in, shape), (held_out, target_shape))
            )
            if not processes.alone():
                packed = processes.put(packed, self._by_user)
                targets = processes.put(targets, self._by_user)
            # Slots after a shard's last held-out item are padding.
            edge = first + np.arange(shards + 1) * (shape.users // shards)
            edge = held_out.indptr[np.minimum(edge, fold_in.n_users)]
            count_DT = np.asarray(
                self._counts(shape, target_shape, params, packed, targets)
            ).reshape(shards, -1)
            counts += [x[:n] for x, n in zip(count_DT, np.diff(edge))]
        # Items above each held-out item, which itself counts as equal.
        above = (np.concatenate(counts).astype(np.float64) - 1) / 2
        above_U = np.diff(
            np.concatenate([[0], np.cumsum(above)])[held_out.indptr]
        )
        n_U = held_out.counts
        # Of two held-out items one is above the other, or each by a half.
        lost_U = above_U - n_U * (n_U - 1) / 2
        pairs_U = n_U * (fold_in.n_items - fold_in.counts - n_U)
        return np.where(
            pairs_U > 0, 1 - lost_U / np.maximum(pairs_U, 1), np.nan
        )

    def _count(
        self,
        shape: packing.Shape,
        target_shape: packing.Shape,
        params: Any,
        packed: jax.Array,
        packed_targets: jax.Array,
    ) -> jax.Array:
        batch, user_B = packing.unpack(packed, shape)
        targets, _ = packing.unpack(packed_targets, target_shape)
        users = P(mesh_lib.DATA)
        batches = SparseBatch(users, users, users)
        return mesh_lib.on_mesh(
            self._mesh,
            functools.partial(_count_local, self._scorer, self._mesh),
            in_specs=(
                mesh_lib.specs(params, self._scorer.partition),
                *(batches, users, batches),
            ),
            out_specs=users,
        )(params, batch, user_B, targets)


def _count_local(
    scorer: Scorer,
    mesh: Mesh,
    params: Any,
    batch: SparseBatch,
    user_B: jax.Array,
    targets: SparseBatch,
) -> jax.Array:
    """Returns twice the unseen items above each target, int32 [T].

    Items of the same score, the target among them, count once.
    """
    item_axis = mesh_lib.axis(mesh, mesh_lib.ITEM)
    score_BI = scorer.apply(params, batch, user_B)
    n_local = score_BI.shape[1]
    offset = mesh_lib.item_offset(n_local, item_axis)
    real_I = jnp.arange(n_local) + offset < scorer.n_items
    score_BI = jnp.where(real_I, score_BI, -jnp.inf)

    def local(item_N: jax.Array) -> jax.Array:
        """Returns columns of this shard; n_local for items of others."""
        item_N -= offset
        return jnp.where((item_N >= 0) & (item_N < n_local), item_N, n_local)

    score_BI = score_BI.at[batch.row_N, local(batch.item_N)].set(
        -jnp.inf, mode="drop"
    )
    own_T = score_BI.at[targets.row_N, local(targets.item_N)].get(
        mode="fill", fill_value=-jnp.inf
    )
    if item_axis:
        own_T = lax.pmax(own_T, item_axis)

    def count(target: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, own = target
        score_I = score_BI[row]
        above_I = (score_I >= own).astype(jnp.int32) + (score_I > own)
        return jnp.sum(above_I)

    at_once = max(1, _BLOCK // n_local)
    count_T = lax.map(count, (targets.row_N, own_T), batch_size=at_once)
    return lax.psum(count_T, item_axis) if item_axis else count_T
