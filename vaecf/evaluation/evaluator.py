"""Evaluates rankings on held-out users: per-user metrics and their means."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from vaecf.config import EvalConfig
from vaecf.data.interactions import Interactions
from vaecf.evaluation import list_metrics
from vaecf.evaluation import metrics as metrics_lib
from vaecf.evaluation.ranking import RankedLists, Ranker, Scorer
from vaecf.parallel import processes


class Evaluation(NamedTuple):
    """Metrics of one scorer on one split."""

    # {'ndcg@100': {'mean', 'stderr', 'users'}, ...}. Mean and standard error
    # are None where they do not exist; a single number of all lists, such as
    # coverage, has no standard error. {} for an empty split.
    summary: dict[str, dict[str, Any]]
    # {'ndcg@100': float64 [U], ...}; NaN for users without held-out items.
    # Single numbers of all lists have no values per user.
    per_user: dict[str, np.ndarray]
    left_out: int  # number of users without held-out items
    lists: RankedLists  # ranked lists of all users; no lists for an empty split

    def record(self, prefix: str) -> dict[str, Any]:
        """Returns {'<prefix>/ndcg@100': mean, '<prefix>/ndcg@100_stderr'}."""
        record: dict[str, Any] = {}
        for name, value in self.summary.items():
            record[f"{prefix}/{name}"] = value["mean"]
            if value["stderr"] is not None:
                record[f"{prefix}/{name}_stderr"] = value["stderr"]
        return record


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Ranks the users of one split and compares with their held-out items.

    The same evaluator serves every scorer. Evaluating new parameters with the
    ranker that `compile` returned does not compile again.
    """

    fold_in: Interactions  # histories that the scorer sees
    # Interactions of the same users that the scorer should find.
    held_out: Interactions
    # Interactions of the training users, for the popularity and the similarity
    # of items.
    train: Interactions
    metrics: tuple[str, ...]  # names such as 'ndcg@100'
    best_metric: str  # the metric that epochs and settings are chosen by
    batch_size: int  # users per batch, over all devices
    mesh: Mesh  # devices ('data', 'item') to rank on

    @classmethod
    def for_split(
        cls, dataset: Any, split: str, config: EvalConfig, mesh: Mesh
    ) -> Evaluator:
        """Returns the evaluator of a dataset's 'validation' or 'test' split.

        Its metrics are `config.metrics`; for validation also
        `config.best_metric`, by which epochs and settings are chosen.
        """
        held = dataset.split(split)
        names = config.metrics
        if split == "validation" and config.best_metric not in names:
            names = (*names, config.best_metric)
        return cls(
            held.fold_in,
            held.held_out,
            dataset.train,
            names,
            config.best_metric,
            config.batch_size,
            mesh,
        )

    @property
    def depth(self) -> int:
        """Length of the lists that the metrics need."""
        return metrics_lib.depth(self.metrics)

    @property
    def is_empty(self) -> bool:
        """True if no user of the split has a held-out item."""
        return self.held_out.nnz == 0

    def compile(self, scorer: Scorer) -> Ranker:
        """Returns a ranker of the scorer, deep enough for the metrics."""
        return Ranker(scorer, self.mesh, self.depth)

    def __call__(self, ranker: Ranker, params: Any) -> Evaluation:
        """Ranks all users of the split and evaluates the lists.

        On several processes all must call this method. The means are those of
        process 0: rounding differences would make the processes choose
        different epochs or settings. `ranker` is a result of `compile`, or any
        ranker of at least this depth.
        """
        if self.is_empty:
            return Evaluation({}, {}, self.held_out.n_users, ranker.no_lists())
        lists = ranker(
            params,
            self.fold_in.indptr,
            self.fold_in.indices,
            batch_size=self.batch_size,
        )
        auc_U = None
        if metrics_lib.AUC in self.metrics:
            auc_U = ranker.auc(
                params, self.fold_in, self.held_out, batch_size=self.batch_size
            )
        evaluation = self.evaluate_lists(lists, auc_U)
        return evaluation._replace(summary=_from_lead(evaluation.summary))

    def best_value(self, ranker: Ranker, params: Any) -> float:
        """Returns the mean of `best_metric` on a split that is not empty."""
        only = dataclasses.replace(self, metrics=(self.best_metric,))
        return only(ranker, params).summary[self.best_metric]["mean"]

    def evaluate_lists(
        self, lists: RankedLists, auc_U: np.ndarray | None = None
    ) -> Evaluation:
        """Returns the metrics of given lists, one list per user of the split.

        `auc_U` is the AUC of each user, which lists do not tell.

        Raises:
          ValueError: the lists are shorter than the metrics need, or the AUC
            is missing.
        """
        n_items = self.train.n_items
        needed = min(self.depth, n_items)
        if lists.item_UK.shape[1] < needed:
            # Missing ranks would count as misses.
            raise ValueError(
                f"lists of {lists.item_UK.shape[1]} items, but the metrics "
                f"need {needed}"
            )
        n_held_out_U = np.diff(self.held_out.indptr)
        evaluated_U = n_held_out_U > 0
        hits_UK = metrics_lib.hits(
            lists.item_UK, self.held_out.indptr, self.held_out.indices
        )
        shown = functools.cache(
            lambda: list_metrics.Lists(
                # Lists of users without held-out items do not count.
                np.where(evaluated_U[:, None], lists.item_UK, -1),
                *(hits_UK, n_held_out_U, self.fold_in, self._items),
            )
        )
        per_user: dict[str, np.ndarray] = {}
        summary: dict[str, dict[str, Any]] = {}
        for name in self.metrics:
            kind, k = metrics_lib.parse(name)
            if kind == metrics_lib.AUC:
                if auc_U is None:
                    raise ValueError("the AUC needs the scores of all items")
                values = auc_U
            elif kind in metrics_lib.HIT_METRICS:
                values = metrics_lib.HIT_METRICS[kind](hits_UK, n_held_out_U, k)
            else:
                values = metrics_lib.LIST_METRICS[kind](shown(), k)
            if values.ndim:
                per_user[name] = values
                summary[name] = mean_and_stderr(values)
            else:
                # One value of all lists has no standard error.
                summary[name] = {
                    **mean_and_stderr(values[None]),
                    "users": int(evaluated_U.sum()),
                }
        left_out = int((~evaluated_U).sum())
        return Evaluation(summary, per_user, left_out, lists)

    def groups(self, evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
        """Returns the mean of `best_metric` by groups of users and of items.

        Returns:
          {'history_length': as `by_history_length`, 'item_popularity':
          [{'bucket': 'head', 'items', 'mean', 'stderr', 'users'}, 'mid',
          'tail']}, JSON values. {} if the metric was not evaluated; metrics
          other than those of hits have no 'item_popularity'.

        The head is the most popular items that hold 20 % of the training
        interactions, the tail those outside the items that hold 80 %
        (Abdollahpouri et al. 2021, "User-centered evaluation of popularity bias
        in recommender systems"). The metric of a group is that of the same
        lists if only the held-out items of the group are hits; users without
        such items are left out.
        """
        name = self.best_metric
        if name not in evaluation.per_user:
            return {}
        lengths = self.fold_in.counts
        values_U = evaluation.per_user[name]
        groups = {"history_length": by_history_length(values_U, lengths)}
        kind, k = metrics_lib.parse(name)
        if kind not in metrics_lib.HIT_METRICS:
            return groups
        held_out, item_UK = self.held_out, evaluation.lists.item_UK
        hits_UK = metrics_lib.hits(item_UK, held_out.indptr, held_out.indices)
        group_I = self._items.popularity_group_I
        user_N = np.repeat(np.arange(held_out.n_users), held_out.counts)
        groups["item_popularity"] = []
        for group, bucket in enumerate(list_metrics.POPULARITY_GROUPS):
            is_inside_N = group_I[held_out.indices] == group
            n_U = np.bincount(user_N[is_inside_N], minlength=held_out.n_users)
            inside_UK = hits_UK & (group_I[item_UK] == group)
            values_U = metrics_lib.HIT_METRICS[kind](inside_UK, n_U, k)
            n_items = int((group_I == group).sum())
            groups["item_popularity"].append(
                {
                    "bucket": bucket,
                    "items": n_items,
                    **mean_and_stderr(values_U),
                }
            )
        return groups

    @functools.cached_property
    def _items(self) -> list_metrics.Items:
        return list_metrics.Items(self.train)


def _from_lead(summary: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the means and standard errors of process 0."""
    if processes.alone():
        return summary
    cells = [(name, key) for name in summary for key in ("mean", "stderr")]
    numbers = [summary[name][key] for name, key in cells]
    received = processes.from_lead(
        [math.nan if x is None else x for x in numbers]
    )
    result = {name: dict(cell) for name, cell in summary.items()}
    for (name, key), x in zip(cells, received, strict=True):
        result[name][key] = None if math.isnan(x) else x
    return result


def mean_and_stderr(values: np.ndarray) -> dict[str, Any]:
    """Returns {'mean', 'stderr', 'users'} of the values that are not NaN.

    The standard error divides by n - 1. Mean and standard error are None where
    they do not exist.
    """
    real = values[~np.isnan(values)]
    n = len(real)
    mean = float(real.mean()) if n else None
    stderr = float(real.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "users": n}


def by_history_length(
    values_U: np.ndarray, length_U: np.ndarray, buckets: int = 4
) -> list[dict[str, Any]]:
    """Returns the mean of a metric by the length of the users' histories.

    Args:
      values_U: float [U], the metric; NaN for users to leave out.
      length_U: int [U], number of fold-in items of each user.
      buckets: largest number of groups; each has about as many users.

    Returns:
      [{'bucket': '5-12', 'mean', 'stderr', 'users'}, ...], shortest first.
    """
    real_U = ~np.isnan(values_U)
    values_U, length_U = values_U[real_U], length_U[real_U]
    if not len(values_U):
        return []
    shares = np.linspace(0, 1, buckets + 1)[1:]
    # Inclusive upper bounds. Many users with the same length share a bucket.
    upper = np.unique(np.quantile(length_U, shares, method="inverted_cdf"))
    bucket_U = np.searchsorted(upper, length_U)
    rows = []
    for b in range(len(upper)):
        inside = bucket_U == b
        if inside.any():
            low, high = length_U[inside].min(), length_U[inside].max()
            name = f"{low}" if low == high else f"{low}-{high}"
            rows.append({"bucket": name, **mean_and_stderr(values_U[inside])})
    return rows
