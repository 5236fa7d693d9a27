"""The training step as it is timed."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from experiments.benchmark import machine
from vaecf import __version__
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline
from vaecf.training import state as state_lib
from vaecf.training.signals import STRETCH_SECONDS

# A peer that is ourselves.
OWN = "vaecf_fp32"


class Trainer:
    """The training step as the loop runs it, in long dispatches.

    The whole batches of one epoch are gone through again and again; a last
    partial batch would count less users for the same work.
    """

    def __init__(
        self,
        config: Config,
        setup: state_lib.TrainSetup,
        train: Any,
    ) -> None:
        """Places data and state on the device, compiles, takes two steps.

        Args:
          config: of the run.
          setup: made of them.
          train: Interactions.
        """
        batch_size = config.train.batch_size
        order = input_pipeline.epoch_order(
            config.seed,
            0,
            train.n_users,
            batch_size,
            drop_remainder=True,
            parts=setup.parts(batch_size),
        )
        self._feed = input_pipeline.make_pipeline(
            config.data.feed, setup, train, config.seed
        )
        self._epoch = self._feed.prepare(order)
        self._state = state_lib.init_state(setup, config.seed)
        self._next = 0
        self.steps_timed = 0
        self.losses: list[float] = []
        real = order[order < train.n_users]
        self.interactions_per_user = float(train.counts[real].mean())
        self._run(1)
        _, seconds = self._run(1)
        self._stretch = max(1, round(STRETCH_SECONDS / max(seconds, 1e-9)))

    @property
    def compile_seconds(self) -> float:
        """Tracing and compilation of the step."""
        return self._feed.compile_seconds

    @property
    def program_bytes(self) -> int:
        """Memory that the step needs on a device."""
        return self._feed.program_bytes()

    @property
    def params(self) -> Any:
        """Parameters now."""
        return self._state.params

    def measure(self, seconds: float) -> float:
        """Users a second over about `seconds`; at least one dispatch."""
        users, spent = 0.0, 0.0
        while not users or spent < seconds:
            before = self._next
            stretch_users, stretch_seconds = self._run(self._stretch)
            users += stretch_users
            spent += stretch_seconds
            self.steps_timed += (self._next or self._epoch.steps) - before
        return users / spent

    def _run(self, steps: int) -> tuple[float, float]:
        """Users and seconds of the next so many steps, or to the end."""
        start = self._next
        stop = min(start + steps, self._epoch.steps)
        compiled = self._feed.compile_seconds
        began = time.perf_counter()
        self._state, totals = self._feed.run(
            self._state, self._epoch, start, stop
        )
        seconds = time.perf_counter() - began
        seconds -= self._feed.compile_seconds - compiled
        self._next = stop % self._epoch.steps
        self.losses.append(float(totals.loss.sum() / totals.users.sum()))
        return float(totals.users.sum()), seconds


class Own:
    """Our step in fp32, measured as peers are, beside another precision.

    Attributes:
      name: `OWN`.
      facts: {'version'}.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        """Compiles; `options` are those of the run that it stands beside."""
        self.name, self.facts = OWN, {"version": __version__}
        fp32 = dataclasses.replace(config.precision, policy="fp32")
        config = dataclasses.replace(config, precision=fp32)
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        setup = state_lib.make_setup(config, dataset.n_items, mesh)
        self._trainer = Trainer(config, setup, dataset.train)

    def measure(self, seconds: float) -> dict[str, Any]:
        """{'users', 'seconds', 'peak_rss_bytes'}; the memory is both's."""
        rate = self._trainer.measure(seconds)
        return {
            "users": rate * seconds,
            "seconds": seconds,
            "first_loss": self._trainer.losses[0],
            "loss": self._trainer.losses[-1],
            "peak_rss_bytes": machine.peak_rss_bytes(),
        }
