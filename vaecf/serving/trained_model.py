"""A model as it lies in a directory: parameters, config, item ids."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data import dataset as dataset_lib
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import blend_tuning, ranking, scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.training import checkpoints, linear_branch
from vaecf.training import state as state_lib

_USERS_ENCODED = 2048  # at once


# What `TrainedModel.save` writes.
_SAVED = {
    "checkpoints",
    workdir_lib.CONFIG,
    workdir_lib.DATASET,
    workdir_lib.ITEMS,
}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model, ready to rank.

    Attributes:
      config: of the run that trained it.
      manifest: of the dataset that it was trained on.
      items: raw ids in the order of the item axis.
      setup: module and mesh.
      params: the model's parameters, on the mesh.
      branch: linear branch that ranks beside it, on the mesh; None for none.
      directory: where it was loaded from.
      position: where in the run the parameters were taken.
    """

    config: Config
    manifest: dict[str, Any]
    items: IdTable
    setup: state_lib.TrainSetup
    params: Any
    directory: pathlib.Path
    position: dict[str, Any]
    branch: dict[str, Any] | None = None

    def ranker(self, k: int, exclude_seen: bool = True) -> ranking.Ranker:
        """Compiled ranking to depth k, kept for as long as the model is."""
        if (k, exclude_seen) not in self._rankers:
            self._rankers[k, exclude_seen] = ranking.Ranker(
                self.scorer(), self.setup.mesh, k, exclude_seen=exclude_seen
            )
        return self._rankers[k, exclude_seen]

    @functools.cached_property
    def _rankers(self) -> dict[tuple[int, bool], ranking.Ranker]:
        return {}

    def scorer(self) -> ranking.Scorer:
        """What `ranking` and `evaluation` take."""
        return scorers.model(self.setup.model)

    @property
    def scorer_params(self) -> scorers.ModelParams:
        """Parameters of `scorer`, to call a ranker with."""
        return scorers.ModelParams(self.params, self.branch)

    def encode(self, matrix: Interactions) -> np.ndarray:
        """Users' representations, float32 [U, latent]."""
        n_users = matrix.n_users
        size = min(_USERS_ENCODED, sparse_batch.bucket_users(n_users))
        n_blocks = max(1, -(-n_users // size))
        user_SB = np.arange(n_blocks * size, dtype=np.int32).reshape(-1, size)
        user_SB = np.minimum(user_SB, n_users)
        n_slots = sparse_batch.slots_for(np.append(matrix.counts, 0)[user_SB])
        parts = []
        for user_B in user_SB:
            batch = sparse_batch.assemble_on_host(
                matrix.indptr, matrix.indices, user_B, n_slots
            )
            code_BZ = self._encoder(
                {"params": self.params}, jax.tree.map(jnp.asarray, batch)
            )
            parts.append(np.asarray(code_BZ))
        return np.concatenate(parts)[:n_users]

    @functools.cached_property
    def _encoder(self) -> Callable[..., jax.Array]:
        """Compiled once for every shape, kept for the next call."""
        return jax.jit(
            functools.partial(self.setup.whole.apply, method="encode")
        )

    def item_vectors(self) -> np.ndarray:
        """Output weights of every item, normalised, float32 [I, H]."""
        kernel_HI = np.asarray(jax.device_get(self.params["output_kernel"]))
        vector_IH = kernel_HI.T[: len(self.items)]
        norm_I = np.linalg.norm(vector_IH, axis=1, keepdims=True)
        return vector_IH / np.maximum(norm_I, np.finfo(np.float32).tiny)

    def save(
        self, directory: pathlib.Path, *, overwrite: bool = False
    ) -> pathlib.Path:
        """Writes a self-contained copy: config, ids, parameters; all or none.

        Args:
          directory: new, empty, or (with `overwrite`) one written by `save`.
          overwrite: replace what was saved there.

        Raises:
          VaecfError: the directory is taken or cannot be written.
        """
        if directory.exists() and not directory.is_dir():
            raise VaecfError(f"{directory} is a file: name a directory")
        if directory.exists() and any(directory.iterdir()):
            # A run's workdir holds more than we would write: never replaced.
            names = {path.name for path in directory.iterdir()}
            if names - {linear_branch.FOLDER} != _SAVED:
                raise VaecfError(
                    f"{directory} is not empty and no saved model: choose "
                    "another directory"
                )
            if not overwrite:
                raise VaecfError(
                    f"{directory} holds a saved model: pass overwrite=True to "
                    "replace it, or choose another directory"
                )
        with workdir_lib.atomic_directory(directory) as fresh:
            dataset_lib.write_identity(fresh, self.manifest, self.items)
            saved = checkpoints.Checkpoints(fresh / "checkpoints")
            step = self.position.get("epoch", 0)
            saved.save(checkpoints.BEST, step, self.params, self.position)
            saved.close()
            if self.branch is not None:
                linear_branch.save(
                    self.branch, self.config.linear, len(self.items), fresh
                )
            workdir_lib.write_json(
                fresh / workdir_lib.CONFIG, self.config.to_dict()
            )
        return directory


def load(
    directory: pathlib.Path,
    *,
    policy: str | None = None,
    mesh: Mesh | None = None,
) -> TrainedModel:
    """The best model of a workdir or of a directory written by `TrainedModel.save`.

    It goes onto this machine's devices, whatever it was trained on.

    Args:
      directory: workdir.
      policy: precision to score in; None takes the run's.
      mesh: None shards users over all devices.

    Raises:
      VaecfError: missing or damaged files; names them.
    """
    config = workdir_lib.read_config(directory)
    if policy is not None:
        config = dataclasses.replace(
            config,
            precision=dataclasses.replace(config.precision, policy=policy),
        )
    manifest = workdir_lib.read_json(directory / workdir_lib.DATASET)
    items = IdTable.read(directory / workdir_lib.ITEMS, "item")
    try:
        digest = manifest["ids"]["items"]["sha256"]
    except (KeyError, TypeError):
        raise VaecfError(
            f"{directory / workdir_lib.DATASET}: not the manifest of a dataset"
        ) from None
    if items.sha256() != digest:
        raise VaecfError(
            f"{directory / workdir_lib.ITEMS}: not the items of the dataset "
            f"that {workdir_lib.DATASET} beside it describes"
        )
    setup = state_lib.make_setup(
        config, len(items), mesh_lib.make_mesh() if mesh is None else mesh
    )
    saved = checkpoints.Checkpoints(directory / "checkpoints")
    params = checkpoints.restore_params(saved, setup.whole, setup.mesh)
    position = saved.position(checkpoints.BEST)
    saved.close()
    branch = None
    if config.linear.l2:
        branch = linear_branch.load(
            directory, setup.mesh, config.linear, len(items)
        )
        if kept := linear_branch.read_weights(directory):
            branch = linear_branch.with_weights(
                branch, gain=kept["gain"], prior=kept["prior"]
            )
    return TrainedModel(
        config, manifest, items, setup, params, directory, position, branch
    )


def tune_blend(
    model: TrainedModel,
    validation: Evaluator,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> TrainedModel:
    """Returns the model with the blend weights that rank validation users best.

    The weights are saved in the model's directory, with all candidates that
    were tried, and are chosen again when another epoch is the best.

    Args:
      model: a model loaded from a workdir that the caller has locked; returned
        unchanged if it has no linear branch.
      validation: evaluator of the validation users; if it is empty, the model
        keeps its initial weights.
      log: receives one line.
    """
    if model.branch is None or validation.is_empty:
        return model
    epoch = model.position.get("epoch")
    weights = linear_branch.read_weights(model.directory)
    # Process 0 decides: another host may still see an older file.
    [is_tuned] = processes.from_lead([weights.get("epoch", -1) == epoch])
    if not is_tuned:
        began = time.perf_counter()
        ranker = model.ranker(validation.depth)
        found = blend_tuning.search(validation, ranker, model.scorer_params)
        weights = {"epoch": epoch, **found}
        if processes.is_lead():
            linear_branch.write_weights(model.directory, weights)
        log(
            f"linear branch: gain {weights['gain']:g}, prior "
            f"{weights['prior']:g}: best of {len(weights['tried'])} by "
            f"validation {weights['metric']} {weights['value']:.4f} "
            f"({weights['model_alone']:.4f} without the branch), in "
            f"{time.perf_counter() - began:.1f} s"
        )
    gain, prior = processes.from_lead(
        [weights.get(name, 0.0) for name in ("gain", "prior")]
    )
    branch = linear_branch.with_weights(model.branch, gain=gain, prior=prior)
    return dataclasses.replace(model, branch=branch)
