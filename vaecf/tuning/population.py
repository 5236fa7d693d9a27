"""Populations: runs that share one compiled program.

Members of a population differ only in their seed and in numbers that the
program takes as arguments (`VARIED`). Each member is a run of `training.loop`
in a thread of its own, and computes what a separate run computes, to rounding.
The members share the interactions on the device and the compiled steps, and as
many of them as there are cores are trained at the same time. Eight members of
configs/ml100k.py took 0.6 times as long as separate runs in one process (20
epochs on two busy cores, compilation included).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax
import numpy as np

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import bag_of_items
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.serving import trained_model
from vaecf.training import input_pipeline, linear_branch, signals
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib

T = TypeVar("T")

# Numbers that the program takes as arguments, in float32.
_NUMBERS = (
    *("optimizer.learning_rate", "loss.anneal_cap", "loss.total_anneal_steps"),
    *("loss.gamma", "loss.weight_decay", "model.dropout_rate"),
)
# The settings in which members may differ.
VARIED = ("seed", *_NUMBERS)


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
    """Raises VaecfError unless runs fit in one program on one device."""
    if not configs:
        raise VaecfError("a population needs at least one member")
    first, *others = [config_lib.flatten(c.to_dict()) for c in configs]
    check_settings(
        key
        for key, value in first.items()
        if any(other[key] != value for other in others)
    )
    config = configs[0]
    if not processes.alone():
        raise VaecfError(
            "a population is trained by one process: set num_processes=1"
        )
    if mesh_lib.make_mesh(config.mesh.data, config.mesh.item).size > 1:
        raise VaecfError(
            "a population is trained on one device: set config.mesh.data=1 "
            "and config.mesh.item=1"
        )
    if config.data.feed == "streamed":
        raise VaecfError(
            "config.data.feed='streamed' is not possible for a population, "
            "which keeps the interactions on the device: use 'resident'"
        )


def train_members(
    configs: Sequence[Config],
    directories: Sequence[pathlib.Path],
    dataset: Dataset,
    train: Callable[[int, input_pipeline.InputPipeline], T],
    *,
    log: Callable[[str], None] = lambda line: None,
) -> list[T]:
    """Trains the members of a population, each in a thread of its own.

    Args:
      configs: settings of the members; they may differ in `VARIED`.
      directories: workdirs of the members, locked by the caller.
      dataset: data to train on.
      train: called with the index of a member and the pipeline that its
        `loop.train` is to use. If one call raises, the others save and stop.
      log: receives one line of text at a time.

    Returns:
      The results of `train`, in the order of the members.

    Raises:
      VaecfError: the runs are not a population, see `check`.
      KeyboardInterrupt: the members were interrupted, with everything saved.
    """
    check(configs)
    config = configs[0]
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    # Fitted once; the loops read it from their workdirs.
    if linear_branch.prepare(
        config.linear, dataset.train, directories[0], mesh, log=log
    ):
        for directory in directories[1:]:
            linear_branch.share(directories[0], directory)
    shared = _SharedPipeline(configs, dataset)
    with (
        signals.interrupts() as interrupted,
        futures.ThreadPoolExecutor(_n_cores(), "member") as threads,
    ):
        jobs = [
            threads.submit(train, m, shared.of_member(own))
            for m, own in enumerate(configs)
        ]
        done, _ = futures.wait(jobs, return_when=futures.FIRST_EXCEPTION)
        for job in done:
            if error := job.exception():
                signal.raise_signal(signal.SIGINT)  # the others save and stop
                threads.shutdown(cancel_futures=True)
                raise error
        if interrupted():
            raise KeyboardInterrupt
    return [job.result() for job in jobs]


class _SharedPipeline(input_pipeline.ResidentPipeline):
    """A pipeline whose compiled steps take the numbers of any member."""

    def __init__(self, configs: Sequence[Config], dataset: Dataset) -> None:
        config, train = configs[0], dataset.train
        if config.data.feed == "auto":
            feed, why = input_pipeline.choose(train)
            if feed != "resident":
                raise VaecfError(
                    f"a population keeps the interactions on the device: {why}"
                    "; train separate runs"
                )
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        setup = state_lib.make_setup(config, dataset.n_items, mesh)
        super().__init__(setup, train, config.seed)
        self._config, self._lock = config, threading.Lock()
        flats = [config_lib.flatten(c.to_dict()) for c in configs]
        # Numbers that all members share remain constants of the program.
        self._varied = [k for k in _NUMBERS if len({f[k] for f in flats}) > 1]
        self._numbers: dict[str, Any] = {}

    def of_member(self, config: Config) -> _SharedPipeline:
        """Returns the pipeline of a member."""
        member = copy.copy(self)
        member._key = state_lib.step_key(config.seed, self._everywhere)
        flat = config_lib.flatten(config.to_dict())
        member._numbers = {key: np.float32(flat[key]) for key in self._varied}
        if "model.dropout_rate" in member._numbers:
            rate = bag_of_items.traced_rate(config.model.dropout_rate)
            member._numbers["model.dropout_rate"] = rate
        return member

    def _steps(
        self, state: Any, epoch: input_pipeline.Epoch, window: Any, bounds: Any
    ) -> Any:
        bounds = jax.device_put(bounds, self._everywhere)
        arguments = (
            *(state, self._numbers, window, epoch.order, self._key),
            *bounds,
        )
        began = time.perf_counter()
        key = (epoch.setup.phase, epoch.n_slots)
        with self._lock:  # the other members wait for the program
            if key not in self._programs:
                self._programs[key] = self._compile(epoch, arguments)
        self.compile_seconds += time.perf_counter() - began
        return self._programs[key](*arguments)

    def _compile(self, epoch: input_pipeline.Epoch, arguments: tuple) -> Any:
        def train_steps(state: Any, numbers: Any, *arguments: Any) -> Any:
            setup = state_lib.make_setup(
                _with_numbers(self._config, numbers),
                self._setup.model.n_items,
                self._setup.mesh,
            )
            return step_lib.train_steps(
                setup.in_phase(epoch.setup.phase),
                epoch.n_slots,
                epoch.csr_spec,
                state,
                *arguments,
            )

        places = (state_lib.state_shardings(self._setup), self._everywhere)
        program = jax.jit(train_steps, donate_argnums=0, out_shardings=places)
        return program.lower(*arguments).compile()


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
