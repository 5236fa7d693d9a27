"""Folds through the commands: prepare_dataset, main, compare."""

import numpy as np
import polars as pl
import pytest
from oracles import refuses

import vaecf
from vaecf import experiment
from vaecf.workdir import read_json

N_USERS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory, succeeds, tiny):
    """(folder, flags of the training, what it printed)."""
    folder = tmp_path_factory.mktemp("folds")
    rng = np.random.default_rng(0)
    lines = ["user,item"]
    for user in range(N_USERS):
        for item in rng.choice(25, rng.integers(6, 15), replace=False):
            lines.append(f"u{user},i{item}")
    (folder / "r.csv").write_text("\n".join(lines))
    out = succeeds(
        "prepare_dataset", f"--ratings={folder / 'r.csv'}", "--folds=2",
        f"--output={folder / 'data'}",
    )  # fmt: skip
    assert f"--config.data.dir={folder / 'data'}" in out
    flags = (*tiny, f"--data_dir={folder / 'data'}", "--epochs=1")
    test = ("--train", "--test", "--baselines=popularity,ease")
    out = succeeds("main", *flags, *test, f"--workdir={folder / 'run'}")
    return folder, (*flags, *test), out


def test_the_pooled_values_are_those_of_all_folds(made):
    folder, _, out = made
    run = folder / "run"
    frame = pl.read_parquet(run / "per_user.parquet")
    parts = [
        pl.read_parquet(run / f"fold{i}" / "per_user.parquet") for i in (1, 2)
    ]
    assert frame.sort("model", "user").equals(
        pl.concat(parts).sort("model", "user")
    )
    results = read_json(run / "results.json")
    for name in ("mult_vae", "popularity", "ease (l2 500)"):
        own = frame.filter(pl.col("model") == name)
        assert sorted(own["user"]) == sorted(f"u{u}" for u in range(N_USERS))
        cells = results if name == "mult_vae" else results[name.split(" (")[0]]
        for metric, cell in cells["test"].items():
            values = own[metric].drop_nans()
            assert cell == {
                "mean": pytest.approx(values.mean(), abs=1e-12),
                "stderr": pytest.approx(values.std() / len(values) ** 0.5),
                "users": len(values),
            }
    table = out[out.index("All folds") :]
    assert f"protocol vaecf, 2 folds, {N_USERS} users" in table
    assert f"{results['test']['ndcg@100']['mean']:.4f}" in table
    page = (run / "report.html").read_text()
    assert "vaecf, 2 folds" in page and "fold2" in page


def test_runs_on_folds_are_compared(made, succeeds, command):
    run = made[0] / "run"
    out = succeeds("compare", run, "--resamples=100")
    assert f"protocol vaecf, 2 folds, {N_USERS} users" in out
    assert "ease (l2 500)" in out and "paired by user" in out
    done = command("compare", run, run / "fold1")
    assert done.status == 2 and "different datasets" in done.err
    with refuses(f"name one of them, such as {run / 'fold1'}"):
        vaecf.Recommender.load(run)


def test_finished_folds_are_skipped(made, succeeds, command, monkeypatch):
    folder, flags, _ = made
    run = folder / "run"
    ran, limit = [], 9

    def counted(config, workdir, actions, *, log):
        if len(ran) == limit:
            raise KeyboardInterrupt
        ran.append((workdir.name, config.data.dir, actions.test))

    monkeypatch.setattr(experiment, "run", counted)
    before = read_json(run / "results.json")
    out = succeeds("main", *flags, f"--workdir={run}")
    assert ran == [] and out.count("skipped") == 2
    assert read_json(run / "results.json") == before
    # An interrupted call goes on where it was.
    limit = 1
    other = (*flags, "--ease_l2=50", f"--workdir={run}")
    assert command("main", *other).status == 130
    limit = 9
    succeeds("main", *other)
    data = folder / "data"
    both = [(f, str(data / f), True) for f in ("fold1", "fold2")]
    assert ran == both
    # Results that have changed since then are no longer those of the call.
    path = run / "fold2" / "results.json"
    path.write_text(path.read_text() + "\n")
    succeeds("main", *other)
    assert ran == [*both, both[1]]
    # The config of a test is that of the workdir.
    succeeds("main", "--test", f"--workdir={run}")
    assert ran == [*both, both[1], *both]


def test_a_fitted_model_and_its_tuned_namesake(made, tmp_path, succeeds, tiny):
    folder, _, _ = made
    out = succeeds(
        "main", *tiny, f"--data_dir={folder / 'data'}", "--train", "--test",
        "--config.model.name=ease", "--config.baseline.ease_l2=50",
        "--baselines=ease", "--baselines_tuned", f"--workdir={tmp_path / 'r'}",
    )  # fmt: skip
    frame = pl.read_parquet(tmp_path / "r" / "per_user.parquet")
    own, other = frame["model"].unique(maintain_order=True)
    assert own == "ease" and other.startswith("ease (")
    assert frame.group_by("model").len()["len"].to_list() == [N_USERS] * 2
    assert other in out[out.index("All folds") :]


def test_refused(made, tmp_path, refused, succeeds, tiny):
    folder, flags, _ = made
    own = f"--workdir={folder / 'run'}"
    other = tmp_path / "other"
    succeeds(
        "prepare_dataset", f"--ratings={folder / 'r.csv'}", "--folds=2",
        f"--output={other}", "--seed=1",
    )  # fmt: skip
    train = [*tiny, "--epochs=1", "--train", f"--data_dir={other}"]
    refused("main", [*train, own], "another dataset", writes=True)
    single = [*train[:-1], f"--data_dir={other / 'fold1'}"]
    refused("main", [*single, own], "holds a run on folds")
    refused("main", [*train, f"{own}/fold1"], "fold1 holds a run")
    new = f"--workdir={tmp_path / 'new'}"
    for flag in ("--log_path=x", "--results_dir=x", "--inference_benchmark"):
        refused("main", [*flags, new, flag], "single run", "fold1")
    refused("main", [*flags, new, "--baselines=eese"], "eese", writes=True)
    assert not (tmp_path / "new").exists()
    untrained = [*tiny, f"--data_dir={other}", "--inference_benchmark"]
    refused("main", untrained, "holds folds")
