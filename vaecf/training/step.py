"""The step: where model, loss, optimiser, loss scale and mesh meet.

Pure functions over arrays. `TrainSetup` holds what is static; `TrainState` what
changes. On several devices the gradient is taken inside `jax.shard_map`: over
the items it is completed by the transpose of what shard_map replicates, over
the users it is each device's own and summed once, behind the microbatches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vaecf.config import Config, LossConfig, ModelConfig, TrainConfig
from vaecf.errors import VaecfError
from vaecf.models import losses, mult_vae, registry, sparse_batch
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel.mesh import vary, varying_axes
from vaecf.training import loss_scale, optimizers, precision


class TrainState(NamedTuple):
    """Everything that training changes; arrays only.

    Attributes:
      step: int32, steps taken, skipped ones too. Keys, order and annealing
        are functions of it.
      params: pytree of float32.
      opt_state: the optimiser's state, the loss scale's with it.
      average: of the parameters at the ends of the epochs, float32; None
        where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None


class _WithoutAverage(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any


def stored(state: TrainState) -> Any:
    """The state as a checkpoint holds it: no trace of an average without one.

    So that checkpoints from before there was one are like those of today.
    """
    if state.average is not None:
        return state
    return _WithoutAverage(state.step, state.params, state.opt_state)


class StepMetrics(NamedTuple):
    """Sums over users, float32: of a step, or one of each of several steps.

    Divide by `users` last, so that a small last batch counts as what it is.
    """

    loss: Any
    nll: Any
    kl: Any
    users: Any


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a compiled step is specialised to; hashable.

    Attributes:
      model: module over this shard's items, for use inside shard_map.
      whole: the same over all (padded) items, for initialisation.
      tx: optimiser.
      loss: weights of the loss's terms.
      mesh: ('data', 'item').
      microbatch: users whose activations a device holds at once.
      reduce_dtype: in which gradients are summed over the data shards.
      zero: optimiser moments are divided over the data shards too (stage 1
        of Rajbhandari et al. 2020, "ZeRO").
      trained: group of parameters that a step trains; 'all' for all of them.
      averaged: an average of the parameters is kept, and ranks.
    """

    model: mult_vae.MultDAE
    whole: mult_vae.MultDAE
    tx: optax.GradientTransformation
    loss: LossConfig
    mesh: Mesh
    microbatch: int
    reduce_dtype: Any = jnp.float32
    zero: bool = False
    trained: str = "all"
    averaged: bool = False

    @property
    def data_shards(self) -> int:
        """Devices along the users."""
        return self.mesh.shape[mesh_lib.DATA]

    def parts(self, batch_size: int) -> int:
        """Pieces a batch of so many users is made of, over all devices.

        Each is the microbatch of a device. `batch_size` is brought to a
        multiple of them with padding users behind the batch.
        """
        on_device = math.ceil(batch_size / self.data_shards)
        return math.ceil(on_device / self.microbatch) * self.data_shards

    def trained_part(self, params: Any) -> Any:
        """The parameters that a step changes."""
        if self.trained == "all":
            return params
        return {name: params[name] for name in self.model.GROUPS[self.trained]}


def in_turn(setup: TrainSetup, config: TrainConfig, epoch: int) -> TrainSetup:
    """The problem of an epoch: what it trains, and how.

    Args:
      setup: of the run.
      config: `alternating_epochs` = (n, m) trains the encoder for n epochs, then the
        decoder for m, and so on; () everything at once.
      epoch: counted from 0.
    """
    if not config.alternating_epochs:
        return setup
    encoder, decoder = config.alternating_epochs
    if epoch % (encoder + decoder) < encoder:
        return dataclasses.replace(setup, trained="encoder")
    # Shenbin et al. 2020, section 3.4: the decoder sees whole histories.
    return dataclasses.replace(
        setup,
        model=setup.model.clone(dropout_rate=0.0),
        trained="decoder",
    )


def starts_decoder(config: TrainConfig, epoch: int) -> bool:
    """Whether the encoder's turn ended with the epoch before."""
    return bool(config.alternating_epochs) and (
        epoch % sum(config.alternating_epochs) == config.alternating_epochs[0]
    )


def renew_prior(setup: TrainSetup, state: TrainState) -> TrainState:
    """The encoder as it is becomes the one that the prior remembers."""
    copy = jax.jit(
        lambda tree: jax.tree.map(jnp.copy, tree),
        out_shardings=state_shardings(setup).params["posterior"],
    )
    prior = copy(state.params["posterior"])
    return state._replace(params={**state.params, "prior": prior})


def scoring_params(state: TrainState) -> Any:
    """What scoring needs: the average where there is one, and no prior."""
    params = state.params if state.average is None else state.average
    return {name: x for name, x in params.items() if name != "prior"}


def average(state: TrainState, decay: float, epochs: int) -> TrainState:
    """The state with this epoch's end in its average; as it is without one.

    average = d · average + (1 - d) · params, with d = min(decay,
    (1 + e) / (10 + e)) after e epochs, so that the first of them are soon
    forgotten: the moving average of Polyak & Juditsky 1992 as it is used for
    neural networks, an epoch at a time.

    Args:
      state: after the epoch's last step.
      decay: the most that is kept of the average before, below 1.
      epochs: that ended before this one.
    """
    if state.average is None:
        return state
    kept = min(decay, (1 + epochs) / (10 + epochs))
    latest = {name: state.params[name] for name in state.average}
    return state._replace(
        average=_mix(jnp.float32(kept), state.average, latest)
    )


@jax.jit
def _mix(kept: jax.Array, before: Any, latest: Any) -> Any:
    return jax.tree.map(
        lambda old, new: kept * old + (1 - kept) * new, before, latest
    )


def make_model(
    config: ModelConfig,
    policy: precision.Policy,
    n_items: int,
    item_shards: int = 1,
) -> mult_vae.MultDAE:
    """The module over all items, unsharded; padded for so many shards."""
    lowering = config.input
    if lowering == "auto":
        # Matrix units make the dense product cheap; a CPU gathers faster. A
        # catalogue that is looked at in blocks is too large for users x items.
        gather = jax.default_backend() == "cpu" or config.item_block
        lowering = "gather" if gather else "dense"
    return registry.MODELS[config.name](
        n_items=n_items,
        item_rows=mesh_lib.padded_items(n_items, item_shards),
        hidden=config.hidden,
        latent=config.latent,
        activation=config.activation,
        dropout_rate=config.dropout_rate,
        input_lowering=lowering,
        item_block=config.item_block,
        dtype=policy.dtype,
        precision=policy.precision,
    )


def shard_model(whole: mult_vae.MultDAE, mesh: Mesh) -> mult_vae.MultDAE:
    """The module as each item shard sees it; with one shard, the whole one."""
    if not mesh_lib.axis(mesh, mesh_lib.ITEM):
        return whole
    return whole.clone(
        item_rows=whole.item_rows // mesh.shape[mesh_lib.ITEM],
        item_axis=mesh_lib.ITEM,
    )


def make_setup(config: Config, n_items: int, mesh: Mesh) -> TrainSetup:
    """The problem that a run's options describe.

    Raises:
      VaecfError: options that do not fit the model.
    """
    _check_turns(config)
    policy = precision.policy(config.precision.policy)
    whole = make_model(config.model, policy, n_items, mesh.shape[mesh_lib.ITEM])
    in_fp32 = config.mesh.reduce == "fp32"
    return TrainSetup(
        model=shard_model(whole, mesh),
        whole=whole,
        tx=optimizers.make_optimizer(
            config.optimizer,
            config.precision,
            policy,
            whole.GROUPS if config.train.alternating_epochs else None,
        ),
        loss=config.loss,
        mesh=mesh,
        microbatch=_microbatch(config.train),
        reduce_dtype=jnp.float32 if in_fp32 else policy.dtype,
        zero=config.mesh.zero,
        averaged=config.train.ema > 0,
    )


def _check_turns(config: Config) -> None:
    name, turns = config.model.name, config.train.alternating_epochs
    groups = registry.MODELS[name].GROUPS
    if turns and not groups:
        raise VaecfError(
            f"config.train.alternating_epochs={turns} is not for {name}, which is "
            "trained at once: leave it at ()"
        )
    if groups and not turns:
        raise VaecfError(
            f"config.train.alternating_epochs=() is not for {name}: give the epochs of "
            "encoder and decoder, such as (3, 1)"
        )


def _microbatch(config: TrainConfig) -> int:
    """What 0 means on this device."""
    if config.microbatch:
        return config.microbatch
    # A CPU is faster with arrays users x items that are not too large: they
    # are allocated, and their memory mapped, anew in every dispatch.
    return 1024 if jax.default_backend() == "cpu" else config.batch_size


def init_params(whole: mult_vae.MultDAE, key: jax.Array) -> Any:
    """Fresh parameters (shapes only under `jax.eval_shape`)."""
    empty = SparseBatch(*(jnp.zeros((1,), jnp.int32) for _ in range(3)))
    return whole.init(key, empty)["params"]


def first_state(setup: TrainSetup, key: jax.Array) -> TrainState:
    """Parameters out of a key, and what the optimiser starts with."""
    params = init_params(setup.whole, key)
    state = TrainState(jnp.int32(0), params, setup.tx.init(params))
    if not setup.averaged:
        return state
    start = jax.tree.map(jnp.copy, scoring_params(state))
    return state._replace(average=start)


def state_shardings(setup: TrainSetup) -> TrainState:
    """NamedSharding of every array of the state."""
    shapes = jax.eval_shape(
        functools.partial(first_state, setup), jax.random.key(0)
    )
    specs = mesh_lib.specs(shapes, mult_vae.PARTITION)
    moments = _moment_specs(setup, shapes.opt_state, specs.opt_state)
    return mesh_lib.shardings(setup.mesh, specs._replace(opt_state=moments))


def _moment_specs(setup: TrainSetup, shapes: Any, specs: Any) -> Any:
    """Of moments, and of the gradients that they are updated with."""
    if not setup.zero:
        return specs
    return mesh_lib.spread(
        shapes,
        specs,
        setup.data_shards,
        setup.mesh.shape[mesh_lib.ITEM],
    )


def init_state(setup: TrainSetup, seed: int) -> TrainState:
    """First state, initialised sharded: no unsharded copy ever exists."""

    def init(key_data: jax.Array) -> TrainState:
        return first_state(setup, jax.random.wrap_key_data(key_data))

    place = state_shardings(setup)
    return jax.jit(init, out_shardings=place)(_host_key(jax.random.key, seed))


def _host_key(make: Callable[[int], jax.Array], seed: int) -> np.ndarray:
    """Key data on the host: one device is not those of all processes."""
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(make(seed)))


def step_key(seed: int, place: NamedSharding | None = None) -> jax.Array:
    """Key from which every step's key is folded; not the initialiser's.

    Args:
      seed: of the run.
      place: where it is to lie; None for the default device.
    """
    if place is None:
        return jax.random.fold_in(jax.random.key(seed), 1)
    wrap = jax.jit(jax.random.wrap_key_data, out_shardings=place)
    return wrap(_host_key(step_key, seed))


_REPLICATED = P()
_BATCH_SPEC = SparseBatch(*(P(mesh_lib.DATA),) * 3)


def _sum_over_users(x: jax.Array, spec: P) -> jax.Array:
    """All of the sum, or this device's part where the spec divides it."""
    divided = [
        d for d, axes in enumerate(spec) if mesh_lib.DATA in (axes or ())
    ]
    if divided:
        [dimension] = divided
        return lax.psum_scatter(
            x, mesh_lib.DATA, scatter_dimension=dimension, tiled=True
        )
    return lax.psum(x, mesh_lib.DATA)


def _local_gradients(
    setup: TrainSetup,
    gradient_specs: Any,
    params: Any,
    batch: SparseBatch,
    key_data: jax.Array,
    kl_weight: jax.Array,
    scale: jax.Array,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Gradients of the mean loss, and sums, on one device's part.

    The microbatches' gradients are summed here, and over the devices once,
    to what `gradient_specs` say of each.

    Returns:
      (gradients of `problem.trained_part`, (users, nll, kl) and, where γ
      weighs it, the weighted kl).
    """
    axes = (mesh_lib.DATA,) if setup.data_shards > 1 else ()
    n_local = batch.count_B.shape[0]
    parts = setup.parts(n_local * setup.data_shards) // setup.data_shards
    if n_local % parts:
        raise ValueError(
            f"{n_local} users a device are not {parts} microbatches: pad them"
        )
    size = n_local // parts
    first_row = lax.axis_index(mesh_lib.DATA) * n_local if axes else 0
    users = jnp.sum((batch.count_B > 0).astype(jnp.float32))
    users = lax.psum(users, axes) if axes else users
    by_part = jax.tree.map(lambda x: x.reshape(parts, -1), batch)
    # Marked, the gradient is this device's share: summed below, not at once.
    own_params = vary(setup.trained_part(params), axes)
    gamma = setup.loss.gamma
    by_items = not losses.is_left_out(gamma)

    def loss_of(
        trained: Any, part: SparseBatch, first_row: jax.Array | int
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        terms: Any = setup.model.apply(
            {"params": {**params, **trained}},
            part,
            jax.random.wrap_key_data(key_data),
            first_row,
            method="loss_terms",
        )
        nll_B, kl_B = terms
        nll = jnp.sum(nll_B)
        kl = jnp.sum(kl_B * (part.count_B > 0).astype(jnp.float32))
        sums: tuple[jax.Array, ...] = (nll, kl)
        weighted = kl_weight * kl
        if by_items:
            # Shenbin et al. 2020, section 3.3: γ times the user's items.
            annealed = weighted
            weighted = gamma * jnp.sum(kl_B * part.count_B.astype(jnp.float32))
            if isinstance(gamma, jax.Array):
                weighted = jnp.where(gamma == 0, annealed, weighted)
            sums = (nll, kl, weighted)
        mean = (nll + weighted) / jnp.maximum(users, 1.0)
        return mean * scale, sums

    gradients_of = jax.grad(loss_of, has_aux=True)

    def add(m: Any, sums: Any) -> Any:
        part = jax.tree.map(lambda x: x[m], by_part)
        more = gradients_of(own_params, part, first_row + m * size)
        return jax.tree.map(jnp.add, sums, more)

    if parts == 1:
        grads, terms = gradients_of(
            own_params, jax.tree.map(lambda x: x[0], by_part), first_row
        )
    else:
        zeros = jax.tree.map(
            lambda x: vary(jnp.zeros(x.shape, x.dtype), varying_axes(x)),
            own_params,
        )
        none = (vary(jnp.float32(0), axes),) * (3 if by_items else 2)
        grads, terms = lax.fori_loop(0, parts, add, (zeros, none))
    if axes:
        dtypes = jax.tree.map(lambda g: g.dtype, grads)
        grads = jax.tree.map(lambda g: g.astype(setup.reduce_dtype), grads)
        grads = jax.tree.map(_sum_over_users, grads, gradient_specs)
        grads = jax.tree.map(lambda g, dtype: g.astype(dtype), grads, dtypes)
        terms = lax.psum(terms, axes)
    return grads, (users, *terms)


def gradients(
    setup: TrainSetup,
    params: Any,
    batch: SparseBatch,
    key: jax.Array,
    step: jax.Array,
    scale: jax.Array | float = 1.0,
) -> tuple[Any, StepMetrics]:
    """Gradients of the annealed negative ELBO, mean over the real users.

    loss = 1/B Σ_u (nll_u + β_step KL_u) + weight_decay Σ |W|², Liang et al.
    2018, equation 7 with the weight β of section 2.2.2.

    Args:
      setup: static.
      params: parameters.
      batch: global batch, the concatenation of `problem.parts` batches.
      key: of this step.
      step: int32, global step: the KL's weight is a function of it.
      scale: the gradients are of the loss times this.

    Returns:
      (gradients of the parameters that are trained, this step's Totals,
      unscaled).
    """
    weight = losses.anneal_weight(
        step,
        cap=setup.loss.anneal_cap,
        total_steps=setup.loss.total_anneal_steps,
    )
    specs = mesh_lib.specs(params, mult_vae.PARTITION)
    trained = setup.trained_part(params)
    gradient_specs = _moment_specs(setup, trained, setup.trained_part(specs))
    by_items = not losses.is_left_out(setup.loss.gamma)
    grads, (users, nll, kl, *by_gamma) = mesh_lib.on_mesh(
        setup.mesh,
        functools.partial(_local_gradients, setup, gradient_specs),
        in_specs=(specs, _BATCH_SPEC, P(), P(), P()),
        out_specs=(gradient_specs, (P(),) * (4 if by_items else 3)),
    )(params, batch, jax.random.key_data(key), weight, jnp.float32(scale))
    weighted = by_gamma[0] if by_gamma else weight * kl
    loss = (nll + weighted) / jnp.maximum(users, 1.0)
    rate = setup.loss.weight_decay
    if not losses.is_left_out(rate):
        norm, slope = jax.value_and_grad(losses.squared_norm_of_kernels)(
            trained
        )
        loss += rate * norm
        grads = jax.tree.map(lambda g, s: g + scale * rate * s, grads, slope)
    return grads, StepMetrics(loss * users, nll, kl, users)


def train_step(
    setup: TrainSetup, state: TrainState, batch: SparseBatch, key: jax.Array
) -> tuple[TrainState, StepMetrics]:
    """One update.

    Args:
      setup: static.
      state: before the step.
      batch: global batch, the concatenation of `problem.parts` batches.
      key: `step_key(seed)`; the step number is folded in here.

    Returns:
      (state after the step, the step's Totals).
    """
    grads, totals = gradients(
        setup,
        state.params,
        batch,
        jax.random.fold_in(key, state.step),
        state.step,
        loss_scale.scale_of(state.opt_state),
    )
    trained = setup.trained_part(state.params)
    updates, opt_state = setup.tx.update(grads, state.opt_state, trained)
    params = {**state.params, **optax.apply_updates(trained, updates)}
    return TrainState(state.step + 1, params, opt_state, state.average), totals


def assemble(
    setup: TrainSetup,
    csr: sparse_batch.Csr,
    user_B: jax.Array,
    n_slots: int,
    csr_spec: P = _REPLICATED,
) -> SparseBatch:
    """Global batch from interactions on the device.

    Args:
      setup: static.
      csr: all training interactions; or, by data shard, those of its users.
      user_B: int32 [batch_size], users, numbered as in `csr`.
      n_slots: static slots of a microbatch.
      csr_spec: PartitionSpec of csr's arrays.
    """
    parts = setup.parts(user_B.shape[0]) // setup.data_shards

    def local(csr: sparse_batch.Csr, user_B: jax.Array) -> SparseBatch:
        by_part = [
            sparse_batch.assemble(csr, part_B, n_slots)
            for part_B in jnp.split(user_B, parts)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *by_part)

    return mesh_lib.on_mesh(
        setup.mesh,
        local,
        in_specs=(csr_spec, P(mesh_lib.DATA)),
        out_specs=_BATCH_SPEC,
    )(csr, user_B)


def train_steps(
    setup: TrainSetup,
    n_slots: int,
    csr_spec: P,
    state: TrainState,
    csr: sparse_batch.Csr,
    order_SB: jax.Array,
    key: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """Steps start .. stop-1 in one dispatch.

    The bounds are traced, so every stretch of an epoch runs the same program.

    Args:
      setup: static.
      n_slots: static slots of a microbatch.
      csr_spec: as `assemble`'s.
      state: before.
      csr: as `assemble`'s.
      order_SB: int32 [steps, batch_size], the users of each batch.
      key: `step_key(seed)`.
      start: int32, first step, a row of order_SB.
      stop: int32, one past the last.

    Returns:
      (state after, Totals of every step, [steps]; 0 for steps not taken).
    """
    n_steps = order_SB.shape[0]

    def body(
        i: jax.Array, carry: tuple[TrainState, StepMetrics]
    ) -> tuple[TrainState, StepMetrics]:
        state, taken = carry
        batch = assemble(setup, csr, order_SB[i], n_slots, csr_spec)
        state, totals = train_step(setup, state, batch, key)
        return state, jax.tree.map(lambda x, v: x.at[i].set(v), taken, totals)

    none = StepMetrics(
        *(jnp.zeros(n_steps, jnp.float32) for _ in StepMetrics._fields)
    )
    return lax.fori_loop(start, stop, body, (state, none))
