"""Recommendations to show beside the metrics of a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from vaecf.data.dataset import Dataset
from vaecf.serving.trained_model import TrainedModel


def sample_recommendations(
    model: TrainedModel, dataset: Dataset, *, n_users: int = 3, k: int = 10
) -> list[dict[str, Any]]:
    """Returns k recommendations for each of the first test users, as raw ids.

    Their histories are the fold-in items of the dataset.

    Returns:
      [{'user', 'history': [item, ...], 'rows': [{'rank', 'item', 'score'},
      ...]}, ...], where the score is that of `TrainedModel.columns`.
    """
    fold_in = dataset.test.fold_in
    n_users = min(n_users, fold_in.n_users)
    if n_users == 0:
        return []
    fold_in = fold_in.rows(np.arange(n_users))
    lists = model.ranker(min(k, dataset.n_items))(
        model.scorer_params,
        fold_in.indptr,
        fold_in.indices,
        batch_size=n_users,
    )
    row, rank, item, score = (c.tolist() for c in model.columns(lists).values())
    first = dataset.split_sizes[0] + dataset.split_sizes[1]
    return [
        {
            "user": dataset.users.ids[first + u],
            "history": [dataset.items.ids[i] for i in fold_in.row(u)],
            "rows": [
                {"rank": rank[j], "item": item[j], "score": score[j]}
                for j in range(len(row))
                if row[j] == u
            ],
        }
        for u in range(n_users)
    ]
