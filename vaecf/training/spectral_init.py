"""First output weights out of the interactions instead of random ones.

A model that begins with items close to each other that the same users have
need not learn so from chance: on MovieLens-1M and Yelp2018 a RecVAE that does
is after 8 epochs where it is otherwise after 24 to 40. The items' vectors are
those of `low_rank.item_vectors`; to begin with such is the idea of ImplicitSLIM
(Shenbin and Nikolenko 2024), which has other vectors.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf.errors import VaecfError
from vaecf.models import low_rank
from vaecf.parallel import processes
from vaecf.training.state import TrainState

# Those of the path in configs/blend.py, which are not of one dataset.
_PENALTY = {"l2": 150.0, "dropout": 0.5, "user_exponent": 0.5}
_FILE = "output_kernel.npy"


def start(
    states: Sequence[TrainState],
    seeds: Sequence[int],
    train: Any,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None],
) -> list[TrainState]:
    """First states with output weights out of the items' vectors.

    Turned by a random rotation, so that no unit is above others, and as long
    on average as the random ones that they replace. All else begins as it was.

    Args:
      states: the first ones of runs that have one output layer's shape; one,
        where there are several processes.
      seeds: of the runs.
      train: Interactions (users x items).
      workdir: where process 0 puts what the others read.
      log: gets one line.

    Raises:
      VaecfError: the vectors do not fit memory.
    """
    began = time.perf_counter()
    n_units = states[0].params["output_kernel"].shape[0]

    def vectors() -> np.ndarray:
        return low_rank.item_vectors(
            train, n_units, advice="set model.init='random'", **_PENALTY
        )

    if processes.alone():
        vector_IH = vectors()
        begun = [
            _with_output(state, rotated(vector_IH, seed))
            for state, seed in zip(states, seeds, strict=True)
        ]
    else:
        # Rounding may differ from host to host: all take process 0's.
        path = workdir / _FILE
        [state], [seed] = states, seeds
        with processes.agreement():
            if processes.is_lead():
                _write(path, rotated(vectors(), seed))
        with processes.agreement():
            begun = [_with_output(state, _read(path))]
        if processes.is_lead():  # everyone has read it
            path.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    found = min(n_units, train.n_users, train.n_items)
    log(f"output weights: {found:,} singular vectors, in {seconds:.1f} s")
    return begun


def rotated(vector_IH: np.ndarray, seed: int) -> np.ndarray:
    """[I, H] times a rotation, uniform in all of them (Mezzadri 2007)."""
    n_units = vector_IH.shape[1]
    drawn = np.random.default_rng(seed).standard_normal((n_units, n_units))
    rotation, triangle = np.linalg.qr(drawn)
    rotation *= np.sign(np.diag(triangle))
    return vector_IH @ rotation.astype(np.float32)


def _write(path: pathlib.Path, array: np.ndarray) -> None:
    try:
        np.save(path, array)
    except OSError as error:
        raise VaecfError(
            f"{path} cannot be written ({error.strerror})"
        ) from error


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise VaecfError(
            f"{path}: what process 0 wrote cannot be read ({error}); is the "
            "workdir on a file system that all processes see?"
        ) from None


def _with_output(state: TrainState, vector_IH: np.ndarray) -> TrainState:
    kernel = state.params["output_kernel"]
    norm = float(jax.jit(jnp.linalg.norm)(kernel))  # its padding is zero
    made = np.zeros(kernel.shape, np.float32)
    made[:, : len(vector_IH)] = vector_IH.T
    made *= norm / max(np.linalg.norm(made), np.finfo(np.float32).tiny)

    def replaced(params: Any) -> Any:
        # A copy for each: what is donated must not lie in two places.
        new = processes.put(made.copy(), kernel.sharding)
        return {**params, "output_kernel": new}

    state = state._replace(params=replaced(state.params))
    if state.average is None:
        return state
    return state._replace(average=replaced(state.average))
