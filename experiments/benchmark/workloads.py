"""What the benchmarks of a model time: training steps and a matrix product."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import common, machine
from vaecf import __version__
from vaecf.config import Config
from vaecf.data.id_table import IdTable
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import input_pipeline, precision
from vaecf.training import state as state_lib
from vaecf.training.epochs import Epochs
from vaecf.training.signals import STRETCH_SECONDS
from vaecf.training.step import StepMetrics


class Trainer:
    """Runs the full batches of one epoch, again and again.

    A last partial batch is left out, because it would count fewer users for the
    same work. `losses` holds the mean loss per user of every stretch of steps.
    """

    def __init__(
        self,
        config: Config,
        train: Any,
        pipeline: input_pipeline.InputPipeline | None = None,
    ) -> None:
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        self.setup = state_lib.make_setup(config, train.n_items, mesh)
        self.state = state_lib.init_state(self.setup, config.seed)
        self._config, self._batch_size = config, config.train.batch_size
        self.pipeline = pipeline or input_pipeline.make_pipeline(
            config.data.feed, self.setup, train, config.seed
        )
        self._order_of = functools.partial(
            input_pipeline.epoch_order,
            config.seed,
            n_users=train.n_users,
            batch_size=self._batch_size,
            drop_remainder=True,
            parts=self.setup.parts(self._batch_size),
        )
        epochs = self._epochs(1)
        self.state = state_lib.begin_phase(
            self.setup, self.state, epochs.phase(0)
        )
        self._epoch = epochs.take(0)
        self._stretch = self.steps = 0
        self.losses: list[float] = []

    def measure(self, seconds: float) -> float:
        """Trains for about `seconds`; returns users/s without compilation."""
        if not self._stretch:
            steps = self._epoch.steps if self._epoch.short else 1
            self.run(steps)
            _, spent = self.run(steps)
            one = max(spent / steps, 1e-9)
            self._stretch = max(1, round(STRETCH_SECONDS / one))
        first, spent = self.steps, 0.0
        while self.steps == first or spent < seconds:
            spent += self.run(self._stretch)[1]
        return (self.steps - first) * self._batch_size / spent

    @property
    def users_per_epoch(self) -> int:
        """Users of the full batches of an epoch."""
        return self._epoch.steps * self._batch_size

    @property
    def figures(self) -> dict[str, Any]:
        """The version, the last loss and the peak memory so far."""
        return {
            "version": __version__,
            "loss": self.losses[-1],
            "peak_rss_bytes": machine.peak_rss_bytes(),
        }

    def epochs(self, number: int) -> float:
        """Trains so many whole epochs, each in its order.

        Returns seconds without compilation.
        """
        compiled = self.pipeline.compile_seconds
        began = time.perf_counter()
        epochs = self._epochs(number)
        for n in range(number):
            self.state = state_lib.begin_phase(
                self.setup, self.state, epochs.phase(n)
            )
            epoch = epochs.take(n)
            self.state, _ = self.pipeline.run(
                self.state, epoch, 0, epoch.steps, epochs.prepare_next
            )
        seconds = time.perf_counter() - began
        return seconds - (self.pipeline.compile_seconds - compiled)

    def _epochs(self, number: int) -> Epochs:
        config = dataclasses.replace(self._config.train, epochs=number)
        return Epochs(self.pipeline, self.setup, config, self._order_of)

    def run(self, steps: int) -> tuple[StepMetrics, float]:
        """Takes up to `steps` steps, at most to the end of the epoch.

        Returns the metrics of every step, and seconds without compilation.
        """
        start = self.steps % self._epoch.steps
        stop = min(start + steps, self._epoch.steps)
        compiled = self.pipeline.compile_seconds
        began = time.perf_counter()
        self.state, totals = self.pipeline.run(
            self.state, self._epoch, start, stop
        )
        seconds = time.perf_counter() - began
        seconds -= self.pipeline.compile_seconds - compiled
        self.steps += stop - start
        self.losses.append(float(totals.loss.sum() / totals.users.sum()))
        return totals, seconds


def decoder_product(
    config: Config, mesh: Mesh, batch_size: int, items: int
) -> Callable[[float], float]:
    """Returns a function from seconds to the GFLOP/s of the output layer.

    Every implementation computes its product [users, hidden] x [hidden, items],
    so that it is the machine's ceiling. `batch_size` counts on an accelerator;
    on a CPU more users than 4,096 change only the memory.
    """
    policy = precision.policy(config.precision.policy)
    hidden = config.model.hidden[0]
    shards = mesh.shape[mesh_lib.DATA]
    users = 4096 if jax.default_backend() == "cpu" else batch_size
    users = -(-users // shards) * shards
    items = mesh_lib.padded_items(items)

    def random(shape: tuple[int, int], spec: P) -> jax.Array:
        return jax.jit(
            lambda: jax.random.normal(jax.random.key(0), shape, policy.dtype),
            out_shardings=NamedSharding(mesh, spec),
        )()

    products = [
        functools.partial(
            jax.lax.dot,
            random((users, hidden), P(mesh_lib.DATA, None)),
            random((hidden, items), P(None, mesh_lib.ITEM)),
            precision=policy.precision,
            preferred_element_type=dtype,
        )
        # Sums are float32; a narrower result may be faster to write.
        for dtype in {jnp.dtype(jnp.float32), jnp.dtype(policy.dtype)}
    ]

    def gflops(seconds: float) -> float:
        times = []
        for product in products:
            jax.block_until_ready(product())  # compiles
            found = common.timings(product, seconds / len(products))
            times.append(statistics.median(found))
        return 2e-9 * users * hidden * items / min(times)

    return gflops


def random_model(config: Config, n_items: int) -> TrainedModel:
    """Returns a model with random parameters, ready to rank."""
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    setup = state_lib.make_setup(config, n_items, mesh)
    return TrainedModel(
        config,
        manifest={},
        items=IdTable(np.arange(n_items)),
        module=setup.whole,
        mesh=mesh,
        params=state_lib.init_state(setup, config.seed).params,
        directory=pathlib.Path(),
        progress={},
    )
