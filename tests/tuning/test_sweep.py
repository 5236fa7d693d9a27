"""Sweeps that train, against what their trials wrote down themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal

import jax
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.data import dataset as dataset_lib
from vaecf.data.dataset import find_dataset
from vaecf.errors import VaecfError
from vaecf.serving.trained_model import load
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning import sweep as sweep_lib
from vaecf.tuning import trial as trial_lib

METRIC = "validation/ndcg@10"
RATES = (0.01, 1e30, 0.03)


def test_a_sweep(plan, tmp_path, monkeypatch, opened, curve) -> None:
    """Three trials, the second of which must fail; the test users are away."""
    made = plan(
        trials=3,
        pruner="none",
        overrides={"train.epochs": 4},
        config_file="configs/synthetic.py",
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
    said: list[str] = []
    sweep_lib.sweep(made, log=said.append)

    trials = study.get_trials()
    assert [t.number for t in trials] == [0, 1, 2]
    states = [t.state.name for t in trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "the loss is" in trials[1].user_attrs["error"]
    bests = {}
    for number in (0, 2):
        folder = made.workdir / "trials" / f"{number:05d}"
        values = curve(folder)
        assert list(values) == [1, 2, 3, 4]
        assert trials[number].intermediate_values == values
        bests[number] = max(values.values())
        assert trials[number].value == bests[number]
        config = json.loads((folder / "config.json").read_text())
        rate = trials[number].params["optimizer.learning_rate"]
        assert config["optimizer"]["learning_rate"] == rate
        names = {path.name for path in folder.iterdir()}
        assert names == {".lock", "checkpoints", "config.json", "dataset.json",
                         "items.parquet", "metrics.jsonl"}  # fmt: skip
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["best"]
    assert study.best_value == max(bests.values())
    # The best checkpoint is a model like any other.
    best = max(bests, key=lambda n: bests[n])
    model = load(made.workdir / "trials" / f"{best:05d}")
    assert model.config.optimizer.learning_rate == RATES[best]

    frame = pd.read_csv(made.workdir / "trials.csv")
    assert frame["number"].tolist() == [0, 1, 2]
    assert frame["state"].tolist() == ["complete", "failed", "complete"]
    assert frame["value"].max() == study.best_value
    assert frame["optimizer.learning_rate"].tolist() == [*RATES]
    written = json.loads((made.workdir / "best.json").read_text())
    assert (written["trial"], written["value"]) == (best, study.best_value)
    assert written["overrides"] == [
        "--config.train.epochs=4",
        f"--config.optimizer.learning_rate={RATES[best]}",
    ]
    for name in ("history.png", "slices.png"):
        assert (made.workdir / name).read_bytes().startswith(b"\x89PNG")
    assert not (made.workdir / "importances.png").exists()
    text = "\n".join(said)
    for number in range(3):
        assert sum(line.startswith(f"trial {number}: ") for line in said) == 1
    assert "trial 1: failed: the loss is" in text
    assert "2 complete trials are too few" in text
    assert f"\n    {best}  " in text  # the table's first line

    # Nothing is left to do, and nothing is done.
    said.clear()
    sweep_lib.sweep(made, log=said.append)
    assert len(study.get_trials()) == 3
    assert said[0].startswith("study sweep: 3 of 3 trials are over")


def test_a_bad_trial_is_pruned(plan, opened, curve) -> None:
    """Six trials before it were better at every epoch than any can be."""
    made = plan(trials=6, prune_after=2)
    study = opened(made)
    distributions = space_lib.distributions(made.space, made.base)
    params = {
        "optimizer.learning_rate": 0.01,
        "model.dropout_rate": 0.5,
        "model.latent": 4,
        "model.hidden": "()",
    }
    for _ in range(5):
        study.add_trial(
            optuna.trial.create_trial(
                value=1.0,
                params=params,
                distributions=distributions,
                intermediate_values={epoch: 1.0 for epoch in (1, 2, 3, 4)},
            )
        )
    said: list[str] = []
    sweep_lib.sweep(made, log=said.append)
    pruned = study.get_trials()[5]
    assert pruned.state == TrialState.PRUNED
    folder = made.workdir / "trials" / "00005"
    # Optuna's warm-up ends with its epochs.
    assert list(curve(folder)) == [1, 2]
    assert pruned.intermediate_values == curve(folder)
    (line,) = [text for text in said if text.startswith("trial 5: ")]
    assert line.endswith("pruned") and "; 2 epochs" in line
    assert not (folder / "checkpoints").exists()
    with workdir_lib.locked(folder):
        pass
    frame = pd.read_csv(made.workdir / "trials.csv")
    assert frame["state"].tolist() == ["complete"] * 5 + ["pruned"]


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_from_its_checkpoint(
    plan, tmp_path, monkeypatch, opened, curve
) -> None:
    """And ends as if it had not been stopped; here in a database."""

    def made(name):
        return plan(
            trials=1,
            pruner="none",
            workdir=tmp_path / name,
            storage=f"sqlite:///{tmp_path / name}.db",
        )

    sweep_lib.sweep(made("straight"), log=lambda line: None)
    write, stopped = trial_lib._Watch.write, []

    def write_and_stop(self, record, *, step):
        write(self, record, step=step)
        if METRIC in record and record["epoch"] == 2 and not stopped:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trial_lib._Watch, "write", write_and_stop)
    cut = made("cut")
    with pytest.raises(KeyboardInterrupt, match="0 of 1 trials are over; the"):
        sweep_lib.sweep(cut, log=lambda line: None)
    assert list(curve(cut.workdir / "trials" / "00000")) == [1, 2]
    # Nothing of it has to be found out by waiting.
    states = [t.state for t in opened(cut).get_trials()]
    assert states == [TrialState.FAIL, TrialState.WAITING]
    sweep_lib.sweep(cut, log=lambda line: None)
    (trial,) = study_lib.counted(opened(cut))
    (straight,) = study_lib.counted(opened(made("straight")))
    assert not (cut.workdir / "trials" / "00000").exists()
    assert trial.state == TrialState.COMPLETE
    assert trial.value == straight.value and trial.params == straight.params
    assert trial.intermediate_values == straight.intermediate_values
    # Each epoch once: it did not start over.
    assert (
        curve(cut.workdir / "trials" / "00001") == straight.intermediate_values
    )


def test_what_is_wrong_is_said_before_the_first_trial(plan, base) -> None:
    def refused(message, **changes):
        with pytest.raises(VaecfError, match=message):
            sweep_lib.sweep(plan(**changes), log=lambda line: None)

    refused("--trials=0 must be at least 1", trials=0)
    refused("--prune_after=-1", prune_after=-1)
    refused("not a key of the config", space={"x": {"choices": [1]}})
    nowhere = dataclasses.replace(
        base, data=dataclasses.replace(base.data, dir="/nosuch")
    )
    refused("no dataset in /nosuch", base=nowhere)
    metric = dataclasses.replace(
        base, eval=dataclasses.replace(base.eval, best_metric="ndgc@10")
    )
    refused("ndgc", base=metric)
    with pytest.raises(VaecfError, match="--workers=0"):
        sweep_lib.sweep(plan(), workers=0)
    assert not (plan().workdir / "trials").exists()


def test_a_workdir_is_one_of_a_study(plan, monkeypatch) -> None:
    made = plan()
    sweep_lib._claim(made)
    # By another name, and moved.
    moved = made.workdir.rename(made.workdir.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    relative = pathlib.Path("moved")
    sweep_lib._claim(
        plan(workdir=relative, storage=str(relative / "study.journal"))
    )
    moved.rename(made.workdir)
    with pytest.raises(VaecfError, match="trials of --study=sweep, not other"):
        sweep_lib._claim(plan(study="other"))


def test_a_dataset_without_validation_users_is_refused(
    plan, data_dir, monkeypatch
) -> None:
    made = dataset_lib.open_dataset(data_dir)
    held = made.validation
    nothing = dataclasses.replace(
        held.held_out,
        indptr=held.held_out.indptr * 0,
        indices=held.held_out.indices[:0],
    )
    empty = dataclasses.replace(
        made, validation=held._replace(held_out=nothing)
    )
    monkeypatch.setattr(sweep_lib, "find_dataset", lambda path: empty)
    with pytest.raises(VaecfError, match="no validation users to choose by"):
        sweep_lib.sweep(plan())


def test_a_model_too_large_is_a_failed_trial(plan, monkeypatch, opened) -> None:
    def train(*arguments, **named):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n")

    monkeypatch.setattr(trial_lib.loop, "train", train)
    said: list[str] = []
    sweep_lib.sweep(plan(trials=2), log=said.append)
    lines = [line for line in said if line.startswith("trial ")]
    assert len(lines) == 2
    assert all("failed: RESOURCE_EXHAUSTED: Out of" in line for line in lines)
    assert "no trial is complete yet" in said[-1]
    # What fails every trial ends the sweep before all are spent.
    with pytest.raises(VaecfError, match="5 trials in a row failed"):
        sweep_lib.sweep(plan(trials=20), log=said.append)
    assert len(opened(plan()).get_trials()) == 7


def test_a_defect_ends_the_sweep_and_the_trial_waits(
    plan, monkeypatch, opened
) -> None:
    def train(*arguments, **named):
        raise TypeError("a defect")

    monkeypatch.setattr(trial_lib.loop, "train", train)
    with pytest.raises(TypeError, match="a defect"):
        sweep_lib.sweep(plan(trials=2), log=lambda line: None)
    states = [t.state for t in opened(plan(trials=2)).get_trials()]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_workers_share_cores_and_gpus() -> None:
    cores = [sweep_lib._cores(n, 2) for n in range(2)]
    everything = sorted(os.sched_getaffinity(0))
    if len(everything) > 1:
        assert sorted(cores[0] + cores[1]) == everything
    assert all(sweep_lib._cores(n, 99) for n in range(99))
    four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert [sweep_lib.share(n, 2, four) for n in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "1,3"},
    ]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert sweep_lib.share(0, 2, {"CUDA_VISIBLE_DEVICES": "0"}) == memory
    assert sweep_lib.share(0, 2, {}) == memory
    assert sweep_lib.share(0, 2, memory) == {}


def test_overrides_give_the_trials_config(plan, base) -> None:
    """What best.json says, through the flags of an entry point."""
    import ml_collections

    from vaecf.tuning import results

    params = {"model.hidden": (8, 4), "model.latent": 6,
              "optimizer.learning_rate": 0.1 + 0.2,
              "train.drop_remainder": True}  # fmt: skip
    flags = results._flags(plan(), {"params": params})
    config = ml_collections.ConfigDict(base.to_dict())
    config.model.hidden = tuple(config.model.hidden)
    changed = config_lib.replace(base, params)
    import ast

    for text in flags:
        key, _, value = text.removeprefix("--config.").partition("=")
        config.update_from_flattened_dict({key: ast.literal_eval(value)})
    assert config_lib.from_mapping(config) == changed
