"""The benchmarks on tiny shapes: what they write, not how fast."""

from __future__ import annotations

import json
import pathlib
import runpy

import jax
import pytest

import vaecf

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = (
    "--shape=synthetic",
    "--users=200",
    "--items=60",
    "--hidden=16",
    "--latent=4",
    "--batch_size=100",
    "--seconds=0.2",
    "--repeats=1",
    "--mesh_data=1",
)
METRICS = ["ndcg@10", "recall@5"]
TINY_EVALUATION = (
    "--users=30",
    "--items=60",
    "--batch_size=16",
    f"--metrics={','.join(METRICS)}",
    "--seconds=0.1",
    "--repeats=2",
)


def test_training(tmp_path, command) -> None:
    path = tmp_path / "new" / "training.json"
    done = command("benchmark/training", *TINY, f"--json={path}")
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert result["batch_size"] == 100 and result["precision"] == "fp32"
    assert (result["users"], result["items"]) == (200, 60)
    assert result["users_per_second"] > 0 and result["ceiling_gflops"] > 0
    # Three products of hidden x items, two FLOP each, a user.
    share = result["users_per_second"] * 3 * 2 * 16 * 60
    assert result["fraction_of_ceiling"] == pytest.approx(
        share / (result["ceiling_gflops"] * 1e9)
    )
    assert result["versions"]["jax"] == jax.__version__
    assert result["versions"]["vaecf"] == vaecf.__version__
    assert result["device"]
    assert result["loss_last"] < result["loss_first"]
    assert f"{result['users_per_second']:,.0f} users/s" in done.out


def test_training_beside_itself(tmp_path, command) -> None:
    """Another precision, a feed, microbatches: all the same work."""
    path = tmp_path / "training.json"
    done = command(
        "benchmark/training",
        *TINY,
        "--precision=bf16",
        "--feed=streamed",
        # Four pieces of 25; three of 33 need a padding user.
        "--microbatch=34",
        "--peers=vaecf_fp32",
        f"--json={path}",
    )
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    peer = result["peers"]["vaecf_fp32"]
    turn = result["rounds"][0]
    assert peer["ratio"] == pytest.approx(
        turn["users_per_second"] / peer["users_per_second"]
    )
    assert turn["peers"]["vaecf_fp32"]["loss"] > 0
    assert (result["feed"], result["microbatch"]) == ("streamed", 34)
    assert result["precision"] == "bf16" and result["program_bytes"] > 0
    assert result["seconds_for_400_epochs"] == pytest.approx(
        400 * 200 / result["users_per_second"]
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_size=500", "--batch_size=500 is larger than the 200"),
        ("--hidden=wide", "--hidden=wide must be whole numbers"),
        ("--precision=fp8", "--precision=fp8"),
        ("--precision=tf32", "needs an NVIDIA GPU"),
        ("--peers=keras", "keras"),
        ("--repeats=0", "--repeats=0"),
    ],
)
def test_training_refused(tmp_path, command, flag, message) -> None:
    path = tmp_path / "training.json"
    done = command("benchmark/training", *TINY, f"--json={path}", flag)
    assert done.status == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_inference(tmp_path, command) -> None:
    path = tmp_path / "inference.json"
    sizes = ("--items=60", "--repeats=9", "--batch_sizes=1,3", "--k=5")
    done = command("benchmark/inference", *sizes, f"--json={path}")
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert list(result["batches"]) == ["1", "3"]
    for size, figures in result["batches"].items():
        assert figures["mean_throughput"] == pytest.approx(
            int(size) / figures["mean_latency"]
        )
        names = ("p50", "p90", "p95", "p99")
        quantiles = [figures[f"{name}_latency"] for name in names]
        assert quantiles[0] > 0 and quantiles == sorted(quantiles)
        for name, part in (
            ("fraction_of_floor", figures["floor"]),
            ("p99_over_mean", figures["p99_latency"]),
        ):
            assert figures[name] == pytest.approx(
                part / figures["mean_latency"]
            )
    # The output weights, 600 x 128 with padding, at the measured bandwidth.
    assert result["floor_seconds"] == pytest.approx(
        600 * 128 * 4 / (result["read_gb_per_second"] * 1e9)
    )
    assert result["copy_gb_per_second"] > 0
    assert result["precision"] == "fp32" and result["device"]


def test_evaluation(tmp_path, command) -> None:
    path = tmp_path / "evaluation.json"
    done = command("benchmark/evaluation", *TINY_EVALUATION, f"--json={path}")
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert (result["users"], result["items"], result["k"]) == (30, 60, 10)
    assert result["batch_size"] == 16 and result["metrics"] == METRICS
    assert result["users_per_second"] == pytest.approx(30 / result["seconds"])
    # One product of hidden x items, two FLOP each, a user.
    flop = 2 * 600 * 60
    assert result["floor"]["flop_per_user"] == flop
    assert result["fraction_of_ceiling"] == pytest.approx(
        result["users_per_second"] * flop / (result["ceiling_gflops"] * 1e9)
    )
    for name in ("ranking", "metrics"):
        assert 0 < result[f"{name}_seconds"] < result["first_seconds"]
    assert 0 < result["compile_seconds"] < result["first_seconds"]
    assert len(result["rounds"]) == result["repeats"] == 2
    assert result["peak_rss_bytes"] > 1e7 and result["device"]
    assert result["versions"]["jax"] == jax.__version__
    assert f"{result['users_per_second']:,.0f} users/s" in done.out
    # And its row of README's tables.
    tables = runpy.run_path(
        str(ROOT / "experiments" / "benchmark" / "tables.py")
    )
    row = tables["evaluation"](result)
    assert row.startswith("| 16 | fp32 | ") and row.count("|") == 8


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--metrics=ndcg", "'ndcg' is not a metric"),
        ("--precision=tf32", "needs an NVIDIA GPU"),
        ("--users=0", "--users=0"),
    ],
)
def test_evaluation_refused(tmp_path, command, flag, message) -> None:
    path = tmp_path / "evaluation.json"
    flags = (*TINY_EVALUATION, f"--json={path}", flag)
    done = command("benchmark/evaluation", *flags)
    assert done.status == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_tables_of_the_results_here(capsys) -> None:
    path = ROOT / "experiments" / "benchmark" / "tables.py"
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    results = path.with_name("results")
    assert out.count("Training, ") == bool(list(results.glob("training*")))
    assert out.count("Evaluation, ") == bool(list(results.glob("evaluation*")))
    heads = ("|", "Tr", "Ev", "Qu", "Pr", "Po", "La")
    for line in out.splitlines():
        assert not line or line.startswith(heads), line
    page = (ROOT / "docs" / "scaling.md").read_text()
    large = out[out.index("| items | units ") :].strip()
    assert large in page and large.count("\n") == 3


def test_a_run_of_all_is_recorded_whether_it_works_or_not(parsed) -> None:
    with parsed("benchmark/gpu", "--json=unused") as gpu:
        scripts = ROOT / "experiments" / "benchmark"
        for name in {run[0] for run in gpu.RUNS}:
            assert (scripts / f"{name}.py").is_file()
        good, bad = (
            gpu.run(("training", *TINY, f"--precision={name}"))
            for name in ("bf16", "tf32")
        )
    assert good["result"]["precision"] == "bf16"
    assert good["arguments"] == ["training", *TINY, "--precision=bf16"]
    assert "needs an NVIDIA GPU" in bad["error"] and "result" not in bad


def test_preparation(tmp_path, command) -> None:
    path = tmp_path / "preparation.json"
    done = command(
        "benchmark/preparation",
        "--rows=20000",
        f"--json={path}",
        f"--dir={tmp_path}",
    )
    assert done.status == 0, done.err
    assert "matrices identical" in done.out
    result = json.loads(path.read_text())
    assert result["identical"] is True and result["rows"] == 20_000
    assert result["ratio"] == pytest.approx(
        result["pandas"]["seconds"] / result["vaecf"]["seconds"]
    )
    for name in ("vaecf", "pandas"):
        assert result[name]["peak_rss_bytes"] > 1e7
    assert [p.name for p in tmp_path.iterdir()] == ["preparation.json"]


def test_large_catalogue(tmp_path, command) -> None:
    path = tmp_path / "large.json"
    done = command(
        "benchmark/large_catalogue",
        "--items=3000",
        "--hidden=8",
        "--latent=4",
        "--batch_size=32",
        "--item_block=256",
        "--devices=4",
        "--mesh_item=4",
        "--steps=5",
        f"--json={path}",
    )
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert result["mesh"] == {"data": 1, "item": 4}
    assert result["losses"][0] == pytest.approx(result["log_items"], rel=0.01)
    assert result["losses"][-1] < result["losses"][0]
    assert result["peak_rss_bytes"] >= result["peak_rss_bytes_initialised"]


@pytest.mark.slow
def test_population(tmp_path, command) -> None:
    path = tmp_path / "population.json"
    done = command(
        "benchmark/population",
        "--users=200",
        "--items=60",
        "--held_out_users=20",
        "--change=train.epochs=2",
        "--members=seed=0,1",
        "--repeats=1",
        f"--json={path}",
    )
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert result["members"] == 2 and result["varied"] == ["seed=0,1"]
    assert (result["users"], result["items"]) == (200, 60)
    assert [*result["ways"]] == ["processes", "one_process", "population"]
    for figures in result["ways"].values():
        parts = ("training_seconds", "compile_seconds", "other_seconds")
        assert min(figures[part] for part in parts) > 0
        assert figures["seconds"] == pytest.approx(
            sum(figures[part] for part in parts)
        )
    own = result["ways"]["population"]["seconds"]
    assert result["times_faster"]["processes"]["seconds"] == pytest.approx(
        result["ways"]["processes"]["seconds"] / own
    )
