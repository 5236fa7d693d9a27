"""Baselines of a run: fitted, tuned on the validation users, evaluated."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import coordinate_search, evaluator, held_out, scorers
from vaecf.evaluation.ranking import Scorer
from vaecf.parallel import processes
from vaecf.serving.trained_model import TrainedModel

if TYPE_CHECKING:
    import polars as pl

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


# What --baselines_tuned chooses from: moved up and down for as long as the
# validation users are ranked better (`_tune`).
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "popularity": {},
    "itemknn": {
        "neighbours": (5, 10, 20, 50, 100, 200, 500, 1000),
        "shrinkage": (0.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    },
    "ials": {
        "l2": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        "alpha": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "factors": (16, 32, 64, 128),
    },
    "ease": {
        "l2": (
            *(10.0, 20.0, 50.0, 100.0, 200.0, 300.0, 500.0),
            *(700.0, 1000.0, 2000.0, 5000.0, 10000.0),
        )
    },
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
    model: TrainedModel,
    dataset: Dataset,
    settings: Settings,
    *,
    tuned: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], evaluator.Evaluation | None]:
    """One of `BASELINES` on both splits.

    Args:
      name: which.
      model: its mesh, metrics and evaluation batch are used.
      dataset: to fit to, and its held-out users.
      settings: what to fit with; tuning begins with those of its `GRIDS`.
      tuned: choose by the validation users' `eval.best_metric`; the test users
        are ranked by the chosen one alone.
      log: gets a line of a choice that was tried, while they take their time.

    Returns:
      ({'validation', 'test': summaries, 'fit_seconds', the settings, 'tuned':
      {'metric', 'value', 'tried'}}, the test users' evaluation).

    Raises:
      VaecfError: it cannot be fitted; or nothing to tune by is held out.
    """
    fits = _Fits(name, model, dataset, log)
    chosen = settings.of(name)
    is_tuned = tuned and bool(GRIDS[name])
    if is_tuned:
        chosen = _tune(name, chosen, fits.value)
    fit_seconds, validation = fits.validation(chosen)
    test = held_out.evaluate(model, dataset, "test", fits.entrant(chosen))
    result = {
        "validation": validation,
        "fit_seconds": fit_seconds,
        "test": {} if test is None else test.summary,
        **chosen,
    }
    if is_tuned:
        result["tuned"] = {
            "metric": model.config.eval.best_metric,
            "value": fits.value(chosen),
            "tried": fits.tried(),
        }
    return result, test


def _tune(
    name: str,
    given: dict[str, Any],
    value: Callable[[dict[str, Any]], float],
) -> dict[str, Any]:
    """The settings that no step in `GRIDS` makes better."""
    grids = GRIDS[name]
    start = {key: given[key] for key in grids}

    def of_choice(choice: dict[str, float]) -> float:
        return value(given | choice)

    if name == "ials":
        # It is regularised by about λ·α (times the items): α is moved with
        # that held. More factors want more of it.
        turns: list[dict[str, int]] = [{"l2": 1}, {"alpha": 1, "l2": -1}]
        return given | coordinate_search.climb_nested(
            "factors", grids, turns, start, of_choice
        )
    turns = [{key: 1} for key in grids]
    return given | coordinate_search.climb_in_turns(
        grids, turns, start, of_choice
    )


class _Fits:
    """A baseline with one choice of settings after another.

    The last fit alone is held: two matrices of many items do not fit memory
    together.
    """

    def __init__(
        self,
        name: str,
        model: TrainedModel,
        dataset: Dataset,
        log: Callable[[str], None],
    ) -> None:
        self._name, self._model, self._dataset = name, model, dataset
        self._say, self._said = log, time.monotonic()
        self._held: tuple[dict[str, Any], held_out.Entrant] | None = None
        self._seconds = 0.0
        # Of (key, value) pairs of settings: seconds of the fit, and summary.
        self._validations: dict[tuple, tuple[float, dict[str, Any]]] = {}

    def entrant(self, settings: dict[str, Any]) -> held_out.Entrant:
        """What ranks with these; fitted unless it is the last."""
        if self._held is not None and self._held[0] == settings:
            return self._held[1]
        self._held = None
        # A host's array for which JAX has no more use goes with the garbage.
        gc.collect()
        began = time.perf_counter()
        scorer = fit(self._name, self._dataset.train, settings)
        self._seconds = time.perf_counter() - began
        self._held = settings, held_out.entrant(self._model, scorer)
        return self._held[1]

    def validation(
        self, settings: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        """(seconds of the fit, the validation users' summary)."""
        key = tuple(settings.items())
        if key not in self._validations:
            ranked_by = self.entrant(settings)
            summary = held_out.summary(
                self._model, self._dataset, "validation", ranked_by
            )
            self._validations[key] = self._seconds, summary
        return self._validations[key]

    def value(self, settings: dict[str, Any]) -> float:
        """What is to be large.

        Raises:
          VaecfError: no validation user has it.
        """
        metric = self._model.config.eval.best_metric
        is_new = tuple(settings.items()) not in self._validations
        _, summary = self.validation(settings)
        if metric not in summary:
            raise VaecfError(
                f"--baselines_tuned chooses by {metric} of the validation "
                "users, and there is none: leave it out, prepare with "
                "--held_out_users above 0, or add it to config.eval.metrics"
            )
        # A last bit that differs must not part the processes.
        [value] = processes.from_lead([summary[metric]["mean"]])
        if is_new:
            self._tell(f"{label(self._name, settings)}: {metric} {value:.4f}")
        return value

    def tried(self) -> list[dict[str, Any]]:
        """Settings, value and seconds of the fit of all, in order."""
        metric = self._model.config.eval.best_metric
        return [
            {
                **dict(key),
                "value": summary[metric]["mean"],
                "fit_seconds": seconds,
            }
            for key, (seconds, summary) in self._validations.items()
        ]

    def _tell(self, line: str) -> None:
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(f"tried {line} of the validation users")


def keep(
    results: dict[str, Any],
    frame: pl.DataFrame,
    path: pathlib.Path,
    *,
    log: Callable[[str], None],
) -> dict[str, pl.DataFrame]:
    """Per-user rows of earlier calls' baselines that have today's metrics.

    Args:
      results: of the run, with today's 'test'; the other baselines leave it.
        Beside the lead, which alone writes, all do.
      frame: `held_out.per_user` of today's test.
      path: where `held_out.write_per_user` left the earlier ones.
      log: gets a line of those that left.

    Returns:
      Frames by label.
    """
    before = {name: results.pop(name) for name in BASELINES if name in results}
    if not processes.is_lead():
        return {}
    frames = held_out.read_per_user(path)
    kept: dict[str, pl.DataFrame] = {}
    gone: list[str] = []
    for name, result in before.items():
        rows = frames.get(label(name, result))
        is_alike = result["test"].keys() == results["test"].keys()
        if is_alike and rows is not None and rows.schema == frame.schema:
            results[name], kept[label(name, result)] = result, rows
        else:
            gone.append(name)
    if gone:
        log(
            f"without the earlier {', '.join(gone)}, of which not all of these "
            f"metrics are known: --baselines={','.join(gone)} evaluates again"
        )
    return kept


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
