"""What a finished run is worth by the validation users."""

from __future__ import annotations

import pathlib

from vaecf.data.dataset import Dataset
from vaecf.models import sharding
from vaecf.options import Options
from vaecf.serving import blending
from vaecf.serving.model import load
from vaecf.training import linear_path
from vaecf.training.position import Position


def value(
    options: Options, folder: pathlib.Path, dataset: Dataset, position: Position
) -> float | None:
    """The best validation value of a finished run.

    While a blend is trained its epochs are compared with weights that are the
    same for all runs. Here they are chosen, and kept in the folder, as
    `main.py` does: runs are compared by what they rank like in the end.

    Args:
      options: of the run.
      folder: its workdir, held by the caller.
      dataset: its validation users are ranked.
      position: where the run ended.
    """
    if not options.linear.l2 or position.best is None:
        return position.best
    mesh = sharding.make_mesh(options.mesh.data, options.mesh.item)
    model = load(folder, mesh=mesh)
    blending.choose(model, dataset, say=lambda line: None)
    return float(linear_path.read_weights(folder)["value"])
