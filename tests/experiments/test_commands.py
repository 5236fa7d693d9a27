"""The commands of README, docs and configs, and the recipe's own, as written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex

import numpy as np
import pandas as pd
import polars as pl
import pytest
from absl import flags

from vaecf.data import catalog
from vaecf.data.dataset import open_dataset

ROOT = pathlib.Path(__file__).resolve().parents[2]


def commands(text: str) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", "", text)
    return [
        shlex.split(line)
        for line in re.findall(r"^\s*python (experiments/.*)$", joined, re.M)
    ]


def written() -> list[tuple[str, list[str]]]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in pages}
    for path in [
        *(ROOT / "configs").rglob("*.py"),
        *(ROOT / "experiments").rglob("*.py"),
    ]:
        docstring = path.read_text().split('"""')[1].replace("\\\\\n", "\\\n")
        texts[str(path.relative_to(ROOT))] = docstring
    return [
        (f"{where}-{i}", command)
        for where, text in texts.items()
        for i, command in enumerate(commands(text))
    ]


WRITTEN = written()


def test_the_commands_are_found() -> None:
    files = {where.rsplit("-", 1)[0] for where, _ in WRITTEN}
    assert {"README.md", "configs/ml20m.py", "experiments/main.py"} <= files
    assert "docs/scaling.md" in files
    models = ("mult_vae", "mult_dae", "rec_vae")
    assert {f"configs/sweeps/{name}.py" for name in models} < files
    assert len(WRITTEN) > 50


@pytest.mark.parametrize(
    "command", [c for _, c in WRITTEN], ids=[w for w, _ in WRITTEN]
)
def test_a_written_command_parses(command, parsed, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    script, *arguments = command
    name = pathlib.Path(script).relative_to("experiments").with_suffix("")
    with parsed(str(name), *arguments) as module:
        if name.name == "main":
            module.main_flags.parse(flags.FLAGS)


# --- Your own data ----------------------------------------------------------


def shop(n_users: int = 70) -> pd.DataFrame:
    """Customers with 6 to 12 of 30 articles, in no order."""
    rng = np.random.default_rng(3)
    rows = [
        (f"customer {u}", f"sku-{i:02d}")
        for u in range(n_users)
        for i in rng.choice(30, rng.integers(6, 13), replace=False)
    ]
    frame = pd.DataFrame(rows, columns=["customer", "sku"])
    return frame.sample(frac=1, random_state=0, ignore_index=True)


@pytest.mark.slow
def test_readme_from_a_csv_to_recommendations(
    tmp_path, monkeypatch, command
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    frame = shop()
    frame.to_csv("shop.csv", index=False)
    prepare, main, recommend, *_ = [
        c[1:] for w, c in WRITTEN if w.startswith("README")
    ]
    done = command("prepare_dataset", *prepare, "--held_out_users=10")
    assert done.status == 0, done.err
    assert open_dataset("data/shop", verify=True).split_sizes == (50, 10, 10)
    small = ("--config.model.hidden=(12,)", "--config.model.latent=6",
             "--epochs=2", "--config.mesh.data=1")  # fmt: skip
    done = command("main", *main, *small)
    assert done.status == 0, done.err
    for row in ("rec_vae", "popularity", "ease"):
        assert row in done.out
    assert pathlib.Path("runs/shop/report.html").exists()
    done = command("recommend", *recommend)
    assert done.status == 0, done.err
    assert done.out.startswith("70 users, 700 recommendations")
    made = pl.read_parquet("recommendations.parquet").to_dict(as_series=False)
    made = pd.DataFrame(made)
    assert list(made.columns) == ["user", "rank", "item", "score"]
    assert list(made["user"].unique()) == list(frame["customer"].unique())
    seen = set(zip(frame["customer"], frame["sku"]))
    assert not seen & set(zip(made["user"], made["item"]))
    assert set(made["item"]) <= set(frame["sku"])
    for _, rows in made.groupby("user"):
        assert rows["rank"].tolist() == list(range(1, 11))
        assert rows["item"].is_unique
        assert (rows["score"].diff().iloc[1:] <= 0).all()
        assert 0 < np.exp(rows["score"]).sum() < 1


# --- The recipe's commands --------------------------------------------------


@pytest.fixture
def recipe_data(tmp_path, monkeypatch) -> pathlib.Path:
    """/data of the recipe after unpacking, with few ratings of MovieLens 20M."""
    rng = np.random.default_rng(1)
    rows = [
        (u + 1, i + 1, rng.integers(6, 11) / 2, 1)
        for u in range(101)
        for i in rng.choice(40, rng.integers(10, 30), replace=False)
    ]
    frame = pd.DataFrame(
        rows, columns=["userId", "movieId", "rating", "timestamp"]
    )
    folder = tmp_path / "data" / "ml-20m" / "extracted" / "ml-20m"
    folder.mkdir(parents=True)
    frame.to_csv(folder / "ratings.csv", index=False)
    entry = dataclasses.replace(
        catalog.get("ml-20m"), counts={"ratings": len(frame)}
    )
    monkeypatch.setattr(catalog, "CATALOG", {"ml-20m": entry})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_recipes_commands(recipe_data, command) -> None:
    """Four devices, batches of 24,576 asked for of 81 users: as they are."""
    data = f"--data_dir={recipe_data / 'data'}"
    done = command("prepare_dataset", data, "--held_out_users=10")
    assert done.status == 0, done.err
    common = ("--amp", data, "--checkpoint_dir=./checkpoints")
    done = command("main", "--train", *common, "--epochs=2")
    assert done.status == 0, done.err
    config = json.loads(
        (recipe_data / "checkpoints" / "config.json").read_text()
    )
    assert config["precision"]["policy"] == "amp"
    assert config["train"]["batch_size"] == 24_576
    lines = (recipe_data / "checkpoints" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    # 81 users are one batch, whatever the devices.
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2]
    done = command("main", "--test", *common)
    assert done.status == 0, done.err
    results = json.loads(
        (recipe_data / "checkpoints" / "results.json").read_text()
    )
    assert results["train"]["precision"] == "bf16"
    assert results["test"]["ndcg@100"]["users"] == 10
    assert "protocol recipe, 10 users" in done.out
    done = command("main", "--inference_benchmark", *common)
    assert done.status == 0, done.err
    for figure in ("throughput", "latency"):
        assert f"batch_1_mean_{figure}: " in done.out
    made = {path.name for path in recipe_data.iterdir()}
    assert made == {"data", "checkpoints"}
