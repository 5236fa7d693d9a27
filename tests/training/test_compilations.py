"""What a run compiles, and when: the first epoch's programs are enough."""

import time

import jax
import numpy as np
import pytest
from oracles import generated

from vaecf.models import sparse_batch
from vaecf.reporting.writers import Writer
from vaecf.training import input_pipeline

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Epochs(Writer):
    """Counts compilations by the epoch in which they happen.

    The last record of an epoch is that of the validation.
    """

    def __init__(self):
        self.current = 1
        self.compiled = []
        self.records = []

    def heard(self, name, seconds, **about):
        """Listens to JAX, loaded programs included."""
        if name == _COMPILED:
            self.compiled.append((self.current, str(about.get("fun_name"))))

    def write(self, record, step):
        if any(name.startswith("validation/") for name in record):
            self.current = record["epoch"] + 1
        if "train/loss" in record:
            self.records.append(record)

    def of(self, program):
        """Epochs in which a program was compiled."""
        return [epoch for epoch, name in self.compiled if program in name]


@pytest.fixture
def epochs():
    counted = Epochs()
    jax.monitoring.register_event_duration_secs_listener(counted.heard)
    yield counted
    jax.monitoring.unregister_event_duration_listener(counted.heard)


def test_waiting_for_another_process_to_compile_is_no_training(
    tmp_path, small, train, monkeypatch
):
    """With a clock on which only the wait takes more than a millisecond."""
    now, events = 0.0, []

    def clock():
        nonlocal now
        now += 0.001
        return now

    def gather(value):
        nonlocal now
        now += 21.8
        events.append("gather")
        return np.asarray(value)[None]

    compile_ = input_pipeline.InputPipeline._compile

    def compiled(*arguments):
        program = compile_(*arguments)
        events.append("compiled")
        return lambda *a: events.append("run") or program(*a)

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(input_pipeline.processes, "gather", gather)
    monkeypatch.setattr(input_pipeline.InputPipeline, "_compile", compiled)
    monkeypatch.setattr(
        input_pipeline.InputPipeline, "program_bytes", lambda self: 0
    )
    summary = train(tmp_path, small(train={"epochs": 1})).summary
    assert events[:3] == ["compiled", "gather", "run"]
    assert summary["compile_seconds"] > 21.8 * events.count("compiled")
    assert 0 < summary["seconds"] < 1


@pytest.mark.parametrize(
    ("feed", "policy"), [("resident", "fp16"), ("streamed", "fp32")]
)
def test_three_epochs_compile_in_the_first(
    tmp_path, small, train, epochs, feed, policy
):
    """Batches of these users need 256, 512 and 512 slots in the epochs."""
    data = generated(60, 16, 120, 3)
    order = [input_pipeline.epoch_order(7, e, 60, 8) for e in range(3)]
    counts = np.append(data.train.counts, 0)
    needed = [sparse_batch.slots_for(counts[users]) for users in order]
    assert needed == [256, 512, 512]
    config = small(
        data={"feed": feed},
        precision={"policy": policy, "initial_loss_scale": 2.0**24},
        train={"batch_size": 8},
    )
    train(tmp_path, config, data, extra_writer=epochs)
    assert epochs.current == 4
    assert epochs.of("train_steps") == [1]
    assert epochs.of("rank") == [1]
    assert [entry for entry in epochs.compiled if entry[0] > 1] == []
    # Float16 recovers from a loss scale that is too large.
    first, *_, last = epochs.records
    skipped = last["train/skipped_steps"]
    assert (1 <= first["train/skipped_steps"] <= skipped) == (policy == "fp16")
    scale = 2.0 ** (24 - skipped) if policy == "fp16" else 1
    assert last["train/loss_scale"] == scale
    assert last["train/nll"] < first["train/nll"]
