"""Chooses the weights of a blend by the validation users.

The search is cautious, because few users cannot tell many candidates apart. It
first chooses how much the branch counts beside the model: the default gains,
all times the same factor. Then single weights may move. Both happen only for a
gain above its standard error. Few users are asked several times, each time with
other items held out; of many users, a sample is enough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vaecf.data.interactions import Interactions
from vaecf.data.splits import hold_out
from vaecf.evaluation.coordinate_search import coordinate_search
from vaecf.evaluation.evaluator import Evaluator
from vaecf.evaluation.ranking import Ranker
from vaecf.evaluation.scorers import ModelParams
from vaecf.models import blend
from vaecf.parallel import processes

# All gains are the default gains times one of these. 0 is the model alone; with
# the largest factor the model hardly counts.
FACTORS = (1.0, 0.0, 0.5, 2.0, 4.0, 8.0, 64.0)
# Candidates of single weights: the prior, and each gain times these factors.
PRIORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SINGLE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# More users are sampled. The histories of few users are split as often as makes
# this number of histories, which fills a batch (a power of two), up to a limit.
_MOST_USERS, _HISTORIES, _MOST_SPLITS = 2000, 512, 10


def search(
    evaluator: Evaluator,
    ranker: Ranker,
    params: ModelParams,
    *,
    split_again: bool = False,
) -> dict[str, Any]:
    """Returns the weights that rank the validation users best by `best_metric`.

    The weights in `params` are ignored.

    Args:
      split_again: the held-out items are random items of users who are not
        trained on, so that other items can be held out instead.

    Returns:
      The weights by name, and {'metric', 'value', 'model_alone', 'users',
      'splits', 'tried': [{'value', and the weights}, ...]}. Values are means
      over the users and splits that the weights were chosen by; 'model_alone'
      is the value without the linear branch.
    """
    users, n_splits = _users_to_ask(evaluator, split_again)
    tried: dict[tuple[float, ...], np.ndarray] = {}
    names = blend.weights_of(params.linear)

    def values(at: Mapping[str, float]) -> np.ndarray:
        """Returns the metric of each user, float64 [U]."""
        key = tuple(at[name] for name in names)
        if key not in tried:
            weights = {name: jnp.float32(at[name]) for name in names}
            candidate = ModelParams(params.model, params.linear | weights)
            tried[key] = _per_user(users(ranker, candidate), n_splits)
        return tried[key]

    default = blend.default_weights(blend.experts_of(params.linear))
    default = {name: default[name] for name in names}
    gains = [name for name in names if name in blend.GAINS.values()]

    def times(factor: float) -> dict[str, float]:
        return default | {name: factor * default[name] for name in gains}

    def certain_gain(at: dict[str, float]) -> float:
        gain_U = values(at) - values(start)
        stderr = np.nanstd(gain_U) / math.sqrt(max(1, len(gain_U) - 1))
        return float(np.nanmean(gain_U) - stderr)

    start = times(1.0)
    best = max(map(times, FACTORS), key=lambda at: np.nanmean(values(at)))
    if certain_gain(best) > 0:
        start = best

    grids: dict[str, Sequence[float]] = {"prior": PRIORS}
    for name in gains:
        grids[name] = [factor * start[name] for factor in SINGLE_FACTORS]
    chosen = coordinate_search(certain_gain, grids, start)
    return {
        **chosen,
        "metric": evaluator.best_metric,
        "value": float(np.nanmean(values(chosen))),
        "model_alone": float(np.nanmean(values(times(0.0)))),
        "users": users.fold_in.n_users // n_splits,
        "splits": n_splits,
        "tried": [
            {**dict(zip(names, key)), "value": float(np.nanmean(value_U))}
            for key, value_U in tried.items()
        ],
    }


def _users_to_ask(
    evaluator: Evaluator, split_again: bool
) -> tuple[Evaluator, int]:
    """Returns an evaluator of `best_metric`, and its number of splits.

    Its rows are the users of the first split, then those of the next one.
    """
    fold_in, held_out = evaluator.fold_in, evaluator.held_out
    rng = np.random.default_rng(0)
    chosen = np.flatnonzero(held_out.counts)
    if len(chosen) > _MOST_USERS:
        chosen = np.sort(rng.choice(chosen, _MOST_USERS, replace=False))
    fold_in, held_out = fold_in.rows(chosen), held_out.rows(chosen)
    n_splits = 1
    if split_again:
        n_splits = min(_MOST_SPLITS, max(1, _HISTORIES // len(chosen)))
    if n_splits > 1:
        rows = np.tile(np.arange(len(chosen)), n_splits)
        both = (fold_in, held_out)
        known, _ = Interactions.from_pairs(
            np.concatenate(
                [np.repeat(rows[: len(chosen)], m.counts) for m in both]
            ),
            np.concatenate([m.indices for m in both]),
            *(len(chosen), fold_in.n_items),
        )
        known = known.rows(rows)
        fold_in, held_out = hold_out(
            known, held_out.counts[rows], rng.random(known.nnz)
        )
    asked = dataclasses.replace(
        evaluator,
        fold_in=fold_in,
        held_out=held_out,
        metrics=(evaluator.best_metric,),
    )
    return asked, n_splits


def _per_user(evaluation: Any, n_splits: int) -> np.ndarray:
    """Returns the metric of each user, the mean over the splits, float64 [U].

    A metric of all lists together counts as that of one user. All processes get
    the values of process 0.
    """
    [(name, cell)] = evaluation.summary.items()
    if name not in evaluation.per_user:
        return np.array([cell["mean"]])
    values = processes.from_lead(evaluation.per_user[name].tolist())
    return np.reshape(values, (n_splits, -1)).mean(axis=0)
