"""What a fitted recommender tells: evaluation, history, explanations, copies."""

import copy
import dataclasses
import os
import pickle
import signal

import matplotlib
import numpy as np
import pandas as pd
import pytest
from oracles import ease, ranked, refuses

import vaecf
from vaecf import config as config_lib
from vaecf.serving import fit, inspection
from vaecf.serving.recommender import Recommender
from vaecf.serving.trained_model import REFITTED
from vaecf.training import input_pipeline, loop, signals
from vaecf.training.progress import Diverged

matplotlib.use("agg")

SMALL = dict(
    model="mult_vae", hidden=8, latent=4, batch_size=16, epochs=4, patience=None
)


@pytest.fixture(scope="module")
def split(shop):
    return vaecf.split(shop.frame, test_users=0.2, min_items_per_user=3)


@pytest.fixture(scope="module")
def linear(split):
    return Recommender("ease", l2=20).fit(split)


# --- Evaluation -------------------------------------------------------------


def recall(weights_II, held, k):
    """Mean and standard error of hits / min(k, held-out items)."""
    fold_UI = held.fold_in.to_scipy().toarray()
    values = []
    for u, score_I in enumerate(fold_UI @ weights_II):
        best = ranked(score_I, set(np.flatnonzero(fold_UI[u])))[:k]
        out = set(held.held_out.row(u).tolist())
        if out:
            values.append(len(out & set(best)) / min(k, len(out)))
    return np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5


def test_evaluate(split, linear):
    table = linear.evaluate(split, metrics=["recall@5", "coverage@5"])
    assert table.columns.tolist() == ["metric", "mean", "stderr", "users"]
    assert table["users"].tolist() == [12, 12]
    weights = ease(split.train.to_scipy().toarray(), 20)
    expected = recall(weights, split.test, 5)
    np.testing.assert_allclose(
        table.loc[0, ["mean", "stderr"]].tolist(), expected
    )
    assert np.isnan(table.loc[1, "stderr"])
    table = linear.evaluate(split, split="validation", metrics="recall@5")
    expected = recall(weights, split.validation, 5)
    np.testing.assert_allclose(
        table.loc[0, ["mean", "stderr"]].tolist(), expected
    )


@pytest.mark.parametrize("everyone", [False, True])
def test_baselines_learn_from_the_users_of_the_model(split, linear, everyone):
    recommender = copy.copy(linear)
    progress = {REFITTED: 4} if everyone else {}
    recommender._model = dataclasses.replace(linear._model, progress=progress)
    table = recommender.evaluate(split, metrics="recall@5", baselines="ease")
    assert table["model"].tolist() == ["ease", "ease"]
    assert table.attrs["settings"] == {"ease": {"l2": 500.0}}
    train = split.everything() if everyone else split.train
    assert train.n_users == (49 if everyone else 43)
    expected = recall(ease(train.to_scipy().toarray(), 500), split.test, 5)
    np.testing.assert_allclose(
        table.loc[1, ["mean", "stderr"]].tolist(), expected
    )
    if everyone:
        with refuses("has learned from the validation users"):
            recommender.evaluate(split, split="validation")


def test_a_refit_of_one_go_has_learned_from_validation_users(split, tmp_path):
    changes = {
        **{"model.name": "popularity", "train.refit_epochs": 4},
        "data.dir": "(in memory)",
    }
    config = config_lib.replace(config_lib.Config(), changes)
    recommender = Recommender("popularity")
    recommender._model = fit.in_memory(config, split, tmp_path / "run")
    saved = recommender.save(tmp_path / "saved")
    for place in (tmp_path / "run", saved):
        with refuses("has learned from the validation users"):
            Recommender.load(place).evaluate(split, split="validation")


def test_tuned_baselines(split, linear, monkeypatch):
    evaluate = inspection.baselines_lib.evaluate

    def tuned_to_77(*arguments, tuned=False, **options):
        return (
            ({"l2": 77.0}, None) if tuned else evaluate(*arguments, **options)
        )

    monkeypatch.setattr(inspection.baselines_lib, "evaluate", tuned_to_77)
    table = linear.evaluate(
        split, metrics="recall@5", baselines=["ease"], tuned=True
    )
    assert table.attrs["settings"] == {"ease": {"l2": 77.0}}
    expected = recall(ease(split.train.to_scipy().toarray(), 77), split.test, 5)
    np.testing.assert_allclose(
        table.loc[1, ["mean", "stderr"]].tolist(), expected
    )


def test_evaluate_warns_of_another_dataset(split, linear, shop):
    other = vaecf.split(
        shop.frame, test_users=0.2, min_items_per_user=3, seed=1
    )
    with pytest.warns(UserWarning, match="was not fitted to this") as caught:
        linear.evaluate(other)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, s: r.evaluate(s.train), "of type Interactions: pass a Dataset"),
        (lambda r, s: r.evaluate(s, split="train"), "unknown split 'train'"),
        (lambda r, s: r.evaluate(s, metrics="ndgc@10"),
         "^metrics: 'ndgc@10' is .*did you mean ndcg@10"),
        (lambda r, s: r.evaluate(s, metrics=["precision"]),
         r"did you mean precision@100\?"),
        (lambda r, s: r.evaluate(s, metrics=()), "^metrics=.* not empty"),
        (lambda r, s: r.evaluate(s, metrics=5), "^metrics=5 must be a tuple"),
        (lambda r, s: r.evaluate(s, baselines=5), "^baselines=5 must be a tup"),
        (lambda r, s: r.evaluate(s, baselines="eas"), "did you mean ease"),
        (lambda r, s: r.evaluate(vaecf.split([[1, 2, 3, 4, 5]] * 9)),
         "items of the dataset are not the 30 of the model"),
        (lambda r, s: r.evaluate(vaecf.split(s, test_users=0, seed=3)),
         "no test users"),
        (lambda r, s: r.fit(s, validation_users=3), "validation_users=3 has no"),
        (lambda r, s: r.explain([], "sku-01"), r"history=\[\]: pass the items"),
        (lambda r, s: r.explain("sku-01", "sku-02"), "pass a list of items"),
        (lambda r, s: r.explain(["x"], "sku-02"), "knows none of the 1 items"),
        (lambda r, s: r.explain(["sku-01"], "x"), "item 'x' is not known"),
        (lambda r, s: r.explain(["sku-01"], "sku-02", score="x"), "use one of"),
        (lambda r, s: r.explain(["sku-01"], "sku-02", n=0), "n=0 must be"),
        (lambda r, s: r.similar_users([["sku-01"]], 0), "ease has no latent"),
        (lambda r, s: r.plot_history(), "was not trained in epochs"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the model was not fitted to this dataset")
def test_refusals(split, linear, call, message):
    with refuses(message):
        call(linear, split)


# --- Explanations and neighbours --------------------------------------------


def test_explain_is_the_difference_without_an_item(shop, numpy_logits):
    history = ["sku-03", "sku-08", "sku-21", "sku-77", "sku-08"]
    known, target = [3, 8, 21], 11
    rows_UI = np.zeros((4, 30))
    rows_UI[:, known] = 1
    for row, item in enumerate(known, 1):
        rows_UI[row, item] = 0
    _, logits_UI = numpy_logits(shop.recommender._model.params, rows_UI)
    exact_U = logits_UI[:, target] - np.log(np.exp(logits_UI).sum(1))
    change_H = exact_U[0] - exact_U[1:]
    table = shop.recommender.explain(history, "sku-11", n=2)
    order = np.argsort(-np.abs(change_H))[:2]
    assert table["rank"].tolist() == [1, 2]
    assert table["item"].tolist() == [f"sku-{known[i]:02d}" for i in order]
    np.testing.assert_allclose(table["change"], change_H[order], atol=2e-6)
    np.testing.assert_allclose(table.attrs["score"], exact_U[0], rtol=1e-5)


def test_explain_of_a_linear_model_is_its_weights(split, linear):
    table = linear.explain(["sku-03", "sku-08", "sku-21"], "sku-08")
    weights = ease(split.train.to_scipy().toarray(), 20)
    expected = {f"sku-{i:02d}": weights[i, 8] for i in (3, 8, 21)}
    assert expected["sku-08"] == 0 and len(table) == 3
    for item, change in zip(table["item"], table["change"]):
        np.testing.assert_allclose(change, expected[item], atol=1e-6)


def test_similar_users_are_those_of_numpy(shop, expected):
    users, history_UI, codes, _ = expected
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    cosine = unit @ unit[5]
    order = [u for u in np.argsort(-cosine) if u != 5][:3]
    near = shop.recommender.similar_users(shop.frame, users[5], k=3)
    assert near["user"].tolist() == users[order].tolist()
    np.testing.assert_allclose(near["score"], cosine[order], atol=1e-5)
    # The same history without a name finds its owner first.
    history = shop.recommender.items[history_UI[5] > 0].tolist()
    near = shop.recommender.similar_users(shop.frame, history, k=100)
    assert near["user"][0] == users[5] and len(near) == len(users)
    with refuses("user='eve' is not in the histories"):
        shop.recommender.similar_users(shop.frame, "eve")
    with refuses("knows none of the 1 items"):
        shop.recommender.similar_users(shop.frame, ["sku-99"])


# --- History, copies, cards -------------------------------------------------


def test_history_is_saved(shop, tmp_path):
    history = shop.recommender.history
    assert (
        history.index.tolist() == [1, 2, 3, 4] and history.index.name == "epoch"
    )
    axes = shop.recommender.plot_history()
    [line] = axes.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), history["train/loss"])
    assert shop.recommender.plot_history("train/kl", axes) is axes
    with refuses("the history has no 'train/los': use one of train/loss"):
        shop.recommender.plot_history("train/los")
    saved = shop.recommender.save(tmp_path / "saved")
    for place in (saved, shop.workdir):
        again = Recommender.load(place).history
        pd.testing.assert_frame_equal(again, history)
    shop.recommender.save(saved, overwrite=True)
    (saved / "metrics.jsonl").unlink()  # an earlier version wrote none
    assert Recommender.load(saved).history.empty


def test_copies_and_pickles_rank_alike(shop, linear):
    for recommender in (shop.recommender, linear):
        expected = recommender.recommend(shop.frame, 4)
        for twin in (copy.copy(recommender), copy.deepcopy(recommender)):
            assert twin is not recommender and twin._model is recommender._model
        twin = pickle.loads(pickle.dumps(recommender))
        pd.testing.assert_frame_equal(twin.recommend(shop.frame, 4), expected)
        pd.testing.assert_frame_equal(twin.history, recommender.history)
    unfitted = pickle.loads(pickle.dumps(Recommender(latent=7)))
    assert unfitted._settings == Recommender(latent=7)._settings
    # What is fitted again leaves its copies alone.
    twin = copy.copy(linear).fit({1: [1, 2], 2: [2, 3]})
    assert len(twin.items) == 3 and len(linear.items) == 30


def test_cards(shop, linear):
    assert "not fitted" in Recommender()._repr_html_()
    text = shop.recommender._repr_html_()
    for fact in ("Recommender: Mult-VAE", "61</td>", "30</td>", "latent units"):
        assert fact in text
    assert "latent units" not in linear._repr_html_()


# --- Interrupted and diverged -----------------------------------------------


def raising(error):
    def action(*arguments, **options):
        raise error

    return action


def test_what_is_kept_of_an_interrupted_run(split, tmp_path, monkeypatch):
    run, steps = input_pipeline.InputPipeline.run, []

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 7:  # the first of epoch 3
            os.kill(os.getpid(), signal.SIGINT)
        return run(self, *arguments)

    recommender, workdir = Recommender(**SMALL), tmp_path / "run"
    message = "interrupted: the model is that of epoch .* resumes the run"
    with monkeypatch.context() as patch:
        patch.setattr(signals, "STRETCH_SECONDS", 0.0)
        patch.setattr(input_pipeline.InputPipeline, "run", interrupted)
        with pytest.warns(UserWarning, match=message) as caught:
            recommender.fit(split, workdir=workdir)
    assert caught[0].filename == __file__
    model, values = (
        recommender._model,
        recommender.history["validation/ndcg@100"],
    )
    assert len(values) == 2 and model.progress["epoch"] == values.idxmax()
    assert REFITTED not in model.progress
    table = recommender.evaluate(split, split="validation", metrics="ndcg@100")
    assert table["mean"][0] == pytest.approx(values.max())
    # A loss that diverges keeps the best epoch, too.
    error = Diverged("the loss is nan in epoch 3, step 2: lower x")
    monkeypatch.setattr(loop, "train", raising(error))
    message = (
        r"diverged \(the loss .* 2\): the model is that of epoch .*; lower l"
    )
    with pytest.warns(UserWarning, match=message):
        recommender.fit(split, workdir=workdir)
    assert recommender._model.progress == model.progress
    # Without a best epoch, what was saved last is the model.
    (workdir / "checkpoints" / "best").rename(tmp_path / "best")
    monkeypatch.setattr(loop, "train", raising(KeyboardInterrupt()))
    message = "model is that of epoch 3, before its end, not validated"
    with pytest.warns(UserWarning, match=message):
        recommender.fit(split, workdir=workdir)
    assert recommender._model.progress["step_in_epoch"] == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Diverged("the loss is nan in epoch 1, step 2: lower x"),
         r"diverged \(the loss is nan in epoch 1, step 2\) before an epoch was "
         "saved: there is no model; lower learning_rate"),
        (KeyboardInterrupt(), "interrupted before an epoch was saved: there is no"),
        (loop.Interrupted("stopped; train again in workdir /tmp/x"),
         "stopped: nothing is kept"),  # by SIGTERM
    ],
)  # fmt: skip
def test_no_model_to_keep(split, monkeypatch, error, message):
    monkeypatch.setattr(loop, "train", raising(error))
    with pytest.raises(type(error), match=message):
        Recommender(**SMALL).fit(split)


def test_a_message_names_no_temporary_directory(split, monkeypatch):
    def refused(config, dataset, workdir, **options):
        raise vaecf.VaecfError(f"{workdir}/checkpoints: no space left")

    monkeypatch.setattr(fit, "train", refused)
    with refuses(r"^\(temporary, in .*\)/checkpoints: no space left"):
        Recommender(**SMALL).fit(split)
