"""What works after `pip install`, outside of the checkout."""

import subprocess
import sys
import zipfile

import pytest
from oracles import ROOT, process

# The lines of the documentation's tour of the Python surface, and a command.
SCRIPT = """
import pathlib
import sys

import numpy as np
import pandas as pd

import vaecf
from vaecf import __main__ as program
from vaecf import config_files

assert pathlib.Path(vaecf.__file__).parents[1] == pathlib.Path(sys.argv[1])
assert config_files.directory().parent == pathlib.Path(vaecf.__file__).parent

rng = np.random.default_rng(0)
rows = [
    (f"user {u}", f"sku-{i:02d}")
    for u in range(80)
    for i in rng.choice(40, rng.integers(6, 12), replace=False)
]
frame = pd.DataFrame(rows, columns=["user", "item"])
frame.to_csv("shop.csv", index=False)
sys.argv = ["vaecf", "prepare", "--ratings=shop.csv", "--output=data/shop"]
try:
    program.main()
except SystemExit as exit:
    assert not exit.code, exit.code

data = vaecf.load_dataset("data/shop")
split = vaecf.split(frame, protocol="strong", test_users=0.1, seed=0)
assert split.split_sizes[2] == 8
small = dict(model="mult_vae", hidden=8, latent=4, refit_epochs=0)
rec = vaecf.Recommender(epochs=2, **small).fit(split, show_progress=False)
assert len(rec.history) == 2
rec.plot_history()
assert set(rec.evaluate(split)["users"]) == {8}
histories = {"ann": ["sku-01", "sku-02"]}
assert len(rec.recommend(histories, k=3)) == 3
assert len(rec.similar_items("sku-01", k=3)) == 3
assert len(rec.similar_users(frame, "user 1", k=3)) == 3
rec.explain(["sku-01", "sku-02"], "sku-03", n=2)
assert len(rec.item_vectors()) == len(rec.items)
rec.encode(histories)

changes = {
    "model.hidden": (8,), "model.latent": 4, "train.epochs": 2,
    "eval.every_epochs": 2, "linear.experts": ("ease",),
}
config = vaecf.load_config("blend", changes)
run = vaecf.train(config, data, workdir="runs/a", show_progress=False)
run = vaecf.open_run("runs/a")
assert run.config.model.latent == 4 and len(run.history) == 2
assert set(run.results["model"]) == {"rec_vae+linear"}
assert len(run.recommender().recommend(histories, k=3)) == 3
run.plot()
config = vaecf.load_config("default", {"model.name": "ease"})
vaecf.train(config, data, workdir="runs/b")
assert list(vaecf.runs("runs/")["status"]) == ["tested", "tested"]
assert len(vaecf.compare(["runs/a", "runs/b"])) == 2
space = {"baseline.ease_l2": {"low": 1.0, "high": 99.0}}
trials = vaecf.sweep(config, space, workdir="runs/s", trials=2, data=data)
assert list(trials["state"]) == ["complete", "complete"]

vaecf.export(rec, "exported")
lists = vaecf.load_exported("exported").recommend(histories, k=3)
assert list(lists["item"]) == list(rec.recommend(histories, k=3)["item"])
print("all lines ran")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel installed in it, and nothing else."""
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if not n.startswith(("vaecf", "vaecf-"))]
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    target = folder / "installed"
    subprocess.run(
        [sys.executable, *pip, "--target", target, wheel], check=True
    )
    return target


@pytest.mark.slow
def test_every_line_of_the_tour(installed, tmp_path):
    done = process(
        *(sys.executable, "-c", SCRIPT),
        installed,
        cwd=tmp_path,
        PYTHONPATH=str(installed),
        MPLBACKEND="agg",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all lines ran\n")
    # The next command names the program and the config.
    assert "next: vaecf train --config=blend --workdir=" in done.stdout


def test_the_program(installed, tmp_path):
    done = process(
        installed / "bin" / "vaecf", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "vaecf train --config=blend" in done.stdout
