"""A model learns new items and new interactions."""

import pathlib

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from oracles import dense, interactions, random_dense, recorded, refuses

from vaecf import config as config_lib
from vaecf.data import in_memory
from vaecf.data.id_table import IdTable
from vaecf.models import mult_vae, registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import growth
from vaecf.serving.recommender import Recommender
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import linear_branch, loop, precision

TINY = dict(
    model="mult_vae", hidden=(), latent=4, batch_size=64, epochs=2,
    learning_rate=0.01, linear_l2=5.0, ema=0.5, refit_epochs=0,
)  # fmt: skip


def shop(first, last, n_users=60, seed=3):
    """Customers of 5 articles each, with ids from `first` to `last`."""
    rng = np.random.default_rng(seed)
    ids = np.arange(first, last)
    rows = [
        (f"user{u}", i)
        for u in range(n_users)
        for i in rng.choice(ids, 5, replace=False).tolist()
    ]
    return pd.DataFrame(rows, columns=["user", "item"])


# Articles 10 to 39; then also 0 to 9 and 40 to 49, without 20 to 24.
OLD = shop(10, 40)
NEW = shop(0, 50, seed=4)
NEW = NEW[~NEW["item"].between(20, 24)]
ITEMS = [*range(10, 40), *range(10), *range(40, 50)]


@pytest.fixture(scope="module")
def fitted():
    return Recommender(**TINY).fit(OLD, validation_users=0.2)


def copy_of(recommender):
    again = Recommender(**TINY)
    again._model = recommender._model
    return again


def model_of(config, items, params=None):
    """A model with random or given parameters."""
    policy, mesh = precision.policy("fp32"), mesh_lib.make_mesh()
    module = registry.make_model(config.model, policy, len(items))
    if params is None:
        key = jax.random.key(1)
        params = registry.scoring_params(
            module, registry.init_params(module, key)
        )
    return TrainedModel(
        config, {}, items, module, mesh, params, pathlib.Path("old"), {}
    )


def grown_by_hand(old, source, x):
    """The module's formula, item by item in float64; old is [items, D]."""
    known = [i for i, j in enumerate(source) if j >= 0]
    for i, j in enumerate(source):
        if j >= 0:
            yield old[j]
            continue
        both = [(x[:, i] * x[:, k]).sum() for k in known]
        weights = [c / np.sqrt(x[:, k].sum() or 1) for c, k in zip(both, known)]
        if not any(weights):
            weights = [1.0] * len(known)
        yield np.average(old[[source[k] for k in known]], axis=0,
                         weights=weights)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_new_items_start_from_co_occurring_ones(seed, monkeypatch):
    monkeypatch.setattr(growth, "_BLOCK", 3)
    rng = np.random.default_rng(seed)
    x = random_dense(30, 16, share=0.2)
    source = rng.permutation(np.r_[np.arange(8), [-1] * 8])
    x[:, np.flatnonzero(source < 0)[1]] = 0  # an item without users
    x[:, np.flatnonzero(source >= 0)[2]] = 0
    old = rng.standard_normal((12, 5)).astype(np.float32)
    grown = growth.grow(old, source, interactions(x))
    expected = np.array([*grown_by_hand(old, source, x)])
    np.testing.assert_allclose(grown, expected, rtol=1e-4, atol=1e-6)
    known = source >= 0
    np.testing.assert_array_equal(grown[known], old[source[known]])


@pytest.mark.parametrize("name", ["mult_vae", "rec_vae"])
def test_known_items_keep_their_parameters_and_scores(name):
    changes = {"model.name": name, "model.hidden": (6,), "model.latent": 4}
    config = config_lib.replace(config_lib.Config(), changes)
    old = model_of(config, IdTable(np.arange(10, 40)))
    # Articles 25 to 29 are no longer sold.
    dataset = in_memory.without_test(NEW[~NEW["item"].between(25, 29)])
    lines = []
    start = growth.grown(old, dataset, log=lines.append)
    assert start.epoch == 0
    assert "20 items keep" in lines[0] and "10 of the earlier" in lines[0]
    ids, train = dataset.items.ids, dataset.train
    x = dense([train.row(u) for u in range(train.n_users)], len(ids))
    source = np.array([i - 10 if 10 <= i < 40 else -1 for i in ids.tolist()])
    known = source >= 0
    before, after = flat(old.params), flat(start.params)
    assert before.keys() == after.keys()
    for key, array in before.items():
        axes = mult_vae.PARTITION.get(key.rsplit("/")[-1], ())
        if "item" not in axes:
            np.testing.assert_array_equal(after[key], array)
            continue
        before_JD, after_ID = (
            np.moveaxis(array, axes.index("item"), 0)
            for array in (array, after[key])
        )
        expected = [*grown_by_hand(before_JD[:30], source, x)]
        after_ID = after_ID[: len(ids)]
        np.testing.assert_allclose(after_ID, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(after_ID[known], before_JD[source[known]])
    # Histories of known items have the same logits.
    now = model_of(config, dataset.items, start.params)
    scores = []
    for model in (old, now):
        recommender = Recommender()
        recommender._model = model
        frame = recommender.recommend(
            [[12, 33], [38]], 20, score="logit", exclude_seen=False,
            allow_items=ids[known],
        )  # fmt: skip
        scores.append(frame.sort_values(["user", "item"]))
    before, after = scores
    assert before["item"].tolist() == after["item"].tolist()
    np.testing.assert_allclose(before["score"], after["score"], rtol=1e-4)


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in leaves
    }


def test_an_update_learns_new_items_and_is_kept(fitted, tmp_path):
    weights = linear_branch.weights_of(fitted._model.branch)
    grown = copy_of(fitted).update(NEW, epochs=3, workdir=tmp_path / "run")
    assert grown.items.tolist() == ITEMS
    assert fitted.items.tolist() == ITEMS[:30]
    assert [*recorded(tmp_path / "run", "train/loss")] == [1, 2, 3]
    assert linear_branch.weights_of(grown._model.branch) == weights
    expected = scores(grown)
    assert set(expected.columns) == set(ITEMS)
    saved = grown.save(tmp_path / "saved")
    for place in (saved, tmp_path / "run"):
        pd.testing.assert_frame_equal(scores(Recommender.load(place)), expected)
    # What was saved is updated like what was fitted.
    again = copy_of(fitted).update(NEW, epochs=3)
    pd.testing.assert_frame_equal(scores(again), expected)
    with refuses("init_from"):
        grown.update(NEW, epochs=3, workdir=tmp_path / "run")


def scores(recommender):
    frame = recommender.recommend(NEW, 100, exclude_seen=False)
    return frame.pivot(index="user", columns="item", values="score")


def test_an_interrupted_update_is_resumed(fitted, tmp_path, monkeypatch):
    expected = scores(copy_of(fitted).update(NEW, epochs=3))
    status = loop._Dispatcher.status

    def interrupted(self, seconds=0.0):
        return status(self, seconds)._replace(interrupted=True)

    again = copy_of(fitted)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Dispatcher, "status", interrupted)
        with pytest.raises(loop.Interrupted):
            again.update(NEW, epochs=3, workdir=tmp_path / "run")
    assert again._model is fitted._model
    again.update(NEW, epochs=3, workdir=tmp_path / "run")
    pd.testing.assert_frame_equal(scores(again), expected)


def test_validation_users_choose_the_weights_of_an_update(fitted, tmp_path):
    updated = copy_of(fitted).update(
        NEW, epochs=1, validation_users=0.3, workdir=tmp_path / "run"
    )
    kept = linear_branch.read_weights(tmp_path / "run")
    assert kept["epoch"] == 1 and "tried" in kept
    assert linear_branch.weights_of(updated._model.branch)["gain"] == (
        pytest.approx(kept["gain"])
    )


def test_a_model_that_is_fitted_in_one_go_is_fitted_again():
    updated = Recommender("itemknn").fit(OLD).update(NEW)
    assert updated.items.tolist() == ITEMS
    fresh = Recommender("itemknn").fit(NEW)
    frames = [
        r.recommend([[1, 30]], 5, exclude_seen=False) for r in (updated, fresh)
    ]
    pd.testing.assert_frame_equal(*frames)


def test_ids_of_an_update():
    words = OLD.assign(item="sku" + OLD["item"].astype(str))
    model = Recommender("popularity").fit(words)
    # All new ids are whole numbers; a column of strings has no other type.
    numbers = OLD.assign(item=OLD["item"] + 5)
    both = pd.concat([words, numbers.astype({"item": str})])
    items = model.update(both).items.tolist()
    assert items[:30] == [f"sku{i}" for i in range(10, 40)]
    assert items[30:] == [str(i) for i in range(15, 45)]
    assert model.update(numbers).items.tolist() == items
    matrix = scipy.sparse.csr_array(np.ones((3, 4)))
    model = Recommender("popularity").fit(matrix)
    more = scipy.sparse.csr_array(np.ones((2, 6)))
    assert model.update(more).items.tolist() == [*range(6)]


def test_what_cannot_be_updated(fitted):
    with refuses("no model yet"):
        Recommender().update(NEW)
    model = copy_of(fitted)
    for frame, words in (
        (shop(60, 90), "knows none of the 30 items"),
        (NEW.assign(item="x" + NEW["item"].astype(str)), "'x"),
        (scipy.sparse.csr_array(np.ones((9, 9))), "matrix"),
    ):
        with refuses(words):
            model.update(frame)
    with refuses("epochs=0"):
        model.update(NEW, epochs=0)
    assert model._model is fitted._model
