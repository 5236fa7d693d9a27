"""The state of a run before its first step: initial, or of an earlier run."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vaecf.config import Config
from vaecf.data.interactions import Interactions
from vaecf.models import registry
from vaecf.training import spectral_init
from vaecf.training import state as state_lib
from vaecf.training.state import TrainSetup, TrainState


class Start(NamedTuple):
    """What a run starts from instead of initial parameters."""

    params: Any  # scoring parameters, on the mesh of the run
    epoch: int  # finished epochs


def initial(
    config: Config,
    setup: TrainSetup,
    train: Interactions,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None],
) -> TrainState:
    """Returns the state of a new run."""
    state = state_lib.init_state(setup, config.seed)
    if config.model.init == "spectral":
        state = spectral_init.start(state, config.seed, train, workdir, log=log)
    return state


def continued(
    config: Config, setup: TrainSetup, start: Start, steps: int
) -> TrainState:
    """Returns the state of a run that starts from given parameters.

    The optimiser starts anew, and the moving average from the parameters.
    `steps` is the number of steps per epoch.
    """
    state = state_lib.init_state(setup, config.seed)
    # Copies: the buffers of a state are donated to its first step.
    copy = functools.partial(jax.tree.map, jnp.copy)
    params = {**state.params, **copy(start.params)}
    for epoch in range(sum(config.train.alternating_epochs)):
        # What only training needs, such as RecVAE's earlier encoder.
        for source, target in setup.model.phase(epoch, config.train).copies:
            params[target] = copy(params[source])
    step = state.step + start.epoch * steps
    state = state._replace(step=step, params=params)
    if state.average is None:
        return state
    return state._replace(
        average=copy(registry.scoring_params(setup.model, params))
    )
