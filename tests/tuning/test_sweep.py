"""Sweeps that train, compared with the files that their trials write."""

import os
import pathlib
import signal
import threading
import time

import jax
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from oracles import generated, refuses

from vaecf import config as config_lib
from vaecf.data.dataset import find_dataset, open_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import linear
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import trained_model
from vaecf.serving.trained_model import load
from vaecf.training import loop, signals
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning import sweep as sweep_lib
from vaecf.workdir import read_json

METRIC = "validation/ndcg@10"
RATES = (0.01, 1e30, 0.03)
# Settings that the trials of a population may vary.
NUMBERS = {
    "optimizer.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    "model.dropout_rate": {"low": 0.0, "high": 0.6},
    "seed": {"low": 0, "high": 9},
}


def quiet(line):
    """Drops a line of the log."""


@pytest.fixture
def on_report(monkeypatch):
    """on_report(f) calls f(run, record) after each report of a validation."""

    def patch(after):
        write = sweep_lib.TrialRun.write

        def watched(self, record, step):
            try:
                write(self, record, step)
            finally:
                if METRIC in record:
                    after(self, record)

        monkeypatch.setattr(sweep_lib.TrialRun, "write", watched)

    return patch


def test_a_sweep(plan, tmp_path, monkeypatch, opened, curve):
    """Three trials, the second of which must fail; the test users are away."""
    made = plan(
        trials=3,
        pruner="none",
        # Only this key, so that the trial that fails can be asked for.
        space={"optimizer.learning_rate": {"low": 1e-3, "high": 1e30}},
    )
    study = opened(made)
    for rate in RATES:
        study.enqueue_trial({"optimizer.learning_rate": rate})

    def without_test_users(path):
        found = find_dataset(path)
        object.__setattr__(found, "test", None)
        return found

    monkeypatch.setattr(sweep_lib, "find_dataset", without_test_users)
    said = []
    rows = sweep_lib.sweep(made, log=said.append)

    trials = study.get_trials()
    assert [row["value"] for row in rows] == [t.value for t in trials]
    states = [row["state"] for row in rows]
    assert states == ["complete", "failed", "complete"]
    assert "the loss is" in trials[1].user_attrs["error"]
    bests = {}
    for number in (0, 2):
        folder = made.trial_directory(number)
        values = curve(folder)
        assert list(values) == [1, 2, 3, 4]
        assert trials[number].intermediate_values == values
        bests[number] = max(values.values())
        assert trials[number].value == bests[number]
        config = read_json(folder / "config.json")
        rate = trials[number].params["optimizer.learning_rate"]
        assert config["optimizer"]["learning_rate"] == rate
        assert not (folder / "tensorboard").exists()
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["best"]
    assert study.best_value == max(bests.values())
    # The best checkpoint is a model like any other.
    best = max(bests, key=lambda n: bests[n])
    model = load(made.trial_directory(best))
    assert model.config.optimizer.learning_rate == RATES[best]

    frame = pd.read_csv(made.workdir / "trials.csv")
    assert frame["number"].tolist() == [0, 1, 2]
    assert frame["value"].max() == study.best_value
    assert frame["optimizer.learning_rate"].tolist() == [*RATES]
    written = read_json(made.workdir / "best.json")
    assert (written["number"], written["value"]) == (best, study.best_value)
    assert written["params"] == {"optimizer.learning_rate": RATES[best]}
    text = "\n".join(said)
    assert "trial 1: failed: the loss is" in text
    table = text[text.index("---") :].splitlines()
    assert table[1].split()[0] == str(best)

    # Nothing is left to do.
    said.clear()
    sweep_lib.sweep(made, log=said.append)
    assert len(study.get_trials()) == 3
    assert said[0].startswith("study sweep: 3 of 3 trials are finished")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "trials=0 must be at least 1"),
        ({"prune_after": -1}, "prune_after=-1"),
        ({"prune_after": 2, "pruner": "none"}, "prune_after=2 has no effect"),
        ({"space": {"x": {"choices": [1]}}}, "'x' is not a known key"),
        ({"population": 2}, "model.latent changes the program"),
        ({"data.dir": "/nosuch"}, "no dataset in /nosuch"),
        ({"eval.best_metric": "ndgc@10"}, "ndgc"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_mistakes_are_found_before_the_first_trial(change, message, plan, base):
    change = dict(change)
    workers = change.pop("workers", 1)
    if change.keys() & config_lib.settings().keys():
        change = {"base": config_lib.replace(base, change)}
    with refuses(message):
        sweep_lib.sweep(plan(**change), workers=workers, log=quiet)
    assert not (plan().workdir / "trials").exists()


def test_a_workdir_is_one_of_a_study(plan, monkeypatch):
    made = plan()
    sweep_lib._check_or_create(made)
    # By another name, and moved.
    moved = made.workdir.rename(made.workdir.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    relative = pathlib.Path("moved")
    sweep_lib._check_or_create(
        plan(workdir=relative, storage=str(relative / "study.journal"))
    )
    moved.rename(made.workdir)
    with refuses("'study': 'other'"):
        sweep_lib._check_or_create(plan(study="other"))


def test_a_dataset_without_validation_users_is_refused(plan, monkeypatch):
    empty = generated(30, 0, 33, 3)
    monkeypatch.setattr(sweep_lib, "find_dataset", lambda path: empty)
    with refuses("needs validation users"):
        sweep_lib.sweep(plan())


@pytest.fixture
def fail(monkeypatch):
    """fail(error): training raises the error."""

    def patch(error):
        def train(*arguments, **named):
            raise error

        monkeypatch.setattr(loop, "train", train)

    return patch


OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory\n"
)


def test_a_model_too_large_is_a_failed_trial(plan, fail, opened):
    fail(OUT_OF_MEMORY)
    said = []
    for _ in range(2):  # it is an error again at the next call
        with refuses("none of the 2 trials succeeded .2 failed; .*EXHAUSTED"):
            sweep_lib.sweep(plan(trials=2), log=said.append)
    assert len(pd.read_csv(plan().workdir / "trials.csv")) == 2
    lines = [line for line in said if line.startswith("trial ")]
    assert len(lines) == 2
    assert all("failed: RESOURCE_EXHAUSTED: Out of" in line for line in lines)
    assert "no trial is complete yet" in said[-1]
    # What fails every trial ends the sweep before all are spent.
    with refuses("5 trials in a row failed"):
        sweep_lib.sweep(plan(trials=20), log=said.append)
    assert len(opened(plan()).get_trials()) == 7


@pytest.mark.filterwarnings("ignore:Fixed parameter")
def test_a_config_that_is_refused_is_a_failed_trial(plan, opened):
    made = plan(trials=2, population=2, space=NUMBERS)
    for _ in range(2):
        opened(made).enqueue_trial({"model.dropout_rate": 2.0})
    with refuses(r"2 failed; .*config\.model\.dropout_rate=2\.0 must be"):
        sweep_lib.sweep(made, log=quiet)
    states = [t.state for t in study_lib.counted(opened(made))]
    assert states == [TrialState.FAIL] * 2


def test_a_defect_ends_the_sweep_and_the_trial_waits(plan, fail, opened):
    fail(TypeError("a defect"))
    with pytest.raises(TypeError, match="a defect"):
        sweep_lib.sweep(plan(trials=2), log=quiet)
    states = [t.state for t in opened(plan(trials=2)).get_trials()]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_trials_of_a_population_equal_separate_trials(
    plan, tmp_path, opened, curve
):
    """Three trials, two at a time; the second must fail."""
    rates = {"optimizer.learning_rate": {"low": 1e-3, "high": 1e30}}
    how = {"trials": 3, "pruner": "none", "space": NUMBERS | rates}

    def swept(made):
        study = opened(made)
        for rate, dropout, seed in zip(RATES, (0.5, 0.5, 0.1), (3, 3, 4)):
            study.enqueue_trial(dict(zip(NUMBERS, (rate, dropout, seed))))
        sweep_lib.sweep(made, log=quiet)
        return study.get_trials()

    made = plan(**how, population=2)
    together = swept(made)
    alone = swept(plan(**how, workdir=tmp_path / "alone", storage=""))
    assert [t.state.name for t in together] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "the loss is" in together[1].user_attrs["error"]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.params, ours.state) == (theirs.params, theirs.state)
        assert ours.intermediate_values == pytest.approx(
            theirs.intermediate_values, abs=1e-5
        )
        if ours.state == TrialState.COMPLETE:
            folder = made.trial_directory(ours.number)
            assert ours.intermediate_values == curve(folder)
            assert ours.value == max(curve(folder).values())
            rate = ours.params["model.dropout_rate"]
            assert load(folder).config.model.dropout_rate == rate


@pytest.mark.parametrize("population", [1, 2])
def test_a_pruned_trial_does_not_stop_another(plan, opened, curve, population):
    """Five earlier trials are better than the first, not than the second."""
    made = plan(
        trials=7,
        population=population,
        prune_after=2,
        space={"optimizer.learning_rate": {"low": 1e-9, "high": 0.1}},
    )
    study = opened(made)
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.0,
                params={"optimizer.learning_rate": 0.05},
                distributions=space_lib.distributions(made.space, made.base),
                intermediate_values={1: 0.3, 2: 0.3, 3: 0.3, 4: 0.3},
            )
        )
    for rate in (1e-9, 0.05):  # the first learns nothing
        study.enqueue_trial({"optimizer.learning_rate": rate})
    said = []
    rows = sweep_lib.sweep(made, log=said.append)
    assert [r["state"] for r in rows[5:]] == ["pruned", "complete"]
    # Optuna's warm-up ends with its epochs.
    assert list(curve(made.trial_directory(5))) == [1, 2]
    assert list(curve(made.trial_directory(6))) == [1, 2, 3, 4]
    assert study.get_trials()[5].intermediate_values == curve(
        made.trial_directory(5)
    )
    assert not (made.trial_directory(5) / "checkpoints").exists()
    assert (made.trial_directory(6) / "checkpoints" / "best").exists()
    (line,) = [text for text in said if text.startswith("trial 5: ")]
    assert ": pruned; " in line and line.endswith("; 2 epochs")


def test_the_epoch_that_max_steps_ends_with_is_not_pruned(plan, base, opened):
    """Sixteen steps are four epochs of four."""
    longer = config_lib.replace(base, {"train.epochs": 9})
    made = plan(base=config_lib.replace(longer, {"train.max_steps": 16}))
    study = opened(made)
    trial = study.ask(space_lib.distributions(made.space, made.base))
    trial.should_prune = lambda: True
    run = sweep_lib.TrialRun(made, study, trial, quiet, quiet)
    with pytest.raises(sweep_lib._Pruned):
        run.write({"epoch": 3, METRIC: 0.1}, step=12)
    run.write({"epoch": 4, METRIC: 0.1}, step=16)
    assert study.get_trials()[0].intermediate_values == {3: 0.1, 4: 0.1}


@pytest.mark.parametrize("population", [1, 2])
def test_an_interrupted_sweep_resumes(
    plan, tmp_path, on_report, opened, curve, population
):
    """Trials end as uninterrupted ones do; here in a database."""
    sent, seen = [], threading.Event()

    def stop(run, record):
        if record["epoch"] == 2 and not seen.is_set():
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGINT))
            # The main thread may take its time; no trial ends before.
            while not signals._received[-1]:
                time.sleep(0.01)

    def made(name):
        return plan(
            trials=population,
            population=population,
            pruner="none",
            space=NUMBERS,
            workdir=tmp_path / name,
            storage=f"sqlite:///{tmp_path / name}.db",
        )

    on_report(stop)
    cut, straight = made("cut"), made("straight")
    with pytest.raises(KeyboardInterrupt, match="trials are finished; the"):
        sweep_lib.sweep(cut, log=quiet)
    seen.set()
    # Nobody has to wait to learn that the trials were interrupted.
    states = [t.state.name for t in opened(cut).get_trials()]
    assert states == ["FAIL"] * population + ["WAITING"] * population
    sweep_lib.sweep(cut, log=quiet)
    sweep_lib.sweep(straight, log=quiet)
    ours, theirs = (study_lib.counted(opened(p)) for p in (cut, straight))
    assert len(ours) == len(theirs) == population
    for one, other in zip(ours, theirs):
        assert (one.params, one.value) == (other.params, other.value)
        assert one.intermediate_values == other.intermediate_values
        # Each epoch once: the trial did not start again.
        assert curve(cut.trial_directory(one.number)) == one.intermediate_values
        earlier = cut.trial_directory(one.number - population)
        assert not earlier.exists()


def test_a_population_too_large_for_the_memory(plan, fail, opened):
    fail(OUT_OF_MEMORY)
    made = plan(trials=2, population=2, space=NUMBERS)
    with refuses("train fewer trials"):
        sweep_lib.sweep(made, log=quiet)
    states = [t.state for t in opened(made).get_trials()]
    assert states == [TrialState.FAIL] * 2 + [TrialState.WAITING] * 2


def test_a_trial_that_another_worker_took_over(plan, on_report, opened):
    def take_over(run, record):
        if run.number == 0 and record["epoch"] == 1:
            study_lib.enqueue_again(opened(made), 0, lost=True)

    on_report(take_over)
    made = plan(trials=2, population=2, pruner="none", space=NUMBERS)
    said = []
    sweep_lib.sweep(made, log=said.append)
    assert "trial 0: taken over by another worker" in said
    # By the same worker, in its next turn.
    states = [t.state.name for t in opened(made).get_trials()]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_blend_whose_tuning_fails_fails_alone(
    plan, base, monkeypatch, opened
):
    tune_blend = trained_model.tune_blend

    def damaged(model, validation):
        if model.directory.name == "00000":
            raise VaecfError("the branch cannot be read")
        return tune_blend(model, validation)

    monkeypatch.setattr(trained_model, "tune_blend", damaged)
    settings = {"linear.l2": 5.0, "linear.dropout": 0.3, "train.epochs": 2}
    made = plan(
        trials=2,
        base=config_lib.replace(base, settings),
        population=2,
        pruner="none",
        space=NUMBERS,
    )
    sweep_lib.sweep(made, log=quiet)
    first, second = opened(made).get_trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert first.user_attrs[study_lib.ERROR] == "the branch cannot be read"
    weights = made.trial_directory(1) / "linear" / "weights.json"
    assert "tried" in read_json(weights)
    model = trained_model.load(made.trial_directory(1))
    users = Evaluator.for_split(
        open_dataset(base.data.dir), "validation", base.eval, model.mesh
    )
    value = users.best_value(model.ranker(users.depth), model.scorer_params)
    assert second.value == pytest.approx(value)


def test_every_worker_has_trials(plan, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sweep_lib,
        "_work_in_processes",
        lambda plan, workers, log: seen.append(plan.population),
    )
    for trials, population in ((8, 8), (8, 3), (5, 8)):
        made = plan(trials=trials, population=population, space=NUMBERS)
        sweep_lib.sweep(made, workers=2, log=quiet)
    assert seen == [4, 3, 3]


def test_a_sweep_of_a_model_without_epochs(plan, base):
    """Each trial is one fit, and its value is that of its validation."""
    rows = sweep_lib.sweep(
        plan(
            base=config_lib.replace(base, {"model.name": "ease"}),
            space={"baseline.ease_l2": {"choices": [1.0, 100.0]}},
            trials=2,
        ),
        log=quiet,
    )
    dataset = find_dataset(base.data.dir)
    users = Evaluator.for_split(
        dataset, "validation", base.eval, mesh_lib.make_mesh(1, 1)
    )
    ranker = users.compile(scorers.fitted("ease", dataset.n_items))
    for row in rows:
        params = linear.fit(dataset.train, row["params"]["baseline.ease_l2"])
        value = users.best_value(ranker, ranker.place(params))
        assert row["value"] == pytest.approx(value)
