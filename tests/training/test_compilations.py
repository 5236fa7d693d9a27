"""What a run compiles, and when: the first epoch's programs are enough."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import pytest

from vaecf.config import Config
from vaecf.data import synthetic

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Epochs:
    """Counts compilations by the epoch in which they happen.

    A writer of the training loop: an epoch ends with its last record, that of
    the validation.
    """

    def __init__(self) -> None:
        self.current = 1
        self.compiled: list[tuple[int, str]] = []

    def heard(self, name: str, seconds: float, **about: Any) -> None:
        """Listens to JAX, loaded programs included."""
        if name == _COMPILED:
            self.compiled.append((self.current, str(about.get("fun_name"))))

    def write(self, record: Mapping[str, Any], step: int) -> None:
        if any(name.startswith("validation/") for name in record):
            self.current = record["epoch"] + 1

    def close(self) -> None:
        pass

    def of(self, program: str) -> list[int]:
        """Epochs in which a program was compiled."""
        return [epoch for epoch, name in self.compiled if program in name]


@pytest.fixture
def epochs() -> Iterator[Epochs]:
    counted = Epochs()
    jax.monitoring.register_event_duration_secs_listener(counted.heard)
    yield counted
    jax.monitoring.unregister_event_duration_listener(counted.heard)


@pytest.mark.parametrize(
    ("feed", "policy"),
    [("resident", "fp32"), ("resident", "fp16"), ("streamed", "fp32")],
)
def test_three_epochs_compile_in_the_first(
    tmp_path: pathlib.Path,
    small: Callable[..., Config],
    train: Callable[..., Any],
    epochs: Epochs,
    feed: str,
    policy: str,
) -> None:
    config = small(data={"feed": feed}, precision={"policy": policy})
    train(tmp_path, config, extra_writer=epochs)
    assert epochs.current == 4
    assert epochs.of("train_steps") == [1]
    assert epochs.of("rank") == [1]
    assert [entry for entry in epochs.compiled if entry[0] > 1] == []


def test_a_fuller_batch_in_a_later_epoch_compiles_nothing(
    tmp_path: pathlib.Path,
    small: Callable[..., Config],
    train: Callable[..., Any],
    epochs: Epochs,
) -> None:
    """Batches of these users need 256, 512 and 512 slots in the epochs."""
    data = synthetic.make(
        "synthetic",
        n_train_users=60,
        n_held_out_users=16,
        n_items=120,
        n_groups=3,
    )
    config = small(train={"batch_size": 8})
    train(tmp_path, config, data, extra_writer=epochs)
    assert epochs.current == 4
    assert epochs.of("train_steps") == [1]
