"""Starts a run from the parameters of a model of other items.

Known items keep their parameters. Those of a new item i are a mean over the
known items j, with weights c_ij / sqrt(n_j): c_ij users have both items, and
n_j users have item j. This is the cosine of the items' users, but for a factor
of item i. A new item that shares no user with a known item starts from the
plain mean of the known items.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.files import user_path
from vaecf.models import mult_vae
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.serving import trained_model
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import checkpoints
from vaecf.training.first_state import Start

# Settings that two models must share, so that one can start from the other.
_SHAPE = ("model.name", "model.hidden", "model.latent", "model.activation")
_BLOCK = 1024  # new items whose co-occurrences are in memory at once


def check(config: Config, workdir: pathlib.Path) -> bool:
    """Returns whether a run begins with `config.train.init_from`.

    It does not without the setting, or with a checkpoint to resume from.

    Raises:
      VaecfError: there is no such model, or the run cannot start from it.
    """
    place, name = config.train.init_from, config.model.name
    if place and config.is_fitted:
        raise VaecfError(
            f"config.train.init_from={place}: {name} is fitted in one go and "
            "starts from no other model; leave the setting out"
        )
    saved = checkpoints.Checkpoints(workdir / workdir_lib.CHECKPOINTS)
    if not place or saved.step(checkpoints.LATEST) is not None:
        return False
    earlier = workdir_lib.read_config(user_path(place)).flat()
    for key in _SHAPE:
        if (new := config.flat()[key]) != earlier[key]:
            raise VaecfError(
                f"config.{key}={new}: the model of config.train.init_from="
                f"{place} has {earlier[key]}; use the same value"
            )
    return True


def start(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None],
) -> Start | None:
    """Returns what a run begins with; None for a state of its own.

    Raises:
      VaecfError: see `check`; or the earlier model is damaged.
    """
    if not check(config, workdir):
        return None
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    with processes.agreement():
        model = trained_model.load(user_path(config.train.init_from), mesh=mesh)
    return grown(model, dataset, log=log)


def further(model: TrainedModel, epochs: int) -> Config:
    """Returns the config of a run that trains a model further."""
    config = model.config
    changes: dict[str, Any] = {
        "data.dir": "(in memory)",
        # That of the earlier run may have been for other devices.
        **{"mesh.data": -1, "mesh.item": 1},
    }
    if not config.is_fitted:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(on_host(model.params, model.mesh)):
            digest.update(leaf.tobytes())
        # A workdir then refuses to resume the update of another model.
        changes["train.init_from"] = f"(in memory) {digest.hexdigest()[:16]}"
        changes |= {"train.epochs": epochs, "train.max_steps": 0}
        # The weight of the KL term has been annealed before.
        changes["loss.total_anneal_steps"] = 0
    return config_lib.replace(config, changes)


def grown(
    model: TrainedModel, dataset: Dataset, *, log: Callable[[str], None]
) -> Start:
    """Returns the start of a run on a dataset, on the mesh of the model.

    Raises:
      VaecfError: the model knows no item of the training interactions.
    """
    source_I = model.items.index_of(dataset.items.ids)
    n_known = int((source_I >= 0).sum())
    n_old, n_new = len(model.items), len(source_I) - n_known
    occurs_I = dataset.train.item_counts() > 0
    if not (occurs_I & (source_I >= 0)).any():
        raise VaecfError(
            f"the model to start from knows none of the {occurs_I.sum():,} "
            "items of the interactions; train a new model"
        )
    log(
        f"start: {n_known:,} items keep their parameters, {n_new:,} new ones "
        f"start from co-occurring items, {n_old - n_known:,} of the earlier "
        "model are dropped"
    )
    leaves, tree = jax.tree.flatten(on_host(model.params, model.mesh))
    all_specs = mesh_lib.specs(model.params, mult_vae.PARTITION)
    axes = [
        list(spec).index(mesh_lib.ITEM) if mesh_lib.ITEM in spec else None
        for spec in jax.tree.leaves(all_specs)
    ]
    # One matrix of all parameters that an item has.
    parts = [
        np.moveaxis(leaf, axis, 0)[:n_old].reshape(n_old, -1)
        for leaf, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]
    grown_ID = grow(np.hstack(parts), source_I, dataset.train)
    ends = np.cumsum([part.shape[1] for part in parts])
    columns = iter(np.split(grown_ID, ends[:-1], axis=1))
    for number, axis in enumerate(axes):
        if axis is not None:
            part = next(columns)
            part = part if leaves[number].ndim > 1 else part[:, 0]
            leaves[number] = np.moveaxis(part, 0, axis)
    rows = mesh_lib.padded_items(len(source_I), model.mesh.shape[mesh_lib.ITEM])
    params = jax.tree.unflatten(tree, leaves)
    params = mesh_lib.resize_items(params, mult_vae.PARTITION, rows)
    places = mesh_lib.shardings(model.mesh, all_specs)
    return Start(processes.put(params, places), epoch=0)


def grow(
    old_JD: np.ndarray, source_I: np.ndarray, train: Interactions
) -> np.ndarray:
    """Returns the parameters of all items, float32 [I, D].

    Args:
      old_JD: parameters of the earlier items, float32 [J, D].
      source_I: index of each item among the earlier items, [I]; -1 if it is
        new.
      train: interactions of users with the items, to find co-occurring ones.
    """
    known_I = source_I >= 0
    known_KD = old_JD[source_I[known_I]]
    grown_ID = np.empty((len(source_I), old_JD.shape[1]), np.float32)
    grown_ID[known_I] = known_KD
    mean_D = known_KD.mean(0)
    ones = np.ones(train.nnz, np.float32)
    shape = train.n_users, train.n_items
    users_UI = scipy.sparse.csr_array(
        (ones, train.indices, train.indptr), shape=shape
    ).tocsc()
    count_I = np.maximum(train.item_counts(), 1)
    scale_K = scipy.sparse.diags_array(count_I[known_I] ** -0.5)
    known_UK = (users_UI[:, known_I] @ scale_K).astype(np.float32).tocsr()
    new = np.flatnonzero(~known_I)
    for first in range(0, len(new), _BLOCK):
        block = new[first : first + _BLOCK]
        weight_BK = users_UI[:, block].T @ known_UK
        total_B1 = np.asarray(weight_BK.sum(1)).reshape(-1, 1)
        found_BD = weight_BK @ known_KD / np.where(total_B1 > 0, total_B1, 1)
        grown_ID[block] = np.where(total_B1 > 0, found_BD, mean_D)
    return grown_ID


def on_host(params: Any, mesh: Mesh) -> Any:
    """Returns whole arrays on the host of every process."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
    return jax.tree.map(np.asarray, whole)
