"""The public surface: fit, load, save, recommend, encode."""

import dataclasses
import logging

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from oracles import ease, refuses

from vaecf.data.interactions import Interactions
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import trained_model
from vaecf.serving.recommender import Recommender
from vaecf.workdir import read_json

SMALL = dict(
    model="mult_vae",
    hidden=(12,),
    latent=4,
    batch_size=32,
    epochs=1,
    refit_epochs=0,
)
SETTINGS = {**SMALL, "epochs": 4, "learning_rate": 0.03, "patience": None}


def by_user(frame):
    return {
        user: part["item"].tolist()
        for user, part in frame.groupby("user", sort=False)
    }


# --- A known answer ---------------------------------------------------------


def test_checkerboard():
    """User u has all items of one colour except item u."""
    board = np.zeros((24, 24), np.float32)
    for u in range(24):
        board[u, u % 2 :: 2] = 1
    np.fill_diagonal(board, 0)
    recommender = Recommender(
        model="mult_vae", hidden=(16,), latent=4, epochs=50, batch_size=24,
        learning_rate=0.04, patience=None, seed=1,
    )  # fmt: skip
    matrix = scipy.sparse.csr_matrix(board)
    recommender.fit(matrix, validation_users=0)
    assert recommender.items.tolist() == list(range(24))
    first = recommender.recommend(matrix, k=1)
    assert first["user"].tolist() == list(range(24))
    assert first["item"].tolist() == list(range(24))
    # Items of the same colour are the nearest.
    for item in range(4):
        near = recommender.similar_items(item, k=11)["item"]
        assert sorted(near) == [i for i in range(item % 2, 24, 2) if i != item]


# --- Where the interactions come from ---------------------------------------


def test_polars_gives_the_same_model_as_pandas(shop):
    """With other column names, and without a workdir."""
    frame = shop.frame.rename(columns={"user": "who", "item": "what"})
    frame = pl.DataFrame(frame.to_dict("list"))
    columns = {"user_column": "who", "item_column": "what"}
    recommender = Recommender(**SETTINGS).fit(
        frame, validation_users=0, **columns
    )
    assert recommender.items.tolist() == sorted(set(frame["what"]))
    result = recommender.recommend(frame, k=4, **columns)
    pd.testing.assert_frame_equal(result, shop.recommender.recommend(shop.frame, 4))  # fmt: skip
    assert result["user"].nunique() == 60  # one has everything


def test_integer_ids_come_back_as_integers(tmp_path, monkeypatch):
    """And numbers of NumPy are settings, and nobody installs log handlers."""
    monkeypatch.setattr(logging.root, "handlers", [])
    rng = np.random.default_rng(2)
    big = 10**15
    frame = pd.DataFrame(
        [(u * 7 - 20, big + 3 * i) for u in range(40) for i in rng.permutation(15)[:6]],
        columns=["user", "item"],
    )  # fmt: skip
    settings = {**SMALL, "latent": np.int64(4), "seed": np.uint8(0)}
    recommender = Recommender(**settings).fit(frame)
    assert recommender.items.dtype == np.int64
    assert set(recommender.items) <= set(frame["item"])
    result = recommender.recommend(frame, k=3)
    assert result["user"].dtype == result["item"].dtype == np.int64
    assert result["user"].unique().tolist() == frame["user"].unique().tolist()
    # A model without a workdir can be saved.
    again = Recommender.load(recommender.save(str(tmp_path / "saved")))
    pd.testing.assert_frame_equal(again.recommend(frame, k=3), result)
    assert logging.root.handlers == []


@pytest.mark.parametrize(
    ("settings", "fit", "message"),
    [
        ({}, {"validation_users": 1.5}, "validation_users=1.5 must be a share"),
        ({}, {"validation_users": np.float32(1.5)}, "must be a share"),
        ({}, {"validation_users": True}, "validation_users=True must be"),
        ({}, {"validation_users": None}, "validation_users=None must be"),
        ({"epochs": 1.5}, {}, "^epochs=1.5 must be of type int"),
        ({"seed": None}, {}, "seed=None must be of type int"),
        ({"seed": 1.5}, {}, "seed=1.5 must be of type int"),
        ({"seed": -1}, {}, r"seed=-1 must be in \[0, 2"),
        ({"anneal_epochs": None}, {}, "anneal_epochs=None must be of type"),
        ({"anneal_epochs": np.nan}, {}, "anneal_epochs=nan must be finite"),
        ({"anneal_epochs": -1}, {}, "anneal_epochs=-1.0 must be at least 0"),
        (
            {"model": "rec_vae", "alternating_epochs": ()},
            {},
            r"alternating_epochs=\(\): rec_vae needs",
        ),
        (
            {"model": "rec_vae", "hidden": (60, 20)},
            {},
            r"hidden=\(60, 20\): rec_vae takes one size",
        ),
    ],
)
def test_fit_refuses(shop, tmp_path, settings, fit, message):
    recommender = Recommender(**settings)
    with refuses(message):
        recommender.fit(shop.frame, workdir=tmp_path / "run", **fit)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda r: r.recommend({"ann": ["sku-01"]}),
        lambda r: r.similar_items("sku-01"),
        lambda r: r.encode([["sku-01"]]),
        lambda r: r.items,
        lambda r: r.save("nowhere"),
    ],
)
def test_not_fitted(ask):
    with refuses(r"no model yet: call fit\(\) or"):
        ask(Recommender())


# --- Lists ------------------------------------------------------------------


def top(expected, k, *, exclude_seen=True, allowed=None):
    """Item indices and logits by a stable sort of NumPy scores."""
    _, history_UI, _, logits_UI = expected
    score_UI = logits_UI.copy()
    if exclude_seen:
        score_UI[history_UI > 0] = -np.inf
    if allowed is not None:
        score_UI[:, ~allowed] = -np.inf
    rows = []
    for u, score_I in enumerate(score_UI):
        best = np.argsort(-score_I, kind="stable")[:k]
        rows += [
            (u, rank, i, logits_UI[u, i])
            for rank, i in enumerate(best, 1)
            if score_I[i] > -np.inf
        ]
    frame = pd.DataFrame(rows, columns=["user", "rank", "item", "logit"])
    return frame.astype({"user": int, "item": int, "logit": float})


def check(result, rows, expected, ids):
    assert result.columns.tolist() == ["user", "rank", "item", "score"]
    assert result["user"].tolist() == expected[0][rows["user"]].tolist()
    assert result["rank"].tolist() == rows["rank"].tolist()
    assert result["item"].tolist() == ids[rows["item"]].tolist()
    np.testing.assert_allclose(result["score"], rows["logit"], atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 30, 1000])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_lists_are_those_of_numpy(shop, expected, k, exclude_seen):
    result = shop.recommender.recommend(
        shop.frame, k, exclude_seen=exclude_seen, score="logit"
    )
    rows = top(expected, k, exclude_seen=exclude_seen)
    check(result, rows, expected, shop.recommender.items)
    assert result.attrs["unknown_items"] == 0
    # The customer with all items gets a list only if seen items are allowed.
    assert ("customer all" in set(result["user"])) != exclude_seen


@pytest.mark.parametrize(
    "kind",
    [
        list,
        set,
        np.array,
        pd.Series,
        lambda ids: pl.Series(ids, dtype=pl.String),
        pd.Index,
        lambda ids: dict.fromkeys(ids).keys(),
        iter,
    ],
)
def test_allow_and_deny(shop, expected, kind):
    ids = shop.recommender.items
    allow = [*ids[4:20], "sku-unknown"]
    deny = [*ids[10:25], "sku-unknown"]
    inside = np.isin(np.arange(len(ids)), np.arange(4, 20))
    outside = ~np.isin(np.arange(len(ids)), np.arange(10, 25))
    for given, mask in (
        ({"allow_items": kind(allow)}, inside),
        ({"deny_items": kind(deny)}, outside),
        ({"allow_items": kind(allow), "deny_items": kind(deny)}, inside & outside),
        ({"allow_items": kind([])}, np.zeros(len(ids), bool)),
        ({"deny_items": kind([])}, np.ones(len(ids), bool)),
    ):  # fmt: skip
        result = shop.recommender.recommend(
            shop.frame, 5, score="logit", batch_size=7, **given
        )
        check(result, top(expected, 5, allowed=mask), expected, ids)


def test_scores(shop, expected):
    exact = expected[3]
    total_U1 = np.log(np.exp(exact).sum(axis=1, keepdims=True))
    log_probability = (exact - total_U1).ravel()
    rows = top(expected, 30, exclude_seen=False)
    place = rows["user"] * 30 + rows["item"]
    for options, values, tolerance in (
        ({}, log_probability, {"atol": 1e-5}),
        ({"score": "probability"}, np.exp(log_probability), {"rtol": 1e-4}),
    ):
        result = shop.recommender.recommend(
            shop.frame, 30, exclude_seen=False, **options
        )
        assert len(result) == 61 * 30
        np.testing.assert_allclose(result["score"], values[place], **tolerance)


def test_batches_and_blocks_do_not_change_the_lists(shop):
    whole = shop.recommender.recommend(shop.frame, 6)
    for batch_size in (1, 9, 61):
        blocks = list(
            shop.recommender.recommend_blocks(
                shop.frame, 6, batch_size=batch_size
            )
        )
        assert len(blocks) > 1 or batch_size == 61
        filled = pd.concat([b for b in blocks if len(b)], ignore_index=True)
        pd.testing.assert_frame_equal(filled, whole)


def test_unknown_and_repeated_items_do_not_change_the_lists(shop):
    ask = shop.recommender.recommend
    once = ask({"ann": ["sku-01", "sku-02"]}, 5)
    often = ask({"ann": ["sku-02", "sku-01", "sku-02", "sku-02"]}, 5)
    pd.testing.assert_frame_equal(once, often)
    mixed = ask({"ann": ["sku-77", "sku-01", None, "sku-02", 12]}, 5)
    assert once.attrs["unknown_items"] == 0
    assert mixed.attrs["unknown_items"] == 3
    pd.testing.assert_frame_equal(mixed, once)


def test_histories_without_known_items_get_one_full_list(shop):
    result = shop.recommender.recommend([["sku-77"], [], ["sku-01"]], 30)
    lists = by_user(result)
    assert sorted(lists[0]) == shop.recommender.items.tolist()
    assert lists[0] == lists[1] != lists[2]
    assert np.isfinite(result["score"]).all()


@pytest.mark.parametrize(
    "nobody", [[], {}, pd.DataFrame({"user": [], "item": []})]
)
def test_no_users(shop, nobody):
    result = shop.recommender.recommend(nobody, 5)
    assert result.columns.tolist() == ["user", "rank", "item", "score"]
    assert len(result) == 0 and result.attrs["unknown_items"] == 0
    users, codes = shop.recommender.encode(nobody)
    assert len(users) == 0 and codes.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 must be"),
        ({"k": 2.5}, "k=2.5 must be"),
        ({"k": True}, "k=True must be"),
        ({"k": np.bool_(True)}, "k=True must be"),
        ({"k": np.arange(3)}, r"k=\[0, 1, 2\] must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"batch_size": None}, "batch_size=None must be"),
        ({"score": "prob"}, "score='prob': use one of log_probability, "),
        ({"allow_items": "sku-01"}, "allow_items='sku-01': pass a list"),
        ({"deny_items": 5}, "deny_items=5: pass a list of items"),
        # Iterating over these would give the names of the columns, or 0 and 1.
        (
            {"deny_items": pd.DataFrame({"item": ["sku-01"]})},
            "deny_items=item 0 sku-01: pass",
        ),
        ({"allow_items": pl.DataFrame({"item": ["sku-01"]})}, "allow_items="),
        ({"deny_items": pl.LazyFrame({"item": ["sku-01"]})}, "deny_items="),
        ({"deny_items": {"sku-01": True}}, "deny_items={'sku-01': True}: pass"),
        ({"deny_items": np.zeros(30, bool)}, "deny_items=.* not a mask"),
        (
            {"allow_items": pd.Series([True, False])},
            "allow_items=.* not a mask",
        ),
        ({"deny_items": np.zeros((2, 3))}, "deny_items=array"),
        ({"deny_items": [["sku-01"]]}, r"id \['sku-01'\] is of type list"),
        (
            {"allow_items": ["sku-77", None]},
            "none of the 2 items of allow_items, such as 'sku-77', None; it knows items such as 'sku-00'",
        ),
    ],
)
def test_recommend_refuses(shop, arguments, message):
    with refuses(message):
        shop.recommender.recommend({"ann": ["sku-01"]}, **arguments)


def test_no_item_of_the_histories_is_known(shop):
    for ask in (shop.recommender.recommend, shop.recommender.encode):
        with refuses("such as 'sku-77', 12; it knows"):
            ask({"ann": ["sku-77"], "bob": [12]})


def test_numbers_of_numpy_and_forms_of_histories(shop):
    """One table, whatever form the histories have."""
    known = shop.frame[shop.frame["user"] < "customer 09"]
    wanted = shop.recommender.recommend(known, 4)
    lists = known.groupby("user", sort=False).agg(list)
    for histories in (
        lists,
        lists["item"],
        pl.LazyFrame(known.to_dict("list")),
    ):
        got = shop.recommender.recommend(
            histories, np.int64(4), batch_size=np.array(5)
        )
        pd.testing.assert_frame_equal(got, wanted)
    assert len(shop.recommender.similar_items(np.str_("sku-01"), np.uint8(3))) == 3  # fmt: skip


# --- One scoring path -------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_evaluation_and_recommend_give_the_same_lists(shop, expected, mesh):
    mesh = mesh_lib.make_mesh(*mesh)
    model = trained_model.load(shop.workdir, mesh=mesh)
    assert model.mesh.devices.shape == mesh.devices.shape
    users, history_UI = expected[:2]
    fold_in = Interactions.from_scipy(scipy.sparse.csr_matrix(history_UI))
    held_out = Interactions.from_scipy(scipy.sparse.csr_matrix(1 - history_UI))
    evaluate = Evaluator(
        *(fold_in, held_out, held_out, ("recall@20",), "recall@20", 16, mesh)
    )
    evaluation = evaluate(evaluate.compile(model.scorer()), model.scorer_params)
    assert evaluation.left_out == 1
    lists = by_user(shop.recommender.recommend(shop.frame, 20))
    assert len(lists) == 60
    for u, user in enumerate(users):
        ranked = [i for i in evaluation.lists.item_UK[u] if i >= 0]
        assert model.items.ids[ranked].tolist() == lists.get(user, [])


# --- Representations --------------------------------------------------------


def test_encode_is_the_posterior_mean(shop, expected, monkeypatch):
    for size in (2048, 16):
        monkeypatch.setattr(trained_model, "_USERS_PER_ENCODING", size)
        users, codes = shop.recommender.encode(shop.frame)
        assert users.tolist() == expected[0].tolist()
        assert codes.dtype == np.float32
        np.testing.assert_allclose(codes, expected[2], atol=1e-5)


def test_similar_items_are_those_of_numpy(shop):
    model = shop.recommender._model
    vectors = np.asarray(model.params["output_kernel"], np.float64)[:, :30].T
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = shop.recommender.items
    for index in (0, 17, 29):
        cosine_I = vectors @ vectors[index]
        order = [i for i in np.argsort(-cosine_I) if i != index]
        for k in (1, 5, 29, 500):
            result = shop.recommender.similar_items(ids[index], k)
            best = order[:k]
            assert result.columns.tolist() == ["rank", "item", "score"]
            assert result["item"].tolist() == ids[best].tolist()
            assert result["rank"].tolist() == list(range(1, len(best) + 1))
            np.testing.assert_allclose(result["score"], cosine_I[best], atol=1e-5)  # fmt: skip
    with refuses("item 'sku-77' is not known"):
        shop.recommender.similar_items("sku-77")
    with refuses("k=-1 must be a whole number"):
        shop.recommender.similar_items("sku-01", k=-1)
    for item in (None, float("nan"), ["sku-01"], {"a": 1}, shop.frame, b"sku"):
        with refuses(r"item None|item nan|of type"):
            shop.recommender.similar_items(item)


@pytest.mark.parametrize("factor", [np.nan, 1e39, 1e25])
def test_a_model_that_diverged(shop, factor):
    """With NaN, infinite and only huge parameters."""
    diverged = Recommender()
    model = shop.recommender._model
    params = jax.tree.map(lambda x: x * np.float64(factor), model.params)
    diverged._model = dataclasses.replace(model, params=params)
    with refuses(r"61 of 61 users.*diverged"):
        diverged.recommend(shop.frame, 3)
    with refuses(r"output weights.*diverged"):
        diverged.similar_items("sku-01")
    if factor != 1e25:
        with refuses(r"codes.*diverged"):
            diverged.encode(shop.frame)


# --- Save and load ----------------------------------------------------------


def test_load_of_a_workdir_and_of_a_copy_of_a_copy(shop, tmp_path):
    here = shop.recommender.recommend(shop.frame, 6)
    for place in (
        shop.workdir,
        Recommender.load(shop.workdir).save(tmp_path / "copy"),
        Recommender.load(tmp_path / "copy").save(tmp_path / "again"),
    ):
        there = Recommender.load(str(place)).recommend(shop.frame, 6)
        pd.testing.assert_frame_equal(there, here)


def test_save_replaces_only_what_it_saved(shop, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with refuses("no saved model"):
            shop.recommender.save(tmp_path, overwrite=overwrite)
    with refuses("is a file"):
        shop.recommender.save(tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    place = shop.recommender.save(tmp_path / "model")
    with refuses("overwrite=True"):
        shop.recommender.save(place)
    (place / "items.parquet").write_bytes(b"")
    shop.recommender.save(place, overwrite=True)
    pd.testing.assert_frame_equal(
        Recommender.load(place).recommend(shop.frame, 3),
        shop.recommender.recommend(shop.frame, 3),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "model"]


@pytest.mark.parametrize("place", ["", None, 7, b"x", "a\0b", "~/x"])
def test_paths(shop, tmp_path, monkeypatch, place):
    """One line for what is no path; ~ is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "~/x":
        assert shop.recommender.save(place) == tmp_path / "x"
        assert len(Recommender.load(place).items) == 30
        return
    for use in (shop.recommender.save, Recommender.load):
        with refuses("is no path"):
            use(place)
    if place is not None:
        with refuses("is no path"):
            Recommender(**SMALL).fit(shop.frame, workdir=place)


def test_messages_go_to_the_logger_vaecf(shop, caplog):
    shop.recommender.recommend([["sku-01", "sku-77"]], deny_items=["sku-78"])
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("vaecf", "ignored 1 unknown items of histories"),
        ("vaecf", "ignored 1 unknown items of deny_items"),
    ]


def test_repr(shop):
    alone = Recommender("mult_vae")
    assert repr(alone) == "Recommender(mult_vae, not fitted)"
    blend = repr(Recommender.blend())
    assert blend == "Recommender(blend, not fitted)"
    assert repr(shop.recommender).startswith("Recommender(mult_vae, 30 items")


# --- RecVAE and a linear branch ---------------------------------------------


@pytest.fixture(scope="module")
def tastes():
    """60 customers with 6 of the 10 articles of their kind, and one other."""
    rng = np.random.default_rng(4)
    rows = []
    for u in range(60):
        own = u % 3 + 3 * rng.choice(10, 6, replace=False)
        rows += [(u, i) for i in {*own.tolist(), int(rng.integers(30))}]
    return pd.DataFrame(rows, columns=["user", "item"])


@pytest.fixture(scope="module")
def blended(tastes, tmp_path_factory):
    """(fitted recommender, its workdir, which has moved since)."""
    place = tmp_path_factory.mktemp("blended")
    recommender = Recommender.blend(
        hidden=8, latent=4, batch_size=16, epochs=4, learning_rate=0.01, seed=3,
        linear_l2=5.0, refit_epochs=0,
    )  # fmt: skip
    recommender.fit(tastes, validation_users=15, workdir=place / "run")
    return recommender, (place / "run").rename(place / "moved")


def test_a_blend_ranks_with_tuned_weights_and_outlives_its_workdir(
    tastes, blended, tmp_path
):
    recommender, workdir = blended
    chosen = read_json(workdir / "linear" / "weights.json")
    assert chosen["epoch"] == 4 and len(chosen["tried"]) >= 5
    assert chosen["gain"] > 0
    for name in ("gain", "prior"):
        value = float(recommender._model.branch[name])
        assert value == pytest.approx(chosen[name])
    assert not recommender._model.directory.exists()
    asked = recommender.recommend(tastes, 12)
    place = recommender.save(tmp_path / "saved")
    recommender.save(place, overwrite=True)
    for directory in (workdir, place):
        again = Recommender.load(directory)
        pd.testing.assert_frame_equal(again.recommend(tastes, 12), asked)
    # Both parts rank: the lists change without the branch.
    again._model = dataclasses.replace(again._model, branch=None)
    assert not again.recommend(tastes, 12).equals(asked)


def test_a_linear_branch_beside_another_model(shop, numpy_logits):
    """Without validation users, the blend keeps its first weights."""
    branch = {"linear_l2": 5.0, "linear_dropout": 0.0}
    alone = {"linear_experts": ("ease",)}
    recommender = Recommender(**SETTINGS, **branch, **alone)
    recommender.fit(shop.frame, validation_users=0)
    model = recommender._model
    history_UI = np.zeros((1, 30))
    history_UI[0, [3, 8, 21]] = 1
    _, logits_UI = numpy_logits(model.params, history_UI)
    items = model.items.index_of(shop.frame["item"])
    users = pd.factorize(shop.frame["user"])[0]
    x = np.zeros((61, 30))
    x[users, items] = 1
    # Steck 2019, with users weighted by their number of items.
    n_U1 = x.sum(axis=1, keepdims=True)
    weights = ease(x / (n_U1 / n_U1.mean()) ** 0.25, 5.0)
    share = (x.sum(axis=0) + 5) / (61 + 5)
    linear = np.log(np.maximum(history_UI @ weights, 0) + 0.003)
    scores_UI = logits_UI + 1.4 * (linear - 0.2 * np.log(share))
    scores_UI[history_UI > 0] = -np.inf
    history = model.items.ids[[3, 8, 21]].tolist()
    result = recommender.recommend([history], 27, score="logit")
    order = np.argsort(-scores_UI[0], kind="stable")[:27]
    assert result["item"].tolist() == model.items.ids[order].tolist()
    np.testing.assert_allclose(result["score"], scores_UI[0, order], atol=1e-3)
