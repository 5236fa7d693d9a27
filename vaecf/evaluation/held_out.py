"""The held-out users of a run: what ranks them, and what is written."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import evaluator, metrics, ranking, scorers
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import loop

if TYPE_CHECKING:
    import polars as pl

ORACLE = "oracle"
SPLITS = ("validation", "test")


class Entrant(NamedTuple):
    """Something that ranks: compiled, with its parameters on the mesh."""

    ranker: ranking.Ranker
    params: Any


def model_entrant(model: TrainedModel) -> Entrant:
    """The model itself, ranked as deep as its metrics look."""
    depth = metrics.depth(model.config.eval.metrics)
    return Entrant(model.ranker(depth), model.ranked_params)


def entrant(model: TrainedModel, scorer: ranking.Scorer) -> Entrant:
    """Another scorer, on the model's mesh and to the same depth."""
    mesh = model.setup.mesh
    rows = mesh_lib.padded_items(scorer.n_items, mesh.shape[mesh_lib.ITEM])
    params = mesh_lib.resize_items(scorer.params, scorer.partition, rows)
    specs = mesh_lib.specs(params, scorer.partition)
    return Entrant(
        ranking.Ranker(scorer, mesh, metrics.depth(model.config.eval.metrics)),
        processes.put(params, mesh_lib.shardings(mesh, specs)),
    )


def evaluate(
    model: TrainedModel, dataset: Dataset, split: str, ranked_by: Entrant
) -> evaluator.Evaluation | None:
    """Metrics of a split; None if it has nothing held out."""
    held = dataset.split(split)
    if held.held_out.nnz == 0:
        return None
    return evaluator.evaluate(
        ranked_by.ranker,
        ranked_by.params,
        held.fold_in,
        held.held_out,
        names=model.config.eval.metrics,
        batch_size=model.config.eval.batch_size,
        item_share_I=loop.item_share(dataset.train, model.config.eval.metrics),
    )


def summary(
    model: TrainedModel, dataset: Dataset, split: str, ranked_by: Entrant
) -> dict[str, Any]:
    """{metric: {'mean', 'stderr', 'users'}}; {} if nothing is held out."""
    result = evaluate(model, dataset, split, ranked_by)
    return {} if result is None else result.summary


def oracle(model: TrainedModel, dataset: Dataset) -> dict[str, Any]:
    """Summaries of both splits, ranked by what generated the data."""
    assert dataset.oracle is not None
    user_group = dataset.oracle["user_group"]
    train, validation, _ = dataset.split_sizes
    rows = {
        "validation": user_group[train : train + validation],
        "test": user_group[train + validation :],
    }
    group_item = dataset.oracle["group_item"]
    return {
        split: summary(
            model,
            dataset,
            split,
            entrant(model, scorers.oracle(mixture, group_item)),
        )
        for split, mixture in rows.items()
    }


def per_user(
    name: str, evaluation: evaluator.Evaluation, dataset: Dataset
) -> pl.DataFrame:
    """Metrics of every test user: model, user, fold_in, held_out, ...

    Args:
      name: of what ranked them.
      evaluation: of the test users.
      dataset: whose users they are.
    """
    import polars as pl

    train, validation, _ = dataset.split_sizes
    ids = dataset.users.ids[train + validation :].tolist()
    return pl.DataFrame(
        {
            "model": [name] * len(ids),
            "user": ids,
            "fold_in": dataset.test.fold_in.counts,
            "held_out": dataset.test.held_out.counts,
            **evaluation.per_user,
        }
    )


def read_per_user(path: pathlib.Path) -> dict[str, pl.DataFrame]:
    """What `write_per_user` wrote as Parquet, by model; {} if nothing is there.

    Also {} if it cannot be read: it is written anew.
    """
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        return {}
    if "model" not in frame.columns:
        return {}
    parts = frame.partition_by("model", as_dict=True, maintain_order=True)
    return {str(name): part for (name,), part in parts.items()}


def write_per_user(path: pathlib.Path, frames: Iterable[pl.DataFrame]) -> None:
    """One file of `per_user`'s frames, a row a model and user.

    Args:
      path: of the file, Parquet, or CSV if it is called so.
      frames: with the same columns.

    Raises:
      VaecfError: it cannot be written.
    """
    import polars as pl

    frame = pl.concat(frames)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.suffix == ".csv":
            frame.write_csv(temporary)
        else:
            frame.write_parquet(temporary)
        temporary.replace(path)
    except OSError as error:
        raise VaecfError(
            f"--per_user={path} cannot be written ({error})"
        ) from None


def oracle_note(results: Mapping[str, Any]) -> str | None:
    """What the oracle's row in a table means; None if there is none."""
    if ORACLE not in results:
        return None
    return (
        f"{ORACLE}: ranking by the probabilities that generated the data, the "
        "best that can be reached"
    )
