"""A run's directory: its layout, its lock, and its identity.

config.json      settings of the run
dataset.json     manifest of the dataset
items.parquet    raw item ids, so that the directory is self-contained
dataset/         the whole dataset, if `vaecf.train` got it in memory
linear/          the linear branch of a blend
fitted/          parameters of a model that is fitted in one go
refit/E+N/       a run that continued from epoch E, for N epochs on all users
checkpoints/     latest (to resume) and best (to use)
metrics.jsonl    one record per line;  tensorboard/  the same as events
wandb.json       id of the tracker's run, as in mlflow.json
results.json     metrics of the test users, and the speed of training
per_user.parquet the same metrics per test user and model
report.html      the run as a page
finished.json    the call that ended, in the workdir of a fold
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.files import (  # noqa: F401  (how a workdir's files are written)
    atomic_directory,
    atomic_file,
    file_sha256,
    read_json,
    remove_leftovers,
    scratch_directory,
    write_bytes,
    write_json,
)

CONFIG, DATASET, ITEMS = "config.json", "dataset.json", "items.parquet"
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
RESULTS, PER_USER, REPORT = "results.json", "per_user.parquet", "report.html"
LINEAR, WEIGHTS, FITTED = "linear", "weights.json", "fitted"
REFIT = "refit"
# Name of a setting in older runs -> its name now.
_RENAMED = {"train.alternate": "train.alternating_epochs"}
MEMBERS, SWEEP = "members.csv", "sweep.json"

# What a directory can hold, and the file that identifies it.
_KINDS = {
    "run": ("a run", CONFIG),
    "population": ("a population", MEMBERS),
    "sweep": ("a sweep", SWEEP),
    "dataset": ("a dataset", "manifest.json"),
    "folds": ("a run on folds", "fold1"),
}


def make_folder(folder: pathlib.Path, setting: str) -> None:
    """Creates a directory for output.

    Raises:
      VaecfError: it cannot be written; names `setting`, as 'results_dir=...'.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise VaecfError(f"{setting} cannot be written ({reason})")


# --- Lock and identity ------------------------------------------------------


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Locks the workdir for this process; creates it if necessary.

    The operating system releases the lock when the process ends.

    Raises:
      VaecfError: another process holds the lock and `wait` is false, or the
        directory cannot be created.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise VaecfError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose "
            "another workdir"
        ) from error
    with lock:
        try:
            how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.flock(lock, how)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise VaecfError(
                f"workdir {workdir} is in use by process {holder}: wait for "
                "that process, or choose another workdir"
            ) from None
        with contextlib.suppress(OSError):  # a full disk
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        remove_leftovers(workdir, below=True)
        yield


def is_in_use(workdir: pathlib.Path) -> bool:
    """Returns whether a process of this host has locked the workdir."""
    try:
        lock = open(workdir / ".lock")  # noqa: SIM115  (closed below)
    except OSError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def require_no_other(workdir: pathlib.Path, kind: str) -> None:
    """Raises VaecfError if the directory holds another kind of content.

    Kinds are 'run', 'population', 'sweep', 'dataset' and 'folds'. The pooled
    results of folds are in files of the same names as those of a run.
    """
    has_folds = (workdir / _KINDS["folds"][1]).exists()
    if (workdir / _KINDS[kind][1]).exists() and has_folds == (kind == "folds"):
        return
    for other, (name, file) in _KINDS.items():
        if other != kind and (workdir / file).exists():
            raise VaecfError(
                f"workdir {workdir} holds {name} ({file}): {_KINDS[kind][0]} "
                "needs a directory of its own"
            )


def read_config(workdir: pathlib.Path) -> Config:
    """Returns the settings of the run in `workdir`.

    A setting that did not exist when the run was made has its default, which
    must therefore keep what runs did before. Runs of version 0.1.0 have
    settings under older names.

    Raises:
      VaecfError: config.json is missing, damaged, or has an unknown key.
    """
    values = read_json(workdir / CONFIG)
    if not isinstance(values, dict):
        raise VaecfError(f"{workdir / CONFIG}: not the settings of a run")
    flat = config_lib.flatten(values)
    for old, new in _RENAMED.items():
        if old in flat:
            flat[new] = flat.pop(old)
    try:
        return config_lib.replace(Config(), flat)
    except VaecfError as error:
        raise VaecfError(f"{workdir / CONFIG}: {error}") from None


def write_identity(
    workdir: pathlib.Path, manifest: Mapping[str, Any], items: Any
) -> None:
    """Writes what a model needs of its dataset; `items` is an `IdTable`."""
    with atomic_file(workdir / ITEMS) as temporary:
        items.write(temporary, "item")
    tables = {ITEMS: file_sha256(workdir / ITEMS)}
    value = {**manifest, "tables": tables}
    write_json(workdir / DATASET, value, digest=True)


def read_manifest(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads ``dataset.json``, or a dataset's ``manifest.json``.

    Returns:
      The manifest, and the SHA-256 of the id tables beside it by file name
      ({} if an earlier version has written the file).

    Raises:
      VaecfError: the file is missing or damaged.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise VaecfError(f"{path}: not the manifest of a dataset")
    tables = manifest.pop("tables", {})
    return manifest, tables if isinstance(tables, dict) else {}


def has_model(workdir: pathlib.Path) -> bool:
    """Returns whether a run has begun to train, or has fitted, its model."""
    return any((workdir / name).is_dir() for name in (CHECKPOINTS, FITTED))


def check_or_create(
    workdir: pathlib.Path, config: Config, dataset: Any, *, train: bool = True
) -> None:
    """Records what the run is, or checks that it is still the same run.

    Args:
      workdir: a directory that the caller has `locked`.
      train: False for a call that only scores: it may use another precision,
        and nothing is written.

    Raises:
      VaecfError: the workdir holds another run; names the keys that differ.
    """
    require_no_other(workdir, "run")
    # A run without a model has no results that a change could invalidate.
    if has_model(workdir):
        old = read_config(workdir)
        if not train:
            old = dataclasses.replace(old, precision=config.precision)
        _check_same(workdir, old, config, dataset)
    elif train:
        write_identity(workdir, dataset.manifest, dataset.items)
        # Blend weights of an earlier model do not fit the new one.
        (workdir / LINEAR / WEIGHTS).unlink(missing_ok=True)
    if train:
        write_json(workdir / CONFIG, config.to_dict(), digest=True)


def _check_same(
    workdir: pathlib.Path, old: Config, new: Config, dataset: Any
) -> None:
    was, now = old.flat(), new.flat()
    changes = "; ".join(
        f"config.{key} was {was[key]!r} and is {now[key]!r}"
        for key in differing_keys(old, new)
    )
    if changes:
        raise VaecfError(
            f"workdir {workdir} holds a run with another config: {changes}. "
            "Use the same values to resume it, or choose another workdir"
        )
    manifest, _ = read_manifest(workdir / DATASET)
    other = dataset.manifest
    keys = sorted(manifest.keys() | other.keys())
    if keys := [k for k in keys if manifest.get(k, ...) != other.get(k, ...)]:
        raise VaecfError(
            f"workdir {workdir} holds a run on another dataset: "
            f"{manifest.get('name')!r}, and {dataset.path} is {dataset.name!r} "
            f"(they differ in {', '.join(keys)}). Use the dataset of the run, "
            "or choose another workdir"
        )


def differing_keys(old: Config, new: Config) -> list[str]:
    """Returns the keys of settings whose change forbids resuming."""
    was, now = old.flat(), new.flat()
    return [
        key
        for key, field in config_lib.settings().items()
        if was[key] != now[key] and not field.metadata["resumable"]
    ]
