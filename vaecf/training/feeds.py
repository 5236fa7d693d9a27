"""How training interactions reach the device: resident or streamed.

Both give the same batches in the same order, so the same numbers; they are two
programs, so the last bit may differ.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from vaecf.models import batching, sharding
from vaecf.training import step as step_lib
from vaecf.training.step import Problem, Totals, TrainState

_MEMINFO = pathlib.Path("/proc/meminfo")


class Epoch(NamedTuple):
    """An epoch, ready to be run in stretches.

    Attributes:
      order: int32 [steps, batch_size], on the device (resident) or host.
      n_slots: slots of a microbatch.
      users: training users in it.
    """

    order: Any
    n_slots: int
    users: int

    @property
    def steps(self) -> int:
        """Batches."""
        return self.order.shape[0]


class Feed(Protocol):
    """Runs stretches of an epoch."""

    compile_seconds: float

    def prepare(self, order: np.ndarray) -> Epoch:
        """Places an epoch's order where `run` wants it."""

    def run(
        self, state: TrainState, epoch: Epoch, start: int, stop: int
    ) -> tuple[TrainState, Totals]:
        """Steps start .. stop-1 with their Totals on the host, float32 [n].

        Waits for the device; `state` is donated.
        """

    def program_bytes(self) -> int:
        """Largest memory on a device that a compiled program needs.

        Parameters, moments, batch and everything temporary.
        """


class ResidentFeed:
    """All interactions on the device; a stretch of steps is one dispatch."""

    def __init__(self, problem: Problem, train: Any, seed: int) -> None:
        """Places the interactions on every device.

        Args:
          problem: static.
          train: Interactions.
          seed: of the run.
        """
        self._problem = problem
        self._counts = np.append(train.counts, 0)
        self._everywhere = sharding.shardings(problem.mesh, P())
        self._csr = jax.device_put(
            batching.as_csr(train.indptr, train.indices), self._everywhere
        )
        self._key = jax.device_put(step_lib.step_key(seed), self._everywhere)
        self._programs: dict[tuple[int, tuple[int, ...]], Any] = {}
        self.compile_seconds = 0.0

    def prepare(self, order: np.ndarray) -> Epoch:
        """See `Feed`."""
        counts = self._counts[order]
        spec = sharding.shardings(self._problem.mesh, P(None, sharding.DATA))
        return Epoch(
            jax.device_put(order, spec),
            _slots(self._counts, order, self._problem),
            int((counts > 0).sum()),
        )

    def run(
        self, state: TrainState, epoch: Epoch, start: int, stop: int
    ) -> tuple[TrainState, Totals]:
        """See `Feed`."""
        bounds = jax.device_put(
            (np.int32(start), np.int32(stop)), self._everywhere
        )
        args = (state, self._csr, epoch.order, self._key, *bounds)
        key = (epoch.n_slots, epoch.order.shape)
        if key not in self._programs:
            began = time.perf_counter()
            self._programs[key] = (
                jax.jit(
                    functools.partial(
                        step_lib.train_steps, self._problem, epoch.n_slots
                    ),
                    donate_argnums=0,
                    out_shardings=(
                        step_lib.state_shardings(self._problem),
                        self._everywhere,
                    ),
                )
                .lower(*args)
                .compile()
            )
            self.compile_seconds += time.perf_counter() - began
        state, totals = self._programs[key](*args)
        return state, Totals(*(x[start:stop] for x in jax.device_get(totals)))

    def program_bytes(self) -> int:
        """See `Feed`."""
        return _program_bytes(self._programs.values())


class StreamedFeed:
    """Batches assembled on the host from the memory map, one dispatch each."""

    def __init__(self, problem: Problem, train: Any, seed: int) -> None:
        """Arguments as `ResidentFeed`'s."""
        self._problem = problem
        self._train = train
        self._counts = np.append(train.counts, 0)
        self._everywhere = sharding.shardings(problem.mesh, P())
        self._by_user = sharding.shardings(problem.mesh, P(sharding.DATA))
        self._key = jax.device_put(step_lib.step_key(seed), self._everywhere)
        self._programs: dict[tuple[int, int], Any] = {}
        self.compile_seconds = 0.0

    def prepare(self, order: np.ndarray) -> Epoch:
        """See `Feed`."""
        counts = self._counts[order]
        return Epoch(
            order,
            _slots(self._counts, order, self._problem),
            int((counts > 0).sum()),
        )

    def run(
        self, state: TrainState, epoch: Epoch, start: int, stop: int
    ) -> tuple[TrainState, Totals]:
        """See `Feed`. The host assembles a batch while the device trains on the
        one before: dispatch is asynchronous."""
        taken = []
        for i in range(start, stop):
            batch = jax.device_put(
                batching.assemble_on_host(
                    self._train.indptr,
                    self._train.indices,
                    epoch.order[i],
                    epoch.n_slots,
                    self._problem.parts(epoch.order.shape[1]),
                ),
                self._by_user,
            )
            state, totals = self._program(epoch, state, batch)(
                state, batch, self._key
            )
            taken.append(totals)
        columns = zip(*jax.device_get(taken), strict=True)
        return state, Totals(*(np.array(x, np.float32) for x in columns))

    def _program(self, epoch: Epoch, *args: Any) -> Any:
        key = (epoch.n_slots, epoch.order.shape[1])
        if key not in self._programs:
            began = time.perf_counter()
            self._programs[key] = (
                jax.jit(
                    functools.partial(step_lib.train_step, self._problem),
                    donate_argnums=0,
                    out_shardings=(
                        step_lib.state_shardings(self._problem),
                        self._everywhere,
                    ),
                )
                .lower(*args, self._key)
                .compile()
            )
            self.compile_seconds += time.perf_counter() - began
        return self._programs[key]

    def program_bytes(self) -> int:
        """See `Feed`."""
        return _program_bytes(self._programs.values())


def _slots(counts: np.ndarray, order: np.ndarray, problem: Problem) -> int:
    """Slots of a microbatch: as a rule the same in every epoch."""
    size = order.shape[1]
    parts = problem.parts(size)
    return max(
        batching.slots_to_expect(counts[:-1], size // parts),
        batching.slots_for(counts[order], parts),
    )


def _program_bytes(programs: Iterable[Any]) -> int:
    sizes = [program.memory_analysis() for program in programs]
    return max(
        (
            # Donated arguments are the outputs.
            x.argument_size_in_bytes
            + x.output_size_in_bytes
            - x.alias_size_in_bytes
            + x.temp_size_in_bytes
            for x in sizes
            if x is not None  # not every backend says
        ),
        default=0,
    )


def make_feed(
    kind: str, problem: Problem, train: Any, seed: int
) -> ResidentFeed | StreamedFeed:
    """The feed of `config.data.feed`; 'auto' as `choose` says."""
    if kind == "auto":
        kind, _ = choose(train)
    feed = ResidentFeed if kind == "resident" else StreamedFeed
    return feed(problem, train, seed)


def choose(train: Any) -> tuple[str, str]:
    """Feed for so many interactions on this device, and why.

    Resident when they take less than a quarter of the free memory, so that
    parameters, activations and evaluation have the rest.
    """
    needed, free = 4 * train.nnz, _free_bytes()
    if train.nnz >= 2**31:
        return "streamed", f"{train.nnz:,} interactions are 2**31 or more"
    if free is None:
        return "resident", f"{needed / 1e6:,.0f} MB; free memory is not known"
    kind = "resident" if needed < free / 4 else "streamed"
    return kind, f"{needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"


def _free_bytes() -> int | None:
    """Free memory of a device; of the host, where that is the device."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu" or not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
