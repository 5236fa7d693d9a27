"""The commands of README, docs, configs and entry points, and the recipe's."""

import dataclasses
import pathlib
import re
import shlex

import numpy as np
import pandas as pd
import polars as pl
import pytest
from absl import flags
from oracles import ROOT, one_device

from vaecf import commands
from vaecf.data import catalog, dataset, synthetic
from vaecf.data.dataset import open_dataset
from vaecf.workdir import read_json


def written():
    """(where, command) of all lines that call a script or the program."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = {page: page.read_text() for page in pages}
    for folder in ("configs", "experiments", "vaecf/commands"):
        for path in (ROOT / folder).rglob("*.py"):
            docstring = path.read_text().split('"""')[1]
            texts[path] = docstring.replace("\\\\\n", "\\\n")
    texts[ROOT / "vaecf" / "commands" / "__init__.py"] = commands._HELP
    found = []
    for path, text in texts.items():
        joined = re.sub(r"\\\n\s*", "", text)
        names = "|".join(commands.COMMANDS)
        command = (
            rf"^\s*(?:python (experiments/.*)|(vaecf (?:{names})(?: .*)?))$"
        )
        lines = [a or b for a, b in re.findall(command, joined, re.M)]
        where = str(path.relative_to(ROOT))
        found += [(where, shlex.split(line)) for line in lines]
    return found


WRITTEN = written()


def test_the_commands_are_found():
    files = {where for where, _ in WRITTEN}
    assert {"README.md", "docs/scaling.md", "experiments/main.py"} <= files
    assert {"configs/ml20m.py", "configs/sweeps/rec_vae.py"} <= files
    assert {"vaecf/commands/main.py", "vaecf/commands/__init__.py"} <= files


@pytest.mark.parametrize(("where", "command"), WRITTEN)
def test_a_written_command_parses(where, command, parsed, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = command
    if script == "vaecf":
        name, *arguments = arguments
        _, name, on = commands.COMMANDS[name]
        arguments += [f"--{on}"] * bool(on)
    else:
        path = pathlib.Path(script).relative_to("experiments")
        name = str(path.with_suffix(""))
    with parsed(name, *arguments) as module:
        if name == "main":
            module.main_flags.parse(flags.FLAGS)


@pytest.fixture
def run(succeeds, tmp_path, monkeypatch):
    """run(script, ...) succeeds in an empty directory and returns stdout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with one_device():
        yield succeeds


@pytest.mark.slow
def test_readme_from_a_csv_to_recommendations(run):
    """70 customers with 6 to 12 of 30 articles, in random order."""
    rng = np.random.default_rng(3)
    pairs = [
        (f"customer {u}", f"sku-{i:02d}")
        for u in range(70)
        for i in rng.choice(30, rng.integers(6, 13), replace=False)
    ]
    frame = pd.DataFrame(pairs, columns=["customer", "sku"])
    frame = frame.sample(frac=1, random_state=0, ignore_index=True)
    frame.to_csv("shop.csv", index=False)
    prepare, train, recommend, *_ = [
        c[2:] for where, c in WRITTEN if where == "README.md"
    ]
    run("prepare_dataset", *prepare, "--held_out_users=10")
    assert open_dataset("data/shop", verify=True).split_sizes == (50, 10, 10)
    small = ("--config.model.hidden=(12,)", "--config.model.latent=6")
    small += ("--epochs=2", "--config.mesh.data=1", "--train")
    out = run("main", *train, *small)
    assert all(row in out for row in ("rec_vae", "popularity", "ease"))
    assert pathlib.Path("runs/shop/report.html").exists()
    out = run("recommend", *recommend)
    assert out.startswith("70 users, 700 recommendations")
    made = pl.read_parquet("recommendations.parquet")
    customers = frame["customer"].unique()
    assert made["user"].to_list() == np.repeat(customers, 10).tolist()
    assert not set(pairs) & set(zip(made["user"], made["item"]))
    assert made["rank"].to_list() == list(range(1, 11)) * 70


@pytest.mark.slow
def test_the_recipes_commands(run, monkeypatch):
    """As its README has them, on /data with few ratings."""
    rng = np.random.default_rng(1)
    rows = [
        (u + 1, i + 1, rng.integers(6, 11) / 2, 1)
        for u in range(101)
        for i in rng.choice(40, rng.integers(10, 30), replace=False)
    ]
    columns = ["userId", "movieId", "rating", "timestamp"]
    folder = pathlib.Path("data/ml-20m/extracted/ml-20m")
    folder.mkdir(parents=True)
    frame = pd.DataFrame(rows, columns=columns)
    frame.to_csv(folder / "ratings.csv", index=False)
    entry = catalog.get("ml-20m")
    entry = dataclasses.replace(
        entry, counts={"ratings": len(rows)}, held_out_users=10
    )
    monkeypatch.setattr(catalog, "CATALOG", {"ml-20m": entry})
    monkeypatch.setattr(dataset, "RECIPE_DATA_DIR", str(folder.parents[2]))

    assert "prepared before" not in run("prepare_dataset")
    before = open_dataset("data/ml-20m/preprocessed", verify=True).manifest
    assert "prepared before" in run("prepare_dataset")
    assert open_dataset("data/ml-20m/preprocessed").manifest == before
    common = ("--amp", "--checkpoint_dir", "./checkpoints")
    run("main", "--train", "--epochs=2", *common)
    config = read_json(pathlib.Path("checkpoints/config.json"))
    assert config["precision"]["policy"] == "amp"
    assert config["train"]["batch_size"] == 24_576
    assert config["data"]["dir"] == "data"
    out = run("main", "--test", *common)
    out += run("main", "--inference_benchmark", *common)
    results = read_json(pathlib.Path("checkpoints/results.json"))
    assert results["train"]["precision"] == "bf16"
    assert results["test"]["ndcg@100"]["users"] == 10
    assert "protocol recipe, 10 users" in out
    assert "batch_1_mean_latency: " in out
    assert "untrained" not in out
    out = run("main", "--inference_benchmark", "--log_path", "untrained.log")
    assert "untrained mult_vae of 40 items" in out
    assert "batch_1_p99_latency" in pathlib.Path("untrained.log").read_text()
    out = run("main", "--train", "--epochs", "2")
    (made,) = pathlib.Path("runs").iterdir()
    assert f"training in {made}" in out and (made / "report.html").exists()
    made = {path.name for path in pathlib.Path().iterdir()}
    made -= {"configs", "data", "checkpoints", "runs", "untrained.log"}
    assert not made


@pytest.mark.slow
def test_the_demo_twice(run, monkeypatch):
    """On a tenth of its dataset, with one epoch."""
    small = {"n_train_users": 400, "n_held_out_users": 50, "n_items": 100}
    make = synthetic.make
    monkeypatch.setattr(synthetic, "make", lambda name: make(name, **small))
    out = run("demo", "--epochs=1", "--workdir=demo")
    table, _, shown = out.partition("Ten recommendations for three users")
    rows = dict(re.findall(r"^(\w[\w ()+]*?) +(0\.\d{4}) ±", table, re.M))
    models = {"rec_vae+linear", "popularity", "ease (l2 500)", "oracle"}
    assert set(rows) == models
    # No model beats the distribution that generated the data.
    assert max(rows, key=lambda name: float(rows[name])) == "oracle"
    # The test users come after 400 training and 50 validation users.
    assert all(str(user) in shown for user in (451, 452, 453))
    assert len(set(re.findall(r"item-\d+", shown))) >= 10
    assert len(re.findall(r"^ *10 ", shown, re.M)) == 3
    path = pathlib.Path("demo/run/results.json")
    before = read_json(path)
    again = run("demo", "--epochs=1", "--workdir=demo")
    assert read_json(path)["test"] == before["test"]
    assert again.partition("Ten recommendations")[2] in out
