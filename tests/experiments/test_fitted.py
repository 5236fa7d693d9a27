"""Commands with a model that is fitted in one go."""

import shutil

import pandas as pd
import pytest

import vaecf
from vaecf.data.dataset import open_dataset
from vaecf.workdir import read_json


@pytest.fixture(scope="module")
def ease_run(tiny, data_dir, tmp_path_factory, succeeds):
    workdir = tmp_path_factory.mktemp("ease") / "run"
    out = succeeds(
        *("main", *tiny, f"--data_dir={data_dir}", "--train", "--test"),
        *("--config.model.name=ease", "--config.baseline.ease_l2=5"),
        *("--baselines=ease", "--ease_l2=5", f"--workdir={workdir}"),
    )
    return workdir, out


def test_main_has_the_metrics_of_the_baseline(ease_run):
    workdir, out = ease_run
    results = read_json(workdir / "results.json")
    assert results["test"] == results["ease"]["test"]
    assert results["validation"] == results["ease"]["validation"]
    assert results["train"]["epochs"] == 0
    assert "training ease on" in out and "ease (l2 5)" in out
    assert (workdir / "report.html").exists()


def test_other_commands(ease_run, data_dir, tmp_path, succeeds, command):
    workdir, _ = ease_run
    out = succeeds(
        *("main", "--test", "--inference_benchmark", f"--workdir={workdir}")
    )
    assert "ease: fitted" not in out and "batch_1_mean_latency" in out
    data = open_dataset(data_dir)
    history = data.items.ids[data.test.fold_in.row(0)].tolist()
    frame = pd.DataFrame({"user": "ann", "item": history})
    frame.to_csv(tmp_path / "h.csv", index=False)
    succeeds(
        *("recommend", f"--workdir={workdir}", "--k=3"),
        *(
            f"--histories={tmp_path / 'h.csv'}",
            f"--output={tmp_path / 'o.csv'}",
        ),
    )
    made = pd.read_csv(tmp_path / "o.csv")
    expected = vaecf.Recommender.load(workdir).recommend({"ann": history}, k=3)
    assert made["item"].tolist() == expected["item"].tolist()
    assert made["score"].to_list() == pytest.approx(expected["score"].tolist())
    for flags, words in (
        (["--config.linear.l2=5"], "--config.linear.l2"),
        (["--config.baseline.ease_l2=0"], "--config.baseline.ease_l2=0"),
    ):
        done = command(
            *("main", "--train", f"--data_dir={data_dir}", *flags),
            *("--config.model.name=ease", f"--workdir={tmp_path / 'new'}"),
        )
        assert done.status == 2 and words in done.err, done


def test_no_model_to_time(data_dir, command):
    done = command(
        *("main", "--inference_benchmark", f"--data_dir={data_dir}"),
        "--config.model.name=ease",
    )
    assert done.status == 2 and "trained in epochs" in done.err


def test_a_refit_of_a_run(trained, oracle_dir, tmp_path, succeeds):
    """The validation stays that of the model before it; the test is its own."""
    workdir = tmp_path / "run"
    shutil.copytree(trained.workdir, workdir)
    before = read_json(workdir / "results.json")
    out = succeeds(
        *("main", *trained.training, "--test", f"--workdir={workdir}"),
        "--config.train.refit_epochs=2",
    )
    after = read_json(workdir / "results.json")
    assert "nothing left to train" in out
    assert "learns from all 140 users" in out
    assert after["validation"] == before["validation"]
    assert after["test"] != before["test"]
    assert after["refit"] and not before["refit"]
    for folder, is_refit in ((workdir, True), (trained.workdir, False)):
        page = (folder / "report.html").read_text()
        assert ("before the refit" in page) is is_refit
    again = succeeds("main", "--test", f"--workdir={workdir}")
    assert "learns from" not in again
    assert read_json(workdir / "results.json")["test"] == after["test"]
