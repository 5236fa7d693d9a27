"""Small runs: resumed, interrupted, diverging, on other meshes."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from oracles import refuses

from vaecf.evaluation import evaluator, scorers
from vaecf.reporting.writers import Writer
from vaecf.training import (
    checkpoints,
    first_state,
    input_pipeline,
    loop,
    progress,
    signals,
)
from vaecf.training.checkpoints import BEST, Checkpoints
from vaecf.training.progress import TrainProgress

STEPS = 4  # an epoch: 60 users, batches of 16
TIMES = {
    "time",
    "train/users_per_second",
    "train/epoch_seconds",
    "validation/seconds",
    "validation/users_per_second",
}


def records(workdir):
    """Returns metrics.jsonl without times and without the summary."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in lines
        if "final/epochs" not in line
    ]


def finals(workdir):
    return (workdir / "metrics.jsonl").read_text().count("final/epochs")


@pytest.fixture(scope="module")
def state_of(small, setup_of):
    """state_of(workdir): the latest state, on one device."""

    def restored(workdir):
        saved = Checkpoints(workdir / "checkpoints")
        state = first_state.restore_state(setup_of(small()), saved)
        saved.close()
        return state

    return restored


@pytest.fixture(scope="module")
def best_of(small, setup_of):
    """best_of(workdir): the best parameters and their progress."""

    def restored(workdir):
        saved, setup = Checkpoints(workdir / "checkpoints"), setup_of(small())
        params = checkpoints.restore_params(saved, setup.whole, setup.mesh)
        position = TrainProgress(**saved.position(BEST))
        saved.close()
        return params, position

    return restored


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


class Recorder(Writer):
    """Keeps the steps of its records; `die_at` raises at a training record."""

    def __init__(self, die_at=None):
        self.die_at, self.steps = die_at, []

    def write(self, record, *, step):
        self.steps.append(step)
        if step == self.die_at and "train/loss" in record:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small, train):
    """A run of three epochs that nothing interrupts."""
    workdir, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    result = train(workdir, small(), extra_writer=recorder)
    assert recorder.steps == [4, 4, 8, 8, 12, 12, 12]
    return workdir, result


@pytest.fixture(scope="module")
def assert_whole(whole, assert_same, state_of):
    def check(workdir):
        states = (state_of(w) for w in (workdir, whole[0]))
        assert_same(*states)
        assert records(workdir) == records(whole[0])

    return check


@pytest.fixture
def stop_after(monkeypatch):
    """`with stop_after(n, signal)`: the process gets a signal in step n."""
    run, calls = input_pipeline.InputPipeline.run, []

    @contextlib.contextmanager
    def patched(n, number):
        def counted(self, state, epoch, start, stop, meanwhile):
            assert stop == start + 1
            calls.append(start)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return run(self, state, epoch, start, stop, meanwhile)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "STRETCH_SECONDS", 0.0)
            patch.setattr(input_pipeline.InputPipeline, "run", counted)
            yield

    return patched


def test_a_finished_run(whole, small, train, assert_same, state_of):
    """Its checkpoint and records, which another call does not change."""
    workdir, result = whole
    before = contents(workdir)
    again = train(workdir, small())
    assert contents(workdir) == before and again.progress == result.progress
    assert_same(again.params, result.params)
    state = state_of(workdir)
    assert state.step == 3 * STEPS
    assert_same(state.params, result.params)
    assert result.progress.epoch == 3 and result.progress.step_in_epoch == 0
    # One warm-up epoch out of three is not timed.
    assert result.progress.timed_users == 2 * 60
    kinds = [
        (r["step"], r["epoch"], "train/loss" in r, "validation/ndcg@10" in r)
        for r in records(workdir)
    ]
    assert kinds == [
        (STEPS * epoch, epoch, training, not training)
        for epoch in (1, 2, 3)
        for training in (True, False)
    ]
    assert finals(workdir) == 1
    losses = [r["train/nll"] for r in records(workdir) if "train/nll" in r]
    assert losses[2] < losses[0]
    anneal = [r["train/anneal"] for r in records(workdir) if "train/kl" in r]
    # Of the last step of each epoch: 3, 7 and 11 of 20, at most 0.2.
    assert anneal == pytest.approx([0.15, 0.2, 0.2])


def test_a_run_is_its_steps(
    whole, small, run_epochs, assert_same, state_of, setup_of
):
    setup = setup_of(small())
    state, metrics = run_epochs(setup, small(), range(3))
    assert_same(state, state_of(whole[0]))
    epochs = [r for r in records(whole[0]) if "train/loss" in r]
    for name in ("loss", "nll", "kl"):
        means = getattr(metrics, name).reshape(3, STEPS).sum(axis=1) / 60
        recorded = [record[f"train/{name}"] for record in epochs]
        assert recorded == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (2, signal.SIGINT),
        (STEPS, signal.SIGTERM),  # the last of an epoch
        (STEPS + 3, signal.SIGTERM),
        (3 * STEPS, signal.SIGINT),  # the last of all
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path, whole, small, train, stop_after, state_of, best_of,
    assert_same, assert_whole, step, number,
):  # fmt: skip
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(n) for n in numbers]
    with (
        stop_after(step, number),
        pytest.raises(loop.Interrupted, match="to resume"),
    ):
        train(tmp_path, small())
    assert handlers == [signal.getsignal(n) for n in numbers]
    assert state_of(tmp_path).step == step
    said = []
    result = train(tmp_path, small(), log=said.append)
    if step < 3 * STEPS:
        assert said == [f"resuming from epoch {step // STEPS}, step {step}"]
    assert_whole(tmp_path)
    assert_same(result.params, whole[1].params)
    best, position = best_of(tmp_path)
    wanted, wanted_position = best_of(whole[0])
    assert_same(best, wanted)
    assert position.epoch == wanted_position.epoch
    assert result.progress.best == position.best == wanted_position.best
    assert finals(tmp_path) == 1


def test_killed_between_checkpoints(
    tmp_path, small, train, assert_whole, state_of
):
    """Records after the last checkpoint are written again, not twice."""
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, small(), extra_writer=Recorder(2 * STEPS))
    assert records(tmp_path)[-1]["step"] == 2 * STEPS
    assert state_of(tmp_path).step == STEPS
    train(tmp_path, small())
    assert_whole(tmp_path)


def test_a_damaged_checkpoint_costs_an_epoch(
    tmp_path, small, train, assert_whole
):
    """Also if the damage is in numbers that orbax would read."""
    train(tmp_path, small(train={"epochs": 2}))
    steps = tmp_path / "checkpoints" / "latest"
    assert {p.name for p in steps.iterdir()} == {"4", "8"}
    position = steps / "8" / "position" / "metadata"
    text = position.read_text()
    position.write_text(text.replace('"epoch": 2', '"epoch": 3'))
    assert position.read_text() != text
    lines: list[str] = []
    train(tmp_path, small(), log=lines.append)
    assert "latest/8" in lines[0] and "step 4 instead" in lines[0]
    assert "epoch 1, step 4" in lines[1]
    assert_whole(tmp_path)
    for step in steps.iterdir():
        (step / "digests.json").write_text("{}")
    with refuses(f"latest.12.*damaged.*remove {tmp_path}.checkpoints"):
        train(tmp_path, small())


def test_a_damaged_best_checkpoint_is_found_before_training(
    tmp_path, small, train
):
    train(tmp_path, small(train={"epochs": 1}))
    [best] = (tmp_path / "checkpoints" / "best").iterdir()
    (best / "state" / "_METADATA").unlink()
    before = contents(tmp_path)
    with refuses("best.4.*state/_METADATA is missing"):
        train(tmp_path, small())
    assert contents(tmp_path) == before


def test_resume_on_another_mesh(tmp_path, small, train, assert_close, state_of):
    """Batches of 15 users do not divide over it; the pipeline changes too."""
    size = {"batch_size": 15, "epochs": 2}
    on_mesh = {"mesh": {"data": 2, "item": 2}, "data": {"feed": "streamed"}}
    train(tmp_path / "a", small(train=size))
    train(tmp_path / "b", small(train=size | {"epochs": 1}))
    train(tmp_path / "b", small(train=size, **on_mesh))
    a, b = (state_of(tmp_path / x) for x in "ab")
    assert a.step == b.step == 8
    assert_close(a.params, b.params, rtol=1e-4, atol=1e-5)
    for x, y in zip(records(tmp_path / "a"), records(tmp_path / "b")):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        if "train/loss" in x:
            assert x["train/loss"] == pytest.approx(y["train/loss"], rel=1e-4)


def test_position_that_does_not_fit_the_state(tmp_path, whole, small, train):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with refuses(r"step 12.*2 steps.*step 6"):
        train(tmp_path, small(train={"batch_size": 30, "epochs": 9}))


def script(monkeypatch, values):
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
    tmp_path, small, train, monkeypatch, assert_same, state_of, best_of
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
    best, at = best_of(tmp_path / "a")
    assert at.epoch == 2
    assert_same(best, state_of(tmp_path / "two").params)
    assert state_of(tmp_path / "a").step == 5 * STEPS
    # The same command stops at once, more patience goes on.
    assert train(tmp_path / "a", config).progress == position
    assert left == [0.4, 0.5]
    more = small(train={"epochs": 6}, eval={"patience": 4})
    position = train(tmp_path / "a", more).progress
    assert (position.epoch, position.best_epoch, position.best) == (6, 6, 0.4)
    assert best_of(tmp_path / "a")[1].epoch == 6


def test_best_checkpoint_scores_what_was_recorded(
    whole, small, dataset, best_of, setup_of
):
    """Evaluates the checkpoint again, with another batch size."""
    values = {
        r["epoch"]: r["validation/ndcg@10"]
        for r in records(whole[0])
        if "validation/ndcg@10" in r
    }
    assert len(set(values.values())) == 3
    params, position = best_of(whole[0])
    assert position.epoch == max(values, key=values.__getitem__)
    config, setup = small(eval={"batch_size": 16}), setup_of(small())
    validation = evaluator.Evaluator.for_split(
        dataset, "validation", config.eval, setup.mesh
    )
    ranker = validation.compile(scorers.model(setup.model))
    result = validation(ranker, scorers.ModelParams(params))
    found = result.summary["ndcg@10"]["mean"]
    assert found == pytest.approx(values[position.epoch], rel=1e-6)


def test_every_epochs_and_the_last(tmp_path, small, train, monkeypatch):
    left = script(monkeypatch, [0.1, 0.2, 0.3])
    how = {"epochs": 5, "drop_remainder": True, "warm_up_epochs": 0}
    result = train(tmp_path, small(train=how, eval={"every_epochs": 2}))
    validated = [
        (r["epoch"], r["step"])
        for r in records(tmp_path)
        if "validation/ndcg@10" in r
    ]
    assert validated == [(2, 6), (4, 12), (5, 15)] and left == []
    assert result.progress.timed_users == 5 * 48


def test_without_validation_users_the_last_is_best(
    tmp_path, small, train, dataset, assert_same, state_of, best_of
):
    held = dataset.validation.held_out
    nothing = dataclasses.replace(
        held, indptr=np.zeros_like(held.indptr), indices=held.indices[:0]
    )
    without = dataclasses.replace(
        dataset, validation=dataset.validation._replace(held_out=nothing)
    )
    for epochs in (0, 1, 2, 2):
        config = small(train={"epochs": epochs})
        result = train(tmp_path, config, without)
        best, position = best_of(tmp_path)
        assert position.epoch == epochs
        assert_same(best, result.params)
        state = state_of(tmp_path)
        assert state.step == epochs * STEPS
        assert_same(state.params, result.params)
    assert not any("validation/ndcg@10" in r for r in records(tmp_path))
    assert finals(tmp_path) == 2


def test_diverging_run_and_more_epochs(
    tmp_path, small, train, assert_whole, state_of
):
    train(tmp_path, small(train={"epochs": 1}))
    assert state_of(tmp_path).step == STEPS
    before = contents(tmp_path / "checkpoints")
    with refuses(r"(nan|inf) in epoch 2.*learning_rate"):
        train(tmp_path, small(optimizer={"learning_rate": 1e30}))
    assert contents(tmp_path / "checkpoints") == before
    # With the first learning rate, the run resumes as if nothing had happened.
    train(tmp_path, small())
    assert_whole(tmp_path)
    assert finals(tmp_path) == 2


@pytest.mark.parametrize(
    ("epochs", "max_steps", "rounds", "steps", "expected"),
    [
        (56, 2000, (3, 1), 158, 12),
        (56, 2000, (3, 1), 26, 56),
        (56, 2000, (3, 1), 40, 48),
        (56, 2000, (3, 1), 10**6, 12),
        *((50, 100, (), 10, 10), (50, 0, (), 10, 50), (2, 1, (), 10, 2)),
    ],
)
def test_max_steps(small, epochs, max_steps, rounds, steps, expected):
    train = {"epochs": epochs, "max_steps": max_steps}
    config = small(train={**train, "alternating_epochs": rounds})
    lines = []
    limited = progress.limit_epochs(config, steps, log=lines.append)
    assert limited.train.epochs == expected
    assert len(lines) == (expected != epochs)


def test_a_run_ends_with_max_steps(small, train, tmp_path):
    result = train(tmp_path, small(train={"epochs": 9, "max_steps": 17}))
    assert result.summary["epochs"] == 17 // STEPS


def test_in_a_thread(tmp_path, small, train):
    """Python delivers signals to the main thread only."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, tmp_path, small(train={"epochs": 1}))
    assert run.result().progress.epoch == 1


def test_stretches_cover_an_epoch_and_last_about_three_seconds():
    clock = signals.Clock()
    assert clock.next_stop(0, 100) == 1
    assert clock.next_stop(0, 100, short=True) == 100
    clock.ran(1, 0.1)
    assert clock.next_stop(1, 100) == 31
    clock.ran(30, 0.1)
    assert clock.next_stop(31, 100) == 100
    clock.ran(69, 1e-12)
    assert clock.next_stop(0, 100) == 100
    clock.ran(100, 1e6)
    assert clock.next_stop(5, 100) == 6
    assert clock.next_stop(5, 100, short=True) == 100
