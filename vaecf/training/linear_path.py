"""The linear path of a run: fitted once, kept in the workdir.

linear/item_item.npy   float32 [items, items]
linear/log_share.npy   float32 [items]
linear/fit.json        what it was fitted with, and to
linear/weights.json    {'gain', 'prior', ...}, once they are chosen
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaecf import distributed
from vaecf.data import storage
from vaecf.errors import VaecfError
from vaecf.models import blend, sharding
from vaecf.options import LinearOptions
from vaecf.training import workdir as workdir_lib

FOLDER, WEIGHTS = workdir_lib.LINEAR, workdir_lib.WEIGHTS
FIT = "fit.json"
_ARRAYS = ("item_item", "log_share")


def prepare(
    options: LinearOptions,
    train: Any,
    workdir: pathlib.Path,
    mesh: Mesh,
    *,
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    """The path on the mesh; None if the options have none.

    Fitted the first time, and read again when the run goes on. Its weights are
    those to begin with, also where others are chosen already: the epochs of a
    run must be validated alike.

    Args:
      options: of the run that the workdir belongs to.
      train: Interactions (users x items).
      workdir: held by the caller.
      mesh: ('data', 'item').
      log: gets one line.

    Raises:
      VaecfError: it does not fit memory, or cannot be written or read.
    """
    if not options.l2:
        return None
    with distributed.agreement():  # the others wait until it is written
        if distributed.is_lead():
            _fit_once(options, train, workdir / FOLDER, log)
    return load(workdir, mesh, train.n_items)


def _fit_once(
    options: LinearOptions,
    train: Any,
    folder: pathlib.Path,
    log: Callable[[str], None],
) -> None:
    digest = hashlib.sha256()
    for array in (train.indptr, train.indices):
        digest.update(np.asarray(array).tobytes())
    about = {**dataclasses.asdict(options), "train_sha256": digest.hexdigest()}
    if (folder / FIT).exists():
        if workdir_lib.read_json(folder / FIT) == about:
            return
    elif folder.exists():
        raise VaecfError(
            f"{folder} is in the way of the run's linear path: move it, or "
            "choose another workdir"
        )
    began = time.perf_counter()
    n_items = train.n_items
    fitted = blend.fit(
        train,
        l2=options.l2,
        dropout=options.dropout,
        user_exponent=options.user_exponent,
    )
    with storage.atomic_directory(folder) as fresh:
        for name in _ARRAYS:
            np.save(fresh / f"{name}.npy", fitted[name][..., :n_items])
        workdir_lib.write_json(fresh / FIT, about)
    seconds = time.perf_counter() - began
    log(f"linear path: fitted to {n_items:,} items in {seconds:.1f} s")


def load(directory: pathlib.Path, mesh: Mesh, n_items: int) -> dict[str, Any]:
    """The path of a workdir on a mesh, with the weights to begin with.

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    rows = sharding.padded_items(n_items, mesh.shape[sharding.ITEM])
    padded = {
        name: _read(directory / FOLDER / f"{name}.npy", n_items, rows)
        for name in _ARRAYS
    }
    specs = sharding.specs(padded, blend.PARTITION)
    path = distributed.put(padded, sharding.shardings(mesh, specs))
    return with_weights(path, gain=blend.GAIN, prior=blend.PRIOR)


def _read(path: pathlib.Path, n_items: int, rows: int) -> np.ndarray:
    """An array of the file with its last (item) axis padded to `rows`."""
    try:
        # Mapped: the matrix is in memory once, as it will be used.
        host = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise VaecfError(
            f"{path}: the linear path of the model cannot be read ({error}); "
            f"remove {path.parent} and fit it again (--train)"
        ) from None
    if host.shape != (n_items,) * host.ndim:
        raise VaecfError(
            f"{path}: of {host.shape[-1]} items, and the model has {n_items}"
        )
    padded = np.zeros((*host.shape[:-1], rows), np.float32)
    padded[..., :n_items] = host
    return padded


def read_weights(directory: pathlib.Path) -> dict[str, Any]:
    """What `write_weights` kept; {} if nothing was chosen yet.

    Raises:
      VaecfError: the file is damaged.
    """
    path = directory / FOLDER / WEIGHTS
    if not path.exists():
        return {}
    kept = workdir_lib.read_json(path)
    if not isinstance(kept, dict) or not all(
        isinstance(kept.get(name), float | int) for name in ("gain", "prior")
    ):
        raise VaecfError(
            f"{path}: not the weights of a blend; remove it, and they are "
            "chosen again (--test)"
        )
    return kept


def with_weights(
    path: Mapping[str, Any], *, gain: float, prior: float
) -> dict[str, Any]:
    """The path with other weights."""
    return {
        **path,
        "gain": jnp.float32(gain),
        "prior": jnp.float32(prior),
    }


def save(path: Mapping[str, Any], n_items: int, target: pathlib.Path) -> None:
    """Writes the path as it is on the mesh, with the weights it has now.

    Not a copy of the files that it was read from: a temporary directory's are
    gone, and a workdir's may be those of another model by now.

    Args:
      path: of `load`.
      n_items: the items of the model; padding is left out.
      target: directory to write it into.
    """
    (target / FOLDER).mkdir()
    for name in _ARRAYS:
        host = np.asarray(path[name])[..., :n_items]
        np.save(target / FOLDER / f"{name}.npy", host)
    write_weights(
        target, {name: float(path[name]) for name in ("gain", "prior")}
    )


def share(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives the path of a run to another one of the same options and data."""
    if (target / FOLDER).exists():
        return
    with storage.atomic_directory(target / FOLDER) as fresh:
        for file in (*(f"{name}.npy" for name in _ARRAYS), FIT):
            try:
                os.link(source / FOLDER / file, fresh / file)
            except OSError:  # a file system without links
                shutil.copyfile(source / FOLDER / file, fresh / file)


def write_weights(directory: pathlib.Path, chosen: Mapping[str, Any]) -> None:
    """Keeps the weights beside the path."""
    workdir_lib.write_json(directory / FOLDER / WEIGHTS, dict(chosen))
