"""Populations: several runs trained together in one compiled program.

Members of a population differ only in their seed and in numbers that the
program takes as arguments (`VARIED`). A member computes what a separate run
computes, to rounding, but has no checkpoint to resume from.

On a CPU the members share the program, and each core trains one of them. An
accelerator prefers few large products over many small ones, so there
`jax.vmap` stacks the arrays of all members. A CPU is slower with stacked
arrays: 0.5 to 0.9 times the speed of separate runs on two cores, against 1.3
to 1.5 times with threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import bag_of_items, sparse_batch
from vaecf.models.mult_vae import Phase
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting.progress import Progress
from vaecf.reporting.writers import JsonlWriter
from vaecf.serving import trained_model
from vaecf.training import (
    input_pipeline,
    linear_branch,
    loop,
    signals,
    spectral_init,
)
from vaecf.training import progress as progress_lib
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, Checkpoints
from vaecf.training.progress import TrainProgress
from vaecf.training.state import TrainState
from vaecf.training.step import StepMetrics

# Numbers that the program takes as arguments, in float32.
_NUMBERS = (
    "optimizer.learning_rate",
    "loss.anneal_cap",
    "loss.total_anneal_steps",
    "loss.gamma",
    "loss.weight_decay",
    "model.dropout_rate",
)
# The settings in which members may differ.
VARIED = ("seed", *_NUMBERS)


@dataclasses.dataclass
class MemberResult:
    """What became of a member.

    Attributes:
      config: settings of the member.
      progress: epochs, best value and training time; the time is the member's
        share of that of the population.
      params: best parameters for scoring, NumPy arrays; those of the last
        epoch if there are no validation users.
      best_step: steps after which `params` were taken.
      best_progress: `progress` at that time, for the checkpoint.
      records: (step, metrics) of every epoch and validation.
      summary: summary of the training, see `progress.summarise`.
      error: why the member failed, or None.
      stopped: whether `on_validation` has stopped the member.
    """

    config: Config
    progress: TrainProgress = dataclasses.field(default_factory=TrainProgress)
    params: Any = None
    best_step: int = 0
    best_progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    records: list[tuple[int, dict]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    stopped: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return (
            self.error is not None
            or self.stopped
            or self.progress.epoch >= self.config.train.epochs
            or self.progress.out_of_patience(self.config.eval.patience)
        )


@dataclasses.dataclass
class _Member:
    """A member in training: its result, its state, and its arguments."""

    result: MemberResult
    state: TrainState
    numbers: dict[str, Any]
    key_data: np.ndarray


def check_settings(keys: Iterable[str]) -> None:
    """Raises VaecfError if a setting must not vary within a population."""
    for key in keys:
        if key not in VARIED:
            raise VaecfError(
                f"{key} changes the program or the shapes of its arrays, so "
                "it must not vary within a population: train separate runs, "
                f"or vary only {', '.join(VARIED)}"
            )


def check(configs: Sequence[Config]) -> None:
    """Checks that runs can be trained in one program on one device.

    Raises:
      VaecfError: there is no member, a setting must not vary, or there is
        more than one device or process.
    """
    if not configs:
        raise VaecfError("a population needs at least one member")
    first, *others = [config_lib.flatten(c.to_dict()) for c in configs]
    check_settings(
        key
        for key, value in first.items()
        if any(other[key] != value for other in others)
    )
    config = configs[0]
    if config.train.epochs < 1:
        raise VaecfError(
            f"config.train.epochs={config.train.epochs} must be at least 1 "
            "for a population"
        )
    if not processes.alone():
        raise VaecfError(
            "a population is trained by one process: set num_processes=1"
        )
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    if mesh.size > 1:
        raise VaecfError(
            f"a population is trained on one device, and the mesh has "
            f"{mesh.size}: set config.mesh.data=1 and config.mesh.item=1"
        )
    if config.data.feed == "streamed":
        raise VaecfError(
            "config.data.feed='streamed' is not possible for a population, "
            "which keeps the interactions on the device: use 'resident'"
        )


def train_members(
    configs: Sequence[Config],
    dataset: Dataset,
    *,
    linear: dict[str, Any] | None = None,
    on_validation: Callable[[int, Mapping[str, Any]], bool] | None = None,
    stacked: bool | None = None,
    show_progress: bool | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[MemberResult]:
    """Trains runs together and returns their results, in the same order.

    Args:
      configs: settings of the members; they may differ in `VARIED`.
      dataset: its validation users choose the best epoch of each member.
      linear: linear branch of blends, the same for all members.
      on_validation: called with the index of a member and the metrics of a
        validation; a member stops if it returns False.
      stacked: whether to stack members; None for True on accelerators.
      show_progress: None for True if stderr is a terminal.
      log: receives one line of text at a time.

    Raises:
      VaecfError: the members are not a population, see `check`.
    """
    check(configs)
    config = configs[0]
    program = _Program(config, dataset.train, dataset.n_items, stacked)
    members = _first_members(program, configs)
    if config.model.init == "spectral":
        states = spectral_init.start(
            [member.state for member in members],
            [c.seed for c in configs],
            dataset.train,
            pathlib.Path(),  # of one process, nothing is written
            log=log,
        )
        for member, state in zip(members, states, strict=True):
            member.state = state
    validate = loop.make_validator(config, dataset, program.setup, linear)
    clock, group = signals.Clock(), members
    with Progress(
        config.train.epochs, program.steps, enabled=show_progress
    ) as progress:
        for epoch in range(config.train.epochs):
            active = [m for m in group if not m.result.is_finished]
            if not active:
                break
            # Stacked, fewer members are another program to compile.
            if not program.stacked or 2 * len(active) <= len(group):
                group = active
            _train_epoch(program, group, epoch, clock, progress)
            for index, member in enumerate(members):
                if not member.result.is_finished:
                    record = _end_epoch(program, member, validate)
                    if record and on_validation is not None:
                        go_on = on_validation(index, record)
                        member.result.stopped = not go_on
    for member in members:
        if member.result.error is None:
            summary = progress_lib.summarise(
                member.result.progress, program, config, program.setup.mesh
            )
            member.result.summary = {**summary, "members": len(members)}
    return [member.result for member in members]


def _train_epoch(
    program: _Program,
    group: Sequence[_Member],
    epoch: int,
    clock: signals.Clock,
    progress: Progress,
) -> None:
    """Trains all members of the group for an epoch."""
    train = program.config.train
    for member in group:
        member.state = state_lib.begin_phase(
            program.setup, member.state, program.phase(epoch)
        )
    orders, n_slots = program.orders(group, epoch)
    start = 0
    while start < program.steps:
        stop = clock.next_stop(start, program.steps)
        compiled_before = program.compile_seconds
        began = time.perf_counter()
        metrics = program.run(group, epoch, orders, n_slots, start, stop)
        seconds = time.perf_counter() - began
        seconds -= program.compile_seconds - compiled_before
        clock.ran(stop - start, seconds)
        for member, own in zip(group, metrics, strict=True):
            result = member.result
            if result.is_finished:
                continue
            try:
                progress_lib.check_health(
                    result.config, member.state.opt_state, own, result.progress
                )
            except VaecfError as error:
                result.error = str(error)
            else:
                result.progress.add(own, seconds / len(group), train)
        users = sum(float(own.users.sum()) for own in metrics)
        losses = [own.loss.sum() / own.users.sum() for own in metrics]
        finite = np.array(losses)[np.isfinite(losses)]
        progress.update(
            epoch=epoch + 1,
            step_in_epoch=stop,
            loss=float(finite.mean()) if len(finite) else None,
            users_per_second=users / seconds,
        )
        start = stop
    for member in group:
        member.state = state_lib.update_average(member.state, train.ema, epoch)


def _end_epoch(
    program: _Program,
    member: _Member,
    validate: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """Records an epoch; returns the metrics of a validation if one is due."""
    config, result = program.config, member.result
    record = progress_lib.training_record(
        result.config, member.state.opt_state, result.progress, program.steps
    )
    result.progress.next_epoch()
    epoch = result.progress.epoch
    step = epoch * program.steps
    result.records.append((step, record))
    last = epoch == config.train.epochs
    if not last and epoch % config.eval.every_epochs:
        return {}
    params = state_lib.scoring_params(program.setup, member.state)
    record = validate(params)
    if record:
        record = {"epoch": epoch, **record}
        result.records.append((step, record))
        value = record[f"validation/{config.eval.best_metric}"]
    if result.progress.validated(value) if record else last:
        # A copy: the next epoch overwrites the arrays of the state.
        result.params = jax.tree.map(np.array, params)
        result.best_step = step
        result.best_progress = dataclasses.asdict(result.progress)
    return record


class _Program:
    """The training steps that all members share, compiled once.

    Attributes:
      config: settings of the first member.
      setup: static part of its run.
      stacked: whether the program takes all members at once.
      steps: steps per epoch.
      compile_seconds: time spent on compilation so far.
    """

    def __init__(
        self, config: Config, train: Any, n_items: int, stacked: bool | None
    ) -> None:
        if train.n_users == 0:
            raise VaecfError("the dataset has no training users")
        feed, why = config.data.feed, ""
        if feed == "auto":
            feed, why = input_pipeline.choose(train)
        if feed != "resident":
            raise VaecfError(
                f"a population keeps the interactions on the device: {why}; "
                "train separate runs"
            )
        self.config = config
        if stacked is None:
            stacked = jax.default_backend() != "cpu"
        self.stacked = stacked
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        self.setup = state_lib.make_setup(config, n_items, mesh)
        self._batch_size = min(config.train.batch_size, train.n_users)
        self.steps = input_pipeline.steps_per_epoch(
            train.n_users, self._batch_size, config.train.drop_remainder
        )
        self._counts = np.append(train.counts, 0)
        self._place = mesh_lib.shardings(mesh, P())
        self._csr = jax.device_put(
            sparse_batch.as_csr(train.indptr, train.indices), self._place
        )
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def phase(self, epoch: int) -> Phase:
        """Returns what an epoch trains."""
        return self.setup.model.phase(epoch, self.config.train)

    def orders(
        self, members: Sequence[_Member], epoch: int
    ) -> tuple[dict[int, jax.Array], int]:
        """Returns the users of every batch by seed, and a microbatch's slots.

        Each seed has the batches of its separate run.
        """
        orders = {
            seed: input_pipeline.epoch_order(
                seed,
                epoch,
                len(self._counts) - 1,
                self._batch_size,
                drop_remainder=self.config.train.drop_remainder,
                parts=self.setup.parts(self._batch_size),
            )
            for seed in {member.result.config.seed for member in members}
        }
        n_slots = max(
            input_pipeline.slots(self._counts, order, self.setup)
            for order in orders.values()
        )
        return jax.device_put(orders, self._place), n_slots

    def run(
        self,
        members: Sequence[_Member],
        epoch: int,
        orders: Mapping[int, jax.Array],
        n_slots: int,
        start: int,
        stop: int,
    ) -> list[StepMetrics]:
        """Takes steps start .. stop-1 of all members and waits for them.

        Returns:
          Metrics of every member, float32 [stop - start] on the host.
        """
        bounds = (np.int32(start), np.int32(stop))
        shared = (self._csr, *jax.device_put(bounds, self._place))
        states = [member.state for member in members]
        owns = [
            (member.numbers, orders[member.result.config.seed], member.key_data)
            for member in members
        ]
        if self.stacked:
            program = self._compile(epoch, n_slots, states, owns, shared)
            results = program(states, owns, shared)
        else:
            program = self._compile(epoch, n_slots, states[0], owns[0], shared)

            def run(state: TrainState, own: Any) -> Any:
                return jax.block_until_ready(program(state, own, shared))

            with futures.ThreadPoolExecutor(_n_cores(), "member") as threads:
                results = list(threads.map(run, states, owns))
        for member, (state, _) in zip(members, results, strict=True):
            member.state = state
        return [
            StepMetrics(*(np.asarray(x)[start:stop] for x in metrics))
            for _, metrics in results
        ]

    def _compile(self, epoch: int, n_slots: int, *arguments: Any) -> Any:
        """Returns the program for an epoch like this one."""
        phase = self.phase(epoch)
        n_members = len(arguments[0]) if self.stacked else 1
        key = (phase.group, n_slots, n_members)
        if key in self._compiled:
            return self._compiled[key]
        began = time.perf_counter()

        def steps(state: TrainState, own: Any, shared: Any) -> Any:
            numbers, order_SB, key_data = own
            csr, start, stop = shared
            setup = state_lib.make_setup(
                _with_numbers(self.config, numbers),
                self.setup.model.n_items,
                self.setup.mesh,
            )
            return step_lib.train_steps(
                setup.in_phase(phase),
                n_slots,
                P(),
                state,
                csr,
                order_SB,
                jax.random.wrap_key_data(key_data),
                start,
                stop,
            )

        def all_steps(states: Any, owns: Any, shared: Any) -> Any:
            every_member = jax.vmap(steps, in_axes=(0, 0, None))
            results = every_member(_stack(states), _stack(owns), shared)
            return [
                jax.tree.map(lambda x, m=m: x[m], results)
                for m in range(n_members)
            ]

        place: Any = (state_lib.state_shardings(self.setup), self._place)
        program = jax.jit(
            all_steps if self.stacked else steps,
            donate_argnums=0,
            out_shardings=[place] * n_members if self.stacked else place,
        )
        self._compiled[key] = program.lower(*arguments).compile()
        self.compile_seconds += time.perf_counter() - began
        return self._compiled[key]


def _first_members(
    program: _Program, configs: Sequence[Config]
) -> list[_Member]:
    """Returns the members with the initial states of their separate runs."""
    numbers: dict[str, list[Any]] = {}
    for key in _NUMBERS:
        values = [config_lib.flatten(c.to_dict())[key] for c in configs]
        # What all members share remains a constant of the program.
        if len(set(values)) > 1:
            if key == "model.dropout_rate":
                numbers[key] = [bag_of_items.traced_rate(v) for v in values]
            else:
                numbers[key] = [np.float32(v) for v in values]
    return [
        _Member(
            MemberResult(config),
            state_lib.init_state(program.setup, config.seed),
            {key: values[m] for key, values in numbers.items()},
            np.asarray(jax.random.key_data(state_lib.step_key(config.seed))),
        )
        for m, config in enumerate(configs)
    ]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _with_numbers(config: Config, numbers: Mapping[str, Any]) -> Config:
    """Returns the config with traced scalars, which `replace` would refuse."""
    for key, value in numbers.items():
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- Directories of members -------------------------------------------------


def train_runs(
    configs: Sequence[Config],
    directories: Sequence[pathlib.Path],
    dataset: Dataset,
    *,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> list[MemberResult]:
    """Trains members and writes each of them as the workdir of a run.

    Args:
      configs: as for `train_members`.
      directories: workdirs that the caller has `locked`.
      dataset: as for `train_members`.
      log: receives one line of text at a time.
      **options: further arguments of `train_members`.
    """
    config = configs[0]
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    linear = linear_branch.prepare(
        config.linear, dataset.train, directories[0], mesh, log=log
    )
    results = train_members(configs, dataset, linear=linear, log=log, **options)
    for result, directory in zip(results, directories, strict=True):
        workdir_lib.check_or_create(directory, result.config, dataset)
        writer = JsonlWriter(directory / workdir_lib.METRICS, 0)
        with contextlib.closing(writer):
            for step, record in result.records:
                writer.write(record, step=step)
        if result.params is None:  # failed before the first validation
            continue
        if linear is not None:
            linear_branch.share(directories[0], directory)
        saved = Checkpoints(directory / workdir_lib.CHECKPOINTS)
        with contextlib.closing(saved):
            saved.save(
                BEST, result.best_step, result.params, result.best_progress
            )
        results_file = directory / workdir_lib.RESULTS
        workdir_lib.write_json(results_file, {"train": result.summary})
    return results


def tuned_value(directory: pathlib.Path, dataset: Dataset) -> float:
    """Tunes the weights of a trained blend and returns its validation value.

    During training all epochs of all runs are compared with the same weights.
    Finished runs are compared by the models that users would load.
    """
    config = workdir_lib.read_config(directory)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    model = trained_model.load(directory, mesh=mesh)
    validation = Evaluator.for_split(dataset, "validation", config.eval, mesh)
    trained_model.tune_blend(model, validation)
    return float(linear_branch.read_weights(directory)["value"])
