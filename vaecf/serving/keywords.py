"""Keywords of `Recommender` and the settings of a run that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf.config import BLEND, FITTED, Config, fitted_settings
from vaecf.errors import VaecfError, did_you_mean, short
from vaecf.setting import checked, convert, one_of

# Keywords of autoencoders and blends, and the settings that they change;
# anneal_epochs becomes a number of steps.
KEYWORDS = {
    "model": "model.name",
    "hidden": "model.hidden",
    "latent": "model.latent",
    "activation": "model.activation",
    "dropout_rate": "model.dropout_rate",
    "init": "model.init",
    "anneal_cap": "loss.anneal_cap",
    "anneal_epochs": "loss.total_anneal_steps",
    "weight_decay": "loss.weight_decay",
    "gamma": "loss.gamma",
    "learning_rate": "optimizer.learning_rate",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "alternating_epochs": "train.alternating_epochs",
    "ema": "train.ema",
    "patience": "eval.patience",
    "refit_epochs": "train.refit_epochs",
    "precision": "precision.policy",
    "linear_l2": "linear.l2",
    "linear_dropout": "linear.dropout",
    "linear_user_exponent": "linear.user_exponent",
    "linear_rank": "linear.rank",
    "linear_experts": "linear.experts",
    "seed": "seed",
}
# Defaults other than those of `vaecf.config`.
_DEFAULTS: dict[str, Any] = {
    "epochs": 100,
    "patience": 10,
    "refit_epochs": 4,
    "anneal_epochs": 50.0,
}
_FIELDS = config_lib.settings()
_MODELS = one_of("blend", *_FIELDS["model.name"].metadata["rule"].choices)
_LONGEST_ANNEAL = 2**31  # steps; the weight then stays near 0
_REC_VAE: dict[str, Any] = {"gamma": 0.005, "alternating_epochs": (3, 1)}


def complete(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the constructor's keywords, those of a blend with its defaults.

    Raises:
      TypeError: a keyword is unknown, or not of this model.
      VaecfError: the model is unknown.
    """
    if not _MODELS.holds(convert(str, model, "model")):
        raise VaecfError(
            f"model={short(model)} must be {_MODELS.text}"
            f"{did_you_mean(model, _MODELS.choices)}"
        )
    known = _keywords(model)
    for keyword in settings.keys() - known.keys():
        raise TypeError(
            f"Recommender(model={model!r}) has no setting {keyword!r}"
            f"{did_you_mean(keyword, known)}"
        )
    if model == "blend":
        return blend(settings)
    return {"model": model, **settings}


def name_of(title: str) -> str:
    """Returns the `model` of `Recommender` for the title of a config."""
    return "blend" if title == "rec_vae+linear" else title


def _keywords(model: str | None) -> dict[str, str]:
    """Returns the settings of a model by their keywords."""
    if model not in FITTED:
        return KEYWORDS
    own = {key: f"baseline.{model}_{key}" for key in fitted_settings(model)}
    return {"model": "model.name", "seed": "seed", **own}


def blend(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of `vaecf.config.BLEND` with changes."""
    keywords = {
        keyword: BLEND[key] for keyword, key in KEYWORDS.items() if key in BLEND
    }
    # As many epochs without improvement, in validations of one round each.
    epochs = BLEND["eval.patience"] * BLEND["eval.every_epochs"]
    keywords["patience"] = epochs // sum(keywords["alternating_epochs"])
    if "epochs" in changes:  # exactly so many
        del keywords["max_steps"]
    if changes.get("model", "rec_vae") != "rec_vae":
        keywords = {k: v for k, v in keywords.items() if k not in _REC_VAE}
    return {**keywords, **changes}


def make_config(settings: Mapping[str, Any], n_users: int) -> Config:
    """Returns the config of a run for the constructor's keywords.

    Raises:
      VaecfError: a setting is out of range, or not for this model.
    """
    known = _keywords(name := settings.get("model"))
    base = config_lib.replace(Config(), {"data.dir": "(in memory)"})
    if known is not KEYWORDS:
        return _replace(base, known, settings)
    values = {**_DEFAULTS, **settings}
    is_rec_vae = name == "rec_vae"
    if is_rec_vae:
        values = _REC_VAE | values
    elif "alternating_epochs" in values:
        given = values.pop("alternating_epochs")
        if convert(tuple[int, ...], given, "alternating_epochs"):
            raise VaecfError(
                f"alternating_epochs={short(given)}: {name} trains all "
                "parameters together; leave it out"
            )
    anneal_epochs = convert(float, values.pop("anneal_epochs"), "anneal_epochs")
    if anneal_epochs < 0:
        raise VaecfError(f"anneal_epochs={anneal_epochs} must be at least 0")
    config = _replace(base, known, values)
    if is_rec_vae:
        _check_rec_vae(config)
    steps = -(-n_users // config.train.batch_size)
    cap = config.loss.anneal_cap
    # The KL weight is step / total_anneal_steps: it is the cap after
    # anneal_epochs.
    total = 0
    if cap:
        total = round(min(anneal_epochs * steps / cap, _LONGEST_ANNEAL))
    return config_lib.replace(
        config,
        {
            "loss.total_anneal_steps": total,
            "eval.every_epochs": max(1, sum(config.train.alternating_epochs)),
        },
    )


def _replace(
    config: Config, known: Mapping[str, str], values: Mapping[str, Any]
) -> Config:
    """Returns the config with values of keywords; errors name the keyword."""
    changes = {
        known[keyword]: checked(keyword, _FIELDS[known[keyword]], value)
        for keyword, value in values.items()
    }
    return config_lib.replace(config, changes)


def _check_rec_vae(config: Config) -> None:
    if not config.train.alternating_epochs:
        raise VaecfError(
            "alternating_epochs=(): rec_vae needs the numbers of epochs that "
            "train its encoder and its decoder, such as (3, 1)"
        )
    if len(config.model.hidden) != 1:
        raise VaecfError(
            f"hidden={config.model.hidden}: rec_vae takes one size, that of "
            "all layers of its encoder, such as hidden=600"
        )
