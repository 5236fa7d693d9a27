"""Evaluates, describes and packs a trained model, for `Recommender`."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vaecf import config as config_lib
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError, short
from vaecf.evaluation import baselines as baselines_lib
from vaecf.evaluation import metrics as metrics_lib
from vaecf.evaluation.evaluator import Evaluation, Evaluator
from vaecf.models import blend
from vaecf.reporting import plots, tables
from vaecf.serving import keywords
from vaecf.serving.trained_model import REFITTED, TrainedModel, load
from vaecf.setting import checked, convert

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def evaluate(
    model: TrainedModel,
    dataset: Any,
    *,
    split: str = "test",
    metrics: Iterable[str] | str | None = None,
    baselines: Iterable[str] | str = (),
    tuned: bool = False,
) -> pd.DataFrame:
    """Returns means over the users of a split; see `Recommender.evaluate`."""
    import pandas as pd

    _check_dataset(model, dataset, split)
    names = _names("baselines", baselines)
    for name in names:
        baselines_lib.settings(name)
    config = model.config.eval
    if metrics is not None:
        field = config_lib.settings()["eval.metrics"]
        wanted = checked("metrics", field, _names("metrics", metrics))
        config = dataclasses.replace(config, metrics=wanted)
    for name in (*config.metrics, config.best_metric):
        metrics_lib.parse(name, "metrics")
    validation, test = (
        Evaluator.for_split(dataset, name, config, model.mesh)
        for name in ("validation", "test")
    )
    chosen = dataclasses.replace(
        test if split == "test" else validation, metrics=config.metrics
    )
    if chosen.is_empty:
        raise VaecfError(
            f"the dataset has no {split} users with held-out items: split the "
            f"interactions with {split}_users above 0"
        )
    ranker = model.ranker(chosen.depth)
    name = keywords.name_of(model.config.title)
    found = [(name, chosen(ranker, model.scorer_params))]
    settings = {}
    for name in names:
        settings[name], evaluation = _baseline(
            *(name, dataset, validation, chosen, tuned),
            everyone=REFITTED in model.progress,
        )
        found.append((name, evaluation))
    rows = [
        {"model": name, "metric": metric, **cell}
        for name, evaluation in found
        for metric, cell in evaluation.summary.items()
    ]
    frame = pd.DataFrame(
        rows, columns=["model", "metric", "mean", "stderr", "users"]
    )
    frame = frame.astype({"mean": float, "stderr": float})
    frame = frame if names else frame.drop(columns="model")
    frame.attrs["settings"] = settings
    return frame


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Returns the names of an argument: one, or any iterable of them."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = tuple(value)
    names: tuple[str, ...] = convert(tuple[str, ...], value, argument)
    return names


def _check_dataset(model: TrainedModel, dataset: Any, split: str) -> None:
    if not isinstance(dataset, Dataset):
        raise VaecfError(
            f"dataset of type {type(dataset).__name__}: pass a Dataset, the "
            "result of vaecf.split or vaecf.load_dataset"
        )
    dataset.split(split)  # checks the name
    if dataset.items.sha256() != model.items.sha256():
        raise VaecfError(
            f"the {len(dataset.items):,} items of the dataset are not the "
            f"{len(model.items):,} of the model, in their order: evaluate on "
            "the dataset that the model was fitted to"
        )
    if split == "validation" and REFITTED in model.progress:
        raise VaecfError(
            "the model has learned from the validation users: fit with "
            "refit_epochs=0 to evaluate on them, or see `history`"
        )
    if dataset.manifest != model.manifest:
        warnings.warn(
            "the model was not fitted to this dataset: it may have learned "
            f"from its {split} users",
            stacklevel=4,  # where `Recommender.evaluate` was called
        )


def _baseline(
    name: str,
    dataset: Dataset,
    validation: Evaluator,
    chosen: Evaluator,
    tuned: bool,
    *,
    everyone: bool,
) -> tuple[dict[str, float], Evaluation]:
    """Returns the settings of a baseline and its evaluation on `chosen`.

    With `everyone`, the baseline learns from the validation users, too, as the
    model has, but not while its settings are chosen.
    """
    settings = baselines_lib.settings(name)
    if tuned:
        best, _ = baselines_lib.evaluate(name, validation, chosen, tuned=True)
        settings = {key: best[key] for key in settings}
    if everyone:
        validation = dataclasses.replace(validation, train=dataset.everything())
    _, evaluation = baselines_lib.evaluate(
        name, validation, chosen, changes=settings
    )
    return settings, evaluation


def plot_history(
    model: TrainedModel, name: str | None, axes: Axes | None
) -> Axes:
    """Plots a column of the history; see `Recommender.plot_history`."""
    history = plots.history_frame(model.records)
    best = f"validation/{model.config.eval.best_metric}"
    if name is None:
        name = best if best in history else "train/loss"
    if name not in history:
        raise VaecfError(
            f"the history has no {short(name)}: "
            + (
                f"use one of {', '.join(history)}"
                if len(history)
                else "the model was not trained in epochs, or is from an "
                "earlier version"
            )
        )
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(layout="constrained")[1]
    if name.startswith("validation/") and f"{name}_stderr" in history:
        metric = name.removeprefix("validation/")
        plots.plot_validation(history, axes, metric, {})
    else:
        plots.plot_curve(history, name, axes)
    return axes


def facts(model: TrainedModel) -> tuple[str, dict[str, object]]:
    """Returns the name of a model, and what a card says about it."""
    config, progress = model.config, model.progress
    experts = blend.weights_of(model.branch) if model.branch else ()
    counts = model.manifest.get("counts", {})
    best = progress.get("best")
    return tables.model_name(config.title, experts), {
        "dataset": model.manifest.get("name"),
        "training users": counts.get("train_users"),
        "items": len(model.items),
        "latent units": None if config.is_fitted else config.model.latent,
        "best epoch": progress.get("epoch"),
        "epochs on all users": (
            None if config.is_fitted else progress.get(REFITTED)
        ),
        f"validation {config.eval.best_metric}": best,
    }


def packed(model: TrainedModel) -> bytes:
    """Returns the bytes of an archive of the saved model."""
    buffer = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as temporary,
        # Some file systems have times that ZIP archives cannot hold.
        zipfile.ZipFile(buffer, "w", strict_timestamps=False) as archive,
    ):
        folder = model.save(pathlib.Path(temporary) / "model")
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def unpacked(data: bytes) -> TrainedModel:
    """Returns the model of `packed`."""
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(temporary)
        return load(pathlib.Path(temporary))
