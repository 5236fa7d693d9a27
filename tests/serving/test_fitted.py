"""Models that are fitted in one go, behind the same surface as the others."""

import numpy as np
import pandas as pd
import pytest
from oracles import ease, item_knn, refuses, rp3beta, slim

from vaecf.config import FITTED
from vaecf.serving.recommender import Recommender

SETTINGS = {
    "ease": {"l2": 7},
    "itemknn": {"neighbours": 5, "shrinkage": 2.0},
    # All neighbours: rounding would choose among equally near ones.
    "rp3beta": {"neighbours": 30, "alpha": 0.7, "beta": 0.4},
    "slim": {"neighbours": 5, "l2": 9.0},
    "ials": {"factors": 3, "l2": 0.02, "alpha": 0.1, "iterations": 2},
}


ITEM_ITEM = {
    "ease": ease,
    "itemknn": item_knn,
    "rp3beta": rp3beta,
    "slim": slim,
}


@pytest.fixture(scope="module", params=FITTED)
def fitted(request, shop):
    name = request.param
    return Recommender(name, **SETTINGS.get(name, {})).fit(shop.frame)


def implicit_als(x, factor_IF, l2, alpha):
    """Hu et al.'s equation 4, one user after the other."""
    n_items, n_factors = factor_IF.shape
    gram = alpha * factor_IF.T @ factor_IF
    scores = []
    for row in x:
        own = factor_IF[row > 0]
        ridge = l2 * (row.sum() + alpha * n_items) * np.eye(n_factors)
        user = np.linalg.solve(own.T @ own + gram + ridge, own.sum(0))
        scores.append(factor_IF @ user)
    return np.array(scores)


def scores_of(recommender, x):
    name = recommender._model.config.model.name
    settings = SETTINGS.get(name, {})
    if name == "popularity":
        return np.tile(x.sum(0), (len(x), 1))
    if name in ITEM_ITEM:
        return x @ ITEM_ITEM[name](x, **settings)
    assert name == "ials", "a new model needs its oracle here"
    factor_IF = recommender._model.item_vectors().astype(np.float64)
    return implicit_als(x, factor_IF, settings["l2"], settings["alpha"])


def test_scores_are_those_of_numpy(fitted, shop, expected):
    """All users are fitted, and all their items are ranked."""
    users, history_UI = expected[:2]
    score_UI = scores_of(fitted, history_UI)
    result = fitted.recommend(shop.frame, 30)
    assert len(result) == (history_UI == 0).sum()
    row = {user: u for u, user in enumerate(users)}
    column = {item: i for i, item in enumerate(fitted.items)}
    cells = [
        (row[u], column[i]) for u, i in zip(result["user"], result["item"])
    ]
    wanted = [score_UI[cell] for cell in cells]
    np.testing.assert_allclose(result["score"], wanted, rtol=1e-4, atol=1e-5)
    for _, scores in result.groupby("user")["score"]:
        assert (np.diff(scores) <= 0).all()


def test_saved_and_loaded(fitted, shop, tmp_path):
    saved = fitted.save(tmp_path / "saved")
    again = Recommender.load(saved)
    pd.testing.assert_frame_equal(
        again.recommend(shop.frame, 4), fitted.recommend(shop.frame, 4)
    )
    again.save(saved, overwrite=True)
    name = fitted._model.config.model.name
    assert repr(again) == f"Recommender({name}, 30 items)"
    [file, *_] = sorted((saved / "fitted").glob("*.npy"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with refuses(rf"fitted/{file.name}: damaged"):
        Recommender.load(saved)
    file.unlink()
    with refuses(rf"fitted/{file.name} is missing"):
        Recommender.load(saved)


def test_similar_items(fitted, expected):
    name, item = fitted._model.config.model.name, fitted.items[4]
    if name == "popularity":
        with refuses("popularity knows nothing"):
            fitted.similar_items(item)
        return
    similar = fitted.similar_items(item, 3)
    assert similar.columns.tolist() == ["rank", "item", "score"]
    if name == "ials":
        vectors = fitted._model.item_vectors()
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        score_I = vectors @ vectors[4]
    else:
        one = np.eye(30)[4:5]
        x = expected[1]
        weights = ITEM_ITEM[name](x, **SETTINGS[name])
        score_I = (one @ weights)[0]
    score_I[4] = -np.inf
    np.testing.assert_allclose(
        similar["score"], np.sort(score_I)[::-1][:3], atol=1e-5
    )


def test_what_the_models_do_not_have(fitted, shop):
    with refuses("no latent representation .*mult_vae"):
        fitted.encode([["sku-01"]])
    with refuses("score='probability': .* has no probabilities"):
        fitted.recommend([["sku-01"]], score="probability")


def test_settings_of_the_models():
    with pytest.raises(TypeError, match=r"'ease'.* no setting 'hidden'"):
        Recommender(model="ease", hidden=600)
    with refuses(r"^l2=-1.0 must be above 0"):
        Recommender(model="ease", l2=-1).fit([["a", "b"], ["a"]])
    assert repr(Recommender()) == "Recommender(blend, not fitted)"
    assert Recommender()._settings == Recommender("blend")._settings
    assert Recommender()._settings == Recommender.blend()._settings
    small = Recommender(latent=5)
    assert small._settings == Recommender.blend(latent=5)._settings


def test_a_workdir_is_resumed(shop, tmp_path):
    first = Recommender("ease", l2=7).fit(shop.frame, workdir=tmp_path)
    (file,) = (tmp_path / "fitted").glob("*.npy")
    fitted_at = file.stat().st_mtime_ns
    again = Recommender("ease", l2=7).fit(shop.frame, workdir=tmp_path)
    assert file.stat().st_mtime_ns == fitted_at
    pd.testing.assert_frame_equal(
        first.recommend(shop.frame), again.recommend(shop.frame)
    )
    with refuses("baseline.ease_l2 was 7.0 and is 8.0"):
        Recommender("ease", l2=8).fit(shop.frame, workdir=tmp_path)
