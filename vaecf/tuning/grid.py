"""Trains a grid of settings as one population, a workdir per member."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import metrics
from vaecf.reporting import tables
from vaecf.training import loop
from vaecf.training.input_pipeline import InputPipeline
from vaecf.tuning import population

_FIGURES = ("best_epoch", "epochs", "seconds")


def grid(
    values: Mapping[str, Sequence[Any]], base: Config
) -> dict[str, Config]:
    """Returns the config of every combination of values, by a short name.

    Args:
      values: {'seed': [0, 1], 'loss.gamma': [0.01, 0.02]}.
      base: the settings that all members share.

    Returns:
      {'seed=0,gamma=0.01': config, ...}; the first setting varies slowest.

    Raises:
      VaecfError: a setting is unknown, has no values or one value twice, or
        the config refuses a value.
    """
    if not values or not all(values.values()):
        raise VaecfError(
            "members: give a setting and its values, such as seed=0,1,2"
        )
    configs: dict[str, Config] = {}
    for combination in itertools.product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        try:
            config = config_lib.replace(base, changes)
        except VaecfError as error:
            raise VaecfError(f"members: {error}") from None
        flat = config_lib.flatten(config.to_dict())
        # No two settings that may vary end in the same word.
        name = ",".join(f"{k.rpartition('.')[2]}={flat[k]}" for k in values)
        if name in configs:
            raise VaecfError(f"members: {name} is there twice: remove one")
        configs[name] = config
    return configs


def train(
    values: Mapping[str, Sequence[Any]],
    base: Config,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains the members of a grid, or resumes them; writes members.csv.

    Args:
      values: as for `grid`.
      base: the settings that all members share.
      workdir: gets the workdir of each member, by the member's name. Members
        of earlier calls stay, and trained members are not trained again.
      log: receives one line of text at a time.

    Returns:
      A row per member, the best first: 'number' (its name), 'value' of the
      best metric, 'best_epoch', 'epochs', 'seconds', 'error' and 'params'.

    Raises:
      VaecfError: bad input, or every member failed.
      KeyboardInterrupt: interrupted, with everything saved.
    """
    members = grid(values, base)
    population.check([*members.values()])
    metrics.parse(base.eval.best_metric)
    dataset = find_dataset(base.data.dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        workdir_lib.require_no_other(workdir, "population")
        for name, config in members.items():
            stack.enter_context(workdir_lib.locked(workdir / name))
            workdir_lib.check_or_create(workdir / name, config, dataset)
        log(
            f"training {len(members)} members of {base.title} on "
            f"{dataset.name}: {dataset.train.n_users:,} users, "
            f"{dataset.n_items:,} items, {dataset.train.nnz:,} interactions"
        )
        directories = [workdir / name for name in members]
        configs = [*members.values()]
        rows = population.train_members(
            configs,
            directories,
            dataset,
            # One progress bar: the members advance at about the same speed.
            lambda m, pipeline: _train_member(
                configs[m], directories[m], dataset, pipeline, bar=m == 0
            ),
            log=log,
        )
        for row in rows:
            row["params"] = {key: row["params"][key] for key in values}
        rows.sort(key=lambda row: (bool(row["error"]), -(row["value"] or 0)))
        _summarise(rows, workdir / workdir_lib.MEMBERS, base, log)
    return rows


def _train_member(
    config: Config,
    directory: pathlib.Path,
    dataset: Dataset,
    pipeline: InputPipeline,
    bar: bool,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": directory.name,
        "params": config_lib.flatten(config.to_dict()),
        **dict.fromkeys(("value", *_FIGURES, "error")),
    }
    try:
        result = loop.train(
            config,
            dataset,
            directory,
            show_progress=None if bar else False,
            pipeline=pipeline,
            log=lambda line: None,
        )
        row["value"] = result.progress.best
        if config.linear.l2 and result.progress.best is not None:
            row["value"] = population.tuned_value(directory, dataset)
    except VaecfError as error:
        return row | {"error": str(error)}
    path, summary = directory / workdir_lib.RESULTS, result.summary
    results = workdir_lib.read_json(path) if path.exists() else {}
    # Other results belong to a model of fewer epochs.
    if results.get("train", {}).get("epochs") != summary["epochs"]:
        (directory / workdir_lib.PER_USER).unlink(missing_ok=True)
        workdir_lib.write_json(path, {"train": summary})
    return row | {name: summary[name] for name in _FIGURES}


def _summarise(
    rows: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
    base: Config,
    log: Callable[[str], None],
) -> None:
    metric = base.eval.best_metric
    table = [
        {
            "member": row["number"],
            **row["params"],
            f"validation/{metric}": row["value"],
            **{name: row[name] for name in (*_FIGURES, "error")},
        }
        for row in rows
    ]
    csv = pd.DataFrame(table).to_csv(index=False)
    workdir_lib.write_bytes(path, csv.encode())
    for row in rows:
        if row["error"] is not None:
            log(f"{row['number']} failed: {row['error']}")
    sound = [{**row, "params": {}} for row in rows if row["error"] is None]
    if not sound:
        raise VaecfError(
            "every member failed, see above: change the settings, and choose "
            "another workdir"
        )
    title = f"{len(sound)} members by validation users"
    text = tables.trials_table(sound, metric=metric, title=title)
    log(f"\n{text}\n\ntable: {path}")
