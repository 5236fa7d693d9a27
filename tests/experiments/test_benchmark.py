"""The benchmarks with tiny sizes: what they write, not how fast they are."""

import os
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
import pytest
from oracles import ROOT

import vaecf
from vaecf.workdir import read_json

TINY = (
    "--users=200",
    "--items=60",
    "--set=model.hidden=(16,)",
    "--set=model.latent=4",
    "--set=mesh.data=1",
    "--batch_size=100",
    "--seconds=0.3",
    "--repeats=1",
)
TINY_EVALUATION = (
    "--users=30",
    "--items=60",
    "--set=eval.metrics=('ndcg@10','recall@5')",
    "--set=eval.best_metric=ndcg@10",
    "--batch_size=16",
    "--seconds=0.1",
    "--repeats=2",
)


@pytest.fixture
def measured(tmp_path, succeeds):
    def run(name, *arguments):
        path = tmp_path / "new" / "result.json"
        out = succeeds(f"benchmark/{name}", *arguments, f"--json={path}")
        return read_json(path), out

    return run


def test_training(measured):
    result, out = measured("training", *TINY)
    assert result["batch_size"] == 100 and result["precision"] == "fp32"
    assert (result["users"], result["items"]) == (200, 60)
    # Three products of hidden x items with two FLOP each, per user.
    share = result["users_per_second"] * 3 * 2 * 16 * 60
    assert result["fraction_of_ceiling"] == pytest.approx(
        share / (result["ceiling_gflops"] * 1e9)
    )
    assert result["versions"]["jax"] == jax.__version__
    assert result["versions"]["vaecf"] == vaecf.__version__
    assert result["device"] and result["program_bytes"] > 0
    assert result["loss_last"] < result["loss_first"]
    row = f"| vaecf, mult_vae | 60 | 100 | fp32 | {result['users_per_second']:,.0f} |"  # fmt: skip
    assert row in out


def test_training_beside_our_own_fp32(measured):
    result, _ = measured(
        "training",
        *TINY,
        "--precision=bf16",
        "--set=data.feed=streamed",
        # Four microbatches of 25 users; three of 33 would need padding.
        "--set=train.microbatch=34",
        "--peer=vaecf_fp32",
    )
    peer = result["peers"]["vaecf_fp32"]
    assert peer["ratio"] == pytest.approx(
        result["users_per_second"] / peer["users_per_second"]
    )
    assert peer["loss"] > 0
    assert result["config"]["data"]["feed"] == "streamed"
    assert (result["microbatch"], result["precision"]) == (34, "bf16")


def test_inference(measured):
    sizes = ("--items=60", "--repeats=9", "--batch_sizes=1,3", "--k=5")
    result, _ = measured("inference", *sizes)
    assert list(result["batches"]) == ["1", "3"]
    for size, figures in result["batches"].items():
        mean = figures["mean_latency"]
        assert figures["mean_throughput"] == pytest.approx(int(size) / mean)
        names = ("p50", "p90", "p95", "p99")
        quantiles = [figures[f"{name}_latency"] for name in names]
        assert quantiles[0] > 0 and quantiles == sorted(quantiles)
    # The output weights, 600 x 128 with padding, at the measured bandwidth.
    assert result["floor_seconds"] == pytest.approx(
        600 * 128 * 4 / (result["read_gb_per_second"] * 1e9)
    )


def test_evaluation(measured):
    result, out = measured("evaluation", *TINY_EVALUATION)
    assert (result["users"], result["items"], result["k"]) == (30, 60, 10)
    assert result["users_per_second"] == pytest.approx(30 / result["seconds"])
    # One product of hidden x items with two FLOP each, per user.
    assert result["flop_per_user"] == 2 * 600 * 60
    rates = result["rates"]
    turns = np.divide(rates["evaluation"], rates["ceiling"])
    assert len(turns) == 2
    assert result["fraction_of_ceiling"] == pytest.approx(
        2 * 600 * 60 / 1e9 * np.median(turns)
    )
    for name in ("ranking", "metrics"):
        assert result[f"{name}_seconds"] > 0
    assert result["peak_rss_bytes"] > 1e7
    assert f"| 16 | fp32 | {result['users_per_second']:,.0f} |" in out


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("training", "--batch_size=500", "larger than the 200"),
        ("training", "--set=model.hiden=(5,)", "config.model.hiden"),
        ("training", "--precision=fp8", "fp8"),
        ("training", "--precision=tf32", "needs an NVIDIA GPU"),
        ("training", "--peer=keras", "keras"),
        ("training", "--repeats=0", "--repeats=0"),
        ("evaluation", "--set=eval.metrics=('ndcg',)", "'ndcg'"),
        ("evaluation", "--users=0", "--users=0"),
    ],
)
def test_settings_that_cannot_be_measured(
    tmp_path, refused, script, flag, message
):
    flags = TINY if script == "training" else TINY_EVALUATION
    flags = (*flags, f"--json={tmp_path / 'result.json'}", flag)
    refused(f"benchmark/{script}", flags, message)


def test_large_catalogue(measured):
    result, _ = measured(
        "large_catalogue",
        "--items=3000",
        "--set=model.hidden=(8,)",
        "--set=model.latent=4",
        "--set=model.item_block=256",
        "--batch_size=32",
        "--devices=4",
        "--set=mesh.data=1",
        "--set=mesh.item=4",
        "--steps=5",
    )
    assert result["mesh"] == {"data": 1, "item": 4}
    assert result["losses"][0] == pytest.approx(result["log_items"], rel=0.01)
    assert result["losses"][-1] < result["losses"][0]
    assert result["peak_rss_bytes"] >= result["peak_rss_bytes_initialised"]


def test_preparation(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result, out = measured("preparation", "--rows=20000")
    assert "| pandas " in out and result["rows"] == 20_000
    assert result["ratio"] == pytest.approx(
        result["pandas"]["seconds"] / result["vaecf"]["seconds"]
    )
    for name in ("vaecf", "pandas"):
        assert result[name]["peak_rss_bytes"] > 1e7
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_the_tables_are_those_of_the_docs(tmp_path, monkeypatch, capsys):
    from experiments.benchmark import tables

    for path in tables.RESULTS.glob("*.json"):
        # `make bench` and `make bench-gpu` write these.
        if "-local" not in path.name and "-gpu-" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.main()
    out = capsys.readouterr().out.splitlines()
    rows = {line for line in out if line.startswith("|")}
    pages = "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    assert len(rows) > 20 and not rows - set(pages.splitlines())


def test_training_needs_few_packages(tmp_path, monkeypatch):
    """A GPU machine may have only JAX, Flax, Optax, Orbax and SciPy."""
    from experiments.benchmark import machine

    for name in (
        *("certifi", "filelock", "jinja2", "matplotlib", "ml_collections"),
        *("pandas", "platformdirs", "polars", "tensorboardX", "tqdm"),
    ):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "result.json"
    script = ("benchmark/training.py", *TINY, "--precision=bf16")
    machine.run_script(*script, f"--json={path}")
    assert read_json(path)["precision"] == "bf16"


def test_gpu_runs_every_benchmark_although_some_fail(tmp_path):
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$@"\ncase $* in *fp16*) exit 3; esac\n')
    python.chmod(0o755)
    folder = ROOT / "experiments" / "benchmark"
    done = subprocess.run(
        ["sh", str(folder / "gpu.sh"), "out"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    calls = [line.split() for line in done.stdout.splitlines()]
    calls = [call for call in calls if call[0].endswith(".py")]
    assert done.returncode == 1 and len(calls) > 5
    for n, (script, *flags) in enumerate(calls, 1):
        name = pathlib.Path(script).stem
        assert (folder / f"{name}.py").is_file()
        assert flags[-1] == f"--json=out/{name}-gpu-{n}.json"
