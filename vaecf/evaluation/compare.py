"""Finished runs side by side: seeds grouped, differences paired by user."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError
from vaecf.evaluation import evaluator, significance

_MOST_SETTINGS = 3  # in a group's name
_ABOUT_USERS = ("model", "user", "fold_in", "held_out")


class Entry(NamedTuple):
    """Per-user metrics of one model of one run (or file).

    Attributes:
      path: the run or file.
      model: its name; a baseline's has its settings.
      config: of the run; None for baselines and files.
      about: {'user', 'fold_in', 'held_out'}, arrays [U].
      values: {metric: float64 [U]}, NaN for users with nothing held out.
      validation: {metric: mean over the validation users}, {} if not known.
    """

    path: pathlib.Path
    model: str
    config: Mapping[str, Any] | None
    about: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    validation: dict[str, float]

    @property
    def seed(self) -> int | None:
        """The seed of a run's model."""
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
    """Reads runs, groups their seeds, and compares with a reference.

    Args:
      paths: workdirs, or Parquet or CSV files of --per_user.
      metric: what to compare by; the first run's eval.best_metric by default.
      reference: a group's name, or one of `paths` for its model; by default
        the best on the validation users, or the first if that is not known.
      baselines: compare those of the runs too; one that several runs have
        counts once.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Returns:
      {'dataset', 'protocol', 'metric', 'metrics', 'users', 'left_out',
      'reference', 'runs': [{'path', 'group', 'seed', 'metrics'}], 'groups':
      {name: {'seeds', 'metrics', 'validation', 'history_length'}},
      'comparisons': {name: `significance.Paired`'s fields}}; JSON values. A
      group's standard error is over its seeds, or with one seed over users.

    Raises:
      VaecfError: the runs do not compare; says which and why.
    """
    if not paths:
        raise VaecfError(
            "give the runs to compare: workdirs, or files of --per_user"
        )
    manifest = _manifest(paths)
    entries = [e for path in paths for e in _read(path, baselines=baselines)]
    _check_users(entries)
    metric, metrics = _metrics(entries, metric)
    groups = _groups(entries)
    about = entries[0].about
    real_U = ~np.isnan(entries[0].values[metric])
    mean_U = {
        name: np.mean([e.values[metric] for e in group], axis=0)
        for name, group in groups.items()
    }
    chosen = _reference(groups, reference, metric)
    against = {
        name: values[real_U]
        for name, values in mean_U.items()
        if name != chosen
    }
    paired = significance.paired(
        against, mean_U[chosen][real_U], resamples=resamples, seed=seed
    )
    summaries = {
        name: {
            "seeds": len(group),
            "metrics": {m: _summary(group, m) for m in metrics},
            "validation": _validation(group, metric),
            "history_length": evaluator.by_history_length(
                mean_U[name], about["fold_in"]
            ),
        }
        for name, group in groups.items()
    }
    return {
        "dataset": manifest.get("name"),
        "protocol": manifest.get("protocol"),
        "metric": metric,
        "metrics": metrics,
        "users": int(real_U.sum()),
        "left_out": int((~real_U).sum()),
        "reference": chosen,
        "runs": [
            {
                "path": str(e.path),
                "group": name,
                "seed": e.seed,
                "metrics": {m: _summary([e], m) for m in metrics},
            }
            for name, group in groups.items()
            for e in group
        ],
        "groups": summaries,
        "comparisons": {name: p._asdict() for name, p in paired.items()},
    }


def write(path: pathlib.Path, compared: Mapping[str, Any]) -> None:
    """All numbers of a comparison as JSON.

    Raises:
      VaecfError: it cannot be written.
    """
    try:
        workdir_lib.write_json(path, compared)
    except OSError as error:
        raise VaecfError(
            f"--json={path} cannot be written ({error.strerror})"
        ) from None


# --- Reading ----------------------------------------------------------------


def _manifest(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    """The dataset of all runs; {} if there are only files."""
    found: dict[pathlib.Path, Any] = {}
    for path in paths:
        if not path.is_dir():
            continue
        found[path] = workdir_lib.read_json(path / workdir_lib.DATASET)
        first = next(iter(found))
        if found[path] != found[first]:
            raise VaecfError(
                f"{first} and {path} are runs on different datasets "
                f"({found[first].get('name')!r}, {found[path].get('name')!r}; "
                "their manifests differ): compare runs on one prepared dataset"
            )
    return next(iter(found.values()), {})


def _read(path: pathlib.Path, *, baselines: bool) -> list[Entry]:
    """The models of a run or file, the run's own first."""
    if not path.is_dir():
        frame = _frame(path)
        return _entries(path, frame, {}, {})
    config = workdir_lib.read_config(path)
    file = path / workdir_lib.PER_USER
    if not file.exists():
        raise VaecfError(
            f"{path}: no per-user metrics; make them with python "
            f"experiments/main.py --workdir={shlex.quote(str(path))} --test"
        )
    own = config.title
    results = workdir_lib.read_json(path / workdir_lib.RESULTS)
    validation = {own: results.get("validation", {})}
    for name, result in results.items():
        if isinstance(result, Mapping) and "validation" in result:
            validation[name] = result["validation"]
    entries = _entries(path, _frame(file), {own: config.to_dict()}, validation)
    return [e for e in entries if baselines or e.model == own]


def _frame(path: pathlib.Path) -> Any:
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
    missing = [name for name in _ABOUT_USERS if name not in frame.columns]
    if missing or not len(frame):
        raise VaecfError(
            f"{path}: not a file of --per_user (it has no "
            f"{', '.join(missing) or 'rows'})"
        )
    return frame


def _entries(
    path: pathlib.Path,
    frame: Any,
    configs: Mapping[str, Any],
    validation: Mapping[str, Any],
) -> list[Entry]:
    entries = []
    for (model,), part in frame.group_by("model", maintain_order=True):
        # 'ease (l2 500)' is results.json's 'ease'.
        known = validation.get(model, validation.get(model.split(" (")[0], {}))
        entries.append(
            Entry(
                path,
                model,
                configs.get(model),
                {name: part[name].to_numpy() for name in _ABOUT_USERS[1:]},
                {
                    name: part[name].cast(float).fill_null(np.nan).to_numpy()
                    for name in part.columns
                    if name not in _ABOUT_USERS
                },
                {name: cell["mean"] for name, cell in known.items()},
            )
        )
    return entries


def _check_users(entries: Sequence[Entry]) -> None:
    first = entries[0]
    for entry in entries[1:]:
        for name, values in first.about.items():
            if not np.array_equal(values, entry.about[name]):
                raise VaecfError(
                    f"{first.path} and {entry.path} have different test users "
                    f"(column {name}): compare runs on one prepared dataset"
                )


def _metrics(
    entries: Sequence[Entry], asked: str | None
) -> tuple[str, list[str]]:
    """(what to compare by, all metrics that every entry has)."""
    metrics = [
        m for m in entries[0].values if all(m in e.values for e in entries)
    ]
    configs = [e.config for e in entries if e.config is not None]
    if asked is None and configs:
        asked = configs[0]["eval"]["best_metric"]
    metric = asked or (metrics[0] if metrics else "ndcg@100")
    if metric not in metrics:
        lacking = next(e for e in entries if metric not in e.values)
        raise VaecfError(
            f"{lacking.path}: no per-user {metric} of {lacking.model}; "
            f"there is {', '.join(lacking.values) or 'nothing'}: choose "
            "--metric among them, or run --test with it in "
            "config.eval.metrics"
        )
    return metric, metrics


# --- Groups -----------------------------------------------------------------


def _groups(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries by name: runs that differ in the seed alone share one."""
    models: dict[str, list[Entry]] = {}
    others: dict[str, list[Entry]] = {}
    several = {e.model for e in entries if e.config is None}
    for entry in entries:
        if entry.config is not None:
            key = json.dumps(_identity(entry.config), sort_keys=True)
            group = models.setdefault(key, [])
            twin = next((e for e in group if e.seed == entry.seed), None)
            if twin is not None:
                raise VaecfError(
                    f"{twin.path} and {entry.path} are the same run: config "
                    f"and seed {entry.seed} are equal; give one of them"
                )
            group.append(entry)
        elif entry.path.is_dir():
            # A baseline that was fitted in several runs is one.
            others.setdefault(entry.model, [entry])
        else:
            name = entry.model
            if name in others or _in_another_file(entry, entries):
                name = f"{entry.model} in {entry.path}"
            others[name] = [entry]
    named = {
        name if name not in several else f"{name} (run)": group
        for name, group in zip(_names(list(models.values())), models.values())
    }
    return named | others


def _in_another_file(entry: Entry, entries: Sequence[Entry]) -> bool:
    return any(
        e.model == entry.model and e.path != entry.path and e.config is None
        for e in entries
    )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes runs alike: all but the seed, and where a copy of data is."""
    flat = config_lib.flatten(config)
    return {k: v for k, v in flat.items() if k not in ("seed", "data.dir")}


def _names(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """'mult_vae (optimizer.learning_rate=0.002)': how namesakes differ.

    Those that differ in more than a name can show are called by their first
    run.
    """
    flats = [_identity(group[0].config or {}) for group in groups]
    names = []
    for group, flat in zip(groups, flats):
        name = group[0].model
        alike = [other for g, other in zip(groups, flats) if g[0].model == name]
        differing = [
            key
            for key in flat
            if any(other.get(key) != flat[key] for other in alike)
        ]
        settings = ", ".join(f"{key}={flat[key]}" for key in differing)
        if len(differing) > _MOST_SETTINGS:
            settings = str(group[0].path)
        names.append(f"{name} ({settings})" if settings else name)
    return names


def _reference(
    groups: Mapping[str, Sequence[Entry]], asked: str | None, metric: str
) -> str:
    if asked is not None:
        if asked in groups:
            return asked
        for name, group in groups.items():
            if any(e.path == pathlib.Path(asked) for e in group):
                return name
        # 'ease' for 'ease (l2 500)', if there is one.
        short = [name for name in groups if name.split(" (")[0] == asked]
        if len(short) == 1:
            return short[0]
        raise VaecfError(
            f"--reference={asked}: use one of the runs or of "
            f"{'; '.join(groups)}"
        )
    values = {
        name: _validation(group, metric) for name, group in groups.items()
    }
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < len(values):
        return next(iter(groups))
    return max(known, key=known.__getitem__)


def _validation(group: Sequence[Entry], metric: str) -> float | None:
    """Mean over seeds; None unless all are known."""
    values = [entry.validation.get(metric) for entry in group]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return float(np.mean(numbers))


def _summary(group: Sequence[Entry], metric: str) -> dict[str, Any]:
    """Over the seeds if there are several, else over users."""
    if len(group) == 1:
        values = group[0].values[metric]
        return {**evaluator.mean_and_stderr(values), "over": "users"}
    means = np.array([np.nanmean(e.values[metric]) for e in group])
    over_seeds = evaluator.mean_and_stderr(means)
    users = int((~np.isnan(group[0].values[metric])).sum())
    return {**over_seeds, "users": users, "over": "seeds"}
