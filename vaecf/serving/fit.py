"""Trains the model of a run, and trains it further on all users."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation.evaluator import Evaluator
from vaecf.files import user_path
from vaecf.models import blend
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.reporting.progress import say
from vaecf.serving import growth
from vaecf.serving.trained_model import (
    TrainedModel,
    load,
    refit_folder,
    tune_blend,
    with_refit,
)
from vaecf.training import first_state, fitted, linear_branch, loop
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.first_state import Start
from vaecf.training.progress import Diverged

_logger = logging.getLogger("vaecf")


def train(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = _logger.info,
    **options: Any,
) -> dict[str, Any]:
    """Trains, or resumes, the run of a workdir and returns its summary.

    The caller holds the lock of the workdir. `options` are those of
    `loop.train`, for models that are trained in epochs. The run starts from the
    model of `config.train.init_from`, unless `options` have another start.

    Raises:
      VaecfError, loop.Interrupted: as `loop.train` and `fitted.train` do.
    """
    start = options.pop("start", None)
    if start is None:
        start = growth.start(config, dataset, workdir, log=log)
    if config.is_fitted:
        return fitted.train(config, dataset.train, workdir, log=log)
    return loop.train(
        config, dataset, workdir, start=start, log=log, **options
    ).summary


def in_memory(
    config: Config,
    dataset: Dataset,
    workdir: str | pathlib.Path | None,
    *,
    earlier: TrainedModel | None = None,
    show_progress: bool | None = None,
) -> TrainedModel:
    """Trains, tunes and refits a model, as `Recommender.fit` does.

    An interrupt (SIGINT), or a loss that diverges, ends the training with a
    warning, and the best model so far is returned without a refit.

    Args:
      workdir: None trains in a temporary directory.
      earlier: start from this model. Without validation users, its weights of
        a blend stay.

    Raises:
      VaecfError: as `train` does; `Diverged` if there is no sound model.
      KeyboardInterrupt: there is no model yet; `loop.Interrupted` after
        SIGTERM.
    """

    def note(line: str) -> None:
        """Says why another bar follows the one of the training."""
        _logger.info(line)
        if line.startswith("refit:") and show_progress is not False:
            say(line)

    start = None
    if earlier is not None and not config.is_fitted:
        start = growth.grown(earlier, dataset, log=_logger.info)
    options: dict[str, Any] = {
        "show_progress": show_progress,
        "resumable": workdir is not None,
    }
    with _place(workdir) as directory, workdir_lib.locked(directory):
        workdir_lib.check_or_create(directory, config, dataset)
        try:
            stopped = ""
            train(config, dataset, directory, start=start, **options)
        except (KeyboardInterrupt, Diverged) as error:
            stopped = _require_kept(error, config, dataset, directory)
        model = load(directory, refitted=False)
        validation = Evaluator.for_split(
            dataset, "validation", config.eval, model.mesh
        )
        if earlier is not None and earlier.branch and validation.is_empty:
            weights = linear_branch.weights_of(earlier.branch)
            model = _with_weights(model, weights)
        try:
            model = tune_blend(model, validation, log=_logger.info)
            if not stopped:
                model = refit(model, dataset, log=note, **options)
        except (KeyboardInterrupt, Diverged) as error:
            stopped = _reason(error)
    if stopped:
        _warn_about(model, stopped, resumable=workdir is not None)
    return model


@contextlib.contextmanager
def _place(workdir: str | pathlib.Path | None) -> Iterator[pathlib.Path]:
    """Yields the workdir, or a temporary one that no message names."""
    if workdir is not None:
        yield user_path(workdir)
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            yield pathlib.Path(temporary)
        except loop.Interrupted as error:
            where = str(error).partition(";")[0]
            raise loop.Interrupted(
                f"{where}: nothing is kept; fit with a workdir to resume"
            ) from None
        except VaecfError as error:
            place = f"(temporary, in {tempfile.gettempdir()})"
            raise type(error)(str(error).replace(temporary, place)) from None


def _reason(error: BaseException) -> str:
    """Returns why training stopped; raises what must end the program."""
    if isinstance(error, Diverged):
        return f"training diverged ({str(error).partition(':')[0]})"
    if isinstance(error, loop.Interrupted) and error.number != signal.SIGINT:
        raise error  # SIGTERM
    return "training was interrupted"


def _require_kept(
    error: BaseException,
    config: Config,
    dataset: Dataset,
    directory: pathlib.Path,
) -> str:
    """Returns why training stopped, if the directory has a model to keep.

    Without a best model, the last parameters that were saved count as the best.

    Raises:
      KeyboardInterrupt, Diverged: there is no model.
    """
    reason = _reason(error)
    if config.is_fitted:
        raise error
    saved = Checkpoints(directory / workdir_lib.CHECKPOINTS)
    with contextlib.closing(saved):
        if saved.step(BEST) is not None:
            return reason
        if saved.step(LATEST) is None:
            fix = "; lower learning_rate" if isinstance(error, Diverged) else ""
            raise type(error)(
                f"{reason} before an epoch was saved: there is no model{fix}"
            ) from None
        mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
        setup = state_lib.make_setup(config, dataset.n_items, mesh)
        state = first_state.restore_state(setup, saved)
        params = state_lib.scoring_params(setup, state)
        position = {**saved.position(LATEST), "best": None}
        saved.save(BEST, int(state.step), params, position)
    return reason


def _warn_about(model: TrainedModel, stopped: str, *, resumable: bool) -> None:
    progress = model.progress
    epoch, best = progress.get("epoch", 0), progress.get("best")
    where = f"that of epoch {epoch}"
    if progress.get("step_in_epoch"):
        where = f"that of epoch {epoch + 1}, before its end"
    value = "not validated"
    if best is not None:
        value = f"validation {model.config.eval.best_metric} {best:.4f}"
    fix = "; the same call resumes the run" if resumable else ""
    if "diverged" in stopped:
        fix = "; lower learning_rate"
    warnings.warn(
        f"{stopped}: the model is {where}, {value}{fix}",
        stacklevel=5,  # where `Recommender.fit` was called
    )


def with_earlier_weights(model: TrainedModel) -> TrainedModel:
    """Returns the model of a run with the blend weights that it started with.

    These are the weights of `config.train.init_from`, for a run that has no
    validation users to choose them. The model is returned unchanged if its run
    has weights already, or if there are none to start with.

    Raises:
      VaecfError: the weights of the earlier run are damaged.
    """
    place = user_path(model.config.train.init_from)
    weights: dict[str, Any] = {}
    with processes.agreement():
        if (
            processes.is_lead()
            and model.config.train.init_from
            and linear_branch.has_weights(place)
            and not linear_branch.has_weights(model.directory)
        ):
            weights = linear_branch.read_weights(place)
    return _with_weights(model, weights)


def _with_weights(
    model: TrainedModel, weights: Mapping[str, Any]
) -> TrainedModel:
    """Returns the model with some blend weights of process 0, also on disk."""
    if model.branch is None:
        return model
    own, changed = linear_branch.weights_of(model.branch), {}
    if weights:  # a larger catalogue may have other experts
        changed = blend.kept_weights(weights, model.branch)
    if changed and processes.is_lead():
        linear_branch.write_weights(model.directory, own | changed)
    same = processes.from_lead([*(own | changed).values()])
    branch = linear_branch.with_weights(model.branch, dict(zip(own, same)))
    return dataclasses.replace(model, branch=branch)


def refit(
    model: TrainedModel,
    dataset: Dataset,
    *,
    train: bool = True,
    log: Callable[[str], None] = _logger.info,
    **options: Any,
) -> TrainedModel:
    """Returns the model after it has learned from all users.

    Continues from the best parameters for `config.train.refit_epochs` on all
    interactions known before the test. A linear branch is fitted again; the
    weights of a blend stay. The refit is kept in `refit/` of the model's
    workdir, whose lock the caller holds, and the same call resumes it. Without
    `train`, only a refit that is there is taken. `options` are those of
    `loop.train`, for models that are trained in epochs.

    The model is returned unchanged if there is nothing to do: no epochs, no
    validation users, or a model of no epoch.

    Raises:
      VaecfError, loop.Interrupted: as `train` does.
    """
    done = with_refit(model)
    if done is not model or not train:
        return done
    config, epochs = model.config, model.config.train.refit_epochs
    epoch = model.progress.get("epoch", 0)
    is_trained = config.is_fitted or epoch > 0
    if not (epochs and is_trained and dataset.validation.fold_in.n_users):
        return model
    folder = refit_folder(model)
    with processes.agreement():
        others = folder.parent.iterdir() if folder.parent.exists() else ()
        for other in [*others] if processes.is_lead() else ():
            if other != folder:  # of another epoch, or of other epochs
                shutil.rmtree(other)
    data = _all_for_training(dataset)
    log(f"refit: {config.title} learns from all {data.train.n_users:,} users")
    if config.is_fitted:
        fitted.train(config, data.train, folder, log=log)
        return with_refit(model)
    last = epoch + epochs
    changes = {
        "train.epochs": last,
        "train.max_steps": 0,
        "train.trackers": (),
        "eval.every_epochs": last,
    }
    if model.branch is not None:
        changes["linear.experts"] = blend.experts_of(model.branch)
    try:
        loop.train(
            config_lib.replace(config, changes),
            data,
            folder,
            start=Start(model.params, epoch),
            log=log,
            **options,
        )
    except loop.Interrupted as error:
        stopped = loop.Interrupted(
            f"stopped in the refit; train again in workdir {model.directory} "
            "to resume"
        )
        stopped.number = error.number
        raise stopped from None
    return with_refit(model)


def _all_for_training(dataset: Dataset) -> Dataset:
    """Returns a dataset of training users alone: of `everything()`."""
    everything = dataset.everything()
    none = Interactions(
        np.zeros(1, np.int64), np.zeros(0, np.int32), dataset.n_items
    )
    return dataclasses.replace(
        dataset,
        train=everything,
        validation=HeldOut(none, none),
        test=HeldOut(none, none),
        users=IdTable(np.arange(everything.n_users)),
    )
