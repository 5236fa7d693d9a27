"""A run's directory: who may write it, and what it belongs to.

config.json      options of the run
dataset.json     the dataset's manifest
items.parquet    raw item ids, so that the directory is self-contained
linear/          the linear path beside the model, if it has one
checkpoints/     latest (to resume) and best (to use)
metrics.jsonl    one record a line;  tensorboard/  the same as events
results.json     metrics of --test and the speed of training
per_user.parquet the same of every test user, model by model
report.html      the run as a page
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vaecf import options as options_lib
from vaecf.data import id_files
from vaecf.data.ids import IdTable
from vaecf.errors import VaecfError
from vaecf.options import Options

CONFIG, DATASET, ITEMS = "config.json", "dataset.json", "items.parquet"
RESULTS, PER_USER = "results.json", "per_user.parquet"
LINEAR, WEIGHTS = "linear", "weights.json"
MEMBERS, SWEEP = "members.csv", "sweep.json"

# What a workdir may be, what it is called, and the file that it is known by.
_KINDS = {
    "run": ("a run", CONFIG),
    "population": ("a population", MEMBERS),
    "sweep": ("a sweep", SWEEP),
}


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process; the lock dies with the process.

    Raises:
      VaecfError: another process holds it, or it cannot be created.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115  (below)
    except OSError as error:
        raise VaecfError(
            f"--workdir={workdir}: cannot be written ({error.strerror})"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise VaecfError(
                f"--workdir={workdir} is in use by process {holder}: wait for "
                "it, or choose another workdir"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def require_no_other(workdir: pathlib.Path, kind: str) -> None:
    """Refuses a directory that is another kind's, which would lose its own.

    Args:
      workdir: where `kind` is to be.
      kind: out of `_KINDS`.

    Raises:
      VaecfError: names what is there.
    """
    if (workdir / _KINDS[kind][1]).exists():
        return
    for other, (name, file) in _KINDS.items():
        if other != kind and (workdir / file).exists():
            raise VaecfError(
                f"--workdir={workdir} holds {name} ({file}): {_KINDS[kind][0]} "
                "needs a directory of its own"
            )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    os.replace(temporary, path)


def read_json(path: pathlib.Path) -> Any:
    """JSON of a file.

    Raises:
      VaecfError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise VaecfError(
            f"{path}: no such file; is its directory the workdir of a run?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VaecfError(f"{path}: not JSON ({error})") from None


def claim(
    workdir: pathlib.Path, options: Options, dataset: Any, *, train: bool = True
) -> None:
    """Writes what the run is, or checks that it is still the same run.

    Args:
      workdir: held by `locked`.
      options: of this call.
      dataset: of this call.
      train: False for a call that only scores: it may do so in another
        precision, and changes nothing here.

    Raises:
      VaecfError: the workdir holds a run with another config or dataset; names
        the keys that differ.
    """
    require_no_other(workdir, "run")
    config = options.to_dict()
    # Before its first checkpoint a run has nothing to be the same as.
    if (workdir / "checkpoints").is_dir():
        # Also that of a run from before a key was.
        old = options_lib.with_later_keys(read_json(workdir / CONFIG))
        if not train:
            old["precision"] = config["precision"]
        _check_config(workdir, old, config)
        _check_dataset(workdir, read_json(workdir / DATASET), dataset)
    elif train:
        write_model_identity(workdir, dataset.manifest, dataset.items)
        # Chosen for a model that is gone.
        (workdir / LINEAR / WEIGHTS).unlink(missing_ok=True)
    if train:
        write_json(workdir / CONFIG, config)


def write_model_identity(
    directory: pathlib.Path, manifest: Mapping[str, Any], items: IdTable
) -> None:
    """Writes the manifest and the item ids, which scoring needs."""
    id_files.write_ids(directory / ITEMS, "item", items)
    write_json(directory / DATASET, dict(manifest))


def _check_config(
    workdir: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    keys = options_lib.differing_keys(old, new)
    if not keys:
        return
    flat_old, flat_new = options_lib.flatten(old), options_lib.flatten(new)
    changes = "; ".join(
        f"config.{key} was {flat_old.get(key)!r} and is {flat_new.get(key)!r}"
        for key in keys
    )
    raise VaecfError(
        f"--workdir={workdir} holds a run with another config: {changes}. "
        "Use the same values to go on with it, or another workdir"
    )


def _check_dataset(
    workdir: pathlib.Path, old: Mapping[str, Any], dataset: Any
) -> None:
    if old == dataset.manifest:
        return
    keys = sorted(
        key
        for key in old.keys() | dataset.manifest.keys()
        if old.get(key) != dataset.manifest.get(key)
    )
    raise VaecfError(
        f"--workdir={workdir} holds a run on another dataset: "
        f"{old.get('name')!r}, and {dataset.path} is {dataset.name!r} (they "
        f"differ in {', '.join(keys)}). Use the dataset it was trained on, or "
        "another workdir"
    )
