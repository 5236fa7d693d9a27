"""A training step: loss, gradients, update, metrics.

All functions are pure. On several devices the gradients are taken inside
`jax.shard_map`. Over the item shards, JAX's transpose of the replicated
activations completes them; over the data shards, each device's share is summed
once, after the last microbatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from vaecf.models import losses, mult_vae, sparse_batch
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel.mesh import on_cpu, vary, varying_axes
from vaecf.training import optimizers, packed
from vaecf.training.state import TrainSetup, TrainState

_REPLICATED = P()
_BATCH_SPEC = SparseBatch(*(P(mesh_lib.DATA),) * 3)
# Slots of a device that are assembled before the steps. With more of them, the
# launches do not count (H100), and XLA folds large constants.
_SLOTS_AHEAD = 2**21


class StepMetrics(NamedTuple):
    """Sums over the users of a step, float32; or arrays of several steps.

    Divide by `users` only after adding up steps: a small last batch then
    counts for as many users as it has.
    """

    loss: Any
    nll: Any
    kl: Any
    users: Any


class LossSums(NamedTuple):
    """Sums over users of the terms of the loss, float32."""

    nll: Any  # Σ_u nll_u
    kl: Any  # Σ_u KL_u
    # γ Σ_u n_u KL_u; None if γ is 0, when the weighted term is β · kl.
    weighted_kl: Any = None


# --- Loss -------------------------------------------------------------------


def loss_fn(
    trained: Any,
    batch: SparseBatch,
    first_row: jax.Array | int,
    *,
    setup: TrainSetup,
    params: Any,
    keys: jax.Array,
    kl_weight: jax.Array,
    n_users: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, LossSums]:
    """Returns a microbatch's share of the mean negative ELBO, and its sums.

    loss = 1/B Σ_u (nll_u + w_u KL_u)

    Liang et al. 2018, equation 7, with w_u = β, the annealed weight of their
    section 2.2.2. With γ = `setup.loss.gamma` above 0, w_u = γ n_u for a user
    with n_u items (Shenbin et al. 2020, section 3.3). `gradients` adds the
    regulariser, which does not depend on the users.

    Args:
      trained: parameters to differentiate with respect to; they replace
        those of the same name in `params`.
      first_row: index of the microbatch's first user in the global batch.
      kl_weight: β of the step.
      n_users: B, users of the global batch, float32.
      scale: factor of the returned loss (not of the sums), the loss scale.
    """
    terms: Any = setup.model.apply(
        {"params": {**params, **trained}},
        batch,
        keys,
        first_row,
        method="loss_terms",
    )
    nll_B, kl_B = terms
    nll = jnp.sum(nll_B)
    kl = jnp.sum(kl_B * (batch.count_B > 0).astype(jnp.float32))
    weighted_kl = kl_weight * kl
    sums = LossSums(nll, kl)
    gamma = setup.loss.gamma
    if not losses.is_left_out(gamma):
        annealed = weighted_kl
        weighted_kl = gamma * jnp.sum(kl_B * batch.count_B.astype(jnp.float32))
        if isinstance(gamma, jax.Array):
            weighted_kl = jnp.where(gamma == 0, annealed, weighted_kl)
        sums = LossSums(nll, kl, weighted_kl)
    mean = (nll + weighted_kl) / jnp.maximum(n_users, 1.0)
    return mean * scale, sums


# --- Gradients --------------------------------------------------------------


def gradients(
    setup: TrainSetup,
    params: Any,
    batch: SparseBatch,
    keys: jax.Array,
    step: jax.Array,
    scale: jax.Array | float = 1.0,
    packing: packed.Packing = packed.NONE,
) -> tuple[Any, StepMetrics]:
    """Returns gradients of scale · loss, and the metrics without the scale.

    The loss is that of `loss_fn` for all users of the batch, plus
    `weight_decay` Σ |W|² over the weight matrices. The global step (int32)
    determines the weight of the KL term, and `keys` are its `step_keys`. The
    batch is the concatenation of its `setup.parts` microbatches. The gradients
    are those of the trained parameters, packed by `packing`.
    """
    kl_weight = losses.anneal_weight(step, setup.loss)
    specs = mesh_lib.specs(params, mult_vae.PARTITION)
    trained = setup.trained(params)
    gradient_specs = packing.pack_specs(
        setup.moment_specs(trained, setup.trained(specs))
    )
    none = None if losses.is_left_out(setup.loss.gamma) else P()
    grads, n_users, sums = mesh_lib.on_mesh(
        setup.mesh,
        functools.partial(_local_gradients, setup, packing, gradient_specs),
        in_specs=(specs, _BATCH_SPEC, P(), P(), P()),
        out_specs=(gradient_specs, P(), LossSums(P(), P(), none)),
    )(params, batch, jax.random.key_data(keys), kl_weight, jnp.float32(scale))

    weighted_kl = sums.weighted_kl
    if weighted_kl is None:
        weighted_kl = kl_weight * sums.kl
    loss = (sums.nll + weighted_kl) / jnp.maximum(n_users, 1.0)
    rate = setup.loss.weight_decay
    if not losses.is_left_out(rate):
        norm, slope = jax.value_and_grad(losses.squared_norm_of_kernels)(
            trained
        )
        loss += rate * norm
        slope = packing.pack(slope)
        grads = jax.tree.map(lambda g, s: g + scale * rate * s, grads, slope)
    return grads, StepMetrics(loss * n_users, sums.nll, sums.kl, n_users)


def _local_gradients(
    setup: TrainSetup,
    packing: packed.Packing,
    gradient_specs: Any,
    params: Any,
    batch: SparseBatch,
    key_data: jax.Array,
    kl_weight: jax.Array,
    scale: jax.Array,
) -> tuple[Any, jax.Array, LossSums]:
    axes = (mesh_lib.DATA,) if setup.data_shards > 1 else ()
    n_local = batch.count_B.shape[0]
    first_row = lax.axis_index(mesh_lib.DATA) * n_local if axes else 0
    n_users = jnp.sum((batch.count_B > 0).astype(jnp.float32))
    n_users = lax.psum(n_users, axes) if axes else n_users
    loss = functools.partial(
        loss_fn,
        setup=setup,
        params=params,
        keys=jax.random.wrap_key_data(key_data),
        kl_weight=kl_weight,
        n_users=n_users,
        scale=scale,
    )
    # Without this mark, differentiating would sum over the data shards in
    # every microbatch.
    trained = vary(setup.trained(params), axes)
    none = LossSums(*(vary(jnp.float32(0), axes),) * 2)
    if not losses.is_left_out(setup.loss.gamma):
        none = none._replace(weighted_kl=none.kl)
    grads, sums = _sum_over_microbatches(
        setup,
        functools.partial(jax.grad(loss, has_aux=True), trained),
        batch,
        first_row,
        zeros=(jax.tree.map(_zeros_like, trained), none),
    )
    grads = packing.pack(grads)
    if axes:
        grads = _sum_over_data_shards(setup, grads, gradient_specs)
        sums = lax.psum(sums, axes)
    return grads, n_users, sums


def _sum_over_microbatches(
    setup: TrainSetup,
    function: Callable[[SparseBatch, jax.Array | int], Any],
    batch: SparseBatch,
    first_row: jax.Array | int,
    zeros: Any,
) -> Any:
    """Returns the sum of function(microbatch, its first row), from zeros."""
    n_local = batch.count_B.shape[0]
    parts = setup.parts(n_local * setup.data_shards) // setup.data_shards
    if n_local % parts:
        raise ValueError(
            f"{n_local} users on a device do not divide into {parts} "
            "microbatches: pad the batch"
        )
    by_part = jax.tree.map(lambda x: x.reshape(parts, -1), batch)

    def part(m: jax.Array | int) -> Any:
        piece = jax.tree.map(lambda x: x[m], by_part)
        return function(piece, first_row + m * (n_local // parts))

    if parts == 1:
        return part(0)
    return lax.fori_loop(
        0, parts, lambda m, sums: jax.tree.map(jnp.add, sums, part(m)), zeros
    )


def _zeros_like(x: jax.Array) -> jax.Array:
    return vary(jnp.zeros(x.shape, x.dtype), varying_axes(x))


def _sum_over_data_shards(setup: TrainSetup, grads: Any, specs: Any) -> Any:
    """Returns the gradients summed over the data shards.

    A gradient whose spec names the data axis is scattered along it.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(grads)
    pairs = zip(leaves, structure.flatten_up_to(specs), strict=True)
    sums: list[jax.Array] = []
    scattered = None  # the sum that was scattered last
    # Gradients of the last layers come first. XLA does not join a sum with one
    # that waits for it: the backward pass in between then hides the first sum.
    for grad, spec in reversed(list(pairs)):
        x = grad.astype(setup.reduce_dtype)
        along = [d for d, a in enumerate(spec) if mesh_lib.DATA in (a or ())]
        if along:
            if scattered is not None:
                x, _ = lax.optimization_barrier((x, scattered))
            scattered = x = lax.psum_scatter(
                x, mesh_lib.DATA, scatter_dimension=along[0], tiled=True
            )
        else:
            x = lax.psum(x, mesh_lib.DATA)
        sums.append(x.astype(grad.dtype))
    return structure.unflatten(reversed(sums))


# --- Step -------------------------------------------------------------------


def step_keys(setup: TrainSetup, key: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the PRNG keys of a step, from the `step_key` of the run."""
    return setup.model.keys(jax.random.fold_in(key, step))


def train_step(
    setup: TrainSetup,
    state: TrainState,
    batch: SparseBatch,
    keys: jax.Array,
    packing: packed.Packing = packed.NONE,
    operands: Any = None,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one update, and the metrics of the step.

    `keys` are the `step_keys`, and the batch is as in `gradients`. The state is
    packed by `packing`. `operands` are the trained parameters at which the
    gradients are taken; None takes those of the state.
    """
    trained = setup.trained(state.params)
    operands = trained if operands is None else operands
    grads, metrics = gradients(
        setup,
        {**state.params, **packing.unpack(operands)},
        batch,
        keys,
        state.step,
        optimizers.loss_scale_of(state.opt_state),
        packing,
    )
    updates, opt_state = setup.tx.update(grads, state.opt_state, trained)
    params = {**state.params, **optax.apply_updates(trained, updates)}
    return TrainState(state.step + 1, params, opt_state, state.average), metrics


def train_steps(
    setup: TrainSetup,
    n_slots: int,
    csr_spec: P,
    state: TrainState,
    csr: sparse_batch.Csr,
    order_SB: jax.Array,
    key: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[TrainState, jax.Array]:
    """Takes steps start .. stop-1 in one dispatch.

    If the bounds are traced, int32, any range of steps runs the same program.
    If they are constants, a GPU takes the steps without waiting for the host.

    Args:
      n_slots: slots of a microbatch; static, as are `setup` and `csr_spec`.
      csr: as in `assemble`; `csr_spec` is the PartitionSpec of its arrays.
      order_SB: int32 [steps, batch_size], users of each batch.
      key: `step_key` of the run.

    Returns:
      (state after the last step, a row of `StepMetrics` for each step,
      float32 [steps, 4]; 0 for steps not taken).
    """
    n_steps, batch_size = order_SB.shape
    step_S = state.step + jnp.arange(n_steps, dtype=jnp.int32) - start
    keys_S = jax.vmap(lambda step: step_keys(setup, key, step))(step_S)

    def batch_of(user_B: jax.Array) -> SparseBatch:
        return assemble(setup, csr, user_B, n_slots, csr_spec)

    # What does not depend on the state is computed before the steps, because
    # the launches of small kernels bound the small steps of a GPU.
    slots = n_slots * setup.parts(batch_size) // setup.data_shards
    ahead = not on_cpu(setup.model.platform) and n_steps * slots <= _SLOTS_AHEAD
    batches = jax.vmap(batch_of)(order_SB) if ahead else None
    packing = packed.packing(setup, state.params)
    copies = packed.copies(setup, state.params, packing)
    fixed = {
        name: jax.tree.map(copies.rounded, params)
        for name, params in state.params.items()
        if name not in setup.trained(state.params)
    }

    def body(i: jax.Array, carry: tuple) -> tuple:
        state, copied, taken = carry
        if batches is None:
            batch = batch_of(order_SB[i])
        else:
            batch = jax.tree.map(lambda x: x[i], batches)
        operands = copies.read(state.params, copied)
        state = state._replace(params={**fixed, **state.params})
        state, metrics = train_step(
            setup, state, batch, keys_S[i], packing, operands
        )
        params, copied = copies.write(setup.trained(state.params))
        row = jnp.stack(metrics)
        taken = lax.dynamic_update_index_in_dim(taken, row, i, 0)
        return state._replace(params=params), copied, taken

    # One array, so that a GPU needs one kernel to write a step's metrics, and
    # one transfer to send them.
    none = jnp.zeros((n_steps, len(StepMetrics._fields)), jnp.float32)
    before = state.params
    state = packing.pack_state(state._replace(params=setup.trained(before)))
    params, copied = copies.write(state.params)
    carry = (state._replace(params=params), copied, none)
    state, _, taken = lax.fori_loop(start, stop, body, carry)
    state = packing.unpack_state(state)
    state = state._replace(params={**before, **state.params})
    return state, taken


def assemble(
    setup: TrainSetup,
    csr: sparse_batch.Csr,
    user_B: jax.Array,
    n_slots: int,
    csr_spec: P = _REPLICATED,
) -> SparseBatch:
    """Returns a global batch of interactions that are on the device.

    Args:
      csr: all training interactions; or, by data shard, those of its users.
      user_B: int32 [batch_size], users, numbered as in `csr`.
      n_slots: static slots of a microbatch.
    """
    parts = setup.parts(user_B.shape[0]) // setup.data_shards

    def local(csr: sparse_batch.Csr, user_B: jax.Array) -> SparseBatch:
        by_part = [
            sparse_batch.assemble(csr, part_B, n_slots, setup.model.platform)
            for part_B in jnp.split(user_B, parts)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *by_part)

    return mesh_lib.on_mesh(
        setup.mesh,
        local,
        in_specs=(csr_spec, P(mesh_lib.DATA)),
        out_specs=_BATCH_SPEC,
    )(csr, user_B)
