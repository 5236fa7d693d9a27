"""The linear branch of a run: fitted once, kept in the workdir.

linear/log_share.npy   float32 [items]
linear/item_item.npy   float32 [items, items]; or, of a lower rank,
linear/{input_factors,output_factors,self_weight}.npy
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

from vaecf import workdir as workdir_lib
from vaecf.config import LinearConfig
from vaecf.errors import VaecfError
from vaecf.models import blend
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

FOLDER, WEIGHTS = workdir_lib.LINEAR, workdir_lib.WEIGHTS
FIT = "fit.json"


def prepare(
    config: LinearConfig,
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
      config: of the run that the workdir belongs to.
      train: Interactions (users x items).
      workdir: held by the caller.
      mesh: ('data', 'item').
      log: gets one line.

    Raises:
      VaecfError: it does not fit memory, or cannot be written or read.
    """
    if not config.l2:
        return None
    with processes.agreement():  # the others wait until it is written
        if processes.is_lead():
            _fit_once(config, train, workdir / FOLDER, log)
    return load(workdir, mesh, config, train.n_items)


def _fit_once(
    config: LinearConfig,
    train: Any,
    folder: pathlib.Path,
    log: Callable[[str], None],
) -> None:
    digest = hashlib.sha256()
    for array in (train.indptr, train.indices):
        digest.update(np.asarray(array).tobytes())
    about = {**dataclasses.asdict(config), "train_sha256": digest.hexdigest()}
    about["rank"] = blend.effective_rank(config.rank, train.n_items)
    if (folder / FIT).exists():
        # Those of before there was a rank are whole.
        if {"rank": 0, **workdir_lib.read_json(folder / FIT)} == about:
            return
    elif folder.exists():
        raise VaecfError(
            f"{folder} is in the way of the run's linear branch: move it, or "
            "choose another workdir"
        )
    began = time.perf_counter()
    n_items = train.n_items
    fitted = blend.fit(train, **dataclasses.asdict(config))
    with workdir_lib.atomic_directory(folder) as fresh:
        for name, shape in blend.shapes(config.rank, n_items).items():
            _write(fresh / f"{name}.npy", fitted[name], shape)
        workdir_lib.write_json(fresh / FIT, about)
    seconds = time.perf_counter() - began
    rank = f" at rank {about['rank']:,}" if about["rank"] else ""
    log(f"linear branch: fitted to {n_items:,} items{rank} in {seconds:.1f} s")


def load(
    directory: pathlib.Path, mesh: Mesh, config: LinearConfig, n_items: int
) -> dict[str, Any]:
    """The path of a workdir on a mesh, with the weights to begin with.

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    rows = mesh_lib.padded_items(n_items, mesh.shape[mesh_lib.ITEM])
    padded = {
        name: _read(directory / FOLDER / f"{name}.npy", shape, rows)
        for name, shape in blend.shapes(config.rank, n_items).items()
    }
    specs = mesh_lib.specs(padded, blend.PARTITION)
    path = processes.put(padded, mesh_lib.shardings(mesh, specs))
    return with_weights(path, gain=blend.GAIN, prior=blend.PRIOR)


def _write(path: pathlib.Path, array: Any, shape: tuple[int, ...]) -> None:
    """Writes an array without its padding."""
    np.save(path, np.asarray(array)[tuple(slice(size) for size in shape)])


def _read(path: pathlib.Path, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """An array of the file with its sharded axis padded to `rows`."""
    try:
        # Mapped: the matrix is in memory once, as it will be used.
        host = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise VaecfError(
            f"{path}: the linear branch of the model cannot be read ({error}); "
            f"remove {path.parent} and fit it again (--train)"
        ) from None
    if host.shape != shape:
        raise VaecfError(
            f"{path}: an array of {host.shape}, and the model's is {shape}"
        )
    axes = blend.PARTITION[path.stem]
    padded = np.zeros(
        [rows if axis else size for axis, size in zip(axes, shape)], np.float32
    )
    padded[tuple(slice(size) for size in shape)] = host
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


def save(
    path: Mapping[str, Any],
    config: LinearConfig,
    n_items: int,
    target: pathlib.Path,
) -> None:
    """Writes the path as it is on the mesh, with the weights it has now.

    Not a copy of the files that it was read from: a temporary directory's are
    gone, and a workdir's may be those of another model by now.

    Args:
      path: of `load`.
      config: those it was fitted with.
      n_items: the items of the model; padding is left out.
      target: directory to write it into.
    """
    (target / FOLDER).mkdir()
    for name, shape in blend.shapes(config.rank, n_items).items():
        _write(target / FOLDER / f"{name}.npy", path[name], shape)
    write_weights(
        target, {name: float(path[name]) for name in ("gain", "prior")}
    )


def share(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives the path of a run to another one of the same options and data."""
    if (target / FOLDER).exists():
        return
    with workdir_lib.atomic_directory(target / FOLDER) as fresh:
        for file in (source / FOLDER).iterdir():
            if file.suffix != ".npy" and file.name != FIT:
                continue
            try:
                os.link(file, fresh / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, fresh / file.name)


def write_weights(directory: pathlib.Path, chosen: Mapping[str, Any]) -> None:
    """Keeps the weights beside the path."""
    workdir_lib.write_json(directory / FOLDER / WEIGHTS, dict(chosen))
