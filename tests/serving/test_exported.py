"""Exported models: the lists of `Recommender`, without its models."""

import builtins
import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from oracles import process, refuses

import vaecf
from vaecf import config as config_lib
from vaecf.data.interactions import Interactions
from vaecf.models import blend, registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import exported, numpy_ranker, trained_model
from vaecf.serving.recommender import Recommender
from vaecf.training import linear_branch, precision

pytest.importorskip("flatbuffers")

N_ITEMS = 30

# Every kind of layer, expert and fitted parameter. SLIM and RP3beta have those
# of itemknn. Mult-VAE is the model of the shop.
FITTED = {
    "popularity": {},
    "ease": {"l2": 7.0},
    "itemknn": {"neighbours": 5, "shrinkage": 2.0},
    "ials": {"factors": 3, "l2": 0.1, "alpha": 0.1, "iterations": 1},
}
# Layers, and the branch beside them.
LAYERS = {
    "mult_dae": (
        {"hidden": (4,) * 11, "activation": "relu"},
        {"experts": ("ease",)},
    ),
    "rec_vae": (
        {"hidden": (5,)},
        {"experts": ("ease", "graph", "ials", "slim"), "rank": 4},
    ),
}
# Of the shop's model: in half precision, and over item shards with padding.
LOADED = {"bf16": {"policy": "bf16"}, "items": {"mesh": (1, 3)}}


def made(name, shop, history_UI):
    """A model with the parameters of a fit, or with random layers."""
    earlier, branch, module = shop.recommender._model, None, None
    train = Interactions.from_scipy(scipy.sparse.csr_matrix(history_UI))
    changes = {"model.name": name}
    if name in LAYERS:
        layers, linear = LAYERS[name]
        changes |= {f"model.{key}": value for key, value in layers.items()}
    config = config_lib.replace(earlier.config, changes)
    if name in FITTED:
        params = registry.FITTED[name].fit(train, **FITTED[name])
    else:
        policy = precision.policy("fp32")
        module = registry.make_model(config.model, policy, N_ITEMS)
        shapes = registry.abstract_params(module)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
            registry.scoring_params(module, shapes),
        )
        settings = dict(l2=9.0, dropout=0.5, user_exponent=0.5)
        branch = blend.fit(train, **settings, **linear)
        weights = blend.default_weights(linear["experts"])
        branch = linear_branch.with_weights(branch, weights)
    return dataclasses.replace(
        earlier,
        config=config,
        module=module,
        mesh=mesh_lib.make_mesh(1, 1),
        params=params,
        branch=branch,
    )


@pytest.fixture(scope="module", params=[*LOADED, *FITTED, *LAYERS])
def recommender(request, shop, expected):
    name, one = request.param, Recommender()
    if name in LOADED:
        options = {"mesh": (1, 1), **LOADED[name]}
        options["mesh"] = mesh_lib.make_mesh(*options["mesh"])
        one._model = trained_model.load(shop.workdir, **options)
    else:
        one._model = made(name, shop, expected[1])
    return one


def histories(shop):
    lists = dict(shop.frame.groupby("user")["item"].agg(list).iloc[:20])
    everything = [f"sku-{i:02d}" for i in range(30)]
    return {**lists, "nothing": [], "unknown": ["x", "sku-03"], 7: everything}


def test_the_lists_are_those_of_the_recommender(recommender, shop, tmp_path):
    ours = histories(shop)
    directory = vaecf.export(recommender, tmp_path / "a", platforms=["cpu"])
    loaded = vaecf.load_exported(directory)
    assert loaded.items.tolist() == recommender.items.tolist()
    name = repr(recommender).partition(",")[0]
    assert repr(loaded) == f"Exported{name}, 30 items)"
    wanted = recommender.recommend(ours, 7)
    found = loaded.recommend(ours, 7)
    pd.testing.assert_frame_equal(found, wanted)
    assert found.attrs == wanted.attrs == {"unknown_items": 1}
    # NumPy ranks alike. In half precision it does not round activations.
    lists = numpy_ranker.Ranker(directory).recommend(ours.values(), k=7)
    scores = [score for places in lists for _, score in places]
    if recommender._model.config.precision.policy != "fp32":
        np.testing.assert_allclose(scores, wanted["score"], atol=0.05)
        return
    assert [i for places in lists for i, _ in places] == [*wanted["item"]]
    np.testing.assert_allclose(scores, wanted["score"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def directory(shop, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "shop"
    return vaecf.export(shop.recommender, target, max_k=4)


def test_nothing_of_the_training_is_imported(directory, monkeypatch):
    """Not even by an import inside a function."""
    imported, original = set(), builtins.__import__

    def spy(name, *args, **kwargs):
        imported.add(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", spy)
    loaded = vaecf.load_exported(directory)
    assert len(loaded.recommend([["sku-01"]], 2)) == 2
    tops = {name.split(".")[0] for name in imported}
    assert "pandas" in tops and not tops & {"flax", "optax", "orbax"}
    assert not any(name.startswith("vaecf.training") for name in imported)


def test_numpy_ranks_without_any_other_package(directory, shop):
    code = (
        "import json, sys, numpy_ranker\n"
        "ranker = numpy_ranker.Ranker('.')\n"
        "lists = ranker.recommend([['sku-03', 'sku-20']], k=3)\n"
        "assert not {'jax', 'vaecf', 'pandas'} & {*sys.modules}\n"
        "print(json.dumps(lists[0]))"
    )
    done = process(sys.executable, "-c", code, cwd=directory, PYTHONPATH="")
    [items, scores] = zip(*json.loads(done.stdout))
    wanted = shop.recommender.recommend([["sku-03", "sku-20"]], 3)
    assert [*items] == wanted["item"].tolist()
    np.testing.assert_allclose(scores, wanted["score"], rtol=1e-4)


def test_numpy_refuses_histories_without_a_known_item(directory):
    ranker = numpy_ranker.Ranker(directory)
    with pytest.raises(ValueError, match="none of the 2 items of"):
        ranker.recommend([["x"], ["y", "x"]])
    assert [len(places) for places in ranker.recommend([[]], k=2)] == [2]


def test_one_program_of_any_size_for_two_platforms(directory, shop):
    """The batches of 8 users and of 2 have histories of other lengths."""
    about = json.loads((directory / "export.json").read_text())
    assert about["platforms"] == ["cpu", "cuda"]
    loaded = vaecf.load_exported(directory)
    for size in (2, 8):
        pd.testing.assert_frame_equal(
            loaded.recommend(histories(shop), 4, batch_size=size),
            shop.recommender.recommend(histories(shop), 4),
        )
    options = dict(exclude_seen=False, deny_items=["sku-04"], score="logit")
    pd.testing.assert_frame_equal(
        loaded.recommend(histories(shop), 4, **options),
        shop.recommender.recommend(histories(shop), 4, **options),
    )
    with refuses("k=5: .* at most 4; .* max_k"):
        loaded.recommend([["sku-01"]], 5)
    with refuses("score='x'"):
        loaded.recommend([["sku-01"]], 2, score="x")
    assert loaded.recommend([], 4).empty


def test_what_is_no_exported_model(directory, shop, tmp_path, monkeypatch):
    with refuses("holds no exported model"):
        vaecf.load_exported(shop.workdir)
    with refuses("holds no exported model"):
        vaecf.export(shop.recommender, shop.workdir, overwrite=True)
    with refuses("holds an exported model: pass overwrite=True"):
        vaecf.export(shop.recommender, directory)
    with refuses(r"platforms=\('gpu',\): .*cuda"):
        vaecf.export(shop.recommender, tmp_path / "b", platforms="gpu")
    with refuses("cannot export 'w': pass a Recommender"):
        vaecf.export("w", tmp_path / "b")
    with refuses("no model yet"):
        vaecf.export(Recommender(), tmp_path / "b")
    with pytest.raises(ValueError, match="holds no exported model"):
        numpy_ranker.Ranker(shop.workdir)
    with pytest.raises(ValueError, match="'sku-01': pass a list of items"):
        numpy_ranker.Ranker(directory).recommend(["sku-01"])
    monkeypatch.setattr("jax.export.default_export_platform", lambda: "tpu")
    with refuses("exported for cpu, cuda, and JAX runs on tpu"):
        vaecf.load_exported(directory)
    monkeypatch.setattr(exported, "VERSION", 2)
    with refuses("format version 1, and this version of vaecf reads"):
        vaecf.load_exported(directory)


@pytest.mark.parametrize(
    "name",
    ["export.json", "program.bin", "items.json", "arrays/model.input_bias.npy"],
)
def test_damage(name, directory, tmp_path):
    target = shutil.copytree(directory, tmp_path / "copy")
    file = target / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with refuses(file.name):
        vaecf.load_exported(target)
    if name.startswith(("items", "arrays")):
        with pytest.raises(ValueError, match=f"{file.name}: damaged"):
            numpy_ranker.Ranker(target)
    file.unlink()
    with refuses(file.name):
        vaecf.load_exported(target)


def test_a_program_that_jax_cannot_read(directory, tmp_path):
    with refuses("program.bin: jax .* cannot read the program"):
        exported._deserialize(b"damaged", directory, {"jax": "0.9"})
