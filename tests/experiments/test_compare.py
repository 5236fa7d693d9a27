"""compare.py on made-up runs whose numbers are known."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from scipy import stats

from vaecf import config as config_lib
from vaecf.evaluation.baselines import BASELINES
from vaecf.reporting import tables
from vaecf.workdir import read_json

USERS = 12
FOLD_IN = np.repeat([2, 5, 9], 4)
METRICS = ("ndcg@10", "popularity@10")


def scores(seed, shift=0.0):
    rng = np.random.default_rng(seed)
    made = {m: rng.random(USERS) + shift for m in METRICS}
    for values in made.values():
        values[7] = np.nan  # nothing of his is held out
    return made


def frame(models):
    users = {
        "user": [f"u{u}" for u in range(USERS)],
        "fold_in": FOLD_IN,
        "held_out": np.where(np.arange(USERS) == 7, 0, 2),
    }
    return pl.concat(
        pl.DataFrame({"model": [name] * USERS, **users, **values})
        for name, values in models.items()
    )


def write_run(path, models, *, seed=0, rate=0.001, validation=0.3):
    """A workdir; the first model is the run's."""
    path.mkdir()
    (own, *baselines) = models
    name, _, branch = own.partition("+")
    config = config_lib.replace(
        config_lib.Config(),
        {
            "model.name": name,
            "linear.l2": 3.0 if branch else 0.0,
            "optimizer.learning_rate": rate,
            "data.dir": str(path),
            "eval.best_metric": "ndcg@10",
            "seed": seed,
        },
    ).to_dict()

    def result(mean):
        cell = {"mean": mean, "stderr": 0.1, "users": 9}
        return {"validation": {"ndcg@10": cell}, "test": {}}

    results = result(validation)
    for name in baselines:
        results[name.split(" (")[0]] = result(0.45)
    for name, value in (
        ("config", config),
        ("results", results),
        ("dataset", {"name": "ml", "protocol": "paper"}),
    ):
        (path / f"{name}.json").write_text(json.dumps(value))
    frame(models).write_parquet(path / "per_user.parquet")
    return path


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one config, one of another, EASE beside two of them."""
    one, two, other = ({"mult_vae": scores(*s)} for s in ((1,), (2,), (3, 0.2)))
    ease = {EASE: scores(9)}
    return [
        write_run(tmp_path / "a", one | ease, validation=0.4),
        write_run(tmp_path / "b", two, seed=1),
        write_run(tmp_path / "c", other | ease, rate=0.01),
    ]


@pytest.fixture
def compared(tmp_path, succeeds):
    def compare(*arguments):
        made = tmp_path / "all.json"
        out = succeeds(
            "compare", *arguments, f"--json={made}", "--resamples=100"
        )
        return read_json(made), out

    return compare


SLOW, FAST = (f"mult_vae (optimizer.learning_rate={r})" for r in (0.001, 0.01))
EASE = "ease (l2 500)"


def test_groups_differences_and_tables(runs, compared):
    left, text = compared(*runs)
    assert (left["dataset"], left["protocol"]) == ("ml", "paper")
    assert (left["users"], left["left_out"]) == (11, 1)
    assert left["metric"] == "ndcg@10" and left["metrics"] == [*METRICS]
    assert list(left["groups"]) == [SLOW, FAST, EASE]
    # EASE's .45 is the best on validation.
    assert left["reference"] == EASE
    assert left["groups"][SLOW]["validation"] == pytest.approx(0.35)

    real = np.arange(USERS) != 7
    a, b, c, ease = (
        scores(*s)["ndcg@10"][real] for s in ((1,), (2,), (3, 0.2), (9,))
    )
    mean = left["groups"][SLOW]["metrics"]["ndcg@10"]
    assert mean == {
        "mean": pytest.approx((a.mean() + b.mean()) / 2),
        "stderr": pytest.approx(abs(a.mean() - b.mean()) / 2),
        "users": 11,
        "over": "seeds",
    }
    alone = left["groups"][FAST]["metrics"]["ndcg@10"]
    assert alone["over"] == "users"
    assert alone["stderr"] == pytest.approx(stats.sem(c))
    assert [run["seed"] for run in left["runs"]] == [0, 1, 0, None]
    of_b = left["runs"][1]["metrics"]["ndcg@10"]
    assert of_b["mean"] == pytest.approx(b.mean())

    p_values = []
    for name, v in ((SLOW, (a + b) / 2), (FAST, c)):
        found = left["comparisons"][name]
        p_values.append(stats.ttest_rel(v, ease).pvalue)
        assert found["difference"] == pytest.approx((v - ease).mean())
        assert found["stderr"] == pytest.approx(stats.sem(v - ease))
        assert found["p"] == pytest.approx(p_values[-1])
    holm = min(c["p_holm"] for c in left["comparisons"].values())
    assert holm == pytest.approx(min(1, 2 * min(p_values)))

    buckets = left["groups"][SLOW]["history_length"]
    assert [r["bucket"] for r in buckets] == ["2", "5", "9"]
    assert [r["users"] for r in buckets] == [4, 3, 4]
    assert buckets[0]["mean"] == pytest.approx(((a + b) / 2)[:4].mean())

    found = left["comparisons"][FAST]
    for part in (
        "dataset ml, protocol paper, 11 users (1 left out)",
        f"NDCG@10 against {EASE}",
        "5 (3)",
        f"{found['difference']:+.4f}",
        f"{found['low']:+.4f} to {found['high']:+.4f}",
        f"{found['p']:.2g}",
        f"{found['p_holm']:.2g}",
        f"mean {mean['mean']:.4f} ± {mean['stderr']:.4f}",
        "popularity@10",
    ):
        assert part.lower() in " ".join(text.lower().split()), part
    found["stderr"] = None  # as of one user
    lines = tables.comparison_table(left).splitlines()
    assert any(line.startswith(FAST) and " – " in line for line in lines)


def test_seeds_of_a_blend_are_one_group(tmp_path, compared):
    runs = [
        write_run(tmp_path / f"{own}-{s}", {own: scores(s)}, seed=s)
        for own in ("mult_vae", "mult_vae+linear")
        for s in (1, 2)
    ]
    groups = compared(*runs)[0]["groups"]
    assert [group["seeds"] for group in groups.values()] == [2, 2]
    assert list(groups) == ["mult_vae", "mult_vae+linear"]


def test_namesakes_that_differ_in_much_are_called_by_their_run(runs, compared):
    config = read_json(runs[2] / "config.json")
    config["train"] |= {"epochs": 3, "batch_size": 5, "ema": 0.5}
    (runs[2] / "config.json").write_text(json.dumps(config))
    groups = compared(*runs)[0]["groups"]
    assert f"mult_vae ({runs[2]})" in groups and "batch_size" not in str(groups)


def test_the_reference_asked_for(runs, compared):
    assert compared(*runs, "--reference=ease")[0]["reference"] == EASE
    for reference, expected in ((FAST, FAST), (runs[1], SLOW)):
        left, _ = compared(
            *runs, f"--reference={reference}", "--nobaselines",
            "--metric=popularity@10",
        )  # fmt: skip
        assert left["reference"] == expected
        assert list(left["groups"]) == [SLOW, FAST]
        assert left["metric"] == "popularity@10"


def test_files_of_per_user(runs, tmp_path, compared):
    """CSV and Parquet; models of one name are told apart."""
    text = tmp_path / "a.csv"
    frame({"mult_vae": scores(1)}).write_csv(text)
    other = runs[2] / "per_user.parquet"
    left, _ = compared(text, other)
    names = [f"mult_vae in {text}", f"mult_vae in {other}", EASE]
    assert list(left["groups"]) == names
    assert left["reference"] == names[0]  # nothing validated: the first
    assert left["dataset"] is None
    left, _ = compared(text, runs[0])
    assert list(left["groups"]) == ["mult_vae", names[0], EASE]


def test_what_does_not_compare_is_refused(runs, tmp_path, refused):
    a, b, c = runs
    refused("compare", [], "no runs to compare")
    refused("compare", [a, a], "same run: config and seed 0")
    refused("compare", [a, tmp_path / "no"], "neither a workdir nor")
    refused("compare", [a, tmp_path], "dataset.json")
    refused(
        "compare",
        [a, b, "--metric=mrr@3"],
        f"{a}: no per-user mrr@3 of mult_vae",
    )
    refused("compare", [a, b, "--reference=x"], "--reference=x", EASE)
    (b / "per_user.parquet").unlink()
    refused("compare", [a, b], f"{b}: no per-user metrics")
    other = frame({"mult_vae": scores(2)})
    other = other.with_columns(user=pl.col("user") + "x")
    other.write_parquet(b / "per_user.parquet")
    refused("compare", [a, b], "different test users (column user)")
    (c / "dataset.json").write_text(json.dumps({"name": "other"}))
    refused("compare", [a, c], "different datasets ('ml', 'other'")
    broken = tmp_path / "b.csv"
    broken.write_text("user,ndcg@10\n1,0.5\n")
    refused("compare", [broken], "it has no model, fold_in, held_out")


def test_a_real_run_compares_with_itself_under_another_seed(
    trained, tmp_path, compared
):
    again = shutil.copytree(trained.workdir, tmp_path / "again")
    config = read_json(again / "config.json")
    (again / "config.json").write_text(json.dumps(config | {"seed": 5}))
    left, _ = compared(trained.workdir, again)
    results = read_json(trained.workdir / "results.json")
    assert next(iter(left["groups"])) == "mult_vae"
    assert len(left["groups"]) == 1 + len(BASELINES)
    found = left["groups"]["mult_vae"]["metrics"]["ndcg@100"]
    assert found["mean"] == pytest.approx(results["test"]["ndcg@100"]["mean"])
    assert found["stderr"] == 0 and left["groups"]["mult_vae"]["seeds"] == 2
    for name, group in left["groups"].items():
        result = results.get(name.split(" (")[0], results)
        mean = result["validation"]["ndcg@100"]["mean"]
        assert group["validation"] == pytest.approx(mean)
    values = [group["validation"] for group in left["groups"].values()]
    assert left["groups"][left["reference"]]["validation"] == max(values)
