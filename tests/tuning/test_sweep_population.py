"""Sweeps whose trials train together, against trials that train alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import optuna
import pytest
from optuna.trial import TrialState

from vaecf import config as config_lib
from vaecf.errors import VaecfError
from vaecf.serving.trained_model import load
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning import sweep as sweep_lib
from vaecf.tuning import trial as trial_lib

SPACE = {
    "optimizer.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "model.dropout_rate": {"low": 0.0, "high": 0.6},
    "seed": {"low": 0, "high": 9},
}
PARAMS = [
    {"optimizer.learning_rate": 0.01, "model.dropout_rate": 0.5, "seed": 3},
    {"optimizer.learning_rate": 1e30, "model.dropout_rate": 0.5, "seed": 3},
    {"optimizer.learning_rate": 0.03, "model.dropout_rate": 0.1, "seed": 4},
]


def swept(opened, plan, said: list[str] | None = None) -> list:
    """Trials with `PARAMS` of a sweep that is through with them."""
    study = opened(plan)
    for params in PARAMS:
        study.enqueue_trial(params)
    sweep_lib.sweep(plan, log=(said if said is not None else []).append)
    return study.get_trials()


def test_trials_are_what_they_are_alone(plan, tmp_path, opened, curve) -> None:
    """Three, of which the second must fail, two at a time."""
    rates = {"optimizer.learning_rate": {"low": 1e-3, "high": 1e30}}
    how = {"trials": 3, "pruner": "none", "space": SPACE | rates}
    said: list[str] = []
    made = plan(**how, population=2)
    together = swept(opened, made, said)
    alone = swept(
        opened,
        plan(
            **how,
            workdir=tmp_path / "alone",
            storage=str(tmp_path / "alone" / "study.journal"),
        ),
    )
    assert [t.state.name for t in together] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "the loss is" in together[1].user_attrs["error"]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.params == theirs.params and ours.state == theirs.state
        assert ours.intermediate_values == pytest.approx(
            theirs.intermediate_values, abs=1e-5
        )
        if ours.state == TrialState.COMPLETE:
            folder = made.workdir / "trials" / f"{ours.number:05d}"
            assert ours.intermediate_values == curve(folder)
            assert ours.value == max(curve(folder).values())
            model = load(folder)
            rate = ours.params["model.dropout_rate"]
            assert model.config.model.dropout_rate == rate
            left = {path.name for path in (folder / "checkpoints").iterdir()}
            assert left == {"best"}
    for number in range(3):
        assert sum(line.startswith(f"trial {number}: ") for line in said) == 1


def test_a_pruned_trial_does_not_stop_the_others(plan, opened, curve) -> None:
    """Five before it were as good as none can be, or better than it."""
    made = plan(
        trials=7,
        population=2,
        prune_after=2,
        space={"optimizer.learning_rate": {"low": 1e-9, "high": 0.1}},
    )
    study = opened(made)
    distributions = space_lib.distributions(made.space, made.base)
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.0,
                params={"optimizer.learning_rate": 0.05},
                distributions=distributions,
                intermediate_values={1: 0.3, 2: 0.3, 3: 0.3, 4: 0.3},
            )
        )
    for rate in (1e-9, 0.05):  # the first learns nothing
        study.enqueue_trial({"optimizer.learning_rate": rate})
    said: list[str] = []
    sweep_lib.sweep(made, log=said.append)
    bad, good = study.get_trials()[5:]
    assert (bad.state, good.state) == (TrialState.PRUNED, TrialState.COMPLETE)
    folders = [made.workdir / "trials" / f"0000{n}" for n in (5, 6)]
    assert list(curve(folders[0])) == [1, 2] and curve(folders[0])[2] < 0.3
    assert list(curve(folders[1])) == [1, 2, 3, 4]
    assert not (folders[0] / "checkpoints").exists()
    assert (folders[1] / "checkpoints" / "best").exists()
    (line,) = [text for text in said if text.startswith("trial 5: ")]
    assert line.endswith("pruned") and "2 epochs" in line


def test_an_interrupted_population_goes_on(
    plan, tmp_path, monkeypatch, opened, curve
) -> None:
    how = {"trials": 2, "population": 2, "pruner": "none", "space": SPACE}
    stopped: list[int] = []
    goes_on = trial_lib._Watch.goes_on

    def stop(self, record):
        if record["epoch"] == 2 and not stopped:
            stopped.append(2)
            os.kill(os.getpid(), signal.SIGINT)
        return goes_on(self, record)

    monkeypatch.setattr(trial_lib._Watch, "goes_on", stop)
    made = plan(**how)
    with pytest.raises(KeyboardInterrupt, match="0 of 2 trials are over; the"):
        sweep_lib.sweep(made, log=lambda line: None)
    states = [t.state.name for t in opened(made).get_trials()]
    assert states == ["FAIL", "FAIL", "WAITING", "WAITING"]
    sweep_lib.sweep(made, log=lambda line: None)
    straight = plan(
        **how,
        workdir=tmp_path / "straight",
        storage=str(tmp_path / "straight" / "study.journal"),
    )
    sweep_lib.sweep(straight, log=lambda line: None)
    ours, theirs = (study_lib.counted(opened(p)) for p in (made, straight))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs):
        assert one.params == other.params
        assert one.intermediate_values == other.intermediate_values
        # Each epoch once: it did not start over.
        folder = made.workdir / "trials" / f"{one.number:05d}"
        assert curve(folder) == one.intermediate_values


def test_what_is_no_population_is_refused(plan) -> None:
    def refused(message, **changes):
        with pytest.raises(VaecfError, match=message):
            sweep_lib.sweep(plan(**changes), log=lambda line: None)

    refused("--population=0 must be at least 1", population=0)
    refused("--population=2 with model.latent in --space", population=2)
    assert not (plan().workdir / "trials").exists()


def test_too_many_for_the_memory_wait(plan, monkeypatch, opened) -> None:
    def train(*arguments, **named):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n")

    monkeypatch.setattr(trial_lib.population_loop, "train", train)
    made = plan(trials=2, population=2, space=SPACE)
    with pytest.raises(VaecfError) as caught:
        sweep_lib.sweep(made, log=lambda line: None)
    assert str(caught.value) == (
        "--population=2: RESOURCE_EXHAUSTED: Out of memory; train fewer at once"
    )
    states = [t.state for t in opened(made).get_trials()]
    assert states == [TrialState.FAIL] * 2 + [TrialState.WAITING] * 2


def test_a_trial_that_was_taken_over_is_left_alone(
    plan, monkeypatch, opened
) -> None:
    goes_on = trial_lib._Watch.goes_on

    def taken(self, record):
        if self._trial.number == 0 and record["epoch"] == 1:
            study_lib.enqueue_again(self._trial.study, 0, lost=True)
        return goes_on(self, record)

    monkeypatch.setattr(trial_lib._Watch, "goes_on", taken)
    made = plan(trials=2, population=2, pruner="none", space=SPACE)
    said: list[str] = []
    sweep_lib.sweep(made, log=said.append)
    assert "trial 0: taken over by another worker" in said
    states = [t.state.name for t in opened(made).get_trials()]
    # By nobody else than the same worker, in its next turn.
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


def test_an_interrupt_at_the_very_end_ends_the_sweep(
    plan, monkeypatch, opened
) -> None:
    """All of the first population are over; the second is not begun."""
    goes_on, stopped = trial_lib._Watch.goes_on, []

    def stop(self, record):
        if record["epoch"] == 4 and not stopped:
            stopped.append(4)
            os.kill(os.getpid(), signal.SIGINT)
        return goes_on(self, record)

    monkeypatch.setattr(trial_lib._Watch, "goes_on", stop)
    made = plan(trials=4, population=2, pruner="none", space=SPACE)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 trials are over; the"):
        sweep_lib.sweep(made, log=lambda line: None)
    states = [t.state.name for t in opened(made).get_trials()]
    assert states == ["COMPLETE", "COMPLETE"]


def test_what_is_over_stays_so_after_an_interrupt(
    plan, monkeypatch, opened
) -> None:
    """The first is pruned at epoch 1, and the second interrupted at 2."""
    goes_on = trial_lib._Watch.goes_on

    def stop(self, record):
        goes_on(self, record)
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return self._trial.number != 0

    monkeypatch.setattr(trial_lib._Watch, "goes_on", stop)
    made = plan(trials=2, population=2, pruner="none", space=SPACE)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 trials are over; the"):
        sweep_lib.sweep(made, log=lambda line: None)
    first, second, third = opened(made).get_trials()
    assert first.state == TrialState.PRUNED
    assert (second.state, third.state) == (TrialState.FAIL, TrialState.WAITING)
    assert third.params == second.params
    assert list(third.intermediate_values) == [1, 2]


def test_an_error_is_found_one_after_the_other(
    plan, monkeypatch, opened
) -> None:
    """A folder that cannot be trained in fails its own trial alone."""
    train = trial_lib.population_loop.train

    def damaged(members, *arguments, **named):
        latest = members[0].workdir / "checkpoints" / "latest"
        latest.mkdir(parents=True)
        (latest / "17").mkdir()
        return train(members, *arguments, **named)

    monkeypatch.setattr(trial_lib.population_loop, "train", damaged)
    said: list[str] = []
    made = plan(trials=2, population=2, pruner="none", space=SPACE)
    sweep_lib.sweep(made, log=said.append)
    assert any(line.startswith("one after the other: ") for line in said)
    states = [t.state.name for t in opened(made).get_trials()]
    assert states == ["FAIL", "COMPLETE"]


@pytest.fixture
def blend(base):
    path = config_lib.LinearConfig(
        l2=5.0, dropout=0.3, user_exponent=0.0, rank=0
    )
    return dataclasses.replace(base, linear=path)


@pytest.mark.parametrize("population", [1, 2])
def test_a_blend_that_cannot_be_weighed_fails_alone(
    plan, blend, monkeypatch, opened, population
) -> None:
    value = trial_lib.weighing.value

    def damaged(config, folder, *rest):
        if folder.name == "00000":
            raise VaecfError("the path cannot be read")
        return value(config, folder, *rest)

    monkeypatch.setattr(trial_lib.weighing, "value", damaged)
    how = dict(base=blend, population=population, pruner="none", space=SPACE)
    made = plan(trials=2, **how)
    sweep_lib.sweep(made, log=lambda line: None)
    first, second = opened(made).get_trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert first.user_attrs[study_lib.ERROR] == "the path cannot be read"
    folder = made.workdir / "trials" / "00001"
    weights = json.loads((folder / "linear" / "weights.json").read_text())
    assert second.value == weights["value"]
    assert second.value == max(t["value"] for t in weights["tried"])


def test_an_interrupt_does_not_wait_for_blends_to_be_weighed(
    plan, blend, monkeypatch, opened
) -> None:
    goes_on, value = trial_lib._Watch.goes_on, trial_lib.weighing.value
    weighed: list[str] = []

    def stop(self, record):
        if record["epoch"] == blend.train.epochs and not weighed:
            os.kill(os.getpid(), signal.SIGINT)
        return goes_on(self, record)

    def watched(config, folder, *rest):
        weighed.append(folder.name)
        return value(config, folder, *rest)

    monkeypatch.setattr(trial_lib._Watch, "goes_on", stop)
    monkeypatch.setattr(trial_lib.weighing, "value", watched)
    how = dict(base=blend, population=2, pruner="none", space=SPACE)
    made = plan(trials=2, **how)
    with pytest.raises(KeyboardInterrupt, match="0 of 2 trials are over; the"):
        sweep_lib.sweep(made, log=lambda line: None)
    assert not weighed
    monkeypatch.setattr(trial_lib._Watch, "goes_on", goes_on)
    sweep_lib.sweep(made, log=lambda line: None)
    done = [t for t in opened(made).get_trials() if t.value is not None]
    assert len(done) == len(weighed) == 2
    # Those of the call that was interrupted count too.
    for trial in done:
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs[study_lib.SECONDS] > 0


def test_who_may_have_killed_a_worker_goes_alone(plan, opened) -> None:
    made = plan(trials=3, population=3, space=SPACE)
    study = opened(made)
    for trial in study_lib.next_trials(study, made):
        if trial.number != 1:  # that one's worker lives on
            study_lib.enqueue_again(study, trial.number, lost=True)
    for expected in (3, 4):
        (trial,) = study_lib.next_trials(study, made)
        assert trial.number >= expected
        assert trial.user_attrs["lost"] == 1
    assert study_lib.next_trials(study, made) == []


def test_every_worker_has_trials(plan, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        sweep_lib,
        "_work_in_processes",
        lambda plan, workers, log: seen.append(plan.population),
    )
    for trials, population in ((8, 8), (8, 3), (5, 8)):
        made = plan(trials=trials, population=population, space=SPACE)
        sweep_lib.sweep(made, workers=2, log=lambda line: None)
    assert seen == [4, 3, 3]
