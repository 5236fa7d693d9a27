"""What a finished run is worth by the validation users."""

from __future__ import annotations

import pathlib

from vaecf.config import Config
from vaecf.data.dataset import Dataset
from vaecf.evaluation.evaluator import Evaluator
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving.trained_model import load, tune_blend
from vaecf.training import linear_branch
from vaecf.training.progress import TrainProgress


def value(
    config: Config,
    folder: pathlib.Path,
    dataset: Dataset,
    position: TrainProgress,
) -> float | None:
    """The best validation value of a finished run.

    While a blend is trained its epochs are compared with weights that are the
    same for all runs. Here they are chosen, and kept in the folder, as
    `main.py` does: runs are compared by what they rank like in the end.

    Args:
      config: of the run.
      folder: its workdir, held by the caller.
      dataset: its validation users are ranked.
      position: where the run ended.
    """
    if not config.linear.l2 or position.best is None:
        return position.best
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.item)
    model = load(folder, mesh=mesh)
    validation = Evaluator.for_split(dataset, "validation", config.eval, mesh)
    tune_blend(model, validation)
    return float(linear_branch.read_weights(folder)["value"])
