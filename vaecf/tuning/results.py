"""What a sweep leaves behind: a table, the best trial, pictures."""

from __future__ import annotations

import inspect
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.reporting import plots, sweep_plots, tables
from vaecf.tuning import space as space_lib
from vaecf.tuning import study as study_lib
from vaecf.tuning.study import Plan

_SHOWN = 10
# Importance is for getting into the best quarter; with fewer than five trials
# there, it says more of the sampler than of the parameters.
_QUANTILE, _LEAST_FOR_IMPORTANCES = 0.25, 20

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def write(plan: Plan, study: optuna.Study, log: Callable[[str], None]) -> None:
    """Writes trials.csv, best.json and the pictures; prints the best."""
    trials = study_lib.counted(study)
    records = [_record(plan, trial) for trial in trials]
    frame = pd.DataFrame(
        [{**r, **r["params"]} for r in records],
        columns=[*_columns(records), *plan.space],
    )
    path = plan.workdir / "trials.csv"
    workdir_lib.write_bytes(path, frame.to_csv(index=False).encode())
    complete = sorted(
        (r for r in records if r["state"] == "complete"),
        key=lambda r: (-r["value"], r["number"]),
    )
    if not complete:
        log(f"no trial is complete yet; trials: {path}")
        return
    metric = plan.base.eval.best_metric
    log("")
    log(
        tables.trials_table(
            complete[:_SHOWN],
            metric=metric,
            title=f"Best of {len(complete)} complete trials, {len(records)} "
            "in all (validation users)",
        )
    )
    best = complete[0]
    workdir_lib.write_json(plan.workdir / "best.json", _best(plan, best))
    drawn = _draw(plan, study, records, log)
    log(f"\ntrials: {path}\nbest: {plan.workdir / 'best.json'}")
    for picture in drawn:
        log(f"picture: {picture}")
    log(f"\n{_command(plan, best)}")


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in records[0] if key != "params"] if records else []


def _record(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    """A trial in plain values."""
    attributes = trial.user_attrs
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "value": trial.value,
        "epochs": attributes.get(study_lib.EPOCHS),
        "best_epoch": attributes.get(study_lib.BEST_EPOCH),
        "seconds": attributes.get(study_lib.SECONDS),
        "began": trial.datetime_start,
        "host": attributes.get(study_lib.HOST),
        "folder": attributes.get(study_lib.FOLDER),
        "error": attributes.get(study_lib.ERROR),
        "params": space_lib.values(plan.space, trial.params),
    }


def _flags(plan: Plan, best: Mapping[str, Any]) -> list[str]:
    """Overrides of the best trial, one an argument."""
    changed = {**plan.overrides, **best["params"]}
    return [f"--config.{key}={value}" for key, value in changed.items()]


def _best(plan: Plan, best: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "study": plan.study,
        "trial": best["number"],
        "folder": best["folder"],
        "metric": f"validation/{plan.base.eval.best_metric}",
        "value": best["value"],
        "best_epoch": best["best_epoch"],
        "params": best["params"],
        "overrides": _flags(plan, best),
        "command": _command(plan, best),
    }


def _command(plan: Plan, best: Mapping[str, Any]) -> str:
    config = [f"--config={plan.config_file}"] if plan.config_file else []
    words = [
        "python experiments/main.py",
        *map(shlex.quote, config),
        *map(shlex.quote, _flags(plan, best)),
        "--workdir=runs/best --train --test",
    ]
    return " \\\n    ".join(words)


def _draw(
    plan: Plan,
    study: optuna.Study,
    records: Sequence[Mapping[str, Any]],
    log: Callable[[str], None],
) -> list[pathlib.Path]:
    metric = plan.base.eval.best_metric
    logarithmic = {k for k, d in plan.space.items() if d.get("log")}
    pictures = {
        "history.png": sweep_plots.history(records, metric=metric),
        "slices.png": sweep_plots.slices(
            records, list(plan.space), metric=metric, logarithmic=logarithmic
        ),
    }
    complete = sum(r["state"] == "complete" for r in records)
    if complete < _LEAST_FOR_IMPORTANCES:
        log(
            f"importances: not drawn, {complete} complete trials are too few "
            f"(at least {_LEAST_FOR_IMPORTANCES})"
        )
    elif shares := _importances(study, log):
        pictures["importances.png"] = sweep_plots.importances(
            shares, metric=metric
        )
    written = []
    for name, figure in pictures.items():
        workdir_lib.write_bytes(plan.workdir / name, plots.to_png(figure))
        written.append(plan.workdir / name)
    return written


def _importances(
    study: optuna.Study, log: Callable[[str], None]
) -> dict[str, float]:
    make: Any = optuna.importance.PedAnovaImportanceEvaluator
    known = inspect.signature(make).parameters
    # Its name before optuna 5.
    name = next(
        n for n in ("target_quantile", "baseline_quantile") if n in known
    )
    try:
        return optuna.importance.get_param_importances(
            study, evaluator=make(**{name: _QUANTILE})
        )
    except (ValueError, RuntimeError, VaecfError) as error:
        log(f"importances: not drawn ({error})")
        return {}
