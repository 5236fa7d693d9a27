"""The step: where model, loss, optimiser, loss scale and mesh meet.

Pure functions over arrays. `Problem` holds what is static; `TrainState` what
changes. The loss is computed inside `jax.shard_map` and reduced there; its
gradient is taken outside, so that shard_map's own transpose completes the
gradient of every replicated or sharded parameter.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vaecf.models import batching, losses, mult_vae, sharding
from vaecf.models.sparse import SparseBatch
from vaecf.options import LossOptions, ModelOptions, Options
from vaecf.training import loss_scale, optimizers, precision


class TrainState(NamedTuple):
    """Everything that training changes; arrays only.

    Attributes:
      step: int32, steps taken, skipped ones too. Keys, order and annealing
        are functions of it.
      params: pytree of float32.
      opt_state: the optimiser's state, the loss scale's with it.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Totals(NamedTuple):
    """Sums over users, float32: of a step, or one of each of several steps.

    Divide by `users` last, so that a small last batch counts as what it is.
    """

    loss: Any
    nll: Any
    kl: Any
    users: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a compiled step is specialised to; hashable.

    Attributes:
      model: module over this shard's items, for use inside shard_map.
      whole: the same over all (padded) items, for initialisation.
      tx: optimiser.
      loss: weights of the loss's terms.
      mesh: ('data', 'item').
    """

    model: mult_vae.MultDAE
    whole: mult_vae.MultDAE
    tx: optax.GradientTransformation
    loss: LossOptions
    mesh: Mesh

    @property
    def data_shards(self) -> int:
        """Devices along the users."""
        return self.mesh.shape[sharding.DATA]


def make_model(
    options: ModelOptions, policy: precision.Policy, n_items: int
) -> mult_vae.MultDAE:
    """The module over all items, unsharded."""
    lowering = options.input
    if lowering == "auto":
        # Matrix units make the dense product cheap; a CPU gathers faster.
        lowering = "gather" if jax.default_backend() == "cpu" else "dense"
    return mult_vae.MODELS[options.name](
        n_items=n_items,
        item_rows=sharding.padded_items(n_items),
        hidden=options.hidden,
        latent=options.latent,
        activation=options.activation,
        dropout_rate=options.dropout_rate,
        input_lowering=lowering,
        item_block=options.item_block,
        dtype=policy.dtype,
        precision=policy.precision,
    )


def shard_model(whole: mult_vae.MultDAE, mesh: Mesh) -> mult_vae.MultDAE:
    """The module as each item shard sees it."""
    return whole.clone(
        item_rows=whole.item_rows // mesh.shape[sharding.ITEM],
        item_axis=sharding.ITEM,
    )


def make_problem(options: Options, n_items: int, mesh: Mesh) -> Problem:
    """The problem that a run's options describe."""
    policy = precision.policy(options.precision.policy)
    whole = make_model(options.model, policy, n_items)
    return Problem(
        model=shard_model(whole, mesh),
        whole=whole,
        tx=optimizers.make_optimizer(
            options.optimizer, options.precision, policy
        ),
        loss=options.loss,
        mesh=mesh,
    )


def init_params(whole: mult_vae.MultDAE, key: jax.Array) -> Any:
    """Fresh parameters (shapes only under `jax.eval_shape`)."""
    empty = SparseBatch(*(jnp.zeros((1,), jnp.int32) for _ in range(3)))
    return whole.init(key, empty)["params"]


def _init(problem: Problem, key: jax.Array) -> TrainState:
    params = init_params(problem.whole, key)
    return TrainState(jnp.int32(0), params, problem.tx.init(params))


def state_shardings(problem: Problem) -> TrainState:
    """NamedSharding of every array of the state."""
    shapes = jax.eval_shape(
        functools.partial(_init, problem), jax.random.key(0)
    )
    specs = sharding.specs(shapes, mult_vae.PARTITION)
    return sharding.shardings(problem.mesh, specs)


def init_state(problem: Problem, seed: int) -> TrainState:
    """First state, initialised sharded: no unsharded copy ever exists."""
    init = jax.jit(
        functools.partial(_init, problem),
        out_shardings=state_shardings(problem),
    )
    return init(jax.random.key(seed))


def step_key(seed: int) -> jax.Array:
    """Key from which every step's key is folded; not the initialiser's."""
    return jax.random.fold_in(jax.random.key(seed), 1)


_BATCH_SPEC = SparseBatch(*(P(sharding.DATA),) * 3)


def batch_loss(
    problem: Problem,
    params: Any,
    batch: SparseBatch,
    key: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Totals]:
    """Annealed negative ELBO of a batch, mean over its real users.

    loss = 1/B Σ_u (nll_u + β_step KL_u) + weight_decay Σ |W|², Liang et al.
    2018, equation 7 with the weight β of section 2.2.2.

    Returns:
      (float32 scalar, this step's Totals).
    """

    def local(
        params: Any, batch: SparseBatch, key_data: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        n_local = batch.count_B.shape[0]
        first_row = lax.axis_index(sharding.DATA) * n_local
        terms: Any = problem.model.apply(
            {"params": params},
            batch,
            jax.random.wrap_key_data(key_data),
            first_row,
            method="loss_terms",
        )
        nll_B, kl_B = terms
        real_B = (batch.count_B > 0).astype(jnp.float32)
        sums = (jnp.sum(nll_B), jnp.sum(kl_B * real_B), jnp.sum(real_B))
        return lax.psum(sums, sharding.DATA)

    nll, kl, users = jax.shard_map(
        local,
        mesh=problem.mesh,
        in_specs=(sharding.specs(params, mult_vae.PARTITION), _BATCH_SPEC, P()),
        out_specs=(P(), P(), P()),
    )(params, batch, jax.random.key_data(key))
    weight = losses.anneal_weight(
        step,
        cap=problem.loss.anneal_cap,
        total_steps=problem.loss.total_anneal_steps,
    )
    loss = (nll + weight * kl) / jnp.maximum(users, 1.0)
    if problem.loss.weight_decay:
        loss += problem.loss.weight_decay * losses.squared_norm_of_kernels(
            params
        )
    return loss, Totals(loss * users, nll, kl, users)


def train_step(
    problem: Problem, state: TrainState, batch: SparseBatch, key: jax.Array
) -> tuple[TrainState, Totals]:
    """One update.

    Args:
      problem: static.
      state: before the step.
      batch: global batch, the concatenation of the data shards' batches.
      key: `step_key(seed)`; the step number is folded in here.

    Returns:
      (state after the step, the step's Totals).
    """
    scale = loss_scale.scale_of(state.opt_state)

    def scaled_loss(params: Any) -> tuple[jax.Array, Totals]:
        loss, totals = batch_loss(
            problem,
            params,
            batch,
            jax.random.fold_in(key, state.step),
            state.step,
        )
        return loss * scale, totals

    grads, totals = jax.grad(scaled_loss, has_aux=True)(state.params)
    updates, opt_state = problem.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), totals


def assemble(
    problem: Problem, csr: batching.Csr, user_B: jax.Array, n_slots: int
) -> SparseBatch:
    """Global batch from resident interactions; `n_slots` a data shard."""
    return jax.shard_map(
        functools.partial(batching.assemble, n_slots=n_slots),
        mesh=problem.mesh,
        in_specs=(P(), P(sharding.DATA)),
        out_specs=_BATCH_SPEC,
    )(csr, user_B)


def train_steps(
    problem: Problem,
    n_slots: int,
    state: TrainState,
    csr: batching.Csr,
    order_SB: jax.Array,
    key: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> tuple[TrainState, Totals]:
    """Steps start .. stop-1 of an epoch in one dispatch.

    The bounds are traced, so every stretch of an epoch runs the same program.

    Args:
      problem: static.
      n_slots: static slots of a data shard's batch.
      state: before.
      csr: all training interactions, resident.
      order_SB: int32 [steps, batch_size], `batches.epoch_order`.
      key: `step_key(seed)`.
      start: int32, first step within the epoch.
      stop: int32, one past the last.

    Returns:
      (state after, Totals of every step, [steps]; 0 for steps not taken).
    """
    n_steps = order_SB.shape[0]

    def body(
        i: jax.Array, carry: tuple[TrainState, Totals]
    ) -> tuple[TrainState, Totals]:
        state, taken = carry
        batch = assemble(problem, csr, order_SB[i], n_slots)
        state, totals = train_step(problem, state, batch, key)
        return state, jax.tree.map(lambda x, v: x.at[i].set(v), taken, totals)

    none = Totals(*(jnp.zeros(n_steps, jnp.float32) for _ in Totals._fields))
    return lax.fori_loop(start, stop, body, (state, none))
