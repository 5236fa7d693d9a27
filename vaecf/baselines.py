"""Baselines of a run: fitted, tuned on the validation users, evaluated."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

from vaecf import held_out
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import evaluate as evaluate_lib
from vaecf.evaluation import scorers
from vaecf.evaluation.ranking import Scorer
from vaecf.serving.model import Model

BASELINES = ("popularity", "itemknn", "ials", "ease")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the baselines are fitted with, by the names of their flags.

    Attributes:
      ease_l2: λ of EASE.
      itemknn_neighbours: neighbours kept of an item.
      itemknn_shrinkage: in the denominator of the cosine.
      ials_factors: factors of implicit ALS.
      ials_l2: its λ.
      ials_alpha: its weight of the unobserved.
      ials_iterations: its sweeps.
    """

    ease_l2: float = 500.0
    itemknn_neighbours: int = 100
    itemknn_shrinkage: float = 0.0
    ials_factors: int = 64
    ials_l2: float = 0.003
    ials_alpha: float = 0.3
    ials_iterations: int = 16

    def of(self, name: str) -> dict[str, Any]:
        """Settings of one baseline, {'l2': 500.0} of EASE."""
        return {
            field.name.partition("_")[2]: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.partition("_")[0] == name
        }

    def check(self) -> None:
        """Refuses what is out of range.

        Raises:
          VaecfError: names the flag.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "itemknn_shrinkage":
                if not value >= 0:
                    raise VaecfError(
                        f"--{field.name}={value:g} must not be below 0"
                    )
            elif not value > 0:
                raise VaecfError(f"--{field.name}={value:g} must be above 0")


# What --baselines_tuned tries: every combination, on the validation users.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "popularity": {},
    "itemknn": {
        "neighbours": (20, 50, 100, 200),
        "shrinkage": (0.0, 10.0, 100.0),
    },
    "ials": {
        "factors": (64, 128),
        "l2": (0.001, 0.003, 0.01),
        "alpha": (0.1, 0.3, 1.0),
    },
    "ease": {"l2": (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)},
}

_SECONDS_BETWEEN_LINES = 5.0

_FIT: dict[str, Callable[..., Scorer]] = {
    "popularity": scorers.popularity,
    "itemknn": scorers.itemknn,
    "ials": scorers.ials,
    "ease": scorers.ease,
}


def fit(name: str, train: Any, settings: Mapping[str, Any]) -> Scorer:
    """One of `BASELINES`, fitted to the training users."""
    return _FIT[name](train, **settings)


def label(name: str, result: Mapping[str, Any]) -> str:
    """'ease (l2 500)': a figure without its setting is half a figure."""
    settings = [
        f"{key} {result[key]:g}" for key in Settings().of(name) if key in result
    ]
    return f"{name} ({', '.join(settings)})" if settings else name


def evaluate(
    name: str,
    model: Model,
    dataset: Dataset,
    settings: Settings,
    *,
    tuned: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], evaluate_lib.Evaluation | None]:
    """One of `BASELINES` on both splits.

    Args:
      name: which.
      model: its mesh, metrics and evaluation batch are used.
      dataset: to fit to, and its held-out users.
      settings: what to fit with; tuning replaces those of its `GRIDS`.
      tuned: choose by the validation users' `eval.best_metric`, the first of
        equal ones; the test users are ranked by the chosen one alone.
      say: gets a line of a choice that was tried, while they take their time.

    Returns:
      ({'validation', 'test': summaries, 'fit_seconds', the settings, 'tuned':
      {'metric', 'value', 'tried'}}, the test users' evaluation).

    Raises:
      VaecfError: it cannot be fitted; or nothing to tune by is held out.
    """
    candidates = [settings.of(name)]
    if tuned and GRIDS[name]:
        candidates = [
            candidates[0] | dict(zip(GRIDS[name], values))
            for values in itertools.product(*GRIDS[name].values())
        ]
    metric = model.options.eval.best_metric
    best = candidates[0]
    tried: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    ranked_by: held_out.Entrant | None = None
    said = time.monotonic()

    def fitted(candidate: dict[str, Any]) -> tuple[held_out.Entrant, float]:
        # Two matrices of many items do not fit memory together, and a host's
        # array that JAX has no more use for it lets go when garbage is
        # collected.
        gc.collect()
        began = time.perf_counter()
        scorer = fit(name, dataset.train, candidate)
        seconds = time.perf_counter() - began
        return held_out.entrant(model, scorer), seconds

    for candidate in candidates:
        ranked_by = None  # before the next is fitted
        ranked_by, seconds = fitted(candidate)
        validation = held_out.summary(model, dataset, "validation", ranked_by)
        value = validation.get(metric, {}).get("mean")
        if len(candidates) > 1 and value is None:
            raise VaecfError(
                f"--baselines_tuned chooses by {metric} of the validation "
                "users, and there is none: leave it out, prepare with "
                "--held_out_users above 0, or add it to config.eval.metrics"
            )
        tried.append({**candidate, "value": value, "fit_seconds": seconds})
        if (
            len(tried) < len(candidates)
            and time.monotonic() - said > _SECONDS_BETWEEN_LINES
        ):
            said = time.monotonic()
            say(
                f"{label(name, candidate)}: validation {metric} {value:.4f} "
                f"({len(tried)} of {len(candidates)} tried)"
            )
        if not result or value > result["validation"][metric]["mean"]:
            best = candidate
            result = {"validation": validation, "fit_seconds": seconds}
    if best is not candidates[-1]:
        ranked_by = None
        ranked_by, _ = fitted(best)
    assert ranked_by is not None
    test = held_out.evaluate(model, dataset, "test", ranked_by)
    result |= {"test": {} if test is None else test.summary, **best}
    if len(candidates) > 1:
        value = result["validation"][metric]["mean"]
        result["tuned"] = {"metric": metric, "value": value, "tried": tried}
    return result, test


def tuned_line(name: str, result: Mapping[str, Any]) -> str | None:
    """'ease (l2 500): best of 6 by validation ndcg@100 .4012, ...'."""
    if "tuned" not in result:
        return None
    tuned = result["tuned"]
    seconds = sum(candidate["fit_seconds"] for candidate in tuned["tried"])
    return (
        f"{label(name, result)}: best of {len(tuned['tried'])} by validation "
        f"{tuned['metric']} {tuned['value']:.4f}; fits took {seconds:.1f} s"
    )
