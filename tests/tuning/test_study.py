"""Which trial is next, with workers that only ask and do not train."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState
from oracles import ROOT, refuses

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.tuning import study as study_lib

# Takes trials until there are none; 'hang' stops in the midst of the first.
WORKER = """
import pickle, sys, time
from vaecf import workdir as workdir_lib
from vaecf.tuning import study as study_lib
plan = pickle.load(open(sys.argv[1], "rb"))
study = study_lib.open_study(plan, "data")
while (trial := study_lib.next_trial(study, plan)) is not None:
    folder = plan.trial_directory(trial.number)
    with workdir_lib.locked(folder), study_lib.heartbeat(trial, folder):
        trial.report(0.25, 1)
        if sys.argv[2:] == ["hang"]:
            print("hangs", flush=True)
            time.sleep(100)
        time.sleep(0.02)
        study.tell(trial, trial.params["model.dropout_rate"])
"""


def start(plan, *arguments):
    plan.workdir.mkdir(parents=True, exist_ok=True)
    file = plan.workdir / "plan.pickle"
    file.write_bytes(pickle.dumps(plan))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(file), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finished(study):
    return [t.number for t in study_lib.finished(study)]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_workers_at_once_do_n_in_all(kind, plan, tmp_path):
    made = plan(trials=9)
    if kind == "sqlite":
        made = plan(trials=9, storage=f"sqlite:///{tmp_path / 'sweep.db'}")
    workers = [start(made) for _ in range(2)]
    assert [w.wait(60) for w in workers] == [0, 0]
    study = study_lib.open_study(made, "data")
    trials = study_lib.counted(study)
    assert len(trials) == 9
    assert all(t.state == TrialState.COMPLETE for t in trials)
    # None is done twice: every one has parameters of its own.
    assert len({str(t.params) for t in trials}) == 9
    # A sweep of more trials goes on, one of as many does not.
    assert study_lib.next_trial(study, made) is None
    more = study_lib.next_trial(study, dataclasses.replace(made, trials=10))
    assert more is not None


def test_values_lie_in_the_space_and_go_by_the_seed(plan):
    def draw(seed, name):
        made = plan(trials=14, seed=seed, study=name)
        drawn = []
        while True:
            # A worker that is started anew for every trial.
            study = study_lib.open_study(made, "data")
            if (trial := study_lib.next_trial(study, made)) is None:
                return drawn
            study.tell(trial, trial.params["model.dropout_rate"])
            drawn.append(trial.params)

    first = draw(1, "a")
    for params in first:
        assert 1e-3 <= params["optimizer.learning_rate"] <= 1e-1
        assert 0 <= params["model.dropout_rate"] <= 0.6
        assert params["model.latent"] in (2, 4, 6, 8)
        assert params["model.hidden"] in ("()", "(8,)")
    assert draw(1, "b") == first
    assert draw(2, "c") != first
    # It learns: what the last ones try is better than what the first ones do.
    rates = [params["model.dropout_rate"] for params in first]
    assert sum(rates[10:]) / 4 > sum(rates[:10]) / 10


def test_the_trial_of_a_killed_worker_is_tried_again(plan):
    made = plan(trials=3)
    worker = start(made, "hang")
    assert worker.stdout is not None and worker.stdout.readline() == "hangs\n"
    study = study_lib.open_study(made, "data")
    # As long as it lives, it is left alone.
    other = study_lib.next_trial(study, made)
    assert other.number == 1
    study.tell(other, 0.5)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    again = study_lib.next_trial(study, made)
    (dead,) = study.get_trials(states=(TrialState.FAIL,))
    assert dead.number == 0 and again.number == 2
    assert again.params == dead.params
    assert again.user_attrs["folder"] == dead.user_attrs["folder"]
    assert study.get_trials()[2].intermediate_values == {1: 0.25}
    study.tell(again, 0.6)
    study.tell(study_lib.next_trial(study, made), 0.7)
    assert study_lib.next_trial(study, made) is None
    assert finished(study) == [1, 2, 3]


def test_a_trial_that_kills_its_workers_fails(plan):
    made = plan(trials=2)
    study = study_lib.open_study(made, "data")
    params = []
    for _ in range(3):
        trial = study_lib.next_trial(study, made)
        params.append(trial.params)
        assert study_lib.enqueue_again(study, trial.number, lost=True)
    assert params[0] == params[1] == params[2]
    other = study_lib.next_trial(study, made)
    assert other.params != params[0]
    (failed,) = study_lib.finished(study)
    assert "3 workers were lost" in failed.user_attrs["error"]
    assert failed.params == params[0]
    # An interrupt is not the trial's fault.
    for _ in range(5):
        assert study_lib.enqueue_again(study, other.number)
        again = study_lib.next_trial(study, made)
        assert again.params == other.params
        other = again


class Killed(BaseException):
    """Ends a worker at once."""


def lose_a_worker(study, plan, stage):
    """A worker takes a trial and is killed, in one of five stages."""
    ask = study.ask

    def die_while_asking(distributions):
        ask(dict([*distributions.items()][: 2 * stage]))
        raise Killed

    if stage < 2:  # before values are drawn, or when two of four are
        study.ask = die_while_asking
        with pytest.raises(Killed):
            study_lib.next_trial(study, plan)
        return
    trial = study_lib.next_trial(study, plan)  # stage 2: training is to begin
    folder = plan.trial_directory(trial.number)
    if stage == 3:  # the worker trains
        with workdir_lib.locked(folder), study_lib.heartbeat(trial, folder):
            pass
    if stage == 4:  # the trial is ended, and not yet enqueued again
        study.tell(trial, state=TrialState.FAIL)


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_lost_workers_change_no_value(plan, tmp_path, monkeypatch, pruner):
    """Random values at first, then those of TPE; and the brackets."""
    monkeypatch.setattr(study_lib, "ASK_SECONDS", 0.0)

    def run(losses):
        journal = str(tmp_path / f"{losses}.journal")
        made = plan(trials=13, pruner=pruner, storage=journal)
        for n in range(made.trials):
            for k in range(losses):
                study = study_lib.open_study(made, "data")
                lose_a_worker(study, made, (n + k) % 5)
            study = study_lib.open_study(made, "data")
            trial = study_lib.next_trial(study, made)
            study.tell(trial, trial.params["model.dropout_rate"])
        assert study_lib.next_trial(study, made) is None
        trials, brackets = study_lib.counted(study), []
        if pruner == "hyperband":
            study.pruner._try_initialization(study)
            brackets = [study.pruner._get_bracket_id(study, t) for t in trials]
            assert len({*brackets}) > 1
        return [t.params for t in trials], brackets

    assert run(losses=0) == run(losses=1) == run(losses=2)


def test_a_journal_whose_last_line_was_cut(plan):
    made = plan(trials=3)
    study = study_lib.open_study(made, "data")
    study.tell(study_lib.next_trial(study, made), 0.5)
    path = made.workdir / "study.journal"
    whole = path.read_bytes()
    for cut in (whole + b'{"op_code":5,"wor', whole + whole[:-1]):
        path.write_bytes(cut[: len(whole) + 30])
        study = study_lib.open_study(made, "data")
        assert finished(study) == [0]
        assert path.read_bytes().startswith(whole)
        for line in path.read_bytes().splitlines():
            json.loads(line)
    assert study_lib.next_trial(study, made).number == 1


def test_the_trial_of_a_lost_host_is_tried_again(plan, monkeypatch):
    made = plan(trials=1)
    study = study_lib.open_study(made, "data")
    trial = study_lib.next_trial(study, made)
    folder = made.trial_directory(0)
    monkeypatch.setattr(study_lib.socket, "gethostname", lambda: "elsewhere")
    with workdir_lib.locked(folder), study_lib.heartbeat(trial, folder):
        pass
    monkeypatch.undo()
    # Its folder is free here, which says nothing of another host.
    assert study_lib.next_trial(study, made) is None
    now = time.time()
    monkeypatch.setattr(study_lib.time, "time", lambda: now + 601)
    again = study_lib.next_trial(study, made)
    assert again is not None and again.number == 1
    # Only one process gets to enqueue it.
    assert not study_lib.enqueue_again(study, 0)


def test_a_study_is_one_of_a_config_a_space_and_a_dataset(plan, base):
    made = plan()
    study_lib.open_study(made, "a")
    study_lib.open_study(made, "a")
    epochs = config_lib.replace(base, {"train.epochs": 9})
    elsewhere = config_lib.replace(base, {"data.dir": "/other"})
    study_lib.open_study(plan(base=elsewhere), "a")
    with refuses(r"another config\.train\.epochs: use"):
        study_lib.open_study(plan(base=epochs), "a")
    with refuses("another dataset"):
        study_lib.open_study(made, "b")
    space = {**made.space, "model.latent": {"low": 2, "high": 4}}
    with refuses(r"another space of model\.latent"):
        study_lib.open_study(plan(space=space), "a")


def test_passwords_are_not_shown(plan):
    url = "nosuch://me:secret@host/db"
    with refuses(r"nosuch://\*\*\*@host/db") as caught:
        study_lib.open_study(plan(storage=url), "data")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study", "ending in .journal or .log, or the URL"),
        ("nosuch://a/b", "cannot be used"),
        ("sqlite:////nosuch/folder/x.db", "unable to open database file"),
        ("/proc/nosuch/x.journal", "cannot be written"),
    ],
)
def test_storages_that_are_none(storage, message, plan, monkeypatch):
    monkeypatch.setattr(study_lib.time, "sleep", lambda seconds: None)
    with refuses(message):
        study_lib.open_study(plan(storage=storage), "data")


def test_pruners(plan):
    for name, kind in {
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }.items():
        study = study_lib.open_study(plan(pruner=name), "data")
        assert isinstance(study.pruner, kind)
    with refuses("one of median, hyperband, none"):
        study_lib.open_study(plan(pruner="mean"), "data")


def test_a_trial_that_lost_a_worker_runs_alone(plan, opened):
    made = plan(trials=3, population=3, space={"seed": {"low": 0, "high": 9}})
    study = opened(made)
    with contextlib.ExitStack() as stack:

        def begin(trial):
            folder = made.trial_directory(trial.number)
            stack.enter_context(workdir_lib.locked(folder))
            stack.enter_context(study_lib.heartbeat(trial, folder))

        for trial in [*study_lib.next_trials(study, made)]:
            if trial.number != 1:
                study_lib.enqueue_again(study, trial.number, lost=True)
            else:
                begin(trial)  # that worker lives on
        for expected in (3, 4):
            (trial,) = [*study_lib.next_trials(study, made)]
            assert trial.number >= expected
            assert trial.user_attrs["lost"] == 1
            begin(trial)
        assert [*study_lib.next_trials(study, made)] == []
