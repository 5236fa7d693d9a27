"""Saving and loading, also of damaged directories."""

import gc
import json
import shutil
import subprocess
import sys
import weakref

import jax
import numpy as np
import polars as pl
import pytest
from oracles import refuses
from scipy.sparse import csr_matrix

from experiments.benchmark import workloads
from vaecf import config as config_lib
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import trained_model
from vaecf.training import linear_branch


@pytest.fixture(scope="module")
def saved(shop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    return shop.recommender.save(folder)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def same(model, shop):
    other = shop.recommender._model
    return jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)),
            model.params,
            other.params,
        )
    ) and np.array_equal(model.items.ids, other.items.ids)


def test_save_keeps_everything(shop, copy, tmp_path):
    directory = copy.rename(tmp_path / "elsewhere")
    model = trained_model.load(directory)
    other = shop.recommender._model
    assert same(model, shop)
    assert model.config == other.config
    assert model.manifest == other.manifest
    assert model.progress == other.progress and model.progress["epoch"] == 4
    assert model.directory == directory


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)])
def test_it_loads_onto_any_mesh(shop, saved, mesh):
    model = trained_model.load(saved, mesh=mesh_lib.make_mesh(*mesh))
    kernel = model.params["output_kernel"]
    assert len(kernel.sharding.device_set) == mesh[0] * mesh[1]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == 128 // mesh[1]
    assert same(model, shop)


def test_it_loads_in_another_precision(shop, saved):
    model = trained_model.load(saved, policy="bf16")
    assert model.config.precision.policy == "bf16"
    assert shop.recommender._model.config.precision.policy == "fp32"
    assert same(model, shop)
    lists = [
        m.ranker(5)(
            m.scorer_params,
            np.array([0, 5]),
            np.arange(5, dtype=np.int32),
            batch_size=1,
        )
        for m in (model, shop.recommender._model)
    ]
    # bfloat16 has 8 bits: similar scores, but not the same.
    np.testing.assert_allclose(lists[0].score_UK, lists[1].score_UK, atol=0.05)
    assert (lists[0].score_UK != lists[1].score_UK).any()


def refused(folder):
    with refuses() as error:
        trained_model.load(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "config.json: no such file"),
        ("config.json", "no such file"),
        ("dataset.json", "no such file"),
        ("items.parquet", "no such file"),
        ("checkpoints", "no checkpoint there"),
        ("checkpoints/best", "no checkpoint there"),
    ],
)
def test_something_is_missing(copy, name, message):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in refused(copy)


@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff\xfe{"])
def test_json_is_damaged(copy, name, content):
    (copy / name).write_bytes(content)
    refused(copy)


@pytest.mark.parametrize("change", ["cut", "order", "fewer", "more", "column"])
def test_items_are_those_of_another_run(copy, change):
    """29 and 31 items have arrays of the same padded shape."""
    path = copy / "items.parquet"
    ids = pl.read_parquet(path).sort("index")["item"].to_list()
    if change == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        changed = {"order": ids[::-1], "fewer": ids[:-1], "more": [*ids, "x"]}
        column = "user" if change == "column" else "item"
        IdTable(changed.get(change, ids)).write(path, column)
    assert "items.parquet: " in refused(copy)


def test_another_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["latent"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    assert "config.json: damaged, or changed" in refused(copy)
    del config["sha256"]  # as the message says
    (copy / "config.json").write_text(json.dumps(config))
    assert "the checkpoint does not fit this model" in refused(copy)


# Reads that orbax had started before the error.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::RuntimeWarning",
)
def test_any_file_of_the_checkpoint_is_damaged(shop, saved, tmp_path):
    """The model loads unchanged or the error is one line."""
    files = [
        p.relative_to(saved)
        for p in sorted((saved / "checkpoints").rglob("*"))
        if p.is_file()
    ]
    assert len(files) > 4
    errors = 0
    for number, file in enumerate(files):
        for cut in (True, False):
            folder = shutil.copytree(saved, tmp_path / f"{number}{cut}")
            if cut:
                content = (folder / file).read_bytes()
                (folder / file).write_bytes(content[: len(content) // 2])
            else:
                (folder / file).unlink()
            try:
                model = trained_model.load(folder)
            except VaecfError as error:
                errors += 1
                assert "\n" not in str(error) and str(folder) in str(error)
            else:
                assert same(model, shop), file
    assert errors > 4
    gc.collect()


def test_a_deleted_model_is_freed():
    config = config_lib.replace(
        config_lib.Config(), {"precision.policy": "bf16"}
    )
    model = workloads.random_model(config, 30)
    indptr, indices = np.array([0, 2]), np.array([3, 4], np.int32)
    model.ranker(5)(model.scorer_params, indptr, indices, batch_size=1)
    kernel = weakref.ref(model.params["output_kernel"])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and kernel() is None


# --- Models that are replaced meanwhile --------------------------------------

WRITER = """
import pathlib, shutil, sys
import jax.numpy as jnp
from vaecf.training.checkpoints import BEST, Checkpoints
from vaecf.serving import trained_model
folder = pathlib.Path(sys.argv[1])
model = trained_model.load(folder)
saved = Checkpoints(folder / "checkpoints")
print("begins", flush=True)
for step in range(5, 10_000):
    saved.save(BEST, step, model.params, {**model.progress, "epoch": step})
"""


def test_loading_while_a_run_saves_better_models(shop, copy):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(copy)],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        try:
            assert writer.stdout.readline() == "begins\n"
            epochs = []
            while len(epochs) < 6:
                model = trained_model.load(copy)
                assert same(model, shop)
                epochs.append(model.progress["epoch"])
        finally:
            writer.kill()
    assert epochs == sorted(epochs) and epochs[-1] > epochs[0]


def test_the_linear_branch_has_digests(tmp_path):
    """And damage is found although the file can be read."""
    config = config_lib.replace(config_lib.Config(), {"linear.l2": 5.0})
    config = config_lib.replace(config, {"linear.dropout": 0.0})
    rng = np.random.default_rng(0)
    train = Interactions.from_scipy(csr_matrix(rng.random((30, 12)) < 0.3))
    mesh = mesh_lib.make_mesh(1, 1)

    def prepared():
        return linear_branch.prepare(
            config.linear, train, tmp_path, mesh, log=lambda line: None
        )

    first = prepared()
    file = tmp_path / "linear" / "item_item.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with refuses(r"item_item\.npy: damaged.*remove .*linear"):
        prepared()
    shutil.rmtree(tmp_path / "linear")  # as the message says
    again = prepared()
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
    )
