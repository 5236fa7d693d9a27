"""What the parts of a blend bring, beside what the run and a baseline say."""

import json

import numpy as np
import polars as pl
import pytest
from scipy import stats


@pytest.fixture(scope="module")
def blends(tiny, oracle_dir, tmp_path_factory, command):
    """Two seeds, and EASE in the first."""
    folders = [tmp_path_factory.mktemp("blend") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        done = command(
            "main",
            *tiny,
            f"--data_dir={oracle_dir}",
            f"--workdir={folder}",
            f"--config.seed={seed}",
            "--config.linear.l2=20",
            "--train",
            "--test",
            *(() if seed else ("--baselines=ease", "--ease_l2=30")),
        )
        assert done.status == 0, done.err
    return folders


def per_user(folder, model):
    frame = pl.read_parquet(folder / "per_user.parquet")
    rows = frame.filter(pl.col("model").str.starts_with(model))
    return rows["ndcg@100"].to_numpy()


def test_a_blend_says_its_weights(blends):
    for folder in blends:
        left = json.loads((folder / "results.json").read_text())["linear"]
        kept = json.loads((folder / "linear" / "weights.json").read_text())
        assert left["gain"] == pytest.approx(kept["gain"])
        assert left["prior"] == pytest.approx(kept["prior"])
        page = (folder / "report.html").read_text()
        said = f"gain {kept['gain']:g} and prior {kept['prior']:g};"
        assert f"The linear branch ranks with {said}" in page


def test_the_table(blends, tmp_path, command):
    made = tmp_path / "ablation.json"
    done = command(
        "benchmark/ablation", *blends, "--ease_l2=30", f"--json={made}"
    )
    assert done.status == 0, done.err
    rows = {r["variant"]: r for r in json.loads(made.read_text())["variants"]}
    whole = [per_user(f, "mult_vae+linear") for f in blends]
    ease = per_user(blends[0], "ease")
    row = rows["the whole blend"]
    assert row["seeds"] == pytest.approx([np.nanmean(v) for v in whole])
    assert row["stderr"] == pytest.approx(stats.sem(row["seeds"]))
    assert rows["EASE alone"]["seeds"] == pytest.approx([np.nanmean(ease)] * 2)
    difference = (ease - np.mean(whole, axis=0))[~np.isnan(ease)]
    against = rows["EASE alone"]["against"]
    assert against["difference"] == pytest.approx(difference.mean(), abs=1e-6)
    assert against["p"] == pytest.approx(
        stats.ttest_1samp(difference, 0).pvalue, rel=1e-3
    )
    assert (
        f"| the whole blend | {row['mean']:.4f} ± {row['stderr']:.4f} |"
        in done.out
    )
    # The parts are told apart: not all rank alike.
    means = {round(r["mean"], 6) for r in rows.values()}
    assert len(rows) == 7 and len(means) >= 5


def test_what_cannot_be_taken_apart(blends, trained, tmp_path, command):
    for arguments, message in (
        ((), "give the workdirs"),
        ((trained.workdir,), "no linear "),
        ((blends[0], trained.workdir), "differ in"),
    ):
        done = command("benchmark/ablation", *arguments)
        assert done.status != 0
        assert message in done.err and "Traceback" not in done.err
