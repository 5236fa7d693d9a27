"""A run's directory: its layout, its lock, and atomic writes.

config.json      settings of the run
dataset.json     manifest of the dataset
items.parquet    raw item ids, so that the directory is self-contained
linear/          the linear branch of a blend
checkpoints/     latest (to resume) and best (to use)
metrics.jsonl    one record per line;  tensorboard/  the same as events
results.json     metrics of the test users, and the speed of training
per_user.parquet the same metrics per test user and model
report.html      the run as a page
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.errors import VaecfError

CONFIG, DATASET, ITEMS = "config.json", "dataset.json", "items.parquet"
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
RESULTS, PER_USER, REPORT = "results.json", "per_user.parquet", "report.html"
LINEAR, WEIGHTS = "linear", "weights.json"
MEMBERS, SWEEP = "members.csv", "sweep.json"

# What a directory can hold, and the file that identifies it.
_KINDS = {
    "run": ("a run", CONFIG),
    "population": ("a population", MEMBERS),
    "sweep": ("a sweep", SWEEP),
}


# --- Atomic writes ----------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path whose file replaces `path` at the end.

    The temporary file is flushed to the disk before it is renamed, so `path`
    always holds a whole file: the old one until the block succeeds. Parent
    directories are created.

    Raises:
      VaecfError: the file cannot be written.
    """
    target = pathlib.Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise VaecfError(
            f"cannot write {target}: {error.strerror or error}; free space or "
            "choose another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # its parent may be a file
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces a file atomically; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory to fill, which replaces `directory` at the end.

    The new files are flushed to the disk first. If the block raises,
    `directory` stays as it is and the new directory is removed.

    Raises:
      VaecfError: the disk or the permissions do not allow it.
    """
    target = pathlib.Path(os.path.realpath(directory))
    mark = secrets.token_hex(8)
    fresh = target.parent / f".{target.name}.tmp-{mark}"
    old = target.parent / f".{target.name}.old-{mark}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
        _sync(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VaecfError(f"cannot write {directory}: {reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)


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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      VaecfError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = str(error.strerror).lower()  # such as 'no such file or ...'
        raise VaecfError(
            f"{path}: {reason}; is its directory the workdir of a run?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VaecfError(f"{path}: not JSON ({error})") from None


def _sync(path: pathlib.Path) -> None:
    """Makes a file's bytes, or renames within a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def require_no_other(workdir: pathlib.Path, kind: str) -> None:
    """Raises VaecfError if the directory holds another kind of content.

    Kinds are 'run', 'population' and 'sweep'.
    """
    if (workdir / _KINDS[kind][1]).exists():
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
    must therefore keep what runs did before.

    Raises:
      VaecfError: config.json is missing, damaged, or has an unknown key.
    """
    values = read_json(workdir / CONFIG)
    if not isinstance(values, dict):
        raise VaecfError(f"{workdir / CONFIG}: not the settings of a run")
    return config_lib.replace(Config(), config_lib.flatten(values))


def write_identity(
    workdir: pathlib.Path, manifest: Mapping[str, Any], items: Any
) -> None:
    """Writes what a model needs of its dataset; `items` is an `IdTable`."""
    with atomic_file(workdir / ITEMS) as temporary:
        items.write(temporary, "item")
    write_json(workdir / DATASET, dict(manifest))


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
    # A run without a checkpoint has no results that a change could invalidate.
    if (workdir / CHECKPOINTS).is_dir():
        old = read_config(workdir)
        if not train:
            old = dataclasses.replace(old, precision=config.precision)
        _check_same(workdir, old, config, dataset)
    elif train:
        write_identity(workdir, dataset.manifest, dataset.items)
        # Blend weights of an earlier model do not fit the new one.
        (workdir / LINEAR / WEIGHTS).unlink(missing_ok=True)
    if train:
        write_json(workdir / CONFIG, config.to_dict())


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
    manifest, other = read_json(workdir / DATASET), dataset.manifest
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
