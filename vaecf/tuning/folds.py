"""Trains and tests a model on every fold, and pools the results."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vaecf import config as config_lib
from vaecf import experiment, files
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data import folds as data_folds
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines, per_user, pooling
from vaecf.evaluation.baselines import BASELINES
from vaecf.experiment import Actions
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import report, tables

_FINISHED = "finished.json"  # in the workdir of a fold: the call that ended


def are_in(directory: str | pathlib.Path) -> bool:
    """Returns whether a directory holds the folds of a dataset."""
    return data_folds.are_in(files.user_path(directory))


def run(
    config: Config,
    workdir: pathlib.Path,
    actions: Actions,
    *,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does what `experiment.run` does on each fold in turn, and pools.

    Fold i has the workdir ``fold<i>`` in `workdir`. A fold that has finished
    the same call is skipped. When all have finished, `workdir` gets the files
    of a run over all users: results.json, per_user.parquet and report.html.

    Returns:
      The pooled results; see `pooling.pool`.

    Raises:
      VaecfError: the input is bad, or `workdir` holds something else.
      Interrupted: training was interrupted; its state is saved.
    """
    root = files.user_path(config.data.dir)
    manifest = data_folds.read_manifest(root)
    _check(root, actions)
    data_folds.open_all(root)  # each fold is that of the manifest
    workdir_lib.require_no_other(workdir, "folds")
    names = [f"fold{i}" for i in range(1, len(manifest["folds"]) + 1)]
    for number, name in enumerate(names, 1):
        where = f"fold {number} of {len(names)}"
        of_fold = config_lib.replace(config, {"data.dir": str(root / name)})
        digest = manifest["folds"][number - 1]
        finished = workdir / name / _FINISHED
        if finished.exists() and workdir_lib.read_json(finished) == _call(
            of_fold, workdir / name, actions, digest
        ):
            log(f"{where} has finished: skipped")
            continue
        log(f"\n{where}")
        only = dataclasses.replace(actions, per_user=None)
        experiment.run(of_fold, workdir / name, only, log=log)
        call = _call(of_fold, workdir / name, actions, digest)
        workdir_lib.write_json(finished, call, digest=True)
    return _pool(config, workdir, names, manifest, actions, log)


def _check(root: pathlib.Path, actions: Actions) -> None:
    for name in ("log_path", "results_dir", "inference_batch_sizes"):
        if getattr(actions, name):
            raise VaecfError(
                f"{name} is for a single run: use it with "
                f"config.data.dir={root / 'fold1'}"
            )
    if (path := actions.per_user) is not None:
        workdir_lib.make_folder(path.parent, f"per_user={path}")
    if not processes.alone():
        raise VaecfError(
            "folds are trained by a single process: run with num_processes=1"
        )


def _call(
    config: Config, workdir: pathlib.Path, actions: Actions, dataset: str
) -> dict[str, Any]:
    """Returns what was asked of a fold, and the digest of its results."""
    settings = config.flat()
    del settings["data.dir"]  # copies of a dataset may be anywhere
    names = ("train", "test", "baselines", "settings", "baselines_tuned")
    asked = {name: getattr(actions, name) for name in (*names, "trace")}
    call = {"config": settings, "dataset": dataset, **asked}
    results = workdir / workdir_lib.RESULTS
    return {
        "call": files.json_sha256(call),
        "results": files.file_sha256(results) if results.exists() else None,
    }


def _pool(
    config: Config,
    workdir: pathlib.Path,
    names: Sequence[str],
    manifest: Mapping[str, Any],
    actions: Actions,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the files of a run for all folds together, and logs a table."""
    folds: list[pooling.Fold] = []
    for name in names:
        results = workdir_lib.read_json(workdir / name / workdir_lib.RESULTS)
        table = workdir / name / workdir_lib.PER_USER
        folds.append((results, per_user.read(table) if table.exists() else {}))
    metric = config.eval.best_metric
    pooled, frames = pooling.pool(folds, config.title, metric)
    path = workdir / workdir_lib.PER_USER
    if frames:
        for file in filter(None, (path, actions.per_user)):
            per_user.write(file, frames.values())
    else:
        path.unlink(missing_ok=True)
    for name, value in (
        (workdir_lib.DATASET, manifest),
        (workdir_lib.CONFIG, config.to_dict()),
        (workdir_lib.RESULTS, pooled),
    ):
        workdir_lib.write_json(workdir / name, value, digest=True)
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    grouped = baselines.grouped(pooled)
    report.write_report(
        workdir / workdir_lib.REPORT,
        config=config.to_dict(),
        dataset={
            "name": manifest["name"],
            "protocol": manifest["protocol"],
            **manifest["counts"],
        },
        records=[],
        results=grouped,
        environment=report.environment(mesh.devices.flat),
        lists={"Folds": dict(zip(names, map(_settings, pooled["folds"])))},
        model=config.title,
        metric=metric,
    )
    if "test" in pooled:
        text = tables.results_table(
            tables.results_rows(grouped, name=config.title),
            protocol=manifest["protocol"],
            dataset=manifest["name"],
            users_left_out=pooled["users_left_out"],
        )
        log(f"\nAll folds\n\n{text}")
    log(
        f"\nreport: {workdir / workdir_lib.REPORT}\n"
        f"results: {workdir / workdir_lib.RESULTS}"
    )
    return pooled


def _settings(fold: Mapping[str, Any]) -> str:
    """Returns one fold's best epoch and settings as text."""
    best = fold["train"]["best_epoch"]
    parts = [f"best epoch {best}"] if best else []
    if "linear" in fold:
        weights = ", ".join(f"{k} {v:g}" for k, v in fold["linear"].items())
        parts.append(f"linear ({weights})")
    parts += [baselines.label(k, fold[k]) for k in BASELINES if k in fold]
    return "; ".join(parts)
