"""main.py from flags to files: what a run leaves, and that it is right."""

from __future__ import annotations

import gzip
import json
import math
import pathlib
import re
import shutil

import numpy as np
import polars as pl
import pytest
from absl import flags

import vaecf
from configs import ml20m
from vaecf import config as config_lib
from vaecf import experiment
from vaecf.data.dataset import Dataset, open_dataset

ROOT = pathlib.Path(__file__).resolve().parents[2]


def results(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def records(workdir: pathlib.Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ndcg(ranked: list, wanted: set, k: int) -> float:
    gain = sum(
        1 / math.log2(r + 2) for r, i in enumerate(ranked[:k]) if i in wanted
    )
    return gain / sum(1 / math.log2(r + 2) for r in range(min(k, len(wanted))))


def recall(ranked: list, wanted: set, k: int) -> float:
    return len(set(ranked[:k]) & wanted) / min(k, len(wanted))


def check(summary: dict, ranked: list[list], held_out: list[set]) -> None:
    """Against the definitions, user by user."""
    assert set(summary) == {"ndcg@100", "recall@5"}
    for name, metric, k in (("ndcg@100", ndcg, 100), ("recall@5", recall, 5)):
        values = [
            metric(r, h, k) for r, h in zip(ranked, held_out, strict=True)
        ]
        n = len(values)
        assert summary[name]["users"] == n == 20
        assert summary[name]["mean"] == pytest.approx(
            np.mean(values), abs=1e-12
        )
        stderr = np.std(values, ddof=1) / math.sqrt(n)
        assert summary[name]["stderr"] == pytest.approx(stderr, abs=1e-12)


def rank(score_UI: np.ndarray, data: Dataset, split: str) -> list[list[int]]:
    """Unseen items by falling score, ties by index."""
    fold_in = data.split(split).fold_in
    lists = []
    for u in range(fold_in.n_users):
        seen = set(fold_in.row(u).tolist())
        order = np.argsort(-score_UI[u], kind="stable")
        lists.append([i for i in order.tolist() if i not in seen])
    return lists


def held_out(data: Dataset, split: str) -> list[set]:
    matrix = data.split(split).held_out
    return [set(matrix.row(u).tolist()) for u in range(matrix.n_users)]


# --- What a run leaves ------------------------------------------------------


def test_the_models_metrics_are_those_of_its_recommendations(
    trained, oracle_dir
) -> None:
    data = open_dataset(oracle_dir)
    model = vaecf.Recommender.load(trained.workdir)
    for split in ("validation", "test"):
        fold_in = data.split(split).fold_in
        histories = [
            [data.items.ids[i] for i in fold_in.row(u)]
            for u in range(fold_in.n_users)
        ]
        frame = model.recommend(histories, k=data.n_items)
        number = {raw: i for i, raw in enumerate(data.items.ids)}
        ranked = [
            [number[raw] for raw in frame.loc[frame["user"] == u, "item"]]
            for u in range(fold_in.n_users)
        ]
        assert all(
            len(r) == data.n_items - len(set(h))
            for r, h in zip(ranked, histories, strict=True)
        )
        check(results(trained.workdir)[split], ranked, held_out(data, split))


def test_the_baselines_metrics(trained, oracle_dir) -> None:
    """Popularity, EASE in closed form, and the oracle, in float64."""
    data = open_dataset(oracle_dir)
    x_UI = data.train.to_scipy().toarray().astype(np.float64)
    gram_II = x_UI.T @ x_UI + 500.0 * np.eye(data.n_items)
    inverse_II = np.linalg.inv(gram_II)
    weight_II = -inverse_II / np.diag(inverse_II)
    np.fill_diagonal(weight_II, 0)
    left = results(trained.workdir)
    start = data.train.n_users
    for split in ("validation", "test"):
        fold_in = data.split(split).fold_in
        users = np.arange(start, start + fold_in.n_users)
        start += fold_in.n_users
        scores = {
            "popularity": np.tile(x_UI.sum(axis=0), (fold_in.n_users, 1)),
            "ease": fold_in.to_scipy().toarray() @ weight_II,
            "oracle": data.oracle["user_group"][users].astype(np.float64)
            @ data.oracle["group_item"],
        }
        for name, score_UI in scores.items():
            ranked = rank(score_UI, data, split)
            check(left[name][split], ranked, held_out(data, split))


def test_per_user_values_are_those_of_the_table(trained, oracle_dir) -> None:
    data = open_dataset(oracle_dir)
    frame = pl.read_parquet(trained.folder / "per_user.parquet")
    assert frame.equals(pl.read_parquet(trained.workdir / "per_user.parquet"))
    assert frame.columns == [
        "model",
        "user",
        "fold_in",
        "held_out",
        "ndcg@100",
        "recall@5",
    ]
    left = results(trained.workdir)
    ease = frame.filter(pl.col("model") == "ease (l2 500)")["ndcg@100"].mean()
    assert ease == pytest.approx(left["ease"]["test"]["ndcg@100"]["mean"])
    assert frame["model"].n_unique() == 5
    frame = frame.filter(pl.col("model") == "mult_vae")
    assert frame["user"].to_list() == list(range(141, 161))
    np.testing.assert_array_equal(frame["fold_in"], data.test.fold_in.counts)
    np.testing.assert_array_equal(frame["held_out"], data.test.held_out.counts)
    summary = results(trained.workdir)["test"]
    for name in ("ndcg@100", "recall@5"):
        mean = frame[name].mean()
        assert mean == pytest.approx(summary[name]["mean"], abs=1e-12)
        assert f"{mean:.4f}" in trained.done.out


def test_results(trained) -> None:
    left = results(trained.workdir)
    baselines = {"popularity", "itemknn", "ials", "ease"}
    assert {"train", "validation", "test", "oracle", *baselines} < set(left)
    train = left["train"]
    assert train["epochs"] == 3 and 1 <= train["best_epoch"] <= 3
    assert train["users_per_second"] > 0 and train["seconds"] > 0
    assert train["precision"] == "fp32" and train["devices"] == 1
    epochs = [r for r in records(trained.workdir) if "train/loss" in r]
    assert train["seconds"] == pytest.approx(
        sum(r["train/epoch_seconds"] for r in epochs)
    )
    # One warm-up epoch of the three: 120 users in each of the others.
    timed = sum(r["train/epoch_seconds"] for r in epochs[1:])
    assert train["users_per_second"] == pytest.approx(240 / timed)
    assert left["users_left_out"] == 0
    assert sum(row["users"] for row in left["history_length"]) == 20


def test_metrics_of_every_epoch_and_validation(trained) -> None:
    lines = records(trained.workdir)
    epochs = [r for r in lines if "train/loss" in r]
    validations = [r for r in lines if "validation/ndcg@100" in r]
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert [r["step"] for r in epochs] == [3, 6, 9]  # 120 users by 50
    assert [r["epoch"] for r in validations] == [1, 2, 3]
    # anneal = min(0.3, step / 2000) of configs/synthetic.py, at the last step.
    for r in epochs:
        assert r["train/anneal"] == pytest.approx((r["step"] - 1) / 2000)
        assert r["train/skipped_steps"] == 0
    best = max(validations, key=lambda r: r["validation/ndcg@100"])
    left = results(trained.workdir)
    assert left["train"]["best_epoch"] == best["epoch"]
    # The best checkpoint is what is tested, not the last.
    assert left["validation"]["ndcg@100"]["mean"] == pytest.approx(
        best["validation/ndcg@100"], abs=1e-12
    )


def test_what_the_run_is(trained, oracle_dir) -> None:
    config = json.loads((trained.workdir / "config.json").read_text())
    assert config["model"]["hidden"] == [12] and config["model"]["latent"] == 6
    assert (
        config["train"]["batch_size"] == 50 and config["train"]["epochs"] == 3
    )
    assert config["eval"]["every_epochs"] == 1
    assert config["data"]["dir"] == str(oracle_dir)
    manifest = json.loads((trained.workdir / "dataset.json").read_text())
    assert manifest == open_dataset(oracle_dir).manifest
    items = pl.read_parquet(trained.workdir / "items.parquet")
    assert items["item"].to_list() == list(open_dataset(oracle_dir).items.ids)


def test_the_report_is_self_contained(trained) -> None:
    page = (trained.workdir / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", page)
    assert "<script" not in page
    for text in (
        "mult_vae on synthetic",
        "popularity",
        "ease",
        "oracle",
        "item-",
    ):
        assert text in page
    for split in ("test", "validation"):
        mean = results(trained.workdir)[split]["ndcg@100"]["mean"]
        assert f"{mean:.4f}" in page


def test_tensorboard_and_trace(trained) -> None:
    (events,) = (trained.workdir / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    for tag in (b"train/loss", b"validation/ndcg_100"):
        assert tag in content
    (trace,) = (trained.workdir / "trace").rglob("perfetto_trace.json.gz")
    with gzip.open(trace, "rt") as stream:
        assert json.load(stream)["traceEvents"]


def test_latency(trained) -> None:
    figures = results(trained.workdir)["inference"]
    names = ("mean_throughput", "mean_latency", "p90_latency", "p95_latency")
    for batch_size in (1, 3):
        prefix = f"batch_{batch_size}"
        for name in (*names, "p99_latency"):
            value = figures[f"{prefix}_{name}"]
            unit = "users/s" if name.endswith("throughput") else "s"
            assert f"{prefix}_{name}: {value:.6g} {unit}\n" in trained.done.out
        p = [figures[f"{prefix}_p{q}_latency"] for q in (50, 90, 95, 99)]
        assert p[0] > 0 and p == sorted(p)
        mean = figures[f"{prefix}_mean_latency"]
        assert figures[f"{prefix}_mean_throughput"] == pytest.approx(
            batch_size / mean
        )
    assert "batch_2_mean_latency" not in figures


def test_the_recipes_log(trained) -> None:
    lines = (trained.folder / "log.json").read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    entries = [json.loads(line[5:]) for line in lines]
    units = {
        e["metric"]: e["metadata"]["unit"]
        for e in entries
        if e["type"] == "METADATA"
    }
    logged = [e for e in entries if e["type"] == "LOG"]
    assert logged[0]["step"] == "PARAMETER"
    assert logged[0]["data"]["epochs"] == 3
    assert logged[0]["data"]["validation_step"] == 1
    assert logged[0]["data"]["train"] is True
    speeds = {
        e["step"][0]: e["data"]["train_throughput"]
        for e in logged
        if "train_throughput" in e["data"]
    }
    ours = [r for r in records(trained.workdir) if "train/loss" in r]
    assert speeds == {r["epoch"]: r["train/users_per_second"] for r in ours}
    final = logged[-1]
    assert final["step"] == []
    # One warm-up epoch is left out of the mean.
    assert final["data"]["mean_training_throughput"] == pytest.approx(
        (speeds[2] + speeds[3]) / 2
    )
    test = results(trained.workdir)["test"]
    assert final["data"]["test_ndcg@100"] == test["ndcg@100"]["mean"]
    assert units["train_throughput"] == "users/s"
    assert units["train_epoch_time"] == units["batch_1_p99_latency"] == "s"
    assert units["batch_3_mean_throughput"] == "users/s"
    for entry in logged[1:]:
        assert set(entry["data"]) <= set(units)


def test_the_recipes_results(trained) -> None:
    folder = trained.folder / "results"
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["epochs"] == 3 and arguments["top_results"] == 7
    assert arguments["batch_size_train"] == 50 and arguments["lr"] == 0.001
    assert arguments["results_dir"] == str(folder)
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["results"] == results(trained.workdir)
    losses = [
        r["train/loss"] for r in records(trained.workdir) if "train/loss" in r
    ]
    assert statistics["history"]["train/loss"] == losses


def test_xla_is_said_to_be_on(trained) -> None:
    assert "--xla: always on here" in trained.done.out


def test_nothing_is_left_outside(trained) -> None:
    left = {path.name for path in trained.folder.iterdir()}
    assert left == {"run", "log.json", "results", "per_user.parquet"}
    assert not list(trained.folder.rglob("*.tmp"))


# --- A run again ------------------------------------------------------------


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of the trained run, to be changed."""
    return shutil.copytree(trained.workdir, tmp_path / "run")


def test_the_same_command_again(trained, workdir, command) -> None:
    before = results(workdir)
    lines = records(workdir)
    arguments = [
        flag
        for flag in trained.flags
        if not re.match("--(workdir|log|results|per_user|trace|infer)", flag)
    ]
    done = command("main", *arguments, f"--workdir={workdir}")
    assert done.status == 0, done.err
    assert "nothing left to train: 3 epochs are done" in done.out
    after = results(workdir)
    for key in ("validation", "test", "oracle"):
        assert after[key] == before[key]
    for key in ("popularity", "itemknn", "ials", "ease"):
        assert after[key].pop("fit_seconds") > 0
        assert after[key] == {
            k: v for k, v in before[key].items() if k != "fit_seconds"
        }
    assert after["train"]["best_epoch"] == before["train"]["best_epoch"]
    again = records(workdir)
    assert [r for r in again if "epoch" in r] == [
        r for r in lines if "epoch" in r
    ]


def test_testing_takes_the_runs_own_config(workdir, command) -> None:
    before, config = results(workdir), (workdir / "config.json").read_text()
    done = command("main", "--test", f"--workdir={workdir}")
    assert done.status == 0, done.err
    assert results(workdir)["test"] == before["test"]
    assert (workdir / "config.json").read_text() == config


def test_testing_with_other_metrics_and_precision(
    workdir, command, monkeypatch
) -> None:
    """Scoring is this call's choice; the run's config stays as it is."""
    before, config = results(workdir), (workdir / "config.json").read_text()
    policies = []
    load = experiment.load

    def spy(directory, *, policy, mesh):
        policies.append(policy)
        return load(directory, policy=policy, mesh=mesh)

    monkeypatch.setattr(experiment, "load", spy)
    done = command(
        "main",
        "--test",
        "--amp",
        "--config.eval.metrics=('recall@5','ndcg@10')",
        f"--workdir={workdir}",
    )
    assert done.status == 0, done.err
    after = results(workdir)["test"]
    assert set(after) == {"recall@5", "ndcg@10"}
    assert after["recall@5"]["mean"] == pytest.approx(
        before["test"]["recall@5"]["mean"], abs=0.05
    )
    assert policies == ["amp"]
    assert (workdir / "config.json").read_text() == config


def test_another_seed_is_another_run(
    trained, tiny, data_dir, tmp_path, command
) -> None:
    done = command(
        "main", *tiny, f"--data_dir={data_dir}", "--seed=1",
        f"--workdir={tmp_path}", "--train",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "test" not in results(tmp_path)
    first, second = (
        [r["train/loss"] for r in records(where) if "train/loss" in r]
        for where in (trained.workdir, tmp_path)
    )
    assert all(a != b for a, b in zip(first, second, strict=True))


# --- Coming from the recipe -------------------------------------------------

RECIPE = {
    "epochs": ("7", "train.epochs", 7),
    "batch_size_train": ("64", "train.batch_size", 64),
    "batch_size_validation": ("32", "eval.batch_size", 32),
    "validation_step": ("3", "eval.every_epochs", 3),
    "warm_up_epochs": ("2", "train.warm_up_epochs", 2),
    "total_anneal_steps": ("100", "loss.total_anneal_steps", 100),
    "anneal_cap": ("0.3", "loss.anneal_cap", 0.3),
    "lam": ("0.01", "loss.weight_decay", 0.01),
    "lr": ("0.001", "optimizer.learning_rate", 0.001),
    "beta1": ("0.8", "optimizer.beta1", 0.8),
    "beta2": ("0.95", "optimizer.beta2", 0.95),
    "activation": ("relu", "model.activation", "relu"),
    "seed": ("5", "seed", 5),
    "data_dir": ("/data", "data.dir", "/data"),
    "amp": ("true", "precision.policy", "amp"),
}


def options_of(module) -> config_lib.Config:
    config = ml20m.get_config().lock()
    module.main_flags.override(config, flags.FLAGS)
    return config_lib.from_mapping(config)


def test_no_flag_is_the_recipes_config(parsed) -> None:
    with parsed("main", "--train") as module:
        assert options_of(module) == config_lib.from_mapping(ml20m.get_config())


@pytest.mark.parametrize("name", RECIPE)
def test_a_flag_of_the_recipe_sets_its_key(parsed, name: str) -> None:
    text, key, expected = RECIPE[name]
    with parsed("main", f"--{name}={text}", "--train") as module:
        after = config_lib.flatten(options_of(module).to_dict())
    before = config_lib.flatten(
        config_lib.from_mapping(ml20m.get_config()).to_dict()
    )
    assert after[key] == expected
    assert {k for k in after if after[k] != before[k]} == {key}


def test_the_recipes_flags_may_stand_apart_from_their_values(parsed) -> None:
    """`--epochs 3`, as argparse has it."""
    with parsed(
        "main", "--train", "--epochs", "3", "--checkpoint_dir", "c", "--amp"
    ) as module:
        made = options_of(module)
        where = module.main_flags.workdir(flags.FLAGS)
    assert made.train.epochs == 3 and made.precision.policy == "amp"
    assert where == pathlib.Path("c")


def test_a_flag_wins_over_the_config(parsed) -> None:
    with parsed(
        "main", f"--config={ROOT}/configs/ml1m.py", "--epochs=3", "--train"
    ) as module:
        config = module._CONFIG.value
        module.main_flags.override(config, flags.FLAGS)
    made = config_lib.from_mapping(config)
    assert (made.train.epochs, made.train.batch_size) == (3, 250)


def test_help_shows_the_flags() -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "main.py"), "--help"],
        capture_output=True,
        text=True,
    )
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+)", done.stdout, re.M))
    wanted = {
        *RECIPE,
        *("config", "workdir", "train", "test", "inference_benchmark"),
        *("inference_batch_sizes", "baselines", "ease_l2", "per_user"),
        *("baselines_tuned", "itemknn_neighbours", "itemknn_shrinkage"),
        *("ials_factors", "ials_l2", "ials_alpha", "ials_iterations"),
        *("xla", "top_results", "trace", "log_path", "checkpoint_dir"),
        "results_dir",
    }
    assert wanted <= shown


def test_results_never_mix_two_models_or_two_settings(
    trained, workdir, command
) -> None:
    """What one call measured does not stand beside what another one did."""
    assert {"test", "inference", "ease", "oracle"} < set(results(workdir))
    assert results(workdir)["ease"]["l2"] == 500
    again = ("main", "--test", f"--workdir={workdir}")
    done = command(*again, "--config.eval.metrics=('ndcg@10',)")
    assert done.status == 0, done.err
    assert list(results(workdir)["test"]) == ["ndcg@10"]
    assert "ease" not in results(workdir) and "ndcg@100" not in done.out
    assert (
        "without the earlier popularity, itemknn, ials, ease, of which not all"
        in done.out
    )
    # That of ndcg@100, which this call did not measure.
    assert "history_length" not in results(workdir)
    done = command(*again, "--baselines=ease", "--ease_l2=5")
    assert results(workdir)["ease"]["l2"] == 5
    assert "ease (l2 5)" in done.out
    kept = [f for f in trained.flags if not re.match("--(test|base|inf)", f)]
    kept = [f for f in kept if not re.match("--(work|log|res|per|trace)", f)]
    log = workdir / "log.json"
    done = command(
        "main", *kept, "--epochs=4", f"--workdir={workdir}", f"--log_path={log}"
    )
    assert done.status == 0, done.err
    assert set(results(workdir)) == {"train", "validation"}
    assert "test_ndcg" not in log.read_text()


def test_a_later_test_keeps_the_baselines(workdir, command) -> None:
    before = results(workdir)
    rows = pl.read_parquet(workdir / "per_user.parquet")
    again = ("main", "--test", f"--workdir={workdir}")
    done = command(*again)
    assert done.status == 0, done.err
    assert "without the earlier" not in done.out
    for name in experiment.BASELINES:
        assert results(workdir)[name] == before[name]
        assert name in done.out
    assert "ease (l2 500)" in (workdir / "report.html").read_text()
    assert pl.read_parquet(workdir / "per_user.parquet").equals(rows)
    # Of coverage there is nothing per user.
    metrics = "('ndcg@100','recall@5','coverage@5')"
    done = command(*again, f"--config.eval.metrics={metrics}")
    assert "without the earlier popularity" in done.out
    assert "ease" not in results(workdir)
    done = command(*again, "--baselines")
    assert done.status == 0, done.err
    # One alone is another one's, and takes its place.
    done = command(*again, "--baselines=ease", "--ease_l2=5")
    assert done.status == 0, done.err
    left = pl.read_parquet(workdir / "per_user.parquet")["model"].unique()
    assert "ease (l2 5)" in left and "ease (l2 500)" not in left
    assert len(left) == 5


def test_what_is_known_is_left_when_a_baseline_is_stopped(
    workdir, command, monkeypatch
) -> None:
    evaluate = experiment.baselines.evaluate

    def stopped(name, *arguments, **named):
        if name == "ease":
            raise KeyboardInterrupt
        return evaluate(name, *arguments, **named)

    monkeypatch.setattr(experiment.baselines, "evaluate", stopped)
    for path in ("results.json", "per_user.parquet"):
        (workdir / path).unlink()
    again = ("main", "--test", f"--workdir={workdir}")
    done = command(*again, "--baselines=popularity,ease")
    assert done.status != 0
    assert {"test", "popularity"} < set(results(workdir))
    models = pl.read_parquet(workdir / "per_user.parquet")["model"].unique()
    assert set(models) == {"mult_vae", "popularity"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--baselines_tuned",), "--baselines_tuned does nothing without"),
        (("--ease_l2=5",), "--ease_l2 does nothing without --baselines=ease"),
        (
            ("--ease_l2=5", "--baselines=ials"),
            "--ease_l2 does nothing without --baselines=ease",
        ),
    ],
)
def test_a_flag_that_would_do_nothing(given, message, workdir, command):
    done = command("main", "--test", f"--workdir={workdir}", *given)
    assert done.status == 2
    assert message in done.err


def test_a_run_without_epochs(trained, tmp_path, command) -> None:
    kept = [f for f in trained.flags if not re.match("--(test|base|inf)", f)]
    kept = [f for f in kept if not re.match("--(work|log|res|per|trace)", f)]
    done = command("main", *kept, "--epochs=0", f"--workdir={tmp_path / 'w'}")
    assert done.status == 0, done.err
    assert results(tmp_path / "w")["train"]["epochs"] == 0
