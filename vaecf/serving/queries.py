"""What a fitted model answers: recommendations, neighbours, explanations."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.data import frames
from vaecf.data.id_table import text_of
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError, short
from vaecf.evaluation.ranking import DIVERGED
from vaecf.serving.histories import (
    all_unknown,
    allowed_items,
    as_histories,
    count,
)
from vaecf.serving.lists import check_score
from vaecf.serving.trained_model import TrainedModel

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("vaecf")

_ROWS = 512  # histories per batch of `explain`


class Queries:
    """Answers questions by raw ids; the base class of `Recommender`."""

    _model: TrainedModel | None = None

    def _fitted(self) -> TrainedModel:
        if self._model is None:
            raise VaecfError(
                "no model yet: call fit() or Recommender.load(workdir)"
            )
        return self._model

    @property
    def items(self) -> np.ndarray:
        """Raw ids of all items, [items], int64 or strings.

        >>> recommender.items[:2].tolist()
        ['sku-00', 'sku-01']
        """
        return self._fitted().items.ids

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow_items: Iterable[Any] | None = None,
        deny_items: Iterable[Any] | None = None,
        score: str | None = None,
        user_column: str = "user",
        item_column: str = "item",
        batch_size: int = 512,
    ) -> pd.DataFrame:
        """Returns the k items with the highest scores for every history.

        >>> lists = recommender.recommend({"ann": ["sku-01", "sku-02"]}, k=3)
        >>> lists.columns.tolist(), len(lists)
        (['user', 'rank', 'item', 'score'], 3)

        Args:
          histories: pandas or polars frame or Arrow table, with one row per
            (user, item) or one row per user with a list of items; pandas Series
            of lists, whose index is the users; mapping from user to items;
            iterable of lists of items, whose users are 0, 1, ...; or SciPy
            sparse matrix [users, items] with the items in the order of `items`.
          k: number of items per user, at least 1.
          exclude_seen: do not recommend items of the history.
          allow_items: recommend only these items; any iterable or column.
          deny_items: do not recommend these items.
          score: 'log_probability' (natural logarithm, among all items),
            'probability', or 'logit', the score itself. None takes the first,
            or 'logit' for the models that have no probabilities (all but
            autoencoders and blends).
          user_column: user column of a DataFrame.
          item_column: item column of a DataFrame.
          batch_size: users per batch on the device.

        Returns:
          DataFrame with columns user, rank (from 1), item and score, users in
          the given order. Users with fewer than k items left have fewer rows.
          `attrs['unknown_items']` is the number of history items that the model
          does not know and ignores.

        Raises:
          VaecfError: nothing is fitted, an argument cannot be used, or the
            model knows no item of the histories.
        """
        import pandas as pd

        frames = list(
            self.recommend_blocks(
                histories,
                k,
                exclude_seen=exclude_seen,
                allow_items=allow_items,
                deny_items=deny_items,
                score=score,
                user_column=user_column,
                item_column=item_column,
                batch_size=batch_size,
            )
        )
        # The ids of an empty frame have no type that concat could use.
        filled = [frame for frame in frames if len(frame)]
        result = pd.concat(filled or frames[:1], ignore_index=True)
        result.attrs["unknown_items"] = frames[0].attrs["unknown_items"]
        return result

    def recommend_blocks(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow_items: Iterable[Any] | None = None,
        deny_items: Iterable[Any] | None = None,
        score: str | None = None,
        user_column: str = "user",
        item_column: str = "item",
        batch_size: int = 512,
    ) -> Iterator[pd.DataFrame]:
        """Yields the result of `recommend` batch by batch, in bounded memory.

        The arguments are those of `recommend`. Without users, one empty frame
        is yielded.

        >>> blocks = recommender.recommend_blocks(frame, k=3, batch_size=20)
        >>> sum(block["user"].nunique() for block in blocks)
        60
        """
        import pandas as pd

        model = self._fitted()
        k, batch_size = count("k", k), count("batch_size", batch_size)
        check_score(score)
        users, matrix, unknown = as_histories(
            histories, model.items, user_column, item_column
        )
        if unknown:
            _logger.warning("ignored %d unknown items of histories", unknown)
        ranker = model.ranker(min(k, len(model.items)), exclude_seen)
        allowed = allowed_items(model.items, allow_items, deny_items)
        blocks = ranker.blocks(
            model.scorer_params,
            matrix.indptr,
            matrix.indices,
            batch_size=batch_size,
            allowed_I=None if allowed is None else ranker.allow(allowed),
        )
        first = 0
        for lists in blocks if len(users) else [ranker.no_lists()]:
            columns = model.columns(lists, score)
            row = columns.pop("row")
            frame = pd.DataFrame({"user": users[first + row], **columns})
            frame.attrs["unknown_items"] = unknown
            yield frame
            first += len(lists.item_UK)

    def similar_items(self, item: Any, k: int = 10) -> pd.DataFrame:
        """Returns the k items most similar to `item`.

        >>> near = recommender.similar_items("sku-01", k=3)
        >>> near.columns.tolist()
        ['rank', 'item', 'score']

        Returns:
          DataFrame with columns rank (from 1), item (raw id) and score: the
          cosine similarity of the items' output weights or factors, in
          [-1, 1]; or the item-item weight from `item`, for models of such.

        Raises:
          VaecfError: nothing is fitted, or the model does not know the item,
            or nothing about the similarity of items.
        """
        import pandas as pd

        model = self._fitted()
        k = count("k", k)
        index = _index(model, item)
        if model.config.model.name == "popularity":
            raise VaecfError(
                "popularity knows nothing about the similarity of items: use "
                "another model, such as 'itemknn'"
            )
        vector_ID = model.item_vectors()
        if vector_ID is None:
            # Item-item weights are the scores of a history of one item.
            return self.recommend([[item]], k).drop(columns="user")
        cosine_I = _cosines(vector_ID, vector_ID[index], "output weights")
        cosine_I[index] = -np.inf
        best = _best(cosine_I, min(k, len(cosine_I) - 1))
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(best) + 1),
                "item": model.items.ids[best],
                "score": cosine_I[best],
            }
        )

    def similar_users(
        self,
        histories: Any,
        user: Any,
        k: int = 10,
        *,
        user_column: str = "user",
        item_column: str = "item",
    ) -> pd.DataFrame:
        """Returns the k users of `histories` who are most similar to a user.

        Compares the latent representations that `encode` returns.

        >>> near = recommender.similar_users(frame, "ann", k=2)
        >>> near.columns.tolist(), "ann" in set(near["user"])
        (['rank', 'user', 'score'], False)

        Args:
          histories: the users to choose from, as for `recommend`.
          user: one of these users, who is left out of the result; or the
            history of another one, a list of items.
          k: number of users, at least 1.
          user_column: user column of a DataFrame.
          item_column: item column of a DataFrame.

        Returns:
          DataFrame with columns rank (from 1), user and score: the cosine
          similarity of the representations, in [-1, 1].

        Raises:
          VaecfError: nothing is fitted, the model has no representation of
            users (all but autoencoders and blends), or an argument cannot be
            used.
        """
        import pandas as pd

        k = count("k", k)
        users, code_UZ = self.encode(
            histories, user_column=user_column, item_column=item_column
        )
        itself = np.zeros(len(users), bool)
        if pd.api.types.is_list_like(user):
            [code_Z] = self.encode([frames.id_list(user, "user=")])[1]
        else:
            itself = np.array([text_of(u) == text_of(user) for u in users])
            if not itself.any():
                raise VaecfError(
                    f"user={short(user)} is not in the histories: name one of "
                    "their users, or pass a list of items"
                )
            [code_Z] = code_UZ[itself]
        cosine_U = _cosines(code_UZ, code_Z, "codes")
        cosine_U[itself] = -np.inf
        best = _best(cosine_U, min(k, int((~itself).sum())))
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(best) + 1),
                "user": users[best],
                "score": cosine_U[best],
            }
        )

    def explain(
        self,
        history: Any,
        item: Any,
        n: int = 5,
        *,
        score: str | None = None,
    ) -> pd.DataFrame:
        """Returns the items of a history that moved the score of an item most.

        Each item of the history is left out in turn, and the model scores
        `item` anew, all in one call.

        >>> recommender.explain(["sku-01", "sku-02", "sku-07"], "sku-03", n=2)
        ... # doctest: +ELLIPSIS
           rank    item    change
        0     1  sku-0...
        1     2  sku-0...

        Args:
          history: items of one user. Repeated ones count once, and items that
            the model does not know are ignored.
          item: the item to explain, inside or outside of the history.
          n: number of items to return, at most.
          score: the score that moves, as for `recommend`.

        Returns:
          DataFrame with columns rank (from 1), item (of the history) and
          change: the score with the whole history minus the score without
          this item. Its unit is that of the score: nats for
          'log_probability' (1 nat: e times as probable). The largest absolute
          changes come first. `attrs['score']` is the score with the whole
          history. The changes need not add up to it.

        Raises:
          VaecfError: nothing is fitted, the model does not know the item or
            any item of the history, or an argument cannot be used.
        """
        import pandas as pd

        model = self._fitted()
        n, index = count("n", n), _index(model, item)
        check_score(score)
        given = frames.id_list(history, "history=")
        found = model.items.index_of(given)
        index_H = np.unique(found[found >= 0])
        if not len(index_H):
            if given:
                raise all_unknown(len(given), given[:3], "history", model.items)
            raise VaecfError("history=[]: pass the items of a user")
        # Row 0 is the whole history; row r is without its item r - 1.
        n_rows = len(index_H) + 1
        row, column = np.nonzero(
            ~np.eye(n_rows, len(index_H), k=-1, dtype=bool)
        )
        matrix, _ = Interactions.from_pairs(
            row, index_H[column], n_rows, len(model.items)
        )
        ranker = model.ranker(1, exclude_seen=False)
        lists = ranker(
            model.scorer_params,
            matrix.indptr,
            matrix.indices,
            batch_size=min(n_rows, _ROWS),
            allowed_I=ranker.allow(np.arange(len(model.items)) == index),
        )
        score_R = model.columns(lists, score)["score"].astype(np.float64)
        change_H = score_R[0] - score_R[1:]
        best = _best(np.abs(change_H), n)
        frame = pd.DataFrame(
            {
                "rank": np.arange(1, len(best) + 1),
                "item": model.items.ids[index_H[best]],
                "change": change_H[best],
            }
        )
        frame.attrs["score"] = score_R[0]
        return frame

    def item_vectors(self) -> np.ndarray:
        """Returns the items' output weights or factors, float32 [items, D].

        The rows are in the order of `items`. `similar_items` compares them.

        >>> vectors = recommender.item_vectors()
        >>> vectors.shape
        (30, 8)

        Raises:
          VaecfError: nothing is fitted, or the model has no such vectors.
        """
        model = self._fitted()
        if (vector_ID := model.item_vectors()) is None:
            raise VaecfError(
                f"{model.config.model.name} has no vectors of items: use an "
                "autoencoder, a blend, or 'ials'"
            )
        return vector_ID

    def encode(
        self,
        histories: Any,
        *,
        user_column: str = "user",
        item_column: str = "item",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (users [U], latent representations float32 [U, latent]).

        The arguments are those of `recommend`.

        >>> users, codes = recommender.encode({"ann": ["sku-01", "sku-02"]})
        >>> users.tolist(), codes.shape
        (['ann'], (1, 4))

        Raises:
          VaecfError: as `recommend`; or the model has no representation of
            users (all but autoencoders and blends).
        """
        model = self._fitted()
        users, matrix, _ = as_histories(
            histories, model.items, user_column, item_column
        )
        return users, model.encode(matrix)


def _index(model: TrainedModel, item: Any) -> int:
    index = int(model.items.index_of([item])[0])
    if index < 0:
        raise VaecfError(f"item {short(item)} is not known to the model")
    return index


def _cosines(vector_ND: np.ndarray, one_D: np.ndarray, what: str) -> np.ndarray:
    """Returns the cosine similarity of each row to one vector, float32 [N]."""
    tiny = np.finfo(np.float32).tiny
    with np.errstate(over="ignore"):
        norm_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
        norm = np.linalg.norm(one_D)
    if not (np.isfinite(norm_N1).all() and np.isfinite(norm)):
        raise VaecfError(f"{what} are not finite: {DIVERGED}")
    unit_ND = vector_ND / np.maximum(norm_N1, tiny)
    return unit_ND @ (one_D / np.maximum(norm, tiny))


def _best(score_N: np.ndarray, k: int) -> np.ndarray:
    """Returns the indices of the k largest; ties in order of the indices."""
    return np.argsort(-score_N, kind="stable")[:k]
