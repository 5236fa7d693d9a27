"""The first state of a call of `loop.train`: resumed, continued or new."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vaecf.config import Config
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.models import registry
from vaecf.parallel import processes
from vaecf.training import checkpoints, spectral_init
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.progress import TrainProgress, resume_line
from vaecf.training.state import TrainSetup, TrainState


class Start(NamedTuple):
    """What a run starts from instead of initial parameters."""

    params: Any  # scoring parameters, on the mesh of the run
    epoch: int  # finished epochs


def resumed_or_new(
    config: Config,
    setup: TrainSetup,
    train: Interactions,
    saved: Checkpoints,
    workdir: pathlib.Path,
    start: Start | None,
    steps: int,
    *,
    log: Callable[[str], None],
) -> tuple[TrainProgress, TrainState]:
    """Returns the progress and the state that training goes on from.

    They come from the latest checkpoint if there is one, else from `start` if
    it is given; otherwise they are those of a new run. `steps` is the number of
    steps per epoch.

    Raises:
      VaecfError: all checkpoints are damaged or belong to another run.
    """
    if saved.step(LATEST) is not None:
        with processes.deadline(
            config.mesh.peer_timeout, "reading a checkpoint"
        ):
            progress, state = resume(setup, saved, steps, log=log)
        log(resume_line(config, progress, state))
        return progress, state
    if start is not None:
        state = continued(config, setup, start, steps)
        return TrainProgress(epoch=start.epoch), state
    state = state_lib.init_state(setup, config.seed)
    if config.model.init == "spectral":
        state = spectral_init.start(state, config.seed, train, workdir, log=log)
    return TrainProgress(), state


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


def restore_state(
    setup: TrainSetup, saved: Checkpoints, step: int | None = None
) -> TrainState:
    """Returns the latest state, or that of a step, on the mesh of `setup`."""
    shapes = state_lib.abstract_state(setup)
    places = state_lib.state_shardings(setup)
    wanted = checkpoints.abstract(shapes, places)
    return saved.restore(LATEST, wanted, setup.model.n_items, step)


def resume(
    setup: TrainSetup,
    saved: Checkpoints,
    steps: int,
    *,
    log: Callable[[str], None],
) -> tuple[TrainProgress, TrainState]:
    """Returns the latest progress and state, with `steps` steps per epoch.

    If the latest checkpoint is damaged, the one before it is used.

    Raises:
      VaecfError: all checkpoints are damaged or belong to another run.
    """
    first_error = None
    for step in saved.steps(LATEST):
        try:
            with processes.agreement():
                if saved.step(BEST) is not None:
                    saved.check(BEST)
                progress, state = _resume_at(setup, saved, step, steps)
        except VaecfError as error:
            first_error = first_error or error
            continue
        if first_error is not None:
            log(f"{first_error}: using the checkpoint of step {step} instead")
            saved.remove_after(LATEST, step)
        return progress, state
    raise VaecfError(
        f"{first_error}; remove {saved.directory} to train from the start"
    )


def _resume_at(
    setup: TrainSetup, saved: Checkpoints, step: int, steps: int
) -> tuple[TrainProgress, TrainState]:
    place = f"{saved.directory / LATEST / str(step)}: the checkpoint"
    try:
        progress = TrainProgress(**saved.position(LATEST, step))
    except TypeError:
        raise VaecfError(f"{place} is damaged (its progress)") from None
    state = restore_state(setup, saved, step)
    expected = progress.epoch * steps + progress.step_in_epoch
    if expected != int(state.step):
        raise VaecfError(
            f"{place} is of step {int(state.step)}, but with {steps} steps per "
            f"epoch its progress is step {expected}: it is damaged, or from a "
            "run with another batch size or dataset"
        )
    return progress, state
