"""Recommender: fits or loads a model and recommends items by raw ids."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf.data import in_memory
from vaecf.errors import VaecfError, short
from vaecf.evaluation.ranking import DIVERGED
from vaecf.files import user_path
from vaecf.serving import fit, growth, keywords
from vaecf.serving.histories import allowed_items, as_histories, count
from vaecf.serving.trained_model import SCORES, TrainedModel, load
from vaecf.training.checkpoints import no_root_handler

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("vaecf")


class Recommender:
    """A model of users' interactions with items, with raw ids.

    Users are represented by their histories. Nothing about a user is stored, so
    that a fitted model serves new users like known ones. `update` adds new
    items, and trains the model further.

        recommender = Recommender().fit(frame)  # columns user, item
        recommender.recommend({"ann": [12, 50]}, k=10)
    """

    def __init__(self, model: str = "blend", **settings: Any) -> None:
        """Initialises a recommender to be fitted.

        Args:
          model: 'blend' (default), RecVAE beside a linear branch, the most
            accurate model on most datasets; 'mult_vae', 'mult_dae' or
            'rec_vae'; or a model that is fitted in one go: 'ease', 'ials',
            'slim', 'rp3beta', 'itemknn' or 'popularity'.
          **settings: any of these keywords; `vaecf.config` describes them in
            full. Models that are fitted in one go have their own, those of
            `vaecf.baseline_config` such as l2=500, and seed. 'blend' has the
            defaults of `vaecf.config.BLEND`, and all others these:

            - hidden: units of the encoder's hidden layers, from the items
              inwards, a tuple or a number; default (600,). rec_vae takes one
              number.
            - latent: units of the latent layer; default 200.
            - activation: 'tanh' (default) or 'relu'; rec_vae uses swish.
            - dropout_rate: share of a history to drop in training; default 0.5.
            - init: initial output weights, 'random' (default) or 'spectral'.
            - anneal_cap: largest weight of mult_vae's KL term; default 0.2.
            - anneal_epochs: epochs until this weight is the cap; default 50.
            - gamma: weight of rec_vae's KL term per interaction of the user;
              default 0.005; 0 uses the annealed weight.
            - weight_decay: factor of the squared weights in the loss; default
              0.
            - learning_rate: learning rate of Adam; default 1e-3.
            - epochs: passes over the training users, at most; default 100.
            - max_steps: most steps, in whole epochs (rec_vae: rounds), of which
              three are always allowed; default 0, no limit. The blend's is
              2,000, unless `epochs` is given.
            - batch_size: users per step; default 500.
            - alternating_epochs: epochs that train rec_vae's encoder and
              decoder in alternation; default (3, 1).
            - ema: decay per epoch of the moving average of the parameters that
              ranks; default 0, no average.
            - patience: validations without improvement before `fit` stops;
              default 10; None never stops early. The model is validated after
              every epoch, rec_vae after every round of `alternating_epochs`.
            - refit_epochs: epochs, after the best one, of training on all
              users, validation users too; default 4; 0 keeps the best epoch.
            - precision: 'fp32' (default), 'tf32', 'bf16', 'fp16' or 'amp'.
            - linear_l2: L2 regularisation of a linear branch that ranks beside
              the model; default 0, no linear branch.
            - linear_dropout: share of the input that the linear branch learns
              to do without; default 0.5.
            - linear_user_exponent: a user with n items has weight
              n ** -linear_user_exponent in the branch's fit; default 0.5.
            - linear_experts: models in the branch, of 'ease', 'graph' and
              'ials'; default (), chosen by the number of items.
            - linear_rank: rank of EASE's factors; 0 for a full matrix;
              default None, a full matrix up to 25,000 items.
            - seed: seed of everything random; default 0.

        Raises:
          TypeError: a keyword is unknown, or not of this model.
        """
        self._settings = keywords.complete(model, settings)
        self._model: TrainedModel | None = None

    @classmethod
    def blend(cls, **changes: Any) -> Recommender:
        """Returns a recommender of a blend, with changes of its settings.

        `Recommender(**changes)` is the same. Here `model` may also name the
        autoencoder beside the linear branch.
        """
        return cls(**keywords.blend(changes))

    def __repr__(self) -> str:
        """Returns the model's name, and its size if it is fitted."""
        if self._model is None:
            branch = "+linear" if self._settings.get("linear_l2") else ""
            name = self._settings["model"]
            return f"Recommender({name}{branch}, not fitted)"
        config = self._model.config
        latent = "" if config.is_fitted else f", latent {config.model.latent}"
        return f"Recommender({config.title}, {len(self.items):,} items{latent})"

    # --- Fit, load, save ----------------------------------------------------

    @no_root_handler()
    def fit(
        self,
        interactions: Any,
        *,
        user_column: str = "user",
        item_column: str = "item",
        validation_users: int | float = 0.1,
        workdir: str | pathlib.Path | None = None,
        show_progress: bool | None = None,
    ) -> Recommender:
        """Trains the model on interactions of users with items.

        Args:
          interactions: anything that `recommend` accepts as histories. The
            raw ids of a SciPy matrix are its row and column numbers, and every
            entry other than 0 is an interaction. Ids that are neither integers
            nor strings, such as dates, become strings
            (`vaecf.data.id_table.text_of`).
          user_column: column of the user ids.
          item_column: column of the item ids.
          validation_users: number of users, or share in [0, 1), whose
            interactions choose the best epoch and the weights of a blend
            before the model learns from them, too, for `refit_epochs`. 0 keeps
            the last epoch. A model that is fitted in one go needs none.
          workdir: directory to keep the run in; calling `fit` again with the
            same arguments resumes it. None trains in a temporary directory.
          show_progress: whether to draw a progress bar; None draws one if
            stderr is a terminal.

        Returns:
          This recommender.

        Raises:
          VaecfError: the interactions or a setting cannot be used.
        """
        # A wrong setting is an error before the work.
        config = keywords.make_config(self._settings, n_users=1)
        dataset = in_memory.without_test(
            interactions,
            user_column=user_column,
            item_column=item_column,
            validation_users=0 if config.is_fitted else validation_users,
            seed=config.seed,
            keep_all_items=config.train.refit_epochs > 0,
        )
        config = keywords.make_config(self._settings, dataset.train.n_users)
        self._model = fit.in_memory(
            config, dataset, workdir, show_progress=show_progress
        )
        return self

    @no_root_handler()
    def update(
        self,
        interactions: Any,
        *,
        user_column: str = "user",
        item_column: str = "item",
        epochs: int = 8,
        validation_users: int | float = 0,
        workdir: str | pathlib.Path | None = None,
        show_progress: bool | None = None,
    ) -> Recommender:
        """Trains the model further, with new interactions and new items.

        Known items keep their order and their parameters, also those that no
        longer occur; new items follow, and start as a mean of the known items
        that the same users have (`vaecf.serving.growth`). The model then trains
        on the interactions for some epochs. A linear branch, or a model that is
        fitted in one go, is fitted to them anew.

        Args:
          interactions: all current interactions, old and new, as for `fit`.
            Nothing about users is stored: what a recent window of interactions
            leaves out is unknown to a model that is fitted anew, and slowly
            forgotten by an autoencoder. A SciPy matrix has the known items
            first, in the order of `items`, and is for models of a matrix.
          user_column: column of the user ids.
          item_column: column of the item ids.
          epochs: passes over the training users.
          validation_users: as for `fit`, but 0 by default: the model may have
            learned from these users before, which would mislead the choice of
            an epoch and of a blend's weights. With 0 it keeps its weights.
          workdir: directory to keep the run in, other than that of the model;
            the same call on the same model resumes it. None trains in a
            temporary directory.
          show_progress: as for `fit`.

        Returns:
          This recommender.

        Raises:
          VaecfError: nothing is fitted, or the interactions cannot be used or
            have no item that the model knows. The model is unchanged.
        """
        model = self._fitted()
        config = growth.further(model, count("epochs", epochs))
        dataset = in_memory.without_test(
            interactions,
            user_column=user_column,
            item_column=item_column,
            validation_users=0 if config.is_fitted else validation_users,
            seed=config.seed,
            known_items=model.items,
        )
        self._model = fit.in_memory(
            config,
            dataset,
            workdir,
            earlier=model,
            show_progress=show_progress,
        )
        return self

    @classmethod
    @no_root_handler()
    def load(cls, directory: str | pathlib.Path) -> Recommender:
        """Loads the best model of a run's workdir, or a saved model.

        Raises:
          VaecfError: a file is missing or damaged; names the file.
        """
        recommender = cls()
        recommender._model = load(user_path(directory))
        return recommender

    @no_root_handler()
    def save(
        self, directory: str | pathlib.Path, *, overwrite: bool = False
    ) -> pathlib.Path:
        """Writes the model to a self-contained directory, and returns its path.

        The directory is written atomically. It must be new or empty; with
        `overwrite` it may also hold a saved model.

        Raises:
          VaecfError: nothing is fitted, or the directory holds other files or
            cannot be written.
        """
        model = self._fitted()
        return model.save(user_path(directory), overwrite=overwrite)

    # --- Recommend ----------------------------------------------------------

    @property
    def items(self) -> np.ndarray:
        """Raw ids of all items, [items], int64 or strings."""
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
        """
        import pandas as pd

        model = self._fitted()
        k, batch_size = (
            count("k", k),
            count("batch_size", batch_size),
        )
        if score not in (None, *SCORES):
            raise VaecfError(f"score={score!r}: use one of {', '.join(SCORES)}")
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
        index = int(model.items.index_of([item])[0])
        if index < 0:
            raise VaecfError(f"item {short(item)} is not known to the model")
        if model.config.model.name == "popularity":
            raise VaecfError(
                "popularity knows nothing about the similarity of items: use "
                "another model, such as 'itemknn'"
            )
        vector_ID = model.item_vectors()
        if vector_ID is None:
            # Item-item weights are the scores of a history of one item.
            return self.recommend([[item]], k).drop(columns="user")
        with np.errstate(over="ignore"):
            norm_I = np.linalg.norm(vector_ID, axis=1, keepdims=True)
        if not np.isfinite(norm_I).all():
            raise VaecfError(f"output weights are not finite: {DIVERGED}")
        vector_ID = vector_ID / np.maximum(norm_I, np.finfo(np.float32).tiny)
        cosine_I = vector_ID @ vector_ID[index]
        cosine_I[index] = -np.inf
        # A stable sort ranks ties by item index, like `recommend`.
        best = np.argsort(-cosine_I, kind="stable")[: min(k, len(cosine_I) - 1)]
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(best) + 1),
                "item": model.items.ids[best],
                "score": cosine_I[best],
            }
        )

    def encode(
        self,
        histories: Any,
        *,
        user_column: str = "user",
        item_column: str = "item",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (users [U], latent representations float32 [U, latent]).

        The arguments and errors are those of `recommend`.
        """
        model = self._fitted()
        users, matrix, _ = as_histories(
            histories, model.items, user_column, item_column
        )
        return users, model.encode(matrix)

    def _fitted(self) -> TrainedModel:
        if self._model is None:
            raise VaecfError(
                "no model yet: call fit() or Recommender.load(workdir)"
            )
        return self._model
