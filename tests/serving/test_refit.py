"""After the choice on validation users, the model learns from all users."""

import dataclasses
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
from oracles import recorded

from vaecf import config as config_lib
from vaecf.data import in_memory
from vaecf.serving import fit, trained_model
from vaecf.serving.recommender import Recommender
from vaecf.training import input_pipeline, loop
from vaecf.training.checkpoints import Checkpoints

TINY = dict(
    model="mult_dae", hidden=(), latent=4, batch_size=64, epochs=3,
    learning_rate=0.01, linear_l2=5.0, ema=0.5, refit_epochs=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def rare():
    """Articles of which some have a single customer."""
    rng = np.random.default_rng(3)
    rows = [(u, int(i)) for u in range(60) for i in rng.choice(20, 6, False)]
    rows += [(u, 100 + u) for u in range(60)]
    return pd.DataFrame(rows, columns=["user", "item"])


@pytest.fixture(scope="module")
def refitted(rare, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("refit") / "run"
    recommender = Recommender(**TINY).fit(
        rare, validation_users=0.25, workdir=workdir
    )
    return recommender, workdir


def scores(model, rare):
    frame = model.recommend(rare, 100, exclude_seen=False)
    return frame.pivot(index="user", columns="item", values="score")


def test_every_item_can_be_recommended_and_is_learned(refitted, rare):
    recommender, workdir = refitted
    assert set(recommender.items) == set(rare["item"])
    before = trained_model.load(workdir, refitted=False)
    after = recommender._model
    epoch = before.progress["epoch"]
    [folder] = (workdir / "refit").iterdir()
    assert folder.name == f"{epoch}+3"
    assert [*recorded(folder, "train/loss")] == [
        epoch + 1,
        epoch + 2,
        epoch + 3,
    ]
    # log p of all users, by hand; the weights are those of the validation.
    counts = rare.groupby("item")["user"].count().sort_index()
    share = np.log((counts + 5) / (60 + 5))
    np.testing.assert_allclose(
        np.asarray(after.branch["log_share"])[: len(counts)], share, rtol=1e-5
    )
    for name in ("gain", "prior"):
        assert float(after.branch[name]) == float(before.branch[name])
    # Items of validation users alone were unknown to the first fit.
    unseen = np.asarray(before.branch["log_share"])[: len(counts)]
    unseen = np.isclose(unseen, np.log(5 / (45 + 5)))
    assert unseen.sum() == 15


def test_a_refit_is_loaded_saved_and_not_repeated(refitted, rare, tmp_path):
    recommender, workdir = refitted
    expected = scores(recommender, rare)
    saved = recommender.save(tmp_path / "saved")
    for place in (workdir, saved):
        again = Recommender.load(place)
        pd.testing.assert_frame_equal(scores(again, rare), expected)
        assert again._model.progress["refit_epochs"] == 3
        pd.testing.assert_frame_equal(again.history, recommender.history)
    model = trained_model.load(workdir, refitted=False)
    assert "refit_epochs" not in model.progress
    kept = fit.refit(model, dataset(rare)).params
    kernel = recommender._model.params["output_kernel"]
    np.testing.assert_array_equal(kept["output_kernel"], kernel)


def dataset(rare):
    return in_memory.without_test(
        rare, validation_users=0.25, keep_all_items=True
    )


def test_a_temporary_run_saves_no_state_to_resume_from(
    refitted, rare, monkeypatch
):
    """Only an interrupt before the first validation needs one."""
    saved, save = [], Checkpoints.save
    run = input_pipeline.InputPipeline.run

    def spied(self, which, step, *rest):
        saved.append(which)
        save(self, which, step, *rest)

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return run(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", spied)
    model = Recommender(**TINY).fit(rare, validation_users=0.25)
    pd.testing.assert_frame_equal(
        scores(model, rare), scores(refitted[0], rare)
    )
    assert {*saved} == {"best"}
    monkeypatch.setattr(input_pipeline.InputPipeline, "run", interrupted)
    with pytest.warns(UserWarning, match="interrupted: the model is that of"):
        Recommender(**TINY).fit(rare, validation_users=0)
    assert saved[-2:] == ["latest", "best"]


def test_a_killed_refit_is_resumed(refitted, rare, tmp_path, monkeypatch):
    expected, workdir = scores(refitted[0], rare), tmp_path / "run"
    shutil.copytree(refitted[1], workdir)
    shutil.rmtree(workdir / "refit")
    (workdir / "refit" / "1+3").mkdir(parents=True)  # of an earlier best epoch
    status = loop._Dispatcher.status

    def interrupted(self, seconds=0.0):
        return status(self, seconds)._replace(interrupted=True)

    def again():
        return Recommender(**TINY).fit(
            rare, validation_users=0.25, workdir=workdir
        )

    with monkeypatch.context() as patch:
        patch.setattr(loop._Dispatcher, "status", interrupted)
        with pytest.raises(loop.Interrupted, match="stopped in the refit"):
            model = trained_model.load(workdir, refitted=False)
            fit.refit(model, dataset(rare))
    [folder] = (workdir / "refit").iterdir()
    assert folder.name != "1+3"
    # What is there can be used meanwhile.
    before = trained_model.load(workdir, refitted=False).params
    now = trained_model.load(workdir).params
    np.testing.assert_array_equal(now["output_kernel"], before["output_kernel"])
    pd.testing.assert_frame_equal(scores(again(), rare), expected)


def test_nothing_to_refit(refitted, rare):
    model = trained_model.load(refitted[1], refitted=False)
    config = config_lib.replace(model.config, {"train.refit_epochs": 0})
    none = dataclasses.replace(model, config=config)
    assert fit.refit(none, dataset(rare)) is none
    config = config_lib.replace(model.config, {"train.refit_epochs": 9})
    other = dataclasses.replace(model, config=config)
    assert fit.refit(other, dataset(rare), train=False) is other
    everybody = in_memory.without_test(rare, validation_users=0)
    assert fit.refit(other, everybody) is other
