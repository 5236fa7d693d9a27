"""Compares finished runs: groups their seeds, pairs differences by user."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.evaluation import per_user, significance
from vaecf.evaluation.evaluator import by_history_length, mean_and_stderr

if TYPE_CHECKING:
    import polars as pl

_MOST_SETTINGS = 3  # in the name of a group


class Entry(NamedTuple):
    """Per-user metrics of one model of one run or file."""

    path: pathlib.Path  # the run's workdir, or the file
    model: str  # name of the model; for a baseline with its settings
    users: dict[str, np.ndarray]  # `per_user.USER_COLUMNS`, arrays [U]
    # {metric: float64 [U]}; NaN for users without held-out items.
    values: dict[str, np.ndarray]
    # {metric: mean over the validation users}; {} if unknown.
    validation: dict[str, float]
    seed: int | None = None  # of the run; None for baselines and files
    # The run's other settings by dotted key; None for baselines and files.
    settings: Mapping[str, Any] | None = None


def compare(
    paths: Sequence[pathlib.Path],
    *,
    metric: str | None = None,
    reference: str | None = None,
    baselines: bool = True,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the models of several runs with a reference model.

    Runs that differ only in the seed form one group: its per-user values are
    means over the seeds.

    Args:
      paths: workdirs of tested runs, or files written by `per_user.write`.
      metric: metric to compare by; None takes the first run's best_metric, or
        the first metric if the test lacks it.
      reference: name of a group, or one of `paths`. None takes the group that
        is the best on the validation users, or the first group if the
        validation metrics of any group are unknown.
      baselines: also compare the baselines of the runs. A baseline of several
        runs counts once.
      resamples, seed: of the bootstrap.

    Returns:
      {'dataset', 'protocol', 'metric', 'metrics', 'users', 'left_out',
      'reference', 'runs': [{'path', 'group', 'seed', 'metrics'}], 'groups':
      {name: {'seeds', 'metrics', 'validation', 'history_length'}},
      'comparisons': {name: fields of `significance.Paired`}}; JSON values. The
      standard error of a group is over its seeds, or over users if it has a
      single seed.

    Raises:
      VaecfError: the runs cannot be compared; names the run and the reason.
    """
    if not paths:
        raise VaecfError(
            "no runs to compare: give workdirs or files of per-user metrics"
        )
    manifest = _common_manifest(paths)
    entries = [e for path in paths for e in _read(path, baselines=baselines)]
    _require_same_users(entries)
    metric, metrics = _choose_metrics(entries, metric)
    groups = _group(entries)
    mean_U = {
        name: np.mean([e.values[metric] for e in group], axis=0)
        for name, group in groups.items()
    }
    reference = _choose_reference(groups, reference, metric)
    evaluated_U = ~np.isnan(mean_U[reference])
    paired = significance.paired(
        {n: v[evaluated_U] for n, v in mean_U.items() if n != reference},
        mean_U[reference][evaluated_U],
        resamples=resamples,
        seed=seed,
    )
    return {
        "dataset": manifest.get("name"),
        "protocol": manifest.get("protocol"),
        "metric": metric,
        "metrics": metrics,
        "users": int(evaluated_U.sum()),
        "left_out": int((~evaluated_U).sum()),
        "reference": reference,
        "runs": [
            {
                "path": str(entry.path),
                "group": name,
                "seed": entry.seed,
                "metrics": {m: _summary([entry], m) for m in metrics},
            }
            for name, group in groups.items()
            for entry in group
        ],
        "groups": {
            name: {
                "seeds": len(group),
                "metrics": {m: _summary(group, m) for m in metrics},
                "validation": _validation(group, metric),
                "history_length": by_history_length(
                    mean_U[name], group[0].users["fold_in"]
                ),
            }
            for name, group in groups.items()
        },
        "comparisons": {name: p._asdict() for name, p in paired.items()},
    }


def _common_manifest(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Returns the manifest of the runs' dataset; {} if there are only files."""
    runs = [path for path in paths if path.is_dir()]
    files = (run / workdir_lib.DATASET for run in runs)
    manifests = [workdir_lib.read_manifest(file)[0] for file in files]
    for run, other in zip(runs, manifests):
        if other != manifests[0]:
            raise VaecfError(
                f"{runs[0]} and {run} are runs on different datasets "
                f"({manifests[0].get('name')!r}, {other.get('name')!r}; their "
                "manifests differ): compare runs on one prepared dataset"
            )
    return manifests[0] if manifests else {}


def _read(path: pathlib.Path, *, baselines: bool) -> list[Entry]:
    """Returns the models of a run or file, the run's own model first."""
    if not path.is_dir():
        frames = per_user.read(path)
        return [_entry(path, m, f, {}) for m, f in frames.items()]
    config = workdir_lib.read_config(path)
    file = path / workdir_lib.PER_USER
    if not file.exists():
        raise VaecfError(
            f"{path}: no per-user metrics; evaluate the run on the test users"
        )
    results = workdir_lib.read_json(path / workdir_lib.RESULTS)
    entries = []
    for model, frame in per_user.read(file).items():
        if model == config.title:
            settings = config.flat()
            # Copies of a dataset may lie anywhere.
            del settings["data.dir"], settings["train.trackers"]
            seed = settings.pop("seed")
            run = _entry(path, model, frame, results)
            entries.append(run._replace(seed=seed, settings=settings))
        elif baselines:
            # 'ease (l2 500)' is 'ease' in results.json.
            result = results.get(model.split(" (")[0], {})
            entries.append(_entry(path, model, frame, result))
    return entries


def _entry(
    path: pathlib.Path,
    model: str,
    frame: pl.DataFrame,
    results: Mapping[str, Any],
) -> Entry:
    columns = per_user.USER_COLUMNS
    metrics = frame.drop("model", *columns)
    validation = results.get("validation", {})
    return Entry(
        path,
        model,
        {name: frame[name].to_numpy() for name in columns},
        {
            metric.name: metric.cast(float).fill_null(np.nan).to_numpy()
            for metric in metrics
        },
        {name: cell["mean"] for name, cell in validation.items()},
    )


def _require_same_users(entries: Sequence[Entry]) -> None:
    first = entries[0]
    for entry in entries[1:]:
        for name, values in first.users.items():
            if not np.array_equal(values, entry.users[name]):
                raise VaecfError(
                    f"{first.path} and {entry.path} have different test users "
                    f"(column {name}): compare runs on one prepared dataset"
                )


def _choose_metrics(
    entries: Sequence[Entry], asked: str | None
) -> tuple[str, list[str]]:
    """Returns (metric to compare by, all metrics that every entry has)."""
    common = [
        m for m in entries[0].values if all(m in e.values for e in entries)
    ]
    if asked is None:
        best = [e.settings["eval.best_metric"] for e in entries if e.settings]
        preferred = [metric for metric in best[:1] if metric in common]
        asked = [*preferred, *common, "ndcg@100"][0]
    if asked not in common:
        lacking = next(e for e in entries if asked not in e.values)
        raise VaecfError(
            f"{lacking.path}: no per-user {asked} of {lacking.model}, which "
            f"has {', '.join(lacking.values) or 'no metrics'}: choose one of "
            "them, or test the run again with it in config.eval.metrics"
        )
    return asked, common


def _group(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Returns entries by name; runs that differ only in the seed share one."""
    runs: dict[str, list[Entry]] = {}
    others: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.settings is not None:
            key = json.dumps(entry.settings, sort_keys=True)
            group = runs.setdefault(key, [])
            for twin in group:
                if twin.seed == entry.seed:
                    raise VaecfError(
                        f"{twin.path} and {entry.path} are the same run: "
                        f"config and seed {entry.seed} are equal; give one of "
                        "them"
                    )
            group.append(entry)
        elif entry.path.is_dir():
            # A baseline has the same values in all runs.
            others.setdefault(entry.model, [entry])
        else:
            has_namesake = any(
                e.model == entry.model and e.path != entry.path for e in entries
            )
            suffix = f" in {entry.path}" if has_namesake else ""
            others[entry.model + suffix] = [entry]
    return dict(zip(_names(list(runs.values())), runs.values())) | others


def _names(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """Returns names that tell groups of the same model apart.

    Such as 'mult_vae (optimizer.learning_rate=0.002)'. Groups that differ in
    many settings are named after their first run.
    """
    names = []
    for group in groups:
        model, settings = group[0].model, group[0].settings or {}
        namesakes = [g[0].settings for g in groups if g[0].model == model]
        differing = [
            f"{key}={value}"
            for key, value in settings.items()
            if any((other or {}).get(key) != value for other in namesakes)
        ]
        suffix = ", ".join(differing)
        if len(differing) > _MOST_SETTINGS:
            suffix = str(group[0].path)
        names.append(f"{model} ({suffix})" if suffix else model)
    return names


def _choose_reference(
    groups: Mapping[str, Sequence[Entry]], asked: str | None, metric: str
) -> str:
    if asked is None:
        values: dict[str, Any] = {
            name: _validation(g, metric) for name, g in groups.items()
        }
        if None in values.values():
            return next(iter(groups))
        return max(values, key=values.__getitem__)
    path = pathlib.Path(asked)
    exact = [
        name
        for name, group in groups.items()
        if name == asked or any(entry.path == path for entry in group)
    ]
    # 'ease' stands for 'ease (l2 500)' if there is no other.
    labelled = [name for name in groups if name.split(" (")[0] == asked]
    if exact or len(labelled) == 1:
        return [*exact, *labelled][0]
    raise VaecfError(
        f"reference={asked}: use one of the runs, or one of {'; '.join(groups)}"
    )


def _validation(group: Sequence[Entry], metric: str) -> float | None:
    """Returns the mean over seeds; None if the value of any is unknown."""
    values: list[Any] = [entry.validation.get(metric) for entry in group]
    return None if None in values else float(np.mean(values))


def _summary(group: Sequence[Entry], metric: str) -> dict[str, Any]:
    """Returns mean and standard error, over the seeds if there are several."""
    if len(group) == 1:
        values = group[0].values[metric]
        return {**mean_and_stderr(values), "over": "users"}
    means = np.array([np.nanmean(e.values[metric]) for e in group])
    users = int((~np.isnan(group[0].values[metric])).sum())
    return {**mean_and_stderr(means), "users": users, "over": "seeds"}
