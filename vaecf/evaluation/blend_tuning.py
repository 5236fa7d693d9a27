"""The weights of a model and its linear branch, chosen by validation users."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from vaecf.data.dataset import Dataset
from vaecf.evaluation import coordinate_search, evaluator, metrics, scorers
from vaecf.models import blend
from vaecf.parallel import processes
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import linear_branch, loop

# What is tried, from the weights to begin with up and down for as long as it
# gets better: the gain, then the prior, then the gain again.
GAINS = (
    *(0.0, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8),
    *(4.0, 8.0, 16.0, 32.0, 64.0),
)
PRIORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def choose(
    model: TrainedModel, dataset: Dataset, *, log: Callable[[str], None]
) -> TrainedModel:
    """The model with the weights that rank the validation users best.

    They are kept in its directory, with what was tried, and chosen anew when a
    later epoch is the best. Of equally good ones the first tried stays.

    Args:
      model: of a workdir that the caller holds; without a linear branch it is
        returned as it is.
      dataset: its validation users are ranked; without any, the weights to
        begin with stay.
      log: gets one line.
    """
    held = dataset.split("validation")
    if model.path is None or held.held_out.nnz == 0:
        return model
    epoch = model.position.get("epoch")
    kept = linear_branch.read_weights(model.directory)
    # What the lead reads counts: another host may see an older file.
    [is_chosen] = processes.from_lead([kept.get("epoch", -1) == epoch])
    if not is_chosen:
        began = time.perf_counter()
        kept = {"epoch": epoch, **search(model, dataset)}
        if processes.is_lead():
            linear_branch.write_weights(model.directory, kept)
        log(
            f"linear branch: gain {kept['gain']:g}, prior {kept['prior']:g}: "
            f"best of {len(kept['tried'])} by validation {kept['metric']} "
            f"{kept['value']:.4f} ({kept['model_alone']:.4f} without it), in "
            f"{time.perf_counter() - began:.1f} s"
        )
    gain, prior = processes.from_lead(
        [kept.get(name, 0.0) for name in ("gain", "prior")]
    )
    path = linear_branch.with_weights(model.path, gain=gain, prior=prior)
    return dataclasses.replace(model, path=path)


def search(
    model: TrainedModel, dataset: Dataset, *, priors: tuple[float, ...] = PRIORS
) -> dict[str, Any]:
    """Weights that rank the validation users best.

    Args:
      model: has a linear branch, whose own weights do not matter.
      dataset: has validation users.
      priors: that may be chosen, in order.

    Returns:
      {'gain', 'prior', 'metric', 'value', 'model_alone', 'tried': [...]}.
    """
    assert model.path is not None
    its_path = model.path
    metric = model.config.eval.best_metric
    held = dataset.split("validation")
    # As deep as all metrics look: who tests the model next has it compiled.
    ranker = model.ranker(metrics.depth((*model.config.eval.metrics, metric)))
    share_I = loop.item_share(dataset.train, (metric,))

    @functools.cache
    def value(gain: float, prior: float) -> float:
        path = linear_branch.with_weights(its_path, gain=gain, prior=prior)
        evaluation = evaluator.evaluate(
            ranker,
            scorers.ranked_params(model.params, path),
            held.fold_in,
            held.held_out,
            names=(metric,),
            batch_size=model.config.eval.batch_size,
            item_share_I=share_I,
        )
        # A last bit that differs must not part the processes.
        [result] = processes.from_lead([evaluation.summary[metric]["mean"]])
        tried.append({"gain": gain, "prior": prior, "value": result})
        return result

    tried: list[dict[str, float]] = []
    gain = blend.GAIN
    prior = blend.PRIOR if blend.PRIOR in priors else priors[0]
    gain = coordinate_search.climb(GAINS, gain, lambda g: value(g, prior))
    prior = coordinate_search.climb(priors, prior, lambda p: value(gain, p))
    gain = coordinate_search.climb(GAINS, gain, lambda g: value(g, prior))
    model_alone = value(0.0, prior)
    if model_alone > value(gain, prior):
        gain = 0.0
    return {
        "gain": gain,
        "prior": prior,
        "metric": metric,
        "value": value(gain, prior),
        "model_alone": model_alone,
        "tried": tried,
    }
