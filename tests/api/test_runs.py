"""Runs from Python: the same files and numbers as the commands."""

import fcntl
import json
import math
import sys

import pandas as pd
import pytest
from oracles import generated, refuses

import vaecf
from vaecf.evaluation import compare as compare_lib
from vaecf.reporting import trackers
from vaecf.reporting.writers import read_records
from vaecf.workdir import read_json

TINY = {
    "model.hidden": (8,),
    "model.latent": 4,
    "train.epochs": 2,
    "mesh.data": 1,
    "eval.every_epochs": 1,
    "eval.metrics": ("ndcg@100", "recall@5"),
}


def config_of(**changes):
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return vaecf.load_config("synthetic", {**TINY, **changes})


@pytest.fixture(scope="module")
def data():
    return generated(90, 20, 30, 3)


SENT = []


class Sent(trackers.Writer):
    """A tracker that keeps what it gets."""

    def __init__(self, workdir, settings):
        assert workdir.name == "vae" and settings["train.epochs"] == 2

    def write(self, record, step):
        SENT.append(record)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A Mult-VAE with a baseline, two models that are fitted, one untested."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"show_progress": False}
    config = config_of(train__refit_epochs=1, train__trackers=("wandb",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", json)  # any module
        patch.setitem(trackers._WRITERS, "wandb", Sent)
        made = vaecf.train(
            config, data, folder / "vae", baselines=["popularity"], **options
        )
    assert made.workdir == folder / "vae"
    for l2 in (1.0, 50.0):
        config = config_of(model__name="ease", baseline__ease_l2=l2)
        place = folder / "linear" / f"ease{l2:.0f}"
        vaecf.train(config, data, place, **options)
    config = config_of(model__name="popularity")
    vaecf.train(config, data, folder / "untested", test=False, **options)
    return folder


def test_a_run_says_what_its_files_say(folder, data, capsys):
    run = vaecf.open_run(folder / "vae")
    config = config_of(train__refit_epochs=1, train__trackers=("wandb",))
    assert run.config.flat() | {"data.dir": ""} == {
        **config.flat(),
        "data.dir": "",
    }
    results = read_json(run.workdir / "results.json")
    cells = {
        "mult_vae": results["test"],
        "popularity": results["popularity"]["test"],
        "oracle": results["oracle"]["test"],
    }
    expected = [
        (model, metric, *(cell[k] for k in ("mean", "stderr", "users")))
        for model, metrics in cells.items()
        for metric, cell in metrics.items()
    ]
    frame = run.results
    assert [*frame] == ["model", "metric", "mean", "stderr", "users"]
    assert [*frame.itertuples(index=False, name=None)] == expected
    assert frame.attrs["split"] == "test"
    records = read_records(run.workdir / "metrics.jsonl")
    history = run.history
    assert [*history.index] == [1, 2] and "time" not in history
    # The tracker has all records of the training, and none of the refit.
    assert [
        {k: v for k, v in record.items() if k not in ("step", "time")}
        for record in records
    ] == SENT
    for name in ("train/loss", "validation/recall@5"):
        values = [record[name] for record in records if name in record]
        assert history[name].to_list() == values
    assert len(run.plot().axes) >= 2
    text = run._repr_html_()
    for word in ("mult_vae", "popularity", "tested", "20 users", "NDCG@100"):
        assert word in text
    lists = run.recommender().recommend([data.items.ids[:3].tolist()], k=4)
    assert len(lists) == 4
    assert repr(run) == f"Run({str(run.workdir)!r}, mult_vae, tested)"
    assert capsys.readouterr() == ("", "")


def test_the_same_call_again_trains_nothing(folder, data):
    before = read_json(folder / "vae" / "results.json")
    config = config_of(train__refit_epochs=1)
    run = vaecf.train(config, data, folder / "vae", show_progress=False)
    after = read_json(run.workdir / "results.json")
    assert after["train"]["seconds"] == before["train"]["seconds"]
    assert after["popularity"] == before["popularity"]
    with refuses("on other data"):
        vaecf.train(config_of(), generated(91, 20, 30, 3), folder / "vae")
    with refuses(r"config\.seed was 0 and is 1"):
        vaecf.train(config_of(seed=1), data, folder / "vae")
    directory = folder / "vae" / "dataset"
    run = vaecf.train(
        config_of(model__name="ease", baseline__ease_l2=1.0),
        directory,
        folder / "linear" / "ease1",
    )
    assert run.status == "tested"


def test_a_frame_is_split(tmp_path):
    rows = [(u, (u * 7 + i * i) % 23) for u in range(60) for i in range(9)]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    config = config_of(model__name="popularity")
    run = vaecf.train(config, frame, tmp_path / "run")
    assert run.status == "tested" and run.results["users"].min() > 0


def test_runs_of_a_folder(folder, tmp_path):
    frame = vaecf.runs(folder)
    names = ["linear/ease1", "linear/ease50", "untested", "vae"]
    assert [*frame.index] == names
    assert [*frame["status"]] == ["tested", "tested", "trained", "tested"]
    assert [*frame["model"]] == ["ease", "ease", "popularity", "mult_vae"]
    assert [*frame["baseline.ease_l2"]][:2] == [1.0, 50.0]
    assert not {"seed", "data.dir", "error"} & {*frame}
    results = read_json(folder / "vae" / "results.json")
    assert frame.loc["vae", "ndcg@100"] == results["test"]["ndcg@100"]["mean"]
    assert frame.loc["vae", "seconds"] == results["train"]["seconds"]
    value = results["validation"]["ndcg@100"]["mean"]
    assert frame.loc["vae", "validation/ndcg@100"] == value
    assert math.isnan(frame.loc["untested", "ndcg@100"])
    assert len(vaecf.runs(tmp_path)) == 0
    with refuses("no such directory"):
        vaecf.runs(tmp_path / "none")


def test_broken_and_running_runs_are_rows(folder, tmp_path):
    config = (folder / "vae" / "config.json").read_text()
    dataset = (folder / "vae" / "dataset.json").read_text()
    for name in ("broken", "running", "begun"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "dataset.json").write_text(dataset)
    (tmp_path / "broken" / "config.json").write_text("{")
    with open(tmp_path / "running" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        frame = vaecf.runs(tmp_path)
    states = dict(zip(frame.index, frame["status"]))
    assert states == {
        "begun": "unfinished",
        "broken": "broken",
        "running": "running",
    }
    assert "config.json" in frame.loc["broken", "error"]
    begun = vaecf.open_run(tmp_path / "begun")
    assert begun.results.empty and begun.history.empty
    with refuses("nothing to plot"):
        begun.plot()
    for name in ("broken", "nowhere"):
        with refuses(r"config\.json"):
            vaecf.open_run(tmp_path / name)


def test_a_comparison_has_the_numbers_of_the_command(folder):
    paths = [folder / "vae", folder / "linear" / "ease50"]
    runs = [vaecf.open_run(paths[0]), str(paths[1])]
    frame = vaecf.compare(runs, metric="recall@5", reference="ease")
    found = compare_lib.compare(paths, metric="recall@5", reference="ease")
    assert {*frame.index} == {"mult_vae", "ease", "popularity"}
    assert frame["mean"].is_monotonic_decreasing
    for name, group in found["groups"].items():
        cell = group["metrics"]["recall@5"]
        row = frame.loc[name]
        assert (row["mean"], row["stderr"]) == (cell["mean"], cell["stderr"])
    for name, paired in found["comparisons"].items():
        values = frame.loc[name].iloc[3:].to_list()
        assert values == [*paired.values()]
    assert frame.loc["ease"].iloc[3:].isna().all()
    assert frame.attrs["reference"] == "ease" and frame.attrs["users"] == 20


def test_a_sweep_is_a_table_of_trials(folder, tmp_path):
    config = config_of(model__name="ease")
    space = {"baseline.ease_l2": {"low": 1.0, "high": 99.0, "log": True}}
    made = [
        vaecf.sweep(
            *(config, space, tmp_path / "s", trials),
            data=folder / "vae" / "dataset",
        )
        for trials in (1, 2)
    ]
    frame = made[1]
    assert [len(f) for f in made] == [1, 2]
    assert [*frame["state"]] == ["complete", "complete"]
    assert frame["baseline.ease_l2"].between(1, 99).all()
    best = json.loads((tmp_path / "s" / "best.json").read_text())
    assert frame["value"].idxmax() == best["number"]
    assert frame["value"].max() == best["value"]
    assert frame.attrs["metric"] == "ndcg@100"
    assert len(vaecf.runs(tmp_path)) == 0
    assert len(vaecf.runs(tmp_path / "s")) == 2


def test_a_call_that_failed_leaves_the_workdir_free(data, tmp_path):
    config = config_of(model__name="popularity")
    with refuses("did you mean ease"):
        vaecf.train(config, data, tmp_path / "run", baselines=["eas"])
    other = generated(91, 20, 30, 3)
    run = vaecf.train(config, other, tmp_path / "run", test=False)
    assert run.dataset == other.manifest
    with refuses("on other data"):
        vaecf.train(config, data, tmp_path / "run")
    with refuses("holds a run"):
        vaecf.sweep(config, {}, tmp_path / "run", data=data)
    assert (
        vaecf.load_dataset(tmp_path / "run" / "dataset").manifest
        == other.manifest
    )
    # The model's name in the chart; the oracle is a line.
    (axes, *_) = vaecf.train(config, other, tmp_path / "run").plot().axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["popularity"]
    assert axes.get_legend() is not None


def test_baselines_need_test_users(data, tmp_path):
    rows = [(u, (u * 7 + i * i) % 23) for u in range(60) for i in range(9)]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    split = vaecf.split(frame, test_users=0)
    with refuses("the dataset has no test users"):
        vaecf.train(
            *(config_of(model__name="popularity"), split, tmp_path / "run"),
            baselines=["popularity"],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": "ease"}, "baselines='ease' must be a list"),
        ({"baselines": ["eas"]}, "did you mean ease"),
        ({"baselines": True, "test": False}, "no effect with test=False"),
        ({"baselines_tuned": True}, "no effect without baselines"),
        ({"data": "nowhere"}, "nowhere. is no directory"),
        ({"config": "blnd"}, "did you mean blend"),
        ({"config": 3}, "config of type int"),
    ],
)
def test_mistakes(data, tmp_path, options, message):
    given = {"config": config_of(), "data": data, **options}
    with refuses(message):
        vaecf.train(workdir=tmp_path / "run", **given)
