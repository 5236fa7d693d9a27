"""Models that are fitted in one go: fitted once and kept in the workdir.

fitted/<name>.npy, arrays.json   parameters, as the model's `fit` returns them
fitted/fit.json                  {"seconds": duration of the fit}
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from vaecf import workdir as workdir_lib
from vaecf.config import Config, fitted_settings
from vaecf.data import array_folder
from vaecf.errors import VaecfError
from vaecf.models import registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes

FOLDER = workdir_lib.FITTED
_FIT = "fit.json"


def settings(config: Config) -> dict[str, Any]:
    """Returns the settings of the config's model, by the names of `fit`."""
    name = config.model.name
    return {
        key: getattr(config.baseline, f"{name}_{key}")
        for key in fitted_settings(name)
    }


def train(
    config: Config,
    train: Any,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fits the model to interactions, unless the workdir holds it.

    The caller holds the lock of the workdir.

    Returns:
      A summary like that of `loop.train`, of no epochs.

    Raises:
      VaecfError: a setting does not go with the model, the fit does not fit
        into memory, or a file cannot be written.
    """
    name, folder = config.model.name, workdir / FOLDER
    if config.linear.l2:
        raise VaecfError(
            f"config.linear.l2={config.linear.l2:g}: {name} cannot have a "
            "linear branch beside it; use 0"
        )
    with processes.agreement():  # all others wait until process 0 has written
        if processes.is_lead() and not folder.exists():
            began = time.perf_counter()
            params = registry.FITTED[name].fit(train, **settings(config))
            seconds = time.perf_counter() - began
            with workdir_lib.atomic_directory(folder) as fresh:
                _write(fresh, params, {"seconds": seconds})
            log(f"{name}: fitted to {train.n_users:,} users in {seconds:.1f} s")
    kept = workdir_lib.read_json(folder / _FIT)
    return {
        "users_per_second": None,
        "seconds": kept.get("seconds") if isinstance(kept, dict) else None,
        "epochs": 0,
        "best_epoch": 0,
        "compile_seconds": 0.0,
        "precision": "fp32",
        "device": jax.devices()[0].device_kind,
        "devices": 1,
    }


def _write(folder: pathlib.Path, params: Any, about: dict[str, Any]) -> None:
    array_folder.write(folder, params)
    workdir_lib.write_json(folder / _FIT, about, digest=True)


def load(
    directory: pathlib.Path, name: str, n_items: int, mesh: Mesh
) -> dict[str, Any]:
    """Reads the parameters of a model of `registry.FITTED` onto a mesh.

    Raises:
      VaecfError: a file is missing or damaged; names it.
    """
    folder = directory / FOLDER
    fix = f"remove {folder} and train again"
    arrays = array_folder.read(folder, fix)
    partition = registry.FITTED[name].PARTITION
    rows = mesh_lib.padded_items(n_items, mesh.shape[mesh_lib.ITEM])
    arrays = mesh_lib.resize_items(arrays, partition, rows)
    specs = mesh_lib.specs(arrays, partition)
    return processes.put(arrays, mesh_lib.shardings(mesh, specs))


def progress(directory: pathlib.Path) -> dict[str, Any]:
    """Returns what `save` was told about the training; {} for a run."""
    kept = workdir_lib.read_json(directory / FOLDER / _FIT)
    about = kept.get("progress") if isinstance(kept, dict) else None
    return about if isinstance(about, dict) else {}


def save(
    params: dict[str, Any],
    name: str,
    n_items: int,
    target: pathlib.Path,
    progress: dict[str, Any],
) -> None:
    """Writes parameters from a mesh, padded as the model's `fit` pads them."""
    (target / FOLDER).mkdir()
    partition = registry.FITTED[name].PARTITION
    host = jax.device_get(params)
    rows = mesh_lib.padded_items(n_items)
    host = mesh_lib.resize_items(host, partition, rows)
    about = {"seconds": None, "progress": progress}
    _write(target / FOLDER, host, about)
