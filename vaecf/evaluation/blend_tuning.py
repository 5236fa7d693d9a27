"""Chooses the weights of a blend by the validation users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vaecf.evaluation.coordinate_search import coordinate_search
from vaecf.evaluation.evaluator import Evaluator
from vaecf.evaluation.ranking import Ranker
from vaecf.evaluation.scorers import ModelParams
from vaecf.models import blend

# Candidates of the weights.
_GAINS = (0.0, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0, 16.0, 32.0, 64.0)
GRIDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(blend.GAINS.values(), _GAINS),
    "prior": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "low_pass": (0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
}
# All gains together say how much the branch counts beside the model.
_TOGETHER = "all gains"
# What is chosen, one after the other; weights of experts that the branch lacks
# are left out.
_ORDER = (
    *("gain", "prior", _TOGETHER),
    *("graph_gain", "ials_gain", "low_pass"),
    *("gain", _TOGETHER, "prior"),
)


def search(
    evaluator: Evaluator,
    ranker: Ranker,
    params: ModelParams,
) -> dict[str, Any]:
    """Returns the weights that give the best value of `best_metric`.

    The search starts from `blend.default_weights`. Among equally good weights
    the first ones tried win. The weights in `params` are ignored.

    Returns:
      The weights by name, and {'metric', 'value', 'model_alone', 'tried':
      [{'value', and the weights}, ...]}, where 'model_alone' is the value
      without the linear branch.
    """
    tried: dict[tuple[float, ...], float] = {}
    names = blend.weights_of(params.linear)
    gains = [name for name in names if name in blend.GAINS.values()]

    def value(at: Mapping[str, float]) -> float:
        key = tuple(at[name] for name in names)
        if key not in tried:
            weights = {name: jnp.float32(at[name]) for name in names}
            candidate = ModelParams(params.model, params.linear | weights)
            tried[key] = evaluator.best_value(ranker, candidate)
        return tried[key]

    start = blend.default_weights(blend.experts_of(params.linear))
    at = {name: start[name] for name in names}
    for name in _ORDER:
        keys = gains if name == _TOGETHER else [name] if name in names else []
        if not keys or (name == "low_pass" and not at["graph_gain"]):
            continue
        grids = {key: GRIDS[key] for key in keys}
        step = dict.fromkeys(keys, 1)
        at = coordinate_search(value, grids, at, directions=(step,))
    alone = at | dict.fromkeys(gains, 0.0)
    model_alone = value(alone)
    if model_alone > value(at):
        at = alone
    return {
        **at,
        "metric": evaluator.best_metric,
        "value": value(at),
        "model_alone": model_alone,
        "tried": [
            {**dict(zip(names, key)), "value": result}
            for key, result in tried.items()
        ],
    }
