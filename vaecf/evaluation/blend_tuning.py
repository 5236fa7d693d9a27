"""Chooses the weights of a blend by the validation users."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from vaecf.evaluation.coordinate_search import coordinate_search
from vaecf.evaluation.evaluator import Evaluator
from vaecf.evaluation.ranking import Ranker
from vaecf.evaluation.scorers import ModelParams
from vaecf.models import blend

# Candidates. The search starts from `blend.GAIN` and `blend.PRIOR` and chooses
# the gain, then the prior, then the gain again.
GAINS = (
    *(0.0, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8),
    *(4.0, 8.0, 16.0, 32.0, 64.0),
)
PRIORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def search(
    evaluator: Evaluator,
    ranker: Ranker,
    params: ModelParams,
) -> dict[str, Any]:
    """Returns the weights that give the best value of `best_metric`.

    Among equally good weights the first one tried wins. The weights in `params`
    are ignored.

    Returns:
      {'gain', 'prior', 'metric', 'value', 'model_alone', 'tried': [{'gain',
      'prior', 'value'}, ...]}, where 'model_alone' is the value without the
      linear branch.
    """
    tried: list[dict[str, float]] = []

    @functools.cache
    def value(gain: float, prior: float) -> float:
        weights = {"gain": jnp.float32(gain), "prior": jnp.float32(prior)}
        candidate = ModelParams(params.model, {**params.linear, **weights})
        result = evaluator.best_value(ranker, candidate)
        tried.append({"gain": gain, "prior": prior, "value": result})
        return result

    grids = {"gain": GAINS, "prior": PRIORS}
    at = {"gain": blend.GAIN, "prior": blend.PRIOR}
    for key in ("gain", "prior", "gain"):
        at = coordinate_search(lambda at: value(**at), {key: grids[key]}, at)
    model_alone = value(0.0, at["prior"])
    if model_alone > value(**at):
        at["gain"] = 0.0
    return {
        **at,
        "metric": evaluator.best_metric,
        "value": value(**at),
        "model_alone": model_alone,
        "tried": tried,
    }
