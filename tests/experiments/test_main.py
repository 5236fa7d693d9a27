"""main.py from its flags to its files."""

import functools
import gzip
import hashlib
import json
import math
import re
import shutil

import numpy as np
import polars as pl
import pytest
from oracles import ease, ndcg, ranked, recall

import vaecf
from vaecf import experiment
from vaecf.data.dataset import open_dataset
from vaecf.evaluation.baselines import BASELINES
from vaecf.reporting import tables
from vaecf.reporting.writers import read_records
from vaecf.serving import trained_model
from vaecf.workdir import read_json


def results(workdir):
    return read_json(workdir / "results.json")


def records(workdir, name):
    """The records of metrics.jsonl that hold a value of this name."""
    return [r for r in read_records(workdir / "metrics.jsonl") if name in r]


def losses(workdir):
    return [r["train/loss"] for r in records(workdir, "train/loss")]


# --- Oracles ----------------------------------------------------------------


def check(summary, lists, data, split):
    matrix = data.split(split).held_out
    wanted = [set(matrix.row(u).tolist()) for u in range(matrix.n_users)]
    assert set(summary) == {"ndcg@100", "recall@5"}
    for name, metric, k in (("ndcg@100", ndcg, 100), ("recall@5", recall, 5)):
        values = [metric(r, w, k) for r, w in zip(lists, wanted, strict=True)]
        cell = {"mean": np.mean(values), "users": 20}
        cell["stderr"] = np.std(values, ddof=1) / math.sqrt(20)
        assert summary[name] == pytest.approx(cell, abs=1e-12)


def test_the_models_metrics_are_those_of_its_recommendations(
    trained, oracle_dir
):
    data = open_dataset(oracle_dir)
    ids = data.items.ids
    index = {raw: i for i, raw in enumerate(ids)}
    model = vaecf.Recommender.load(trained.workdir)
    for split in ("validation", "test"):
        fold_in = data.split(split).fold_in
        histories = [[ids[i] for i in fold_in.row(u)] for u in range(20)]
        frame = model.recommend(histories, k=data.n_items)
        lists = [
            [index[raw] for raw in frame.loc[frame["user"] == u, "item"]]
            for u in range(20)
        ]
        for items, history in zip(lists, histories, strict=True):
            assert len(items) == data.n_items - len(set(history))
        check(results(trained.workdir)[split], lists, data, split)


def test_the_baselines_metrics(trained, oracle_dir):
    """Popularity, EASE in closed form, and the oracle, in float64."""
    data = open_dataset(oracle_dir)
    x_UI = data.train.to_scipy().toarray().astype(np.float64)
    start = data.train.n_users
    for split in ("validation", "test"):
        fold_in = data.split(split).fold_in
        users = np.arange(start, start + fold_in.n_users)
        start += fold_in.n_users
        scores = {
            "popularity": np.tile(x_UI.sum(axis=0), (fold_in.n_users, 1)),
            "ease": fold_in.to_scipy().toarray() @ ease(x_UI, 500.0),
            "oracle": data.oracle["user_group"][users].astype(np.float64)
            @ data.oracle["group_item"],
        }
        for name, score_UI in scores.items():
            lists = [ranked(s, fold_in.row(u)) for u, s in enumerate(score_UI)]
            check(results(trained.workdir)[name][split], lists, data, split)


# --- Files of a run ---------------------------------------------------------


def test_per_user_values_are_those_of_the_table(trained, oracle_dir):
    data, made = open_dataset(oracle_dir), results(trained.workdir)
    frame = pl.read_parquet(trained.folder / "per_user.parquet")
    assert frame.equals(pl.read_parquet(trained.workdir / "per_user.parquet"))
    ease = frame.filter(pl.col("model") == "ease (l2 500)")["ndcg@100"].mean()
    assert ease == pytest.approx(made["ease"]["test"]["ndcg@100"]["mean"])
    assert frame["model"].n_unique() == 1 + len(BASELINES)
    frame = frame.filter(pl.col("model") == "mult_vae")
    assert frame["user"].to_list() == list(range(141, 161))
    np.testing.assert_array_equal(frame["fold_in"], data.test.fold_in.counts)
    np.testing.assert_array_equal(frame["held_out"], data.test.held_out.counts)
    for name in ("ndcg@100", "recall@5"):
        mean = frame[name].mean()
        assert mean == pytest.approx(made["test"][name]["mean"], abs=1e-12)
        assert f"{mean:.4f}" in trained.done.out


def test_results(trained):
    made = results(trained.workdir)
    train, epochs = made["train"], records(trained.workdir, "train/loss")
    assert train["epochs"] == 3 and train["devices"] == 1
    assert train["precision"] == "fp32"
    seconds = [r["train/epoch_seconds"] for r in epochs]
    assert train["seconds"] == pytest.approx(sum(seconds))
    # The first of three epochs is the warm-up; each has 120 users.
    speed = 240 / sum(seconds[1:])
    assert train["users_per_second"] == pytest.approx(speed)
    assert made["users_left_out"] == 0
    for model in (made, *(made[name] for name in (*BASELINES, "oracle"))):
        lengths, popularity = model["history_length"], model["item_popularity"]
        assert sum(row["users"] for row in lengths) == 20
        assert [row["bucket"] for row in popularity] == ["head", "mid", "tail"]


def test_metrics_of_every_epoch_and_validation(trained):
    epochs = records(trained.workdir, "train/loss")
    validations = records(trained.workdir, "validation/ndcg@100")
    assert [r["epoch"] for r in validations] == [1, 2, 3]
    # 120 users in batches of 50.
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 3), (2, 6), (3, 9)]
    # anneal = min(0.3, step / 2000) of configs/synthetic.py, at the last step.
    for r in epochs:
        assert r["train/anneal"] == pytest.approx((r["step"] - 1) / 2000)
    # The best checkpoint is tested, not the last.
    best = max(validations, key=lambda r: r["validation/ndcg@100"])
    made = results(trained.workdir)
    assert made["train"]["best_epoch"] == best["epoch"]
    mean = made["validation"]["ndcg@100"]["mean"]
    assert mean == pytest.approx(best["validation/ndcg@100"], abs=1e-12)


def test_identity_of_the_run(trained, oracle_dir):
    config = read_json(trained.workdir / "config.json")
    assert config["model"]["hidden"] == [12]
    assert config["eval"]["every_epochs"] == 1
    assert config["data"]["dir"] == str(oracle_dir)
    manifest = read_json(trained.workdir / "dataset.json")
    digests = manifest.pop("tables")
    items = (trained.workdir / "items.parquet").read_bytes()
    assert digests == {"items.parquet": hashlib.sha256(items).hexdigest()}
    assert manifest == open_dataset(oracle_dir).manifest
    items = pl.read_parquet(trained.workdir / "items.parquet")
    assert items["item"].to_list() == list(open_dataset(oracle_dir).items.ids)
    files = {path.name for path in trained.folder.iterdir()}
    assert files == {"run", "log.json", "results", "per_user.parquet"}
    assert not list(trained.folder.rglob("*.tmp*"))


def test_report_events_and_trace(trained):
    page = (trained.workdir / "report.html").read_text("utf-8")
    mean = results(trained.workdir)["test"]["ndcg@100"]["mean"]
    names = map(tables.model_name, BASELINES)
    for text in ("Mult-VAE on synthetic", *names, f"{mean:.4f}", "item-"):
        assert text in page
    (events,) = (trained.workdir / "tensorboard").glob("events.out.tfevents.*")
    for tag in (b"train/loss", b"validation/ndcg_100"):
        assert tag in events.read_bytes()
    (trace,) = (trained.workdir / "trace").rglob("perfetto_trace.json.gz")
    with gzip.open(trace, "rt") as stream:
        assert json.load(stream)["traceEvents"]


def test_latency(trained):
    figures = results(trained.workdir)["inference"]
    assert "batch_2_mean_latency" not in figures
    for size in (1, 3):
        mean = figures[f"batch_{size}_mean_latency"]
        assert mean > 0
        line = f"batch_{size}_mean_latency: {mean:.6g} s\n"
        assert line in trained.done.out


# --- Files of the recipe ----------------------------------------------------


def test_the_recipes_log(trained):
    lines = (trained.folder / "log.json").read_text().splitlines()
    entries = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    declared = [e for e in entries if e["type"] == "METADATA"]
    units = {e["metric"]: e["metadata"]["unit"] for e in declared}
    first, *epochs, final = [e["data"] for e in entries if e["type"] == "LOG"]
    assert first["epochs"] == 3 and first["train"] is True
    assert (first["world_size"], first["local_batch_size"]) == (1, 50)
    losses_in_log = [e["train_loss"] for e in epochs if "train_loss" in e]
    assert losses_in_log == losses(trained.workdir)
    # The mean leaves out the warm-up epoch.
    speeds = [e["train_throughput"] for e in epochs if "train_throughput" in e]
    mean = final["mean_training_throughput"]
    assert mean == pytest.approx((speeds[1] + speeds[2]) / 2)
    speeds = [e["inference_throughput"] for e in epochs if "valid_time" in e]
    assert final["max_inference_throughput"] == max(speeds)
    seconds = [
        e.get("train_epoch_time", 0) + e.get("valid_time", 0) for e in epochs
    ]
    assert final["total_elapsed_time"] > sum(seconds)
    test = results(trained.workdir)["test"]
    assert final["test_ndcg@100"] == test["ndcg@100"]["mean"]
    assert units["batch_3_mean_throughput"] == "users/s"


def test_the_recipes_results(trained):
    folder = trained.folder / "results"
    arguments = read_json(folder / "args.json")
    assert arguments["epochs"] == 3 and arguments["top_results"] == 7
    assert arguments["batch_size_train"] == 50 and arguments["lr"] == 0.001
    assert arguments["results_dir"] == str(folder)
    # All flags, and the overrides of the config.
    assert arguments["per_user"] == str(trained.folder / "per_user.parquet")
    assert arguments["inference_batch_sizes"] == ["1", "3"]
    assert arguments["baselines"] == list(BASELINES)
    assert arguments["ease_l2"] == 500 and arguments["num_processes"] is None
    assert arguments["config"].endswith("synthetic.py")
    assert arguments["config.model.hidden"] == [12]
    assert arguments["config.mesh.data"] == 1
    statistics = read_json(folder / "statistics.json")
    assert statistics["results"] == results(trained.workdir)
    assert statistics["history"]["train/loss"] == losses(trained.workdir)


# --- A second call ----------------------------------------------------------


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the trained run that tests may change."""
    return shutil.copytree(trained.workdir, tmp_path / "run")


@pytest.fixture
def main(succeeds):
    return functools.partial(succeeds, "main")


def test_the_same_command_again(trained, workdir, main):
    before, epochs = results(workdir), records(workdir, "epoch")
    again = ("--test", f"--workdir={workdir}")
    assert "nothing left to train" in main(*trained.training, *again)
    after = results(workdir)
    same = ("validation", "test", "oracle", *BASELINES)
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert after["train"]["best_epoch"] == before["train"]["best_epoch"]
    assert records(workdir, "epoch") == epochs


def test_a_test_uses_the_config_of_the_run(workdir, main):
    """It keeps the baselines, and replaces one with another setting."""
    before, config = results(workdir), (workdir / "config.json").read_text()
    out = main(
        "--test", f"--workdir={workdir}", "--baselines=ease", "--ease_l2=5"
    )
    after = results(workdir)
    assert after["ease"]["l2"] == 5
    for name in {"test", *BASELINES} - {"ease"}:
        assert after[name] == before[name]
    assert all(name in out for name in (*BASELINES, "ease (l2 5)"))
    page = (workdir / "report.html").read_text()
    assert 'EASE <span class="e">(l2 5)</span>' in page
    models = pl.read_parquet(workdir / "per_user.parquet")["model"].unique()
    assert "ease (l2 5)" in models and "ease (l2 500)" not in models
    assert len(models) == 1 + len(BASELINES)
    assert (workdir / "config.json").read_text() == config


def test_a_test_with_other_metrics_and_precision(workdir, main, monkeypatch):
    """The config of the run stays; results in the old metrics go."""
    before, config = results(workdir), (workdir / "config.json").read_text()
    load, policies = trained_model.load, []

    def spy(directory, *, policy, **options):
        policies.append(policy)
        return load(directory, policy=policy, **options)

    monkeypatch.setattr(trained_model, "load", spy)
    metrics = "--config.eval.metrics=('recall@5','ndcg@10','coverage@5')"
    out = main("--test", "--amp", f"--workdir={workdir}", metrics)
    assert policies == ["amp"]
    after = results(workdir)
    assert set(before["precision"].values()) == {"fp32"}
    assert after["train"]["precision"] == "fp32"
    assert after["precision"] == before["precision"] | {
        "validation": "bf16",
        "test": "bf16",
    }
    assert {"recall@5", "ndcg@10", "coverage@5"} <= set(after["test"])
    old, new = (r["test"]["recall@5"]["mean"] for r in (before, after))
    assert new == pytest.approx(old, abs=0.05)
    assert (workdir / "config.json").read_text() == config
    assert not set(BASELINES) & set(after)
    for name in BASELINES:
        assert re.search(f"removed .*results of {name}", out)


def test_training_on_drops_the_results_of_the_old_model(trained, workdir, main):
    log = workdir / "log.json"
    more = ("--epochs=4", f"--workdir={workdir}", f"--log_path={log}")
    main(*trained.training, *more)
    kept = {"train", "validation", "precision", "refit"}
    assert set(results(workdir)) == kept
    assert set(results(workdir)["precision"]) == {"validation"}
    assert "test_ndcg" not in log.read_text()
    assert not (workdir / "per_user.parquet").exists()


def test_results_so_far_are_saved_when_a_baseline_is_interrupted(
    workdir, command, monkeypatch
):
    evaluate = experiment.baselines.evaluate

    def interrupted(name, *arguments, **named):
        if name == "ease":
            raise KeyboardInterrupt
        return evaluate(name, *arguments, **named)

    monkeypatch.setattr(experiment.baselines, "evaluate", interrupted)
    for path in ("results.json", "per_user.parquet"):
        (workdir / path).unlink()
    again = ("main", "--test", f"--workdir={workdir}")
    assert command(*again, "--baselines=popularity,ease").status == 130
    assert {"test", "popularity"} < set(results(workdir))
    models = pl.read_parquet(workdir / "per_user.parquet")["model"].unique()
    assert set(models) == {"mult_vae", "popularity"}


def test_a_run_without_epochs(trained, tmp_path, main):
    main(*trained.training, "--epochs=0", f"--workdir={tmp_path}")
    assert results(tmp_path)["train"]["epochs"] == 0


def test_a_blend_reports_its_weights(tiny, oracle_dir, tmp_path, command):
    run = (f"--data_dir={oracle_dir}", f"--workdir={tmp_path}")
    run += ("--config.linear.l2=20", "--config.linear.experts=('ease','graph')")
    done = command("main", *tiny, *run, "--train")
    assert done.status == 0, done.err
    kept = json.loads((tmp_path / "linear" / "weights.json").read_text())
    names = ("gain", "prior", "graph_gain", "low_pass")
    weights = {name: kept[name] for name in names}
    reported = results(tmp_path)["linear"]
    assert reported == pytest.approx(weights)
    shown = ", ".join(f"{name} {kept[name]:g}" for name in reported)
    page = (tmp_path / "report.html").read_text()
    assert f"The linear branch ranks with {shown}" in page
