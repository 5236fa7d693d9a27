"""Keywords of Recommender, and the configs that they become."""

import numpy as np
import pytest
from oracles import refuses

from configs import blend as blend_config
from vaecf import config as config_lib
from vaecf.errors import VaecfError
from vaecf.serving.keywords import make_config
from vaecf.serving.recommender import Recommender


def test_wrong_calls():
    with pytest.raises(TypeError, match="'latnet'; did you mean latent"):
        Recommender(latnet=3)
    with refuses("model='mult_vea' must be one of blend, .* mean mult_vae"):
        Recommender("mult_vea")
    with refuses("model=None must be of type str"):
        Recommender(None)


def test_the_blend_has_the_settings_of_its_config():
    mine, its = (
        config.flat()
        for config in (
            make_config(Recommender.blend()._settings, 1000),
            config_lib.from_mapping(blend_config.get_config()),
        )
    )
    differing = {key for key in mine | its if mine[key] != its[key]}
    # In memory; a weight that γ replaces; a validation a round and not two; a
    # refit.
    assert differing == {
        "data.dir",
        "train.refit_epochs",
        "loss.total_anneal_steps",
        "eval.every_epochs",
        "eval.patience",
    }
    epochs = [o["eval.patience"] * o["eval.every_epochs"] for o in (mine, its)]
    assert epochs == [24, 24]
    changed = Recommender.blend(epochs=7, model="mult_dae")._settings
    assert (changed["epochs"], changed["model"]) == (7, "mult_dae")


@pytest.mark.parametrize("model", ["mult_vae", "rec_vae"])
def test_only_rec_vae_alternates(model):
    """Its `patience` counts rounds: there is one validation per round."""
    alternating = {"alternating_epochs": np.array([2, 1])}
    settings = Recommender(model=model, gamma=0.5)._settings
    turns, every = ((2, 1), 3) if model == "rec_vae" else ((), 1)
    if model == "rec_vae":
        settings |= alternating
    else:
        with pytest.raises(VaecfError, match="mult_vae trains all parameters"):
            make_config(settings | alternating, 100)
    config = make_config(settings, 100)
    assert config.train.alternating_epochs == turns
    assert config.loss.gamma == 0.5
    assert config.eval.every_epochs == every
    assert config.eval.patience == 10
    dae = make_config(Recommender.blend(model="mult_dae")._settings, 100)
    assert (dae.train.alternating_epochs, dae.loss.gamma) == ((), 0)


def test_an_anneal_without_an_end():
    config = make_config({"anneal_epochs": 1e308, "anneal_cap": 1e-300}, 10)
    assert config.loss.total_anneal_steps == 2**31
