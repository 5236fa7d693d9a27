"""Compares finished runs: groups their seeds, pairs differences by user."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.evaluation import significance
from vaecf.evaluation.evaluator import by_history_length, mean_and_stderr

_MOST_SETTINGS = 3  # in the name of a group
_USER_COLUMNS = ("user", "fold_in", "held_out")


class Entry(NamedTuple):
    """Per-user metrics of one model of one run or file.

    Attributes:
      path: the run's workdir, or the file.
      model: name of the model; for a baseline with its settings.
      config: settings of the run by dotted key; None for baselines and files.
      users: {'user', 'fold_in', 'held_out'}, arrays [U].
      values: {metric: float64 [U]}; NaN for users without held-out items.
      validation: {metric: mean over the validation users}; {} if unknown.
    """

    path: pathlib.Path
    model: str
    config: Mapping[str, Any] | None
    users: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    validation: dict[str, float]

    @property
    def seed(self) -> int | None:
        """Seed of the run; None for baselines and files."""
        return None if self.config is None else self.config["seed"]


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
      metric: metric to compare by; None takes the first run's best_metric.
      reference: name of a group, or one of `paths`. None takes the group that
        is the best on the validation users, or the first group if the
        validation metrics of any group are unknown.
      baselines: also compare the baselines of the runs. A baseline of several
        runs counts once.
      resamples: number of bootstrap resamples.
      seed: seed of the bootstrap.

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
        "runs": _run_results(groups, metrics),
        "groups": _group_results(groups, metrics, metric, mean_U),
        "comparisons": {name: p._asdict() for name, p in paired.items()},
    }


def _run_results(
    groups: Mapping[str, Sequence[Entry]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "path": str(entry.path),
            "group": name,
            "seed": entry.seed,
            "metrics": {m: _summary([entry], m) for m in metrics},
        }
        for name, group in groups.items()
        for entry in group
    ]


def _group_results(
    groups: Mapping[str, Sequence[Entry]],
    metrics: Sequence[str],
    metric: str,
    mean_U: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "seeds": len(group),
            "metrics": {m: _summary(group, m) for m in metrics},
            "validation": _validation(group, metric),
            "history_length": by_history_length(
                mean_U[name], group[0].users["fold_in"]
            ),
        }
        for name, group in groups.items()
    }


# --- Reading ----------------------------------------------------------------


def _common_manifest(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Returns the manifest of the runs' dataset; {} if there are only files."""
    found = {
        path: workdir_lib.read_json(path / workdir_lib.DATASET)
        for path in paths
        if path.is_dir()
    }
    for path, manifest in found.items():
        first = next(iter(found))
        if manifest != found[first]:
            raise VaecfError(
                f"{first} and {path} are runs on different datasets "
                f"({found[first].get('name')!r}, {manifest.get('name')!r}; "
                "their manifests differ): compare runs on one prepared dataset"
            )
    return next(iter(found.values()), {})


def _read(path: pathlib.Path, *, baselines: bool) -> list[Entry]:
    """Returns the models of a run or file, the run's own model first."""
    if not path.is_dir():
        return _entries(path, path, {}, {})
    config = workdir_lib.read_config(path)
    file = path / workdir_lib.PER_USER
    if not file.exists():
        raise VaecfError(
            f"{path}: no per-user metrics; evaluate the run on the test users"
        )
    results = workdir_lib.read_json(path / workdir_lib.RESULTS)
    validation = {config.title: results.get("validation", {})}
    for name, result in results.items():
        if isinstance(result, Mapping) and "validation" in result:
            validation[name] = result["validation"]
    settings = config_lib.flatten(config.to_dict())
    entries = _entries(path, file, {config.title: settings}, validation)
    return [e for e in entries if baselines or e.model == config.title]


def _entries(
    path: pathlib.Path,
    file: pathlib.Path,
    configs: Mapping[str, Any],
    validation: Mapping[str, Any],
) -> list[Entry]:
    frame = _read_frame(file)
    entries = []
    for (model,), part in frame.group_by("model", maintain_order=True):
        # The label 'ease (l2 500)' is 'ease' in results.json.
        known = validation.get(model, validation.get(model.split(" (")[0], {}))
        metrics = [
            c for c in part.columns if c not in ("model", *_USER_COLUMNS)
        ]
        entries.append(
            Entry(
                path,
                model,
                configs.get(model),
                {name: part[name].to_numpy() for name in _USER_COLUMNS},
                {
                    name: part[name].cast(float).fill_null(np.nan).to_numpy()
                    for name in metrics
                },
                {name: cell["mean"] for name, cell in known.items()},
            )
        )
    return entries


def _read_frame(path: pathlib.Path) -> Any:
    import polars as pl

    try:
        if path.suffix == ".csv":
            frame = pl.read_csv(path, infer_schema_length=None)
        else:
            frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise VaecfError(
            f"{path}: neither a workdir nor per-user metrics ({reason})"
        ) from None
    columns = ("model", *_USER_COLUMNS)
    missing = [name for name in columns if name not in frame.columns]
    if missing or not len(frame):
        raise VaecfError(
            f"{path}: not a file of per-user metrics (it has no "
            f"{', '.join(missing) or 'rows'})"
        )
    return frame


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
        configs = [e.config for e in entries if e.config is not None]
        if configs:
            asked = configs[0]["eval.best_metric"]
        else:
            asked = common[0] if common else "ndcg@100"
    if asked not in common:
        lacking = next(e for e in entries if asked not in e.values)
        raise VaecfError(
            f"{lacking.path}: no per-user {asked} of {lacking.model}, which "
            f"has {', '.join(lacking.values) or 'no metrics'}: choose one of "
            "them, or test the run again with it in config.eval.metrics"
        )
    return asked, common


# --- Groups -----------------------------------------------------------------


def _group(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Returns entries by name; runs that differ only in the seed share one."""
    runs: dict[str, list[Entry]] = {}
    others: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.config is not None:
            key = json.dumps(_identity(entry), sort_keys=True)
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
            has_namesake = entry.model in others or any(
                e.model == entry.model and e.path != entry.path
                for e in entries
                if e.config is None
            )
            suffix = f" in {entry.path}" if has_namesake else ""
            others[entry.model + suffix] = [entry]
    taken = {e.model for e in entries if e.config is None}
    named = {
        f"{name} (run)" if name in taken else name: group
        for name, group in zip(_names(list(runs.values())), runs.values())
    }
    return named | others


def _identity(entry: Entry) -> dict[str, Any]:
    """Returns the settings that all runs of a group share."""
    own = ("seed", "data.dir")  # copies of a dataset may lie anywhere
    config = entry.config or {}
    return {key: value for key, value in config.items() if key not in own}


def _names(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """Returns names that tell groups of the same model apart.

    Such as 'mult_vae (optimizer.learning_rate=0.002)'. Groups that differ in
    many settings are named after their first run.
    """
    names = []
    for group in groups:
        model, settings = group[0].model, _identity(group[0])
        namesakes = [_identity(g[0]) for g in groups if g[0].model == model]
        differing = [
            f"{key}={value}"
            for key, value in settings.items()
            if any(other.get(key) != value for other in namesakes)
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
        values = {name: _validation(g, metric) for name, g in groups.items()}
        known = {n: value for n, value in values.items() if value is not None}
        if len(known) < len(values):
            return next(iter(groups))
        return max(known, key=known.__getitem__)
    if asked in groups:
        return asked
    for name, group in groups.items():
        if any(entry.path == pathlib.Path(asked) for entry in group):
            return name
    # 'ease' stands for 'ease (l2 500)' if there is no other.
    labelled = [name for name in groups if name.split(" (")[0] == asked]
    if len(labelled) != 1:
        raise VaecfError(
            f"reference={asked}: use one of the runs, or one of "
            f"{'; '.join(groups)}"
        )
    return labelled[0]


def _validation(group: Sequence[Entry], metric: str) -> float | None:
    """Returns the mean over seeds; None if the value of any is unknown."""
    values = [entry.validation.get(metric) for entry in group]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return float(np.mean(numbers))


def _summary(group: Sequence[Entry], metric: str) -> dict[str, Any]:
    """Returns mean and standard error, over the seeds if there are several."""
    if len(group) == 1:
        values = group[0].values[metric]
        return {**mean_and_stderr(values), "over": "users"}
    means = np.array([np.nanmean(e.values[metric]) for e in group])
    users = int((~np.isnan(group[0].values[metric])).sum())
    return {**mean_and_stderr(means), "users": users, "over": "seeds"}
