"""An input pipeline that runs share, with one compiled program for all."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.models import bag_of_items
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline
from vaecf.training import state as state_lib
from vaecf.training.state import TrainSetup

# Settings that the program takes as arguments, in float32.
NUMBERS = (
    *("optimizer.learning_rate", "loss.anneal_cap", "loss.total_anneal_steps"),
    *("loss.gamma", "loss.weight_decay", "model.dropout_rate"),
)


class SharedPipeline(input_pipeline.InputPipeline):
    """A pipeline whose compiled steps take the `NUMBERS` of any config."""

    def __init__(self, configs: Sequence[Config], dataset: Dataset) -> None:
        config, train = configs[0], dataset.train
        feed, why = config.data.feed, "set config.data.feed='resident'"
        if feed == "auto":
            feed, why = input_pipeline.choose(train)
        if feed != "resident":
            raise VaecfError(
                "a population keeps the interactions on the device "
                f"(config.data.feed): {why}, or train separate runs"
            )
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        setup = state_lib.make_setup(config, dataset.n_items, mesh)
        super().__init__(setup, train, config.seed)
        self._setup_with = functools.partial(setup_with, config)
        flats = [c.flat() for c in configs]
        # Numbers that all members share remain constants of the program.
        self._varied = [k for k in NUMBERS if len({f[k] for f in flats}) > 1]

    def of_member(self, config: Config) -> SharedPipeline:
        """Returns the pipeline of a member."""
        member, flat = copy.copy(self), config.flat()
        member._key = state_lib.step_key(config.seed, self._everywhere)
        member._numbers = {key: np.float32(flat[key]) for key in self._varied}
        if "model.dropout_rate" in member._numbers:
            rate = bag_of_items.traced_rate(config.model.dropout_rate)
            member._numbers["model.dropout_rate"] = rate
        return member


def setup_with(config: Config, numbers: Any, setup: TrainSetup) -> TrainSetup:
    """Returns the setup of a config with other numbers, in the same phase.

    `numbers` are values of `NUMBERS` by dotted key, traced or not.
    """
    for key, value in numbers.items():
        # `config.replace` would refuse traced scalars.
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    made = state_lib.make_setup(config, setup.model.n_items, setup.mesh)
    return made.in_phase(setup.phase)
