"""Small runs: resumed, interrupted, diverging, on other meshes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import threading
from typing import Any

import jax
import numpy as np
import pytest

from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import evaluator, scorers
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting.writers import Writer
from vaecf.training import checkpoints, input_pipeline, loop, signals
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, Checkpoints
from vaecf.training.progress import TrainProgress

STEPS = 4  # an epoch: 60 users, batches of 16
TIMES = {
    "time",
    "train/users_per_second",
    "train/epoch_seconds",
    "validation/seconds",
}


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without times and without the summary."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in parsed
        if "final/epochs" not in record
    ]


def finals(workdir: pathlib.Path) -> int:
    return (workdir / "metrics.jsonl").read_text().count("final/epochs")


def setup_of(config, dataset):
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    return state_lib.make_setup(config, dataset.n_items, mesh)


def state_of(workdir, config, dataset) -> state_lib.TrainState:
    saved = Checkpoints(workdir / "checkpoints")
    state = loop.restore_state(setup_of(config, dataset), saved)
    saved.close()
    return state


def best_of(workdir, config, dataset):
    saved = Checkpoints(workdir / "checkpoints")
    setup = setup_of(config, dataset)
    params = checkpoints.restore_params(saved, setup.whole, setup.mesh)
    position = TrainProgress(**saved.position(BEST))
    saved.close()
    return params, position


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small, train):
    """A run of three epochs that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir, small())


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n, signal): the process gets a signal during step n."""

    def arrange(n: int, number: int) -> None:
        monkeypatch.setattr(signals, "STRETCH_SECONDS", 0.0)
        run, calls = input_pipeline.ResidentPipeline.run, []

        def counted(self, state, epoch, start, stop):
            assert stop == start + 1
            calls.append(start)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return run(self, state, epoch, start, stop)

        monkeypatch.setattr(input_pipeline.ResidentPipeline, "run", counted)

    yield arrange


# --- A run ------------------------------------------------------------------


def test_checkpoint_and_records_of_a_run(whole, small, dataset, assert_same):
    workdir, result = whole
    state = state_of(workdir, small(), dataset)
    assert state.step == 3 * STEPS
    assert_same(state.params, result.params)
    assert result.progress.epoch == 3 and result.progress.step_in_epoch == 0
    kinds = [
        (r["step"], r["epoch"], "train/loss" in r, "validation/ndcg@10" in r)
        for r in records(workdir)
    ]
    assert kinds == [
        (STEPS * epoch, epoch, *kind)
        for epoch in (1, 2, 3)
        for kind in ((True, False), (False, True))
    ]
    assert finals(workdir) == 1
    losses = [r["train/nll"] for r in records(workdir) if "train/nll" in r]
    assert losses[2] < losses[0]
    anneal = [r["train/anneal"] for r in records(workdir) if "train/kl" in r]
    # Of the last step of each epoch: 3, 7 and 11 of 20, at most 0.2.
    assert anneal == pytest.approx([0.15, 0.2, 0.2])


def test_a_run_is_its_steps(whole, small, dataset, assert_same):
    """The loop only runs the pipeline, epoch by epoch."""
    setup = setup_of(small(), dataset)
    feed = input_pipeline.ResidentPipeline(setup, dataset.train, 7)
    state = state_lib.init_state(setup, 7)
    sums = []
    for epoch in range(3):
        order = np.random.Generator(np.random.PCG64([7, epoch])).permutation(60)
        order = np.append(order, [60] * 4).astype(np.int32).reshape(4, 16)
        state, totals = feed.run(state, feed.prepare(order), 0, STEPS)
        sums.append(totals)
    assert_same(state, state_of(whole[0], small(), dataset))
    epochs = [r for r in records(whole[0]) if "train/loss" in r]
    for record, totals in zip(epochs, sums, strict=True):
        assert record["train/loss"] == pytest.approx(
            totals.loss.sum() / 60, rel=1e-5
        )
        assert record["train/nll"] == pytest.approx(
            totals.nll.sum() / 60, rel=1e-5
        )
        assert record["train/kl"] == pytest.approx(
            totals.kl.sum() / 60, rel=1e-5
        )


# --- Resuming ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGTERM),
        (2, signal.SIGINT),
        (STEPS, signal.SIGTERM),  # the last of an epoch
        (STEPS + 3, signal.SIGTERM),
        (3 * STEPS, signal.SIGINT),  # the last of all
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path, whole, small, train, dataset, stop_after, monkeypatch,
    assert_same, step, number,
):  # fmt: skip
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context():
        stop_after(step, number)
        with pytest.raises(loop.Interrupted, match="to resume"):
            train(tmp_path, small())
    monkeypatch.undo()
    assert handlers == [
        signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)
    ]
    assert state_of(tmp_path, small(), dataset).step == step
    said = []
    result = train(tmp_path, small(), log=said.append)
    if step < 3 * STEPS:
        assert said == [f"resuming from epoch {step // STEPS}, step {step}"]
    wanted = state_of(whole[0], small(), dataset)
    assert_same(state_of(tmp_path, small(), dataset), wanted)
    assert_same(result.params, wanted.params)
    best, position = best_of(tmp_path, small(), dataset)
    wanted, wanted_position = best_of(whole[0], small(), dataset)
    assert_same(best, wanted)
    assert position.best == wanted_position.best
    assert position.epoch == wanted_position.epoch
    assert records(tmp_path) == records(whole[0])
    assert result.progress.best == whole[1].progress.best


def test_finished_run_does_nothing(tmp_path, whole, small, train, assert_same):
    shutil.copytree(whole[0], tmp_path / "copy")
    before = contents(tmp_path / "copy")
    result = train(tmp_path / "copy", small())
    assert contents(tmp_path / "copy") == before
    assert_same(result.params, whole[1].params)
    assert result.progress == whole[1].progress


def test_more_epochs_resume(
    tmp_path, whole, small, train, dataset, assert_same
):
    train(tmp_path, small(train={"epochs": 1}))
    first = state_of(tmp_path, small(), dataset)
    train(tmp_path, small(train={"epochs": 3}))
    last = state_of(tmp_path, small(), dataset)
    assert (first.step, last.step) == (STEPS, 3 * STEPS)
    assert_same(last, state_of(whole[0], small(), dataset))
    assert records(tmp_path) == records(whole[0])
    assert finals(tmp_path) == 2


def test_killed_between_checkpoints(
    tmp_path, whole, small, train, dataset, monkeypatch, assert_same
):
    """Records after the last checkpoint are written again, not twice."""

    class Killed(Exception):
        pass

    class Killer(Writer):
        def write(self, record, *, step):
            if step == 2 * STEPS and "train/loss" in record:
                raise Killed

    with pytest.raises(Killed):
        train(tmp_path, small(), extra_writer=Killer())
    assert records(tmp_path)[-1]["step"] == 2 * STEPS
    assert state_of(tmp_path, small(), dataset).step == STEPS
    train(tmp_path, small())
    assert_same(
        state_of(tmp_path, small(), dataset),
        state_of(whole[0], small(), dataset),
    )
    assert records(tmp_path) == records(whole[0])


def test_resume_on_another_mesh(tmp_path, small, train, dataset, assert_close):
    """Batches of 15 users do not divide over it; the pipeline changes too."""
    changes = {"train": {"batch_size": 15}}
    other = small(
        mesh={"data": 2, "item": 2}, data={"feed": "streamed"}, **changes
    )
    train(tmp_path / "a", small(**changes))
    train(tmp_path / "b", small(train={"batch_size": 15, "epochs": 1}))
    train(tmp_path / "b", other)
    a, b = (state_of(tmp_path / x, small(**changes), dataset) for x in "ab")
    assert a.step == b.step == 12
    assert_close(a.params, b.params, rtol=1e-4, atol=1e-5)
    for x, y in zip(records(tmp_path / "a"), records(tmp_path / "b")):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        if "train/loss" in x:
            assert x["train/loss"] == pytest.approx(y["train/loss"], rel=1e-4)


def test_position_that_does_not_fit_the_state(tmp_path, whole, small, train):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(VaecfError, match=r"step 12.*2 steps.*step 6"):
        train(tmp_path, small(train={"batch_size": 30, "epochs": 9}))


# --- Validation -------------------------------------------------------------


def script(monkeypatch, values):
    """Validations give these values, one after the other."""
    left = list(values)

    def evaluated(self, ranker, params):
        summary = {
            name: {"mean": left[0], "stderr": 0.0, "users": 16}
            for name in self.metrics
        }
        left.pop(0)
        return evaluator.Evaluation(summary, {}, 0, None)

    monkeypatch.setattr(evaluator.Evaluator, "__call__", evaluated)
    return left


def test_patience_and_best(
    tmp_path, small, train, dataset, monkeypatch, assert_same
):
    train(tmp_path / "two", small(train={"epochs": 2}))
    left = script(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.25, 0.4, 0.5])
    config = small(train={"epochs": 7}, eval={"patience": 3})
    result = train(tmp_path / "a", config)
    # The third epoch without gain is the fifth: 0.4 is never seen.
    assert left == [0.4, 0.5]
    position = result.progress
    assert (position.epoch, position.best_epoch, position.best) == (5, 2, 0.3)
    assert result.summary["best_epoch"] == 2
    best, at = best_of(tmp_path / "a", config, dataset)
    assert at.epoch == 2
    assert_same(best, state_of(tmp_path / "two", config, dataset).params)
    assert state_of(tmp_path / "a", config, dataset).step == 5 * STEPS
    # The same command stops at once, more patience goes on.
    assert train(tmp_path / "a", config).progress == position
    assert left == [0.4, 0.5]
    more = small(train={"epochs": 6}, eval={"patience": 4})
    position = train(tmp_path / "a", more).progress
    assert (position.epoch, position.best_epoch, position.best) == (6, 6, 0.4)
    assert best_of(tmp_path / "a", config, dataset)[1].epoch == 6


def test_best_checkpoint_scores_what_was_recorded(whole, small, dataset):
    """Evaluates the checkpoint again, with another batch size."""
    workdir, _ = whole
    values = {
        r["epoch"]: r["validation/ndcg@10"]
        for r in records(workdir)
        if "validation/ndcg@10" in r
    }
    params, position = best_of(workdir, small(), dataset)
    assert position.epoch == max(values, key=values.__getitem__)
    setup = setup_of(small(), dataset)
    validation = evaluator.Evaluator.for_split(
        dataset, "validation", small().eval, setup.mesh
    )
    validation = dataclasses.replace(validation, batch_size=16)
    ranker = validation.compile(scorers.model(setup.model))
    result = validation(ranker, scorers.ModelParams(params))
    found = result.summary["ndcg@10"]["mean"]
    assert found == pytest.approx(values[position.epoch], rel=1e-6)
    assert len(set(values.values())) == 3


def test_every_epochs_and_the_last(tmp_path, small, train, monkeypatch):
    left = script(monkeypatch, [0.1, 0.2, 0.3])
    train(tmp_path, small(train={"epochs": 5}, eval={"every_epochs": 2}))
    validated = [
        r["epoch"] for r in records(tmp_path) if "validation/ndcg@10" in r
    ]
    assert validated == [2, 4, 5] and left == []


def test_without_validation_users_the_last_is_best(
    tmp_path, small, train, dataset, without_validation, assert_same
):
    for epochs in (0, 1, 2, 2):
        config = small(train={"epochs": epochs})
        result = train(tmp_path, config, without_validation)
        best, position = best_of(tmp_path, config, dataset)
        assert position.epoch == epochs
        assert_same(best, result.params)
        state = state_of(tmp_path, config, dataset)
        assert state.step == epochs * STEPS
        assert_same(state.params, result.params)
    assert not any("validation/ndcg@10" in r for r in records(tmp_path))
    assert finals(tmp_path) == 2


# --- Batches ----------------------------------------------------------------


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_batch_size_beyond_the_users(
    tmp_path, small, train, assert_same, drop_remainder
):
    results = [
        train(
            tmp_path / str(size),
            small(
                train={
                    "batch_size": size,
                    "epochs": 2,
                    "drop_remainder": drop_remainder,
                }
            ),
        )
        for size in (60, 10**9)
    ]
    assert_same(results[0].params, results[1].params)
    assert [r["step"] for r in records(tmp_path / "60")] == [1, 1, 2, 2]


def test_drop_remainder(tmp_path, whole, small, train, dataset):
    config = small(train={"drop_remainder": True, "warm_up_epochs": 0})
    result = train(tmp_path, config)
    assert result.progress.timed_users == 3 * 48
    assert state_of(tmp_path, config, dataset).step == 9
    assert [r["step"] for r in records(tmp_path)] == [3, 3, 6, 6, 9, 9]
    # One warm-up epoch out of three is not timed.
    assert whole[1].progress.timed_users == 2 * 60


def test_no_training_users(tmp_path, small, train, dataset):
    nobody = dataclasses.replace(
        dataset,
        train=Interactions(
            np.zeros(1, np.int64), np.zeros(0, np.int32), dataset.n_items
        ),
        users=type(dataset.users)(dataset.users.ids[60:]),
    )
    with pytest.raises(VaecfError, match="no training users"):
        train(tmp_path, small(), nobody)


# --- Trouble ----------------------------------------------------------------


def test_diverging_run(tmp_path, whole, small, train, dataset, assert_same):
    train(tmp_path, small(train={"epochs": 1}))
    before = contents(tmp_path / "checkpoints")
    mad = small(optimizer={"learning_rate": 1e30})
    with pytest.raises(VaecfError, match="learning_rate") as e:
        train(tmp_path, mad)
    message = str(e.value)
    assert "\n" not in message and "epoch 2" in message
    assert "nan" in message or "inf" in message
    assert contents(tmp_path / "checkpoints") == before
    # With the learning rate as it was, nothing has happened.
    train(tmp_path, small())
    assert_same(
        state_of(tmp_path, small(), dataset),
        state_of(whole[0], small(), dataset),
    )


def test_float16_overflows_for_good(tmp_path, small, train):
    config = small(
        precision={
            "policy": "fp16",
            "initial_loss_scale": 1e38,
            "max_skipped_in_a_row": 3,
        }
    )
    with pytest.raises(VaecfError, match=r"overflowed \d+ steps in a row") as e:
        train(tmp_path, config)
    assert "\n" not in str(e.value) and "bf16" in str(e.value)


def test_float16_recovers(tmp_path, small, train, dataset):
    config = small(
        train={"epochs": 8},
        precision={"policy": "fp16", "initial_loss_scale": 2.0**24},
    )
    result = train(tmp_path, config)
    trained = [r for r in records(tmp_path) if "train/loss" in r]
    skipped = [r["train/skipped_steps"] for r in trained]
    assert 1 <= skipped[0] <= skipped[-1] < 20
    assert trained[-1]["train/loss_scale"] == 2.0 ** (24 - skipped[-1])
    assert trained[-1]["train/nll"] < trained[0]["train/nll"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))


def test_in_a_thread(tmp_path, small, train):
    """Python delivers signals to the main thread only."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            train(tmp_path, small(train={"epochs": 1}))
        )
    )
    thread.start()
    thread.join()
    assert results[0].progress.epoch == 1


def test_extra_writer_gets_every_record(tmp_path, small, train):
    class Recorder(Writer):
        def __init__(self):
            self.steps = []

        def write(self, record, *, step):
            self.steps.append((step, len(record) > 0))

    writer = Recorder()
    train(tmp_path, small(train={"epochs": 2}), extra_writer=writer)
    assert writer.steps == [(s, True) for s in (4, 4, 8, 8, 8)]


# --- The clock --------------------------------------------------------------


def test_stretches_cover_an_epoch_and_last_about_three_seconds():
    clock = signals.Clock()
    assert clock.next_stop(0, 100) == 1
    clock.ran(1, 0.1)
    assert clock.next_stop(1, 100) == 31
    clock.ran(30, 0.1)
    assert clock.next_stop(31, 100) == 100
    clock.ran(69, 1e-12)
    assert clock.next_stop(0, 100) == 100
    clock.ran(100, 1e6)
    assert clock.next_stop(5, 100) == 6
