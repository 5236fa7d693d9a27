"""The state of training, how it is initialised and how it is sharded."""

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
from jax.sharding import Mesh, NamedSharding

from vaecf.config import Config, LossConfig
from vaecf.errors import VaecfError
from vaecf.models import mult_vae, registry
from vaecf.models.mult_vae import Phase
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import optimizers, precision


class TrainState(NamedTuple):
    """Everything that a step changes; arrays only."""

    # int32, number of steps taken, skipped ones included. PRNG keys, batch
    # order and KL annealing are functions of it.
    step: jax.Array
    params: Any  # pytree of float32 arrays
    opt_state: Any  # state of the optimiser, with the loss scale
    # Moving average of the scoring parameters, float32; None if
    # `config.train.ema` is 0.
    average: Any = None


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """Everything static that a step is compiled for; hashable."""

    # Module of one item shard, for use inside `jax.shard_map`.
    model: mult_vae.MultDAE
    tx: optax.GradientTransformation
    loss: LossConfig
    mesh: Mesh  # mesh with axes ('data', 'item')
    microbatch: int  # users whose activations a device holds at once
    # dtype in which gradients are summed over the data shards.
    reduce_dtype: Any = jnp.float32
    # Whether the optimiser moments are sharded over the data shards too (stage
    # 1 of Rajbhandari et al. 2020, "ZeRO").
    zero: bool = False
    # Whether the state holds an average of the parameters.
    averaged: bool = False
    phase: Phase = mult_vae.ALL  # what the steps train

    @property
    def whole(self) -> mult_vae.MultDAE:
        """The module over all items, for use outside `jax.shard_map`."""
        shards = self.mesh.shape[mesh_lib.ITEM]
        rows = self.model.item_rows * shards
        return self.model.clone(item_rows=rows, item_axis=None)

    @property
    def data_shards(self) -> int:
        """Number of devices along the users."""
        return self.mesh.shape[mesh_lib.DATA]

    def parts(self, batch_size: int) -> int:
        """Returns the number of microbatches of a batch, over all devices.

        A batch is padded with empty users to a multiple of this number.
        """
        on_device = math.ceil(batch_size / self.data_shards)
        return math.ceil(on_device / self.microbatch) * self.data_shards

    def in_phase(self, phase: Phase) -> TrainSetup:
        """Returns the setup of the steps of a phase."""
        phase = phase._replace(copies=())  # done before the steps
        model = self.model
        if not phase.dropout:
            model = model.clone(dropout_rate=0.0)
        return dataclasses.replace(self, model=model, phase=phase)

    def trained(self, params: Any) -> Any:
        """Returns the parameters (or specs of them) that a step changes."""
        if self.phase.group == "all":
            return params
        names = self.model.GROUPS[self.phase.group]
        return {name: params[name] for name in names}

    def moment_specs(self, shapes: Any, specs: Any) -> Any:
        """Returns the PartitionSpecs of moments and of summed gradients.

        `specs` are those of the parameters.
        """
        if not self.zero:
            return specs
        items = self.mesh.shape[mesh_lib.ITEM]
        return mesh_lib.spread(shapes, specs, self.data_shards, items)


def make_setup(
    config: Config, n_items: int, mesh: Mesh, platform: str | None = None
) -> TrainSetup:
    """Returns the setup of a run on a platform; None for that of the mesh.

    Raises:
      VaecfError: a setting does not fit the model or the device.
    """
    platform = platform or mesh_lib.platform(mesh)
    policy = precision.policy(config.precision.policy, platform)
    shards = mesh.shape[mesh_lib.ITEM]
    model = registry.make_model(config.model, policy, n_items, shards, platform)
    _check_phases(config, model)
    sum_in_fp32 = config.mesh.reduce == "fp32"
    # A CPU is faster with arrays of users x items that are not too large:
    # every dispatch allocates them, and maps their memory, anew.
    most = 1024 if platform == "cpu" else config.train.batch_size
    return TrainSetup(
        model=registry.shard_model(model, mesh),
        tx=optimizers.make_optimizer(
            *(config.optimizer, config.precision, policy),
            tuple(model.GROUPS.items()),
        ),
        loss=config.loss,
        mesh=mesh,
        microbatch=config.train.microbatch or most,
        reduce_dtype=jnp.float32 if sum_in_fp32 else policy.dtype,
        zero=config.mesh.zero,
        averaged=config.train.ema > 0,
    )


def _check_phases(config: Config, model: mult_vae.MultDAE) -> None:
    name, epochs = config.model.name, config.train.alternating_epochs
    if epochs and not model.GROUPS:
        raise VaecfError(
            f"config.train.alternating_epochs={epochs}: {name} trains all "
            "parameters together; use ()"
        )
    if model.GROUPS and not epochs:
        groups = " and the ".join(model.GROUPS)
        raise VaecfError(
            f"config.train.alternating_epochs=(): {name} needs the numbers of "
            f"epochs that train the {groups}, such as (3, 1)"
        )


# --- Initialisation ---------------------------------------------------------


def _first_state(setup: TrainSetup, key: jax.Array) -> TrainState:
    params = registry.init_params(setup.whole, key)
    state = TrainState(jnp.int32(0), params, setup.tx.init(params))
    if not setup.averaged:
        return state
    # A copy, because both are donated to the first step.
    average = jax.tree.map(jnp.copy, scoring_params(setup, state))
    return state._replace(average=average)


def init_state(setup: TrainSetup, seed: int) -> TrainState:
    """Returns the state before the first step, initialised sharded.

    No device ever holds an unsharded copy.
    """
    return _initialiser(setup)(_key_data(jax.random.key, seed))


@functools.lru_cache(maxsize=16)
def _initialiser(setup: TrainSetup) -> Callable[[np.ndarray], TrainState]:
    def init(key_data: jax.Array) -> TrainState:
        return _first_state(setup, jax.random.wrap_key_data(key_data))

    return jax.jit(init, out_shardings=state_shardings(setup))


@functools.lru_cache(maxsize=16)
def abstract_state(setup: TrainSetup) -> TrainState:
    """Returns shape and dtype of every array of the state."""
    init = functools.partial(_first_state, setup)
    return jax.eval_shape(init, jax.random.key(0))


def state_shardings(setup: TrainSetup) -> TrainState:
    """Returns the NamedSharding of every array of the state."""
    shapes = abstract_state(setup)
    specs = mesh_lib.specs(shapes, mult_vae.PARTITION)
    moments = setup.moment_specs(shapes.opt_state, specs.opt_state)
    return mesh_lib.shardings(setup.mesh, specs._replace(opt_state=moments))


def _key_data(make: Callable[[int], jax.Array], seed: int) -> np.ndarray:
    # On the host: of several processes, none can place an array on the
    # devices of another.
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(make(seed)))


def step_key(seed: int, place: NamedSharding | None = None) -> jax.Array:
    """Returns the key from which the key of every step is folded.

    It differs from the key of the initial parameters. `place` is its sharding;
    None for the default device.
    """
    if place is None:
        return jax.random.fold_in(jax.random.key(seed), 1)
    wrap = jax.jit(jax.random.wrap_key_data, out_shardings=place)
    return wrap(_key_data(step_key, seed))


# --- Between steps ----------------------------------------------------------


def scoring_params(setup: TrainSetup, state: TrainState) -> Any:
    """Returns the parameters that rank: the average if there is one."""
    params = state.params if state.average is None else state.average
    return registry.scoring_params(setup.model, params)


def begin_phase(
    setup: TrainSetup, state: TrainState, phase: Phase
) -> TrainState:
    """Returns the state with the phase's `copies` done."""
    params = dict(state.params)
    for source, target in phase.copies:
        # Not an alias: both buffers are donated to the next step.
        params[target] = _copy(setup, source)(params[source])
    return state._replace(params=params)


@functools.lru_cache(maxsize=16)
def _copy(setup: TrainSetup, source: str) -> Callable[[Any], Any]:
    places = state_shardings(setup).params[source]
    return jax.jit(
        functools.partial(jax.tree.map, jnp.copy), out_shardings=places
    )


def update_average(state: TrainState, decay: float, epoch: int) -> TrainState:
    """Returns the state with the parameters of an epoch's end averaged in.

    average = d · average + (1 - d) · params with d = min(decay,
    (1 + epoch) / (10 + epoch)): an exponential form of the averaging of
    Polyak & Juditsky 1992. The smaller weights of the first epochs forget the
    initial parameters sooner. Epochs are counted from 0.
    """
    if state.average is None:
        return state
    kept = min(decay, (1 + epoch) / (10 + epoch))
    latest = {name: state.params[name] for name in state.average}
    return state._replace(
        average=_mix(jnp.float32(kept), state.average, latest)
    )


@jax.jit
def _mix(kept: jax.Array, before: Any, latest: Any) -> Any:
    return jax.tree.map(
        lambda old, new: kept * old + (1 - kept) * new, before, latest
    )
