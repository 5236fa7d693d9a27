"""A trained model: loaded from a directory, ranking, saved to another one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vaecf import config as config_lib
from vaecf import files
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data import splits
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import blend_tuning, ranking, scorers
from vaecf.evaluation.evaluator import Evaluator
from vaecf.models import blend, mult_vae, registry, sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting import writers
from vaecf.serving import lists as lists_lib
from vaecf.training import checkpoints, fitted, linear_branch, precision

_USERS_PER_ENCODING = 2048
# A run may save better models while another process loads one.
_ATTEMPTS = 100

# In `TrainedModel.progress`: epochs on all users, if there was a refit.
REFITTED = "refit_epochs"

# What `TrainedModel.save` writes besides the parameters.
_SAVED = {workdir_lib.CONFIG, workdir_lib.DATASET, workdir_lib.ITEMS}
_SAVED_PARAMS = (
    {workdir_lib.CHECKPOINTS},
    {workdir_lib.CHECKPOINTS, workdir_lib.LINEAR},
    {workdir_lib.FITTED},
)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model, ready to rank."""

    config: Config  # settings of the run that trained the model
    manifest: dict[str, Any]  # manifest of the dataset of that run
    items: IdTable  # raw item ids, by item index
    # Module over all items; None for a model of `registry.FITTED`.
    module: mult_vae.MultDAE | None
    mesh: Mesh  # devices ('data', 'item') that the parameters lie on
    params: Any  # parameters of the module or fitted model, on the mesh
    directory: pathlib.Path  # where the model was loaded from
    # Epoch and step at which the parameters were saved.
    progress: dict[str, Any]
    # Linear branch of a blend, on the mesh; None without one.
    branch: dict[str, Any] | None = None
    # Records of training and validation, those of metrics.jsonl.
    records: Sequence[Mapping[str, Any]] = ()

    def scorer(self) -> ranking.Scorer:
        """Returns the scorer that ranks items for this model."""
        if self.module is None:
            return scorers.fitted(self.config.model.name, len(self.items))
        return scorers.model(registry.shard_model(self.module, self.mesh))

    @property
    def scorer_params(self) -> Any:
        """Parameters of `scorer`."""
        if self.module is None:
            return self.params
        return scorers.ModelParams(self.params, self.branch)

    def ranker(self, k: int, exclude_seen: bool = True) -> ranking.Ranker:
        """Returns the ranker of lists of length k; later calls reuse it."""
        if (k, exclude_seen) not in self._rankers:
            self._rankers[k, exclude_seen] = ranking.Ranker(
                self.scorer(), self.mesh, k, exclude_seen=exclude_seen
            )
        return self._rankers[k, exclude_seen]

    @functools.cached_property
    def _rankers(self) -> dict[tuple[int, bool], ranking.Ranker]:
        return {}

    def columns(
        self, lists: ranking.RankedLists, score: str | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the lists of a ranker of this model as a long table.

        Args:
          score: 'log_probability', 'probability' or 'logit', the score itself,
            which is all that fitted models have; None takes the first that the
            model has.

        Returns:
          The result of `lists.columns`.

        Raises:
          VaecfError: the model has no probabilities.
        """
        return lists_lib.columns(
            lists,
            self.items.ids,
            score,
            model=self.config.model.name,
            has_probabilities=self.module is not None,
        )

    def encode(self, histories: Interactions) -> np.ndarray:
        """Returns the latent representations of users, float32 [U, latent].

        Raises:
          VaecfError: the model has none, or they are not finite.
        """
        if self.module is None:
            raise VaecfError(
                f"{self.config.model.name} has no latent representation of "
                f"users: use one of {', '.join(registry.MODELS)}"
            )
        n_users = histories.n_users
        size = min(_USERS_PER_ENCODING, sparse_batch.bucket_users(n_users))
        n_batches = max(1, -(-n_users // size))
        user_SB = np.arange(n_batches * size, dtype=np.int32).reshape(-1, size)
        # Padding users have the number n_users and no interactions.
        user_SB = np.minimum(user_SB, n_users)
        count_SB = np.append(histories.counts, 0)[user_SB]
        n_slots = sparse_batch.slots_for(count_SB)
        codes = []
        for user_B in user_SB:
            batch = sparse_batch.assemble_on_host(
                histories.indptr, histories.indices, user_B, n_slots
            )
            batch = jax.tree.map(jnp.asarray, batch)
            code_BZ = self._encoder({"params": self.params}, batch)
            codes.append(np.asarray(code_BZ))
        code_UZ = np.concatenate(codes)[:n_users]
        if not np.isfinite(code_UZ).all():
            raise VaecfError(f"codes are not finite: {ranking.DIVERGED}")
        return code_UZ

    @functools.cached_property
    def _encoder(self) -> Callable[..., jax.Array]:
        module: Any = self.module
        return jax.jit(functools.partial(module.apply, method="encode"))

    def item_vectors(self) -> np.ndarray | None:
        """Returns the items' output weights or factors, float32 [items, D].

        None for a model without such vectors.
        """
        if self.module is not None:
            vector_ID = self.params["output_kernel"].T
        elif "item_factor" in self.params:
            vector_ID = self.params["item_factor"]
        else:
            return None
        return np.asarray(jax.device_get(vector_ID))[: len(self.items)]

    def save(
        self, directory: pathlib.Path, *, overwrite: bool = False
    ) -> pathlib.Path:
        """Writes a self-contained copy; see `Recommender.save`."""
        files.recover(directory)
        files.remove_leftovers(directory)
        if directory.exists():
            _require_replaceable(directory, overwrite)
        with files.atomic_directory(directory, replace=overwrite) as fresh:
            workdir_lib.write_identity(fresh, self.manifest, self.items)
            self._save_params(fresh)
            if self.records:
                lines = [f"{json.dumps(record)}\n" for record in self.records]
                (fresh / workdir_lib.METRICS).write_text("".join(lines))
            config = self.config.to_dict()
            path = fresh / workdir_lib.CONFIG
            workdir_lib.write_json(path, config, digest=True)
        return directory

    def _save_params(self, target: pathlib.Path) -> None:
        if self.module is None:
            name = self.config.model.name
            n_items = len(self.items)
            fitted.save(self.params, name, n_items, target, self.progress)
            return
        saved = checkpoints.Checkpoints(target / workdir_lib.CHECKPOINTS)
        step = self.progress.get("epoch", 0)
        saved.save(checkpoints.BEST, step, self.params, self.progress)
        saved.close()
        if self.branch is not None:
            linear_branch.save(self.branch, len(self.items), target)


def _require_replaceable(directory: pathlib.Path, overwrite: bool) -> None:
    if not directory.is_dir():
        raise VaecfError(f"{directory} is a file: name a directory")
    names = {path.name for path in directory.iterdir()} - {workdir_lib.METRICS}
    # The workdir of a run holds more files: it is never replaced.
    if names and names not in [_SAVED | params for params in _SAVED_PARAMS]:
        raise VaecfError(
            f"{directory} is not empty and no saved model: choose another "
            "directory"
        )
    if names and not overwrite:
        raise VaecfError(
            f"{directory} holds a saved model: pass overwrite=True to replace "
            "it, or choose another directory"
        )


def load(
    directory: pathlib.Path,
    *,
    policy: str | None = None,
    mesh: Mesh | None = None,
    refitted: bool = True,
) -> TrainedModel:
    """Loads the best model of a run, trained on any devices, or a saved model.

    Args:
      policy: precision to rank in, such as 'bf16'; None takes the run's.
      mesh: devices ('data', 'item') to put the model on; None uses all devices
        along 'data'.
      refitted: take the refit of the best model if the run has one.

    Raises:
      VaecfError: a file is missing or damaged; names the file.
    """
    for _ in range(_ATTEMPTS):
        before = _version(directory)
        try:
            model = _load(directory, policy, mesh)
            model = with_refit(model) if refitted else model
        except VaecfError:
            if _version(directory) == before:
                raise
            continue  # a run has replaced the checkpoint meanwhile
        if _version(directory)[0] == before[0]:
            return model
    raise VaecfError(f"{directory} is being replaced all the time: try again")


def _version(directory: pathlib.Path) -> tuple[int, list[int]]:
    """Returns what changes if a directory or its best model is replaced."""
    files.recover(directory)
    number = directory.stat().st_ino if directory.exists() else 0
    folders = [directory, *directory.glob(f"{workdir_lib.REFIT}/*")]
    return number, [s for folder in folders for s in _best_steps(folder)]


def _best_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the best checkpoints; [0] of a fitted model."""
    if (directory / workdir_lib.FITTED).exists():
        return [0]
    saved = checkpoints.Checkpoints(directory / workdir_lib.CHECKPOINTS)
    return saved.steps(checkpoints.BEST)


def refit_folder(model: TrainedModel) -> pathlib.Path:
    """Returns where the refit of a model of a run is kept."""
    epochs = model.config.train.refit_epochs
    name = f"{model.progress.get('epoch', 0)}+{epochs}"
    return model.directory / workdir_lib.REFIT / name


def with_refit(model: TrainedModel) -> TrainedModel:
    """Returns the model with the parameters of its refit, if there is one.

    The weights of a blend stay.
    """
    folder = refit_folder(model)
    if not (model.config.train.refit_epochs and _best_steps(folder)):
        return model
    name, n_items = model.config.model.name, len(model.items)
    # Evaluation must know that the validation users were trained on.
    progress = {**model.progress, REFITTED: model.config.train.refit_epochs}
    if model.module is None:
        params = fitted.load(folder, name, n_items, model.mesh)
        return dataclasses.replace(model, params=params, progress=progress)
    saved = checkpoints.Checkpoints(folder / workdir_lib.CHECKPOINTS)
    with contextlib.closing(saved):
        params = checkpoints.restore_params(saved, model.module, model.mesh)
    branch = model.branch
    if branch is not None:
        weights = {name: branch[name] for name in blend.weights_of(branch)}
        branch = linear_branch.load(folder, model.mesh, n_items)
        weights = blend.kept_weights(weights, branch)
        branch = linear_branch.with_weights(branch, weights)
    return dataclasses.replace(
        model, params=params, branch=branch, progress=progress
    )


def _load(
    directory: pathlib.Path, policy: str | None, mesh: Mesh | None
) -> TrainedModel:
    config = workdir_lib.read_config(directory)
    records = _read_records(directory)
    if policy is not None:
        config = config_lib.replace(config, {"precision.policy": policy})
    manifest, items = _read_identity(directory)
    if mesh is None:
        mesh = mesh_lib.make_mesh()
    if config.is_fitted:
        params = fitted.load(directory, config.model.name, len(items), mesh)
        return TrainedModel(
            *(config, manifest, items, None, mesh, params, directory),
            fitted.progress(directory),
            records=records,
        )
    module = registry.make_model(
        config.model,
        precision.policy(config.precision.policy, mesh_lib.platform(mesh)),
        len(items),
        mesh.shape[mesh_lib.ITEM],
    )
    saved = checkpoints.Checkpoints(directory / workdir_lib.CHECKPOINTS)
    with contextlib.closing(saved):
        # A run may save a better checkpoint between the two calls.
        step = saved.step(checkpoints.BEST)
        params = checkpoints.restore_params(saved, module, mesh, step)
        progress = saved.position(checkpoints.BEST, step)
    branch = None
    if config.linear.l2:
        branch = linear_branch.load(directory, mesh, len(items))
        weights = linear_branch.read_weights(directory)
        known = {k: v for k, v in weights.items() if k in blend.WEIGHTS}
        branch = linear_branch.with_weights(branch, known)
    return TrainedModel(
        *(config, manifest, items, module, mesh, params),
        *(directory, progress, branch, records),
    )


def _read_records(directory: pathlib.Path) -> Sequence[Mapping[str, Any]]:
    path = directory / workdir_lib.METRICS
    try:
        return writers.read_records(path) if path.exists() else ()
    except VaecfError:  # damaged: the model is not
        return ()


def _read_identity(directory: pathlib.Path) -> tuple[dict[str, Any], IdTable]:
    """Returns the manifest of the dataset and the item ids."""
    file = directory / workdir_lib.DATASET
    manifest, tables = workdir_lib.read_manifest(file)
    if "folds" in manifest:
        raise VaecfError(
            f"{directory} holds the models of {len(manifest['folds'])} folds: "
            f"name one of them, such as {directory / 'fold1'}"
        )
    path = directory / workdir_lib.ITEMS
    items = IdTable.read(path, "item", tables.get(workdir_lib.ITEMS))
    try:
        digest = manifest["ids"]["items"]["sha256"]
    except (KeyError, TypeError):
        raise VaecfError(f"{file}: not the manifest of a dataset") from None
    if items.sha256() != digest:
        raise VaecfError(
            f"{path}: the items differ from those of the dataset that "
            f"{workdir_lib.DATASET} describes"
        )
    return manifest, items


def tune_blend(
    model: TrainedModel,
    validation: Evaluator,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> TrainedModel:
    """Returns the model with the blend weights that rank validation users best.

    The weights are saved in the model's directory, which the caller has locked,
    with all candidates that were tried. They are chosen once for each best
    epoch. A model without a linear branch is returned unchanged, and so is any
    model if there are no validation users.
    """
    if model.branch is None or validation.is_empty:
        return model
    epoch = model.progress.get("epoch")
    weights = linear_branch.read_weights(model.directory)
    # Process 0 decides: another host may still see an older file.
    [is_tuned] = processes.from_lead([weights.get("epoch", -1) == epoch])
    if not is_tuned:
        began = time.perf_counter()
        ranker = model.ranker(validation.depth)
        found = blend_tuning.search(
            validation,
            ranker,
            model.scorer_params,
            split_again=splits.is_strong(model.manifest["protocol"]),
        )
        weights = {"epoch": epoch, **found}
        if processes.is_lead():
            linear_branch.write_weights(model.directory, weights)
        chosen = (f"{k} {weights[k]:g}" for k in blend.weights_of(model.branch))
        splits_text = ""
        if weights["splits"] > 1:
            splits_text = f" over {weights['splits']} splits of the users"
        log(
            f"linear branch: {', '.join(chosen)}: best of "
            f"{len(weights['tried'])} by "
            f"validation {weights['metric']} {weights['value']:.4f}"
            f"{splits_text} "
            f"({weights['model_alone']:.4f} without the branch), in "
            f"{time.perf_counter() - began:.1f} s"
        )
    names = blend.weights_of(model.branch)
    same = processes.from_lead([weights.get(name, 0.0) for name in names])
    branch = linear_branch.with_weights(model.branch, dict(zip(names, same)))
    return dataclasses.replace(model, branch=branch)
