"""What is timed: training steps, an evaluation, a query, a matrix product.

All benchmarks of a model use the library's models and training through this
module.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import common
from vaecf import __version__
from vaecf.config import Config
from vaecf.data.id_table import IdTable
from vaecf.evaluation import scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.evaluation.ranking import Scorer
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import input_pipeline, precision
from vaecf.training import state as state_lib
from vaecf.training.signals import STRETCH_SECONDS
from vaecf.training.step import StepMetrics


class Trainer:
    """Runs the full batches of one epoch, again and again.

    A last partial batch is left out, because it would count fewer users for the
    same work.

    Attributes:
      setup: static part of the step.
      state: parameters and optimiser state.
      losses: mean loss per user of every stretch of steps.
      facts: about the implementation, as `peers.Peer` has them.
      steps: steps taken.
    """

    def __init__(self, config: Config, train: Any) -> None:
        """Initialises the state and places the data on the devices.

        Args:
          config: settings of the run.
          train: Interactions of the training users.
        """
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        self._config = config
        self.setup = state_lib.make_setup(config, train.n_items, mesh)
        self.state = state_lib.init_state(self.setup, config.seed)
        batch_size = config.train.batch_size
        order = input_pipeline.epoch_order(
            config.seed,
            0,
            train.n_users,
            batch_size,
            drop_remainder=True,
            parts=self.setup.parts(batch_size),
        )
        self.pipeline = input_pipeline.make_pipeline(
            config.data.feed, self.setup, train, config.seed
        )
        self._epoch = self.pipeline.prepare(order)
        self._next = 0
        self._stretch = 0
        self.steps = 0
        self.losses: list[float] = []
        self.facts = {"version": __version__}

    def measure(self, seconds: float) -> dict[str, Any]:
        """Trains for about `seconds`, compilation excluded.

        Returns:
          {'users', 'seconds', 'loss', 'peak_rss_bytes'}, as `peers.Peer` does.
        """
        if not self._stretch:
            self.run(1)
            _, one = self.run(1)
            self._stretch = max(1, round(STRETCH_SECONDS / max(one, 1e-9)))
        users, spent = 0.0, 0.0
        while not users or spent < seconds:
            totals, took = self.run(self._stretch)
            users += float(totals.users.sum())
            spent += took
        return {
            "users": users,
            "seconds": spent,
            "loss": self.losses[-1],
            "peak_rss_bytes": common.peak_rss_bytes(),
        }

    def run(self, steps: int) -> tuple[StepMetrics, float]:
        """Takes up to `steps` steps, but not beyond the end of the epoch.

        Returns:
          (metrics of every step, seconds without compilation).
        """
        start = self._next
        stop = min(start + steps, self._epoch.steps)
        compiled = self.pipeline.compile_seconds
        began = time.perf_counter()
        self.state, totals = self.pipeline.run(
            self.state, self._epoch, start, stop
        )
        seconds = time.perf_counter() - began
        seconds -= self.pipeline.compile_seconds - compiled
        self._next = stop % self._epoch.steps
        self.steps += stop - start
        self.losses.append(float(totals.loss.sum() / totals.users.sum()))
        return totals, seconds

    def validation(self, dataset: Any) -> Work:
        """Returns the evaluation of the validation users; see `validation`."""
        return validation(
            self._config,
            self.setup.mesh,
            scorers.model(self.setup.model),
            state_lib.scoring_params(self.setup, self.state),
            dataset,
        )


class Work(NamedTuple):
    """The calls that are timed.

    Attributes:
      evaluate: computes the metrics of the validation users, as the training
        loop does.
      rank: the first part of it: scores and ranks on the device.
      score: the second part: computes the metrics of the lists on the host.
    """

    evaluate: Callable[[], Any]
    rank: Callable[[], Any]
    score: Callable[[], Any]


def validation(
    config: Config, mesh: Mesh, scorer: Scorer, params: Any, dataset: Any
) -> Work:
    """Returns the evaluation of the validation users and its two parts."""
    evaluator = Evaluator.for_split(dataset, "validation", config.eval, mesh)
    ranker = evaluator.compile(scorer)
    model_params = scorers.ModelParams(params)
    fold_in = evaluator.fold_in

    def rank() -> Any:
        return ranker(
            model_params,
            fold_in.indptr,
            fold_in.indices,
            batch_size=config.eval.batch_size,
        )

    lists: list[Any] = []

    def score() -> Any:
        if not lists:
            lists.append(rank())
        return evaluator.evaluate_lists(lists[0])

    return Work(lambda: evaluator(ranker, model_params), rank, score)


def decoder_product(
    config: Config, mesh: Mesh, batch_size: int, items: int
) -> Callable[[float], list[float]]:
    """Compiles the output layer's product [users, hidden] x [hidden, items].

    Every implementation computes this product. The speed of a shared machine
    drifts by a factor of two within hours, so measure it in turns with the work
    that it is compared with.

    Args:
      config: width of the hidden layer, and precision of the product.
      mesh: ('data', 'item'), over whose devices the product is sharded.
      batch_size: users on an accelerator; on a CPU more users than 4,096
        change only the memory.
      items: items before padding.

    Returns:
      Function from seconds to the GFLOP/s of several timings in that time.
    """
    policy = precision.policy(config.precision.policy)
    hidden = config.model.hidden[0]
    shards = mesh.shape[mesh_lib.DATA]
    users = 4096 if jax.default_backend() == "cpu" else batch_size
    users = -(-users // shards) * shards
    items = mesh_lib.padded_items(items)
    operands = [
        jax.jit(
            functools.partial(
                jax.random.normal, shape=shape, dtype=policy.dtype
            ),
            out_shardings=NamedSharding(mesh, spec),
        )(jax.random.key(0))
        for shape, spec in (
            ((users, hidden), P(mesh_lib.DATA, None)),
            ((hidden, items), P(None, mesh_lib.ITEM)),
        )
    ]
    programs = [
        jax.jit(
            functools.partial(
                jax.lax.dot,
                precision=policy.precision,
                preferred_element_type=dtype,
            )
        )
        .lower(*operands)
        .compile()
        # Sums are float32; a narrower result may be faster to write.
        for dtype in dict.fromkeys((jnp.float32, policy.dtype))
    ]

    def gflops(seconds: float) -> list[float]:
        rates = []
        for program in programs:
            # The first call touches the memory of its result.
            jax.block_until_ready(program(*operands))
            times = common.timings(
                functools.partial(program, *operands), seconds / len(programs)
            )
            rates.append([2e-9 * users * hidden * items / t for t in times])
        return max(rates, key=statistics.median)

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
