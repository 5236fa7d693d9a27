"""Selects each user's best items from the scores of an item shard.

A GPU sorts what it selects from. It selects groups of adjacent items first, by
their maxima, and then the items of these groups.

Shapes in names: B users, I items, K ranks, G groups of E items, N slots of
interactions, C candidates, P parts of the items, R groups of a part.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vaecf.models import gpu_kernels, logsumexp
from vaecf.parallel import mesh as mesh_lib

# Larger scores are those of a model that diverged, as infinite ones are. (The
# logits of a trained model are below 100, counts of users below 1e10.)
LARGEST_SCORE = 1e20
# Groups of 16 items take a seventh of the time of single items (H100, 100 of
# 20,108 items).
GROUP = 16
_PART = 128  # groups of a program of the kernel


class Masks(NamedTuple):
    """The items that must not be ranked."""

    n_real: jax.Array | int  # padding items of this shard follow these
    allowed_I: jax.Array | None  # bool [I], items that may be; None allows all
    # int32 [N] each, rows and items that were seen; those out of bounds are
    # ignored. No pair occurs twice. None if seen items may be ranked.
    seen: tuple[jax.Array, jax.Array] | None


class Selection(NamedTuple):
    """The best items, and logsumexp over all real items in two parts."""

    max_B: jax.Array  # float32 [B], finite if all scores are
    sum_B: jax.Array  # float32 [B], sum of exp(score - max)
    # float32 and int32 [B, K], best first; -inf for items that are masked.
    score_BK: jax.Array
    item_BK: jax.Array


def select(
    scores_BI: jax.Array, masks: Masks, k: int, platform: str | None
) -> Selection:
    """Returns the k best items of each user; ties are ranked by item index.

    The logsumexp of a user is not finite if a score is not, or if its size is
    `LARGEST_SCORE` or more.

    Args:
      scores_BI: float32 [B, I].
      k: at most I.
      platform: as in `mesh.platform_of`; None takes JAX's default.
    """
    n_items = scores_BI.shape[1]
    on_cpu = mesh_lib.on_cpu(platform)
    if not on_cpu and n_items % GROUP == 0 and n_items // GROUP > k:
        has_triton = mesh_lib.has_triton(platform)
        has_triton = has_triton and gpu_kernels.fits(scores_BI.size)
        return _select_groups(scores_BI, masks, k, has_triton)
    is_real_I = jnp.arange(n_items) < masks.n_real
    scores_BI = _unsigned_zero(_sound(scores_BI, is_real_I[None, :]))
    max_B, sum_B = logsumexp.max_and_sum(scores_BI, on_cpu)
    # The masks come after the sum, so that XLA writes them into the same array.
    # Another B x I array would cost a CPU 0.1 s per 2,000 users.
    if masks.allowed_I is not None:
        scores_BI = jnp.where(masks.allowed_I[None, :], scores_BI, -jnp.inf)
    if masks.seen is not None:
        scores_BI = scores_BI.at[masks.seen].set(-jnp.inf, mode="drop")
    return Selection(max_B, sum_B, *lax.top_k(scores_BI, k))


def _sound(scores: jax.Array, is_real: jax.Array) -> jax.Array:
    # An infinite score makes the sum of exponentials infinite or NaN.
    scores = jnp.where(jnp.abs(scores) < LARGEST_SCORE, scores, jnp.inf)
    return jnp.where(is_real, scores, -jnp.inf)


def _unsigned_zero(scores: jax.Array) -> jax.Array:
    # top_k ranks 0 before -0, regardless of their indices.
    return jnp.where(scores == 0, 0.0, scores)


def _select_groups(
    scores_BI: jax.Array, masks: Masks, k: int, has_triton: bool
) -> Selection:
    """Returns `select`; all scores are read once, and not written.

    The k groups of the largest maxima hold the k best items: an item outside
    these groups has k better ones inside. A number per group has a bit for each
    item that was seen.
    """
    n_users, n_items = scores_BI.shape
    n_groups = n_items // GROUP
    seen_BG = jnp.zeros((n_users, n_groups), jnp.int32)
    if masks.seen is not None:
        row_N, item_N = masks.seen
        seen_BG = mesh_lib.vary(seen_BG, mesh_lib.varying_axes(row_N, item_N))
        bit_N = 1 << item_N % GROUP
        seen_BG = seen_BG.at[row_N, item_N // GROUP].add(bit_N, mode="drop")
    n_real = jnp.asarray(masks.n_real, jnp.int32)
    args = scores_BI, seen_BG, n_real, masks.allowed_I
    args = mesh_lib.vary(args, mesh_lib.varying_axes(*jax.tree.leaves(args)))
    if has_triton:
        max_B, sum_B, best_BG = lax.platform_dependent(
            *args, cuda=summary_kernel, default=summary_by_definition
        )
    else:
        max_B, sum_B, best_BG = summary_by_definition(*args)

    _, group_BK = lax.top_k(best_BG, k)
    place_E = jnp.arange(GROUP, dtype=group_BK.dtype)
    item_BKE = group_BK[:, :, None] * GROUP + place_E[None, None, :]
    take = functools.partial(jnp.take_along_axis, axis=1, mode="clip")
    scores_BGE = scores_BI.reshape(n_users, n_groups, GROUP)
    score_BKE = take(scores_BGE, group_BK[:, :, None])
    score_BKE = _sound(_unsigned_zero(score_BKE), item_BKE < masks.n_real)
    allowed_BKE = None
    if masks.allowed_I is not None:
        allowed_BKE = jnp.take(masks.allowed_I, item_BKE, mode="clip")
    seen_BK = take(seen_BG, group_BK)
    score_BKE = _masked(score_BKE, seen_BK[:, :, None], allowed_BKE)
    # Both are keys, because the groups are not in the order of their indices.
    minus_BC, item_BC = lax.sort(
        (-score_BKE.reshape(n_users, -1), item_BKE.reshape(n_users, -1)),
        num_keys=2,
        is_stable=False,
    )
    return Selection(max_B, sum_B, -minus_BC[:, :k], item_BC[:, :k])


def _masked(
    scores: jax.Array, seen: jax.Array, allowed: jax.Array | None
) -> jax.Array:
    """Returns the scores of groups, [..., E], with -inf for what is masked."""
    place = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    scores = jnp.where(seen & (1 << place) != 0, -jnp.inf, scores)
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def summary_by_definition(
    scores_BI: jax.Array,
    seen_BG: jax.Array,
    n_real: jax.Array,
    allowed_I: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `logsumexp.max_and_sum`, and the best score of each group [B, G].

    Args:
      scores_BI: float32 [B, I], those of real items before those of padding.
      seen_BG: int32 [B, G]; bit e is that of the group's item e.
      n_real: int32, the number of real items.
      allowed_I: as in `Masks`.
    """
    (n_users, n_groups), n_items = seen_BG.shape, scores_BI.shape[1]
    is_real_I = jnp.arange(n_items) < n_real
    scores_BI = _sound(scores_BI, is_real_I[None, :])
    max_B, sum_B = logsumexp.max_and_sum(scores_BI, on_cpu=False)
    scores_BGE = scores_BI.reshape(n_users, n_groups, GROUP)
    if allowed_I is not None:
        allowed_I = allowed_I.reshape(1, n_groups, GROUP)
    scores_BGE = _masked(scores_BGE, seen_BG[:, :, None], allowed_I)
    return max_B, sum_B, _unsigned_zero(jnp.max(scores_BGE, axis=2))


def summary_kernel(
    scores_BI: jax.Array,
    seen_BG: jax.Array,
    n_real: jax.Array,
    allowed_I: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `summary_by_definition`; a program takes a part of a user."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (n_users, n_groups), n_items = seen_BG.shape, scores_BI.shape[1]
    n_parts = pl.cdiv(n_groups, _PART)

    def kernel(
        scores_ref: Any, seen_ref: Any, n_real_ref: Any, *refs: Any
    ) -> None:
        *allowed_ref, max_ref, sum_ref, best_ref = refs
        user, part = pl.program_id(0), pl.program_id(1)
        group_R = part * _PART + jnp.arange(_PART)
        is_group_R = group_R < n_groups
        item_RE = group_R[:, None] * GROUP + jnp.arange(GROUP)[None, :]
        is_item_RE = item_RE < n_items
        score_RE = plgpu.load(
            scores_ref.at[user, item_RE], mask=is_item_RE, other=0
        )
        is_real_RE = is_item_RE & (item_RE < n_real_ref[0])
        score_RE = _sound(score_RE, is_real_RE)
        # Finite, because -inf - -inf is nan.
        top = jnp.maximum(jnp.max(score_RE), jnp.finfo(jnp.float32).min)
        max_ref[user, part] = top
        sum_ref[user, part] = jnp.sum(jnp.exp(score_RE - top))
        seen_R = plgpu.load(
            seen_ref.at[user, group_R], mask=is_group_R, other=0
        )
        allowed_RE = None
        if allowed_ref:
            allowed_RE = plgpu.load(
                allowed_ref[0].at[item_RE], mask=is_item_RE, other=False
            )
        score_RE = _masked(score_RE, seen_R[:, None], allowed_RE)
        best_R = _unsigned_zero(jnp.max(score_RE, axis=1))
        plgpu.store(best_ref.at[user, group_R], best_R, mask=is_group_R)

    axes = jax.typeof(scores_BI).manual_axis_type
    parts = n_users, n_parts
    max_BP, sum_BP, best_BG = pl.pallas_call(
        kernel,
        grid=parts,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes)
            for shape in (parts, parts, seen_BG.shape)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="summary_of_groups",
    )(
        *(scores_BI, seen_BG, n_real.reshape(1)),
        *(() if allowed_I is None else (allowed_I,)),
    )
    return *logsumexp.join_all(max_BP, sum_BP), best_BG
