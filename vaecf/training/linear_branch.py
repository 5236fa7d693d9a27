"""Fits the linear branch of a blend once and keeps it in the workdir.

linear/<name>.npy      arrays of `blend.fit`
linear/arrays.json     digests of these arrays
linear/fit.json        settings and digest of the data that it was fitted to
linear/weights.json    `blend.WEIGHTS`, and how they were chosen
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

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaecf import workdir as workdir_lib
from vaecf.config import LinearConfig
from vaecf.data import array_folder
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
    return load(workdir, mesh, train.n_items)


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
    experts = config.experts or blend.default_experts(train.n_items)
    about["experts"] = list(experts)
    if (folder / FIT).exists():
        kept = workdir_lib.read_json(folder / FIT)
        if not config.experts and isinstance(kept, dict):
            # A run keeps its experts if a later version has other defaults.
            kept["experts"] = about["experts"]
        if kept == about:
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
        array_folder.write(fresh, fitted)
        workdir_lib.write_json(fresh / FIT, about, digest=True)
    seconds = time.perf_counter() - began
    names = ", ".join(experts)
    if "ease" in experts and about["rank"]:
        names = names.replace("ease", f"ease at rank {about['rank']:,}")
    log(
        f"linear branch: {names} fitted to {n_items:,} items in {seconds:.1f} s"
    )


def load(directory: pathlib.Path, mesh: Mesh, n_items: int) -> dict[str, Any]:
    """Reads the branch of a workdir onto a mesh, with the default weights.

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    folder = directory / FOLDER
    fix = f"remove {folder} and train again to fit the linear branch"
    arrays = array_folder.read(folder, fix)
    own = arrays.get("log_share", np.zeros(0)).shape
    # Earlier versions wrote no padding.
    if own not in ((n_items,), (mesh_lib.padded_items(n_items),)):
        raise VaecfError(f"{folder} is not of a model of these items; {fix}")
    rows = mesh_lib.padded_items(n_items, mesh.shape[mesh_lib.ITEM])
    arrays = mesh_lib.resize_items(arrays, blend.PARTITION, rows)
    specs = mesh_lib.specs(arrays, blend.PARTITION)
    branch = processes.put(arrays, mesh_lib.shardings(mesh, specs))
    return with_weights(branch, blend.default_weights(blend.experts_of(branch)))


def has_weights(directory: pathlib.Path) -> bool:
    """Returns whether the weights of a run's branch have been written."""
    return (directory / FOLDER / WEIGHTS).exists()


def read_weights(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the result of blend tuning; {} before it.

    Raises:
      VaecfError: the file is damaged, or missing in a saved model.
    """
    path = directory / FOLDER / WEIGHTS
    if not has_weights(directory):
        if not (directory / FOLDER / FIT).exists():  # it is no run
            raise VaecfError(f"{path} is missing: save the model again")
        return {}
    kept = workdir_lib.read_json(path)
    kept_weights = kept if isinstance(kept, dict) else {}
    known = {k: kept_weights[k] for k in blend.WEIGHTS if k in kept_weights}
    is_complete = "prior" in known and known.keys() & {*blend.GAINS.values()}
    if not is_complete or not all(
        isinstance(weight, float | int) for weight in known.values()
    ):
        raise VaecfError(
            f"{path}: not the weights of a blend; remove the file and "
            "evaluate the run again to tune them"
        )
    return kept


def with_weights(
    branch: Mapping[str, Any], weights: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the branch with other weights, some of `blend.WEIGHTS`."""
    return {**branch, **{name: jnp.float32(x) for name, x in weights.items()}}


def weights_of(branch: Mapping[str, Any]) -> dict[str, float]:
    """Returns the weights of the branch's experts, by name."""
    return {name: float(branch[name]) for name in blend.weights_of(branch)}


def save(branch: Mapping[str, Any], n_items: int, target: pathlib.Path) -> None:
    """Writes the branch, with its current weights, from the mesh.

    The files that it was read from may no longer exist, or may belong to
    another model by now.
    """
    (target / FOLDER).mkdir()
    weights = weights_of(branch)
    arrays = {k: v for k, v in branch.items() if k not in blend.WEIGHTS}
    host = jax.device_get(arrays)
    rows = mesh_lib.padded_items(n_items)
    host = mesh_lib.resize_items(host, blend.PARTITION, rows)
    array_folder.write(target / FOLDER, host)
    write_weights(target, weights)


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
