"""A population: one step for runs that differ in numbers, not in shapes.

Every member is a run of its own, with its own parameters, moments, seed and
order of users; what differs between them is an argument of one compiled
program. A member computes what it would compute alone, to rounding.

The program takes members in one of two ways, `Population.stacked`:

- stacked: arrays get a leading axis of members (`jax.vmap`), and a step is one
  of all members. Small products become few large ones, which is what an
  accelerator wants.
- not stacked: the program is of one member, and members go through it at the
  same time, from as many threads as there are cores. A CPU is slower with
  stacked arrays: a loop whose length differs between members (the gathered
  input layer's) copies its sums in every turn, and the states of all members,
  which no cache holds, are copied in every dispatch. On two cores, beside
  separate runs: 0.5 to 0.9 times the speed stacked, 0.4 to 1 with `lax.map`
  over stacked arrays, 1.3 to 1.5 from threads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vaecf.config import Config, flatten
from vaecf.errors import VaecfError
from vaecf.models import bag_of_items, sparse_batch
from vaecf.models.mult_vae import Phase
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.training import input_pipeline, loss_scale
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.state import TrainState
from vaecf.training.step import StepMetrics

# What the program can take as arguments, as the step does in float32.
NUMBERS = (
    "optimizer.learning_rate",
    "loss.anneal_cap",
    "loss.total_anneal_steps",
    "loss.gamma",
    "loss.weight_decay",
    "model.dropout_rate",
)
# What members may differ in.
VARIED = ("seed", *NUMBERS)


def check(members: Sequence[Config]) -> None:
    """Refuses runs that are not one program on one device.

    Raises:
      VaecfError: no members, a key that makes another program, more than one
        device or process, or interactions that are not on the device.
    """
    if not members:
        raise VaecfError("a population needs at least one member")
    flats = [flatten(config.to_dict()) for config in members]
    for key in flats[0]:
        if key in VARIED:
            continue
        for flat in flats[1:]:
            if flat[key] != flats[0][key]:
                raise VaecfError(
                    f"config.{key} is {flats[0][key]!r} and {flat[key]!r} in "
                    "one population: it changes the program or the shapes of "
                    "its arrays, so train separate runs; members may differ "
                    f"in {', '.join(VARIED)}"
                )
    config = members[0]
    if config.train.epochs < 1:
        raise VaecfError(
            f"config.train.epochs={config.train.epochs} must be at least 1 "
            "for a population"
        )
    if not processes.alone():
        raise VaecfError(
            "a population is trained by one process: start it alone, with "
            "--num_processes=1"
        )
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    if mesh.size > 1:
        raise VaecfError(
            f"a population is trained on one device, and this mesh has "
            f"{mesh.size}: give --config.mesh.data=1 --config.mesh.item=1"
        )
    if config.data.feed == "streamed":
        raise VaecfError(
            "config.data.feed='streamed' is not for a population, whose "
            "interactions are on the device: give 'resident' or 'auto'"
        )


def varied_numbers(members: Sequence[Config]) -> dict[str, Any]:
    """Those of `NUMBERS` in which members differ, arrays [M] of the host.

    Of dropout rates a `bag_of_items.TracedRate`. What all have in common stays part
    of the program, as in a separate run.
    """
    found: dict[str, Any] = {}
    flats = [flatten(config.to_dict()) for config in members]
    for key in NUMBERS:
        values = [flat[key] for flat in flats]
        if len(set(values)) == 1:
            continue
        if key == "model.dropout_rate":
            rates = [bag_of_items.traced_rate(value) for value in values]
            found[key] = jax.tree.map(lambda *x: np.stack(x), *rates)
        else:
            found[key] = np.array(values, np.float32)
    return found


def with_numbers(config: Config, numbers: Mapping[str, Any]) -> Config:
    """Options with traced scalars in the place of some numbers.

    They go to `step.make_setup`, inside a traced function only.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in numbers.items():
        section, leaf = key.split(".")
        sections.setdefault(section, {})[leaf] = value
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **changes)
            for name, changes in sections.items()
        },
    )


class Epoch(NamedTuple):
    """An epoch of all members.

    Attributes:
      number: counted from 0.
      n_slots: slots of a microbatch.
      orders: int32 [steps, batch_size] on the device, of each member; stacked
        it is one array [M, steps, batch_size], and without the M if all have
        one seed.
    """

    number: int
    n_slots: int
    orders: Any


class _Programs:
    """What is compiled, and how long that took; members may leave."""

    def __init__(self) -> None:
        self.compiled: dict[Any, Any] = {}
        self.seconds = 0.0


class Population:
    """Trains members in one program; see the module.

    States are those of all members, as `join` gives them.

    Attributes:
      members: their options.
      setup: static part of the first; for scoring, that of all.
      n_users: training users.
      steps: an epoch.
      stacked: whether members are an axis of the arrays.
    """

    def __init__(
        self,
        members: Sequence[Config],
        n_items: int,
        train: Any,
        *,
        stacked: bool | None = None,
    ) -> None:
        """Places the interactions on the device.

        Args:
          members: that passed `check`.
          n_items: of the catalogue.
          train: Interactions.
          stacked: None for what is faster on this device.

        Raises:
          VaecfError: there are no training users, or options that do not fit
            the model.
        """
        if train.n_users == 0:
            raise VaecfError("the dataset has no training users")
        self.members = tuple(members)
        config = self.members[0]
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        self.setup = state_lib.make_setup(config, n_items, mesh)
        # A batch beyond the users would be padding and change nothing.
        self.n_users = train.n_users
        self._batch_size = min(config.train.batch_size, train.n_users)
        self.steps = input_pipeline.steps_per_epoch(
            train.n_users, self._batch_size, config.train.drop_remainder
        )
        if stacked is None:
            stacked = jax.default_backend() != "cpu"
        self.stacked = stacked
        self._counts = np.append(train.counts, 0)
        self._place = mesh_lib.shardings(mesh, P())
        csr = sparse_batch.as_csr(train.indptr, train.indices)
        self._csr = jax.device_put(csr, self._place)
        numbers = varied_numbers(self.members)
        self._numbers = [
            jax.tree.map(lambda x, m=m: x[m], numbers)
            for m in range(len(self.members))
        ]
        self._keys = [
            np.asarray(jax.random.key_data(state_lib.step_key(m.seed)))
            for m in self.members
        ]
        self._programs = _Programs()

    @property
    def compile_seconds(self) -> float:
        """Spent on tracing and compilation so far."""
        return self._programs.seconds

    def only(self, kept: Sequence[int]) -> Population:
        """The population of some of its members, with the same programs."""
        smaller = copy.copy(self)
        smaller.members = tuple(self.members[m] for m in kept)
        smaller._numbers = [self._numbers[m] for m in kept]
        smaller._keys = [self._keys[m] for m in kept]
        return smaller

    # --- States -------------------------------------------------------------

    def first_states(self) -> list[TrainState]:
        """Every member's first state."""

        def init(key_data: jax.Array) -> TrainState:
            key = jax.random.wrap_key_data(key_data)
            return state_lib.first_state(self.setup, key)

        program = jax.jit(
            init, out_shardings=state_lib.state_shardings(self.setup)
        )
        return [
            program(np.asarray(jax.random.key_data(jax.random.key(m.seed))))
            for m in self.members
        ]

    def join(self, states: Sequence[TrainState]) -> Any:
        """Members' states as `run` takes them: [M, ...] arrays if stacked."""
        if not self.stacked:
            return list(states)
        join = jax.jit(
            lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees),
            out_shardings=self._place,
        )
        return join(*states)

    def state_of(self, states: Any, m: int) -> TrainState:
        """One member's state."""
        return self._part(states, m) if self.stacked else states[m]

    def params_of(self, states: Any, m: int) -> Any:
        """One member's parameters, for scoring."""
        params = state_lib.scoring_params(
            self.setup, states if self.stacked else states[m]
        )
        return self._part(params, m) if self.stacked else params

    def loss_scale_of(self, states: Any, m: int) -> Any:
        """One member's `loss_scale.LossScaleState` without moments, or ()."""
        state = (states if self.stacked else states[m]).opt_state
        if not isinstance(state, loss_scale.LossScaleState):
            return ()
        state = state._replace(inner=())
        return self._part(state, m) if self.stacked else state

    def _part(self, tree: Any, m: int) -> Any:
        return jax.tree.map(lambda x: x[m], tree)

    def begin_phase(self, states: Any, phase: Phase) -> Any:
        """`state.begin_phase` of every member."""
        if self.stacked:
            return state_lib.begin_phase(self.setup, states, phase)
        return [state_lib.begin_phase(self.setup, s, phase) for s in states]

    def average(self, states: Any, decay: float, epochs: int) -> Any:
        """`step.average` of every member."""
        if self.stacked:
            return state_lib.update_average(states, decay, epochs)
        return [state_lib.update_average(s, decay, epochs) for s in states]

    # --- Training -----------------------------------------------------------

    def phase(self, epoch: int) -> Phase:
        """What an epoch trains."""
        alternating = self.members[0].train.alternating_epochs
        return self.setup.model.phase(epoch, alternating)

    def prepare(self, number: int) -> Epoch:
        """The epoch of that number, of each member as of a separate run."""
        config = self.members[0].train
        seeds = [m.seed for m in self.members]
        orders = {
            seed: input_pipeline.epoch_order(
                seed,
                number,
                self.n_users,
                self._batch_size,
                drop_remainder=config.drop_remainder,
                parts=self.setup.parts(self._batch_size),
            )
            for seed in seeds
        }
        n_slots = max(
            input_pipeline.slots(self._counts, order, self.setup)
            for order in orders.values()
        )
        if self.stacked:
            one = len(orders) == 1
            order = orders[seeds[0]]
            stack = order if one else np.stack([orders[s] for s in seeds])
            return Epoch(number, n_slots, jax.device_put(stack, self._place))
        placed = jax.device_put(orders, self._place)
        return Epoch(number, n_slots, [placed[s] for s in seeds])

    def run(
        self, states: Any, epoch: Epoch, start: int, stop: int
    ) -> tuple[Any, StepMetrics]:
        """Steps start .. stop-1 of all members; waits for the device.

        Args:
          states: as of `join`; donated.
          epoch: of `prepare`.
          start: first step.
          stop: one past the last.

        Returns:
          (states after, Totals on the host, float32 [M, stop - start]).
        """
        bounds = jax.device_put((np.int32(start), np.int32(stop)), self._place)
        if self.stacked:
            states, totals = self._run_stacked(states, epoch, bounds)
        else:
            states, totals = self._run_beside(states, epoch, bounds)
        return states, StepMetrics(*(x[:, start:stop] for x in totals))

    def _run_stacked(
        self, states: Any, epoch: Epoch, bounds: Any
    ) -> tuple[Any, StepMetrics]:
        # With one seed, batches and noise are the same for all, and are not
        # computed again for each.
        one_seed = epoch.orders.ndim == 2
        numbers = jax.tree.map(lambda *x: np.stack(x), *self._numbers)
        args = (
            numbers,
            states,
            epoch.orders,
            self._keys[0] if one_seed else np.stack(self._keys),
            self._csr,
            *bounds,
        )
        axes = (0, 0, *((None, None) if one_seed else (0, 0)), None, None, None)
        states, totals = self._compiled(epoch, args, axes)(*args)
        return states, jax.device_get(totals)

    def _run_beside(
        self, states: list[TrainState], epoch: Epoch, bounds: Any
    ) -> tuple[list[TrainState], StepMetrics]:
        arguments = [
            (numbers, state, order, key, self._csr, *bounds)
            for numbers, state, order, key in zip(
                self._numbers, states, epoch.orders, self._keys, strict=True
            )
        ]
        program = self._compiled(epoch, arguments[0], None)

        def run(args: tuple) -> tuple[TrainState, StepMetrics]:
            state, totals = program(*args)
            return state, jax.device_get(totals)  # waits

        with futures.ThreadPoolExecutor(_cores(), "vaecf-member") as threads:
            done = list(threads.map(run, arguments))
        totals = [totals for _, totals in done]
        return (
            [state for state, _ in done],
            StepMetrics(*(np.stack(x) for x in zip(*totals, strict=True))),
        )

    def _compiled(self, epoch: Epoch, args: tuple, axes: Any) -> Any:
        """The program of such an epoch, `jax.vmap` over `axes` if given."""
        phase = self.phase(epoch.number)
        shapes = tuple(x.shape for x in jax.tree.leaves(args[2:4]))
        key = (phase, epoch.n_slots, args[1].step.shape, shapes)
        if key not in self._programs.compiled:
            began = time.perf_counter()
            steps = functools.partial(
                self._train_steps, epoch.number, epoch.n_slots
            )
            place = state_lib.state_shardings(self.setup)
            if axes is not None:
                steps = jax.vmap(steps, in_axes=axes)
                place = self._place
            self._programs.compiled[key] = (
                jax.jit(
                    steps,
                    donate_argnums=1,
                    out_shardings=(place, self._place),
                )
                .lower(*args)
                .compile()
            )
            self._programs.seconds += time.perf_counter() - began
        return self._programs.compiled[key]

    def _train_steps(
        self,
        number: int,
        n_slots: int,
        numbers: Mapping[str, Any],
        state: TrainState,
        order: jax.Array,
        key_data: jax.Array,
        csr: sparse_batch.Csr,
        start: jax.Array,
        stop: jax.Array,
    ) -> tuple[TrainState, StepMetrics]:
        """`step.train_steps` of one member, its numbers traced."""
        config = self.members[0]
        setup = state_lib.make_setup(
            with_numbers(config, numbers),
            self.setup.model.n_items,
            self.setup.mesh,
        )
        return step_lib.train_steps(
            setup.in_phase(self.phase(number)),
            n_slots,
            P(),
            state,
            csr,
            order,
            jax.random.wrap_key_data(key_data),
            start,
            stop,
        )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
