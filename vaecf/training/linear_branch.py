"""Fits the linear branch of a blend once and keeps it in the workdir.

linear/log_share.npy   float32 [items]
linear/item_item.npy   float32 [items, items]; at a lower rank instead
linear/{input_factors,output_factors,self_weight}.npy
linear/arrays.json     digests of these arrays
linear/fit.json        settings and digest of the data that it was fitted to
linear/weights.json    {'gain', 'prior', ...} after blend tuning
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
from vaecf.training import array_folder

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
    """Returns the linear branch on the mesh; None if `config.l2` is 0.

    A new run fits the branch, a resumed run reads it. The weights are always
    the defaults, even after blend tuning: all epochs of a run must be
    validated alike. The caller holds the lock of the workdir.

    Raises:
      VaecfError: the branch does not fit into memory, or a file cannot be
        written or read.
    """
    if not config.l2:
        return None
    with processes.agreement():  # all others wait until process 0 has written
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
        if workdir_lib.read_json(folder / FIT) == about:
            return
    elif folder.exists():
        raise VaecfError(
            f"{folder} is in the way of the linear branch: move it, or choose "
            "another workdir"
        )
    began = time.perf_counter()
    n_items = train.n_items
    fitted = blend.fit(train, **dataclasses.asdict(config))
    with workdir_lib.atomic_directory(folder) as fresh:
        _write(fresh, fitted, blend.shapes(config.rank, n_items))
        workdir_lib.write_json(fresh / FIT, about, digest=True)
    seconds = time.perf_counter() - began
    rank = f" at rank {about['rank']:,}" if about["rank"] else ""
    log(f"linear branch: fitted to {n_items:,} items{rank} in {seconds:.1f} s")


def load(
    directory: pathlib.Path, mesh: Mesh, config: LinearConfig, n_items: int
) -> dict[str, Any]:
    """Reads the branch of a workdir onto a mesh, with the default weights.

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    rows = mesh_lib.padded_items(n_items, mesh.shape[mesh_lib.ITEM])
    shapes = blend.shapes(config.rank, n_items)
    folder = directory / FOLDER
    fix = f"remove {folder} and train again to fit the linear branch"
    padded = {
        name: _padded(array, blend.PARTITION[name], rows)
        for name, array in array_folder.read(folder, fix, shapes).items()
    }
    specs = mesh_lib.specs(padded, blend.PARTITION)
    branch = processes.put(padded, mesh_lib.shardings(mesh, specs))
    return with_weights(branch, gain=blend.GAIN, prior=blend.PRIOR)


def _write(
    folder: pathlib.Path,
    branch: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Writes the arrays without their padding."""
    parts = {
        name: np.asarray(branch[name])[tuple(slice(size) for size in shape)]
        for name, shape in shapes.items()
    }
    array_folder.write(folder, parts)


def _padded(host: np.ndarray, axes: tuple[Any, ...], rows: int) -> np.ndarray:
    """Returns a copy whose sharded axes have `rows` entries."""
    sizes = [rows if axis else size for axis, size in zip(axes, host.shape)]
    padded = np.zeros(sizes, np.float32)
    padded[tuple(slice(size) for size in host.shape)] = host
    return padded


def read_weights(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the result of blend tuning; {} before it.

    Raises:
      VaecfError: the file is damaged, or missing in a saved model.
    """
    path = directory / FOLDER / WEIGHTS
    if not path.exists():
        if not (directory / FOLDER / FIT).exists():  # it is no run
            raise VaecfError(f"{path} is missing: save the model again")
        return {}
    kept = workdir_lib.read_json(path)
    if not isinstance(kept, dict) or not all(
        isinstance(kept.get(name), float | int) for name in ("gain", "prior")
    ):
        raise VaecfError(
            f"{path}: not the weights of a blend; remove the file and "
            "evaluate the run again to tune them"
        )
    return kept


def with_weights(
    branch: Mapping[str, Any], *, gain: float, prior: float
) -> dict[str, Any]:
    """Returns the branch with other weights."""
    weights = {"gain": jnp.float32(gain), "prior": jnp.float32(prior)}
    return {**branch, **weights}


def save(
    branch: Mapping[str, Any],
    config: LinearConfig,
    n_items: int,
    target: pathlib.Path,
) -> None:
    """Writes the branch, with its current weights, from the mesh.

    The files that it was read from may no longer exist, or may belong to
    another model by now. Padding items are not written.
    """
    (target / FOLDER).mkdir()
    _write(target / FOLDER, branch, blend.shapes(config.rank, n_items))
    write_weights(
        target, {name: float(branch[name]) for name in ("gain", "prior")}
    )


def share(source: pathlib.Path, target: pathlib.Path) -> None:
    """Links the branch into the workdir of a run with the same settings."""
    if (target / FOLDER).exists():
        return
    with workdir_lib.atomic_directory(target / FOLDER) as fresh:
        for file in (source / FOLDER).iterdir():
            if file.suffix != ".npy" and file.name not in (
                FIT,
                array_folder.ARRAYS,
            ):
                continue
            try:
                os.link(file, fresh / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, fresh / file.name)


def write_weights(directory: pathlib.Path, chosen: Mapping[str, Any]) -> None:
    """Writes the result of blend tuning beside the branch."""
    path = directory / FOLDER / WEIGHTS
    workdir_lib.write_json(path, dict(chosen), digest=True)
