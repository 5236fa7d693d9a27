"""The order of the batches, and how interactions reach the device.

Resident and streamed interactions give the same batches in the same order. They
are two programs, so results may differ in the last bit.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from vaecf.config import Config
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.models import sparse_batch
from vaecf.parallel import memory, processes
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.state import TrainSetup, TrainState
from vaecf.training.step import StepMetrics

_WINDOW_BYTES = 2**26  # of a streamed window
# 3 s at 10 TFLOP/s, and at .4 ms for the launches of a step.
_SHORT_FLOP, _SHORT_STEPS = 3e13, 7500
# Without this option, XLA divides the sums of small products, and pads their
# operands for it, in kernels of their own.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_experimental_force_split_k": "1"}
_logger = logging.getLogger("vaecf")


def epoch_order(
    seed: int,
    epoch: int,
    n_users: int,
    batch_size: int,
    *,
    drop_remainder: bool = False,
    parts: int = 1,
) -> np.ndarray:
    """Returns the users of every batch of an epoch.

    The order is a pure function of the seed and the epoch, so that a run can
    resume at any step without a saved iterator.

    Args:
      epoch: counted from 0.
      batch_size: users per batch, over all devices.
      drop_remainder: drop the users that do not fill the last batch (other
        users in each epoch) instead of padding the batch.
      parts: microbatches per batch, over all devices. Padding users after the
        users of each batch bring its size to a multiple of `parts`, so that
        the batches do not depend on `parts`.

    Returns:
      int32 [steps, padded batch_size]; n_users marks a padding user.

    Raises:
      VaecfError: there is no whole batch, and `drop_remainder` is set.
    """
    whole, rest = divmod(n_users, batch_size)
    steps = whole if drop_remainder else whole + bool(rest)
    if steps == 0:
        raise VaecfError(
            f"config.train.batch_size={batch_size} is larger than the "
            f"{n_users} training users, and config.train.drop_remainder is "
            "set: lower the batch size"
        )
    order = (
        np.random.Generator(np.random.PCG64([seed, epoch]))
        .permutation(n_users)
        .astype(np.int32)
    )
    padded = np.full(steps * batch_size, n_users, np.int32)
    used = min(n_users, len(padded))
    padded[:used] = order[:used]
    return np.pad(
        padded.reshape(steps, batch_size),
        ((0, 0), (0, -batch_size % parts)),
        constant_values=n_users,
    )


def batch_order(
    config: Config, setup: TrainSetup, train: Interactions
) -> tuple[int, Callable[[int], np.ndarray]]:
    """Returns (steps per epoch, function from an epoch to its `epoch_order`).

    Raises:
      VaecfError: there are no users, or less than one batch of them.
    """
    if train.n_users == 0:
        raise VaecfError("the dataset has no training users")
    # A larger batch would only add padding.
    size = min(config.train.batch_size, train.n_users)
    order_of = functools.partial(
        epoch_order,
        config.seed,
        n_users=train.n_users,
        batch_size=size,
        drop_remainder=config.train.drop_remainder,
        parts=setup.parts(size),
    )
    return len(order_of(0)), order_of


class Epoch(NamedTuple):
    """The batches of an epoch, in one or more windows of steps."""

    steps: int  # number of batches
    n_slots: int  # slots of a microbatch
    # int32 [steps per window, batch_size], on the device: users of each batch,
    # numbered as in the window.
    order: jax.Array
    # Function from a window's number to its interactions, on the device.
    window: Callable[[int], sparse_batch.Csr]
    csr_spec: P  # PartitionSpec of a window's arrays
    setup: TrainSetup  # setup of the epoch's phase
    # Whether a GPU takes all steps within the time of a dispatch.
    short: bool


# Function from the numbers of a program and a setup to the setup of the steps.
SetupWith = Callable[[dict[str, Any], TrainSetup], TrainSetup]


class InputPipeline:
    """Runs the steps of an epoch.

    All interactions are resident on every device, or they are streamed from
    their memory map, a window at a time. A window holds the users of the next
    few steps; each device receives its own users. The next window is assembled
    and sent while the device trains. A window takes about `window_bytes` and
    holds at least one step; None makes the interactions resident.
    """

    def __init__(
        self,
        setup: TrainSetup,
        train: Interactions,
        seed: int,
        window_bytes: int | None = None,
    ) -> None:
        self._setup, self._train = setup, train
        self._counts = np.append(train.counts, 0)
        self._everywhere = mesh_lib.shardings(setup.mesh, P())
        self._key = state_lib.step_key(seed, self._everywhere)
        self._expected: dict[int, int] = {}  # slots by users of a part
        self._bounds: dict[Any, Any] = {}  # the latest ones on the device
        self._programs: dict[Any, Any] = {}
        self._lock = threading.Lock()
        # Arguments of the program that are part of the setup of its steps.
        self._numbers: dict[str, Any] = {}
        self._setup_with: SetupWith | None = None
        self.compile_seconds = 0.0
        self._window_bytes = window_bytes
        if window_bytes is None:
            csr = sparse_batch.as_csr(train.indptr, train.indices)
            self._csr = processes.put(csr, self._everywhere)
        else:
            self._thread = futures.ThreadPoolExecutor(1, "vaecf-feed")

    def prepare(
        self, order: np.ndarray, setup: TrainSetup | None = None
    ) -> Epoch:
        """Returns an epoch with the batches of `order`, an `epoch_order`.

        `setup` is that of the epoch's phase; None takes the pipeline's.
        """
        in_window, window, csr_spec = order, lambda _: self._csr, P()
        if self._window_bytes is not None:
            in_window, window = self._windows(order, self._window_bytes)
            csr_spec = P(mesh_lib.DATA)
        by_user = mesh_lib.shardings(self._setup.mesh, P(None, mesh_lib.DATA))
        setup = setup or self._setup
        n_slots = self._slots(order, setup.parts(order.shape[1]))
        return Epoch(
            steps=len(order),
            n_slots=n_slots,
            order=processes.put(in_window, by_user),
            window=window,
            csr_spec=csr_spec,
            setup=setup,
            short=is_short(setup, *order.shape),
        )

    def _windows(
        self, order: np.ndarray, window_bytes: int
    ) -> tuple[np.ndarray, Callable[[int], sparse_batch.Csr]]:
        """Returns `order` and `window` of a streamed `Epoch`."""
        steps, batch_size = order.shape
        shards = self._setup.data_shards
        step_bytes = 4 * self._counts.mean() * batch_size
        length = int(np.clip(window_bytes / max(step_bytes, 1), 1, steps))
        order_WLB = np.pad(
            order,
            ((0, -steps % length), (0, 0)),
            constant_values=self._train.n_users,
        ).reshape(-1, length, batch_size)
        # The users of each shard, in the order in which it trains on them.
        user_WDU = (
            order_WLB.reshape(-1, length, shards, batch_size // shards)
            .swapaxes(1, 2)
            .reshape(len(order_WLB), shards, -1)
        )
        n_items = self._slots(user_WDU.reshape(len(user_WDU), -1), shards)
        place = mesh_lib.shardings(self._setup.mesh, P(mesh_lib.DATA))
        own = mesh_lib.local_data_shards(self._setup.mesh)

        def assemble(w: int) -> sparse_batch.Csr:
            # The users of other processes are not read.
            window = sparse_batch.window(
                self._train.indptr,
                self._train.indices,
                user_WDU[w][own],
                n_items,
            )
            return jax.tree.map(
                lambda x: processes.from_shards(
                    dict(zip(own, np.split(x, len(own)))), shards, place
                ),
                window,
            )

        made: dict[int, futures.Future[sparse_batch.Csr]] = {}

        def window(w: int) -> sparse_batch.Csr:
            made.pop(w - 1, None)
            for i in range(w, min(w + 2, len(user_WDU))):
                if i not in made:
                    made[i] = self._thread.submit(assemble, i)
            return made[w].result()

        in_window = np.arange(length * batch_size // shards, dtype=np.int32)
        in_window = np.tile(in_window.reshape(length, -1), (1, shards))
        return in_window, window

    def run(
        self,
        state: TrainState,
        epoch: Epoch,
        start: int,
        stop: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[TrainState, StepMetrics]:
        """Takes steps start .. stop-1 and waits for the device.

        The buffers of `state` are donated. The metrics are those of every step,
        float32 [stop - start] on the host. `meanwhile` is called while the
        device works.
        """
        length = epoch.order.shape[0]
        taken: list[jax.Array] = []
        for w in range(start // length, -(-stop // length)):
            window = epoch.window(w)
            first, last = max(start - w * length, 0), stop - w * length
            bounds = (np.int32(first), np.int32(min(last, length)))
            state, totals = self._steps(state, epoch, window, bounds)
            if taken:
                # At most two windows are on the device.
                jax.block_until_ready(taken[-1])
            taken.append(totals)
            totals.copy_to_host_async()
        meanwhile()
        skipped = start % length
        row_SM = np.concatenate(jax.device_get(taken))
        row_SM = row_SM[skipped : skipped + stop - start]
        return state, StepMetrics(*row_SM.T)

    def _steps(
        self,
        state: TrainState,
        epoch: Epoch,
        window: sparse_batch.Csr,
        bounds: tuple[np.int32, np.int32],
    ) -> tuple[TrainState, jax.Array]:
        # Known bounds spare a GPU an answer of the host after each step.
        whole = epoch.short and bounds == (0, len(epoch.order))
        placed = self._bounds.get(bounds)
        if placed is None:  # a GPU would wait for an upload in every epoch
            placed = processes.put(bounds, self._everywhere)
            self._bounds = {bounds: placed}
        args = (state, self._numbers, window, epoch.order, self._key, *placed)
        shapes = (epoch.order.shape, window.item_M.shape)
        key = (epoch.setup.phase, epoch.n_slots, whole, *shapes)
        began = time.perf_counter()
        with self._lock:  # threads that share the programs wait
            if key not in self._programs:
                self._programs[key] = self._compile(epoch, args, whole)
                # Waiting for a process that compiles longer is no training.
                processes.gather(True)
                self.compile_seconds += time.perf_counter() - began
        return self._programs[key](*args)

    def _compile(self, epoch: Epoch, args: tuple, whole: bool) -> Any:
        how = (epoch.n_slots, epoch.csr_spec, args, self._setup_with)
        return compile_steps(epoch.setup, *how, whole=whole)

    def _slots(self, users: np.ndarray, parts: int) -> int:
        """Returns the slots that a part of each row of users needs.

        Usually they are the same in every epoch, so that few programs are
        compiled.
        """
        size = users.shape[1] // parts
        if size not in self._expected:  # as long as a large step on a GPU
            self._expected[size] = sparse_batch.slots_to_expect(
                self._counts[:-1], size
            )
        needed = sparse_batch.slots_for(self._counts[users], parts)
        return max(self._expected[size], needed)

    def program_bytes(self) -> int:
        """Returns the memory of a device that the largest program needs.

        It holds parameters, moments, the batch and temporary arrays. 0 before
        the first compilation, or if the backend does not tell.
        """
        sizes = [p.memory_analysis() for p in self._programs.values()]
        return max(
            (
                # Donated arguments are the outputs.
                x.argument_size_in_bytes
                + x.output_size_in_bytes
                - x.alias_size_in_bytes
                + x.temp_size_in_bytes
                for x in sizes
                if x is not None
            ),
            default=0,
        )


def is_short(setup: TrainSetup, steps: int, batch_size: int) -> bool:
    """Returns whether a GPU takes so many steps in seconds.

    It then takes all of them in a program that knows their number, so that no
    other program is compiled for the first step alone.
    """
    if mesh_lib.on_cpu(setup.model.platform) or steps > _SHORT_STEPS:
        return False
    params = jax.tree.leaves(state_lib.abstract_state(setup).params)
    # Three products with each weight, or fewer.
    weights = sum(x.size for x in params)
    return 6 * steps * batch_size * weights < _SHORT_FLOP


def compile_steps(
    setup: TrainSetup,
    n_slots: int,
    csr_spec: P,
    args: tuple,
    setup_with: SetupWith | None = None,
    *,
    whole: bool = False,
) -> Any:
    """Returns the compiled `step.train_steps`, with the state donated.

    Args:
      args: arrays of the mesh, or their shapes: the state, the numbers, and
        the other arguments of `train_steps`.
      setup_with: function from the numbers and `setup` to the setup of the
        steps; None takes `setup`.
      whole: take all steps of the order, whatever the bounds are.
    """
    program = _program(setup, n_slots, csr_spec, setup_with, whole)
    on_cpu = mesh_lib.on_cpu(setup.model.platform)
    options = None if on_cpu else GPU_OPTIONS
    return program.lower(*args).compile(compiler_options=options)


@functools.lru_cache(maxsize=16)  # runs with equal setups trace it once
def _program(
    setup: TrainSetup,
    n_slots: int,
    csr_spec: P,
    setup_with: SetupWith | None,
    whole: bool,
) -> Any:
    def train_steps(state: TrainState, numbers: Any, *rest: Any) -> Any:
        made = setup_with(numbers, setup) if setup_with else setup
        csr, order_SB, key, *bounds = rest
        bounds = [0, len(order_SB)] if whole else bounds
        return step_lib.train_steps(
            *(made, n_slots, csr_spec, state, csr, order_SB, key, *bounds)
        )

    everywhere = mesh_lib.shardings(setup.mesh, P())
    places = (state_lib.state_shardings(setup), everywhere)
    return jax.jit(train_steps, donate_argnums=0, out_shardings=places)


def make_pipeline(
    kind: str,
    setup: TrainSetup,
    train: Interactions,
    seed: int,
    *,
    log: Callable[[str], None] = _logger.debug,
) -> InputPipeline:
    """Returns a pipeline: 'resident', 'streamed', or 'auto' as `choose` says.

    `log` receives the choice of 'auto'.
    """
    if kind == "auto":
        kind, why = choose(train)
        log(f"interactions: {kind} ({why})")
    window_bytes = None if kind == "resident" else _WINDOW_BYTES
    return InputPipeline(setup, train, seed, window_bytes)


def choose(train: Interactions) -> tuple[str, str]:
    """Returns 'resident' or 'streamed', and the reason.

    Interactions are resident if they take less than a quarter of the free
    memory: parameters, activations and evaluation need the rest.
    """
    if not processes.alone():
        return "streamed", "each process reads only its own users"
    needed, free = 4 * train.nnz, memory.device_free_bytes()
    if train.nnz >= 2**31:
        return "streamed", f"{train.nnz:,} interactions are 2**31 or more"
    if free is None:
        return "resident", f"{needed / 1e6:,.0f} MB; free memory is not known"
    kind = "resident" if needed < free / 4 else "streamed"
    return kind, f"{needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
