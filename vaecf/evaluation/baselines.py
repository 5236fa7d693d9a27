"""Baselines: fitted to the training users, tuned and evaluated.

The models and their settings are declared in `models.registry` and
`vaecf.config`; flags, checks and tuning are derived from them.
"""

from __future__ import annotations

import gc
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf.config import fitted_settings
from vaecf.errors import VaecfError, did_you_mean
from vaecf.evaluation import per_user, scorers
from vaecf.evaluation.coordinate_search import coordinate_search
from vaecf.evaluation.evaluator import Evaluation, Evaluator
from vaecf.evaluation.ranking import Scorer
from vaecf.models import popularity, registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import progress

if TYPE_CHECKING:
    import polars as pl

# The oracle's name in results.json and in tables.
ORACLE = "oracle"
ORACLE_NOTE = (
    f"{ORACLE}: ranking by the probabilities that generated the data, the best "
    "that a model can reach"
)


class Baseline(NamedTuple):
    """A model of `registry.FITTED` and how it is tuned."""

    # Module with `fit(train interactions, **settings)`, and with `scores` and
    # `PARTITION` for its `Scorer`.
    model: Any
    # Settings of `fit` by name, as `vaecf.config` declares them.
    settings: Mapping[str, Any]
    # `coordinate_search` describes both.
    directions: tuple[Mapping[str, int], ...] | None = None
    outer: str | None = None

    @property
    def grids(self) -> dict[str, tuple[float, ...]]:
        """Candidates of the settings that are tuned."""
        grids = {k: s.metadata["grid"] for k, s in self.settings.items()}
        return {key: grid for key, grid in grids.items() if grid}


_SEARCHES: dict[str, dict[str, Any]] = {
    # The regularisation is about λ·α times the number of items, so alpha moves
    # while that product stays. More factors need more of it.
    "ials": {
        "directions": ({"l2": 1}, {"alpha": 1, "l2": -1}),
        "outer": "factors",
    },
}
BASELINES: dict[str, Baseline] = {
    name: Baseline(model, fitted_settings(name), **_SEARCHES.get(name, {}))
    for name, model in registry.FITTED.items()
}


def settings(
    name: str, changes: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Returns all settings of a baseline, the defaults with `changes`.

    Raises:
      VaecfError: the baseline or a setting is unknown, or a value is out of
        range; names it as `ease_l2`.
    """
    if name not in BASELINES:
        raise VaecfError(
            f"baseline {name!r} is unknown: use {', '.join(BASELINES)}"
            f"{did_you_mean(name, BASELINES)}"
        )
    known = BASELINES[name].settings
    result = {key: setting.default for key, setting in known.items()}
    for key, value in (changes or {}).items():
        if key not in known:
            raise VaecfError(
                f"{name}_{key} is not a setting of a baseline: {name} has "
                f"{', '.join(known) or 'none'}{did_you_mean(key, known)}"
            )
        rule = known[key].metadata["rule"]
        if not rule.holds(value):
            raise VaecfError(f"{name}_{key}={value:g} must be {rule.text}")
        result[key] = value
    return result


def label(name: str, result: Mapping[str, Any]) -> str:
    """Returns the name with its settings, such as 'ease (l2 500)'.

    'ease (tuned per fold)' are pooled results without common settings.
    """
    keys = BASELINES[name].settings
    values = [f"{key} {result[key]:g}" for key in keys if key in result]
    if keys and not values:
        values = ["tuned per fold"]
    return f"{name} ({', '.join(values)})" if values else name


def evaluate(
    name: str,
    validation: Evaluator,
    test: Evaluator,
    *,
    changes: Mapping[str, float] | None = None,
    tuned: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Evaluation]:
    """Fits a baseline to the training users and evaluates both splits.

    Args:
      test: evaluator of the test users, with validation's metrics or fewer.
      changes: settings other than the defaults.
      tuned: choose the settings by the validation users' `best_metric`,
        starting from `changes`. The test users only see the chosen settings.
      log: receives lines about a search.

    Returns:
      ({'validation', 'test': summaries, results of `Evaluator.groups`,
      'fit_seconds', the settings, 'tuned': {'metric', 'value', 'tried'}},
      evaluation of the test users).

    Raises:
      VaecfError: the baseline cannot be fitted, or there are no validation
        users to tune it by.
    """
    chosen = settings(name, changes)
    baseline, metric = BASELINES[name], validation.best_metric
    is_tuned = tuned and bool(baseline.grids)
    if is_tuned and validation.is_empty:
        raise VaecfError(
            f"tuning baselines needs the {metric} of validation users, and "
            "there are none: prepare the dataset with held_out_users above 0, "
            "or do not tune"
        )
    log_candidate = progress.paced(log) if is_tuned else None
    candidates = _Candidates(name, validation, log_candidate)
    if is_tuned:
        chosen = coordinate_search(
            lambda s: candidates.validate(s)["validation"][metric]["mean"],
            baseline.grids,
            chosen,
            directions=baseline.directions,
            outer=baseline.outer,
        )
    found = candidates.validate(chosen)
    on_test = test(candidates.ranker, candidates.params(chosen))
    summaries = {"test": on_test.summary, **test.groups(on_test)}
    result = {**found, **summaries, **chosen}
    if is_tuned:
        tried = [
            {
                **dict(key),
                "value": candidate["validation"][metric]["mean"],
                "fit_seconds": candidate["fit_seconds"],
            }
            for key, candidate in candidates.tried.items()
        ]
        value = found["validation"][metric]["mean"]
        result["tuned"] = {"metric": metric, "value": value, "tried": tried}
        seconds = sum(candidate["fit_seconds"] for candidate in tried)
        log(
            f"{label(name, result)}: best of {len(tried)} by validation "
            f"{metric} {value:.4f}; fits took {seconds:.1f} s"
        )
    return result, on_test


class _Candidates:
    """Fits a baseline with different settings and validates each fit once.

    Only the last fit is kept: two item x item matrices may not fit in memory.
    `tried` holds the results of `validate` by the settings' items.
    """

    def __init__(
        self,
        name: str,
        validation: Evaluator,
        log: Callable[[str], None] | None,
    ) -> None:
        self._name, self._validation, self._log = name, validation, log
        self._last: dict[str, float] | None = None  # settings of `_params`
        n_items = validation.train.n_items
        self.ranker = validation.compile(scorers.fitted(name, n_items))
        self.tried: dict[tuple, dict[str, Any]] = {}

    def params(self, settings: dict[str, float]) -> Any:
        """Returns the fitted parameters, on the mesh."""
        if self._last != settings:
            self._last = self._params = None
            gc.collect()  # frees host arrays that JAX no longer uses
            began = time.perf_counter()
            train = self._validation.train
            params = BASELINES[self._name].model.fit(train, **settings)
            self._fit_seconds = time.perf_counter() - began
            self._last, self._params = settings, self.ranker.place(params)
        return self._params

    def validate(self, settings: dict[str, float]) -> dict[str, Any]:
        """Returns {'validation': summary, 'fit_seconds'}."""
        key = tuple(settings.items())
        if key in self.tried:
            return self.tried[key]
        params = self.params(settings)
        summary = self._validation(self.ranker, params).summary
        result = {"validation": summary, "fit_seconds": self._fit_seconds}
        self.tried[key] = result
        if self._log is not None:
            metric = self._validation.best_metric
            self._log(
                f"tried {label(self._name, settings)}: validation {metric} "
                f"{summary[metric]['mean']:.4f}"
            )
        return result


def evaluate_oracle(
    dataset: Any, validation: Evaluator, test: Evaluator
) -> dict[str, Any]:
    """Evaluates ranking by the probabilities that generated the data.

    Returns {'validation': summary, 'test': summary, results of
    `Evaluator.groups`} for a synthetic dataset.
    """
    oracle = Scorer(
        popularity.oracle_scores, popularity.PARTITION, dataset.n_items
    )
    # The metrics of validation are those of the test, or more.
    ranker = validation.compile(oracle)
    group_item = mesh_lib.pad_items(dataset.oracle["group_item"])
    ends = np.cumsum(dataset.split_sizes[:2])
    _, *mixtures = np.split(dataset.oracle["user_group"], ends)
    on_validation, on_test = (
        evaluator(
            ranker,
            ranker.place({"user_group": user_group, "group_item": group_item}),
        )
        for evaluator, user_group in zip((validation, test), mixtures)
    )
    return {
        "validation": on_validation.summary,
        "test": on_test.summary,
        **test.groups(on_test),
    }


def keep_earlier(
    results: dict[str, Any],
    frame: pl.DataFrame,
    path: pathlib.Path,
    *,
    log: Callable[[str], None],
) -> dict[str, pl.DataFrame]:
    """Returns per-user metrics of an earlier call's baselines, by label.

    A baseline is kept if its metrics are those of the current test; all others
    are removed from `results`, with a line to `log`. Processes other than the
    lead write nothing, and keep none.

    Args:
      results: content of results.json with the current 'test'; changed.
      frame: `per_user.frame` of the current test.
      path: per-user file of the earlier call; may be missing or damaged.
    """
    earlier = {name: results.pop(name) for name in BASELINES if name in results}
    if not processes.is_lead() or not earlier:
        return {}
    try:
        frames = per_user.read(path)
    except VaecfError:
        frames = {}
    kept: dict[str, pl.DataFrame] = {}
    for name, result in earlier.items():
        rows = frames.get(label(name, result))
        has_metrics = result["test"].keys() == results["test"].keys()
        if has_metrics and rows is not None and rows.schema == frame.schema:
            results[name], kept[label(name, result)] = result, rows
        else:
            log(
                f"removed the earlier results of {name}, which lack some of "
                "the current metrics; evaluate it again"
            )
    return kept


def grouped(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of results.json as `report.write_report` takes it."""
    keys = (
        *("train", "validation", "test", "users_left_out", "linear"),
        *("history_length", "item_popularity", "refit"),
    )
    groups = {key: results[key] for key in keys if key in results}
    groups["baselines"] = {
        label(name, results[name]): results[name]
        for name in BASELINES
        if name in results
    }
    groups["references"] = {k: results[k] for k in (ORACLE,) if k in results}
    return groups
