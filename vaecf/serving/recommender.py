"""Recommender: fit or load a model, then recommend to anyone, by raw ids."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data import prepare
from vaecf.data.id_table import IdTable
from vaecf.errors import VaecfError
from vaecf.evaluation import ranking
from vaecf.evaluation.evaluator import Evaluator
from vaecf.serving import histories as histories_lib
from vaecf.serving.trained_model import TrainedModel, load, tune_blend
from vaecf.training import loop

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("log_probability", "probability", "logit")

# Of `Recommender.blend`: those of configs/blend.py, which says where from.
_BLEND: dict[str, Any] = dict(
    model="rec_vae",
    dropout_rate=0.65,
    learning_rate=5e-4,
    epochs=160,
    batch_size=200,
    patience=6,  # rounds of four epochs
    ema=0.95,
    linear_l2=150.0,
    init="spectral",
)


class Recommender:
    """A trained model with the ids of its items.

    Users are histories: nothing about a user is stored, so that new users are
    served like old ones. New items need a new `fit`.

        recommender = Recommender().fit(frame)      # columns user, item
        recommender.recommend({"ann": [12, 50]}, k=10)
    """

    def __init__(
        self,
        *,
        model: str = "mult_vae",
        hidden: int | Sequence[int] = (600,),
        latent: int = 200,
        activation: str = "tanh",
        dropout_rate: float = 0.5,
        anneal_cap: float = 0.2,
        anneal_epochs: float = 50.0,
        weight_decay: float = 0.0,
        learning_rate: float = 1e-3,
        epochs: int = 100,
        batch_size: int = 500,
        patience: int | None = 10,
        precision: str = "fp32",
        seed: int = 0,
        gamma: float = 0.005,
        alternating_epochs: Sequence[int] = (3, 1),
        ema: float = 0.0,
        linear_l2: float = 0.0,
        linear_dropout: float = 0.5,
        linear_user_exponent: float = 0.5,
        linear_rank: int | None = None,
        init: str = "random",
    ) -> None:
        """Settings for `fit`; a loaded model brings its own.

        Args:
          model: 'mult_vae', 'mult_dae' or 'rec_vae'.
          hidden: units of the hidden layers, from the items inwards; a number
            is one layer. rec_vae takes one size, that of all its layers.
          latent: units of the bottleneck.
          activation: 'tanh' or 'relu'; rec_vae's is swish whatever it says.
          dropout_rate: share of a history dropped from the input in training.
          anneal_cap: largest weight of mult_vae's KL term.
          anneal_epochs: epochs in which the weight rises to the cap.
          weight_decay: times the sum of squared weights, added to the loss.
          learning_rate: Adam's.
          epochs: passes over the users, at most.
          batch_size: users a step.
          patience: validations without gain before `fit` stops; None never
            stops early. There is one after every epoch; of rec_vae, which
            trains a part of it at a time, after every round of `alternating_epochs`.
          precision: 'fp32', 'tf32', 'bf16', 'fp16' or 'amp'.
          seed: makes `fit` repeatable.
          gamma: of rec_vae alone: the weight of its KL term is this times the
            user's interactions; 0 takes the annealed weight of mult_vae.
          alternating_epochs: of rec_vae alone: epochs of the encoder and of the decoder
            in turns, a round; the other models are trained at once.
          ema: rank with an average of the epochs' parameters that forgets by
            this factor an epoch; 0 with the parameters as they are.
          linear_l2: λ, in squared interactions, of a linear item-item path
            that ranks beside the model (`models.blend`); 0 for none. What
            the two weigh, the validation users choose.
          linear_dropout: share of the input it learns to do without.
          linear_user_exponent: a user of n items weighs n to the minus this
            in its fit; 0 weighs all alike.
          linear_rank: rank of the factors that the path is kept as; 0 for a
            whole matrix of items x items; None for that up to 25,000 items
            and a rank of 512 beyond.
          init: first output weights: 'random', or 'spectral', from the
            interactions' singular vectors, which takes fewer epochs.
        """
        self._settings: dict[str, Any] = dict(
            model=model,
            hidden=(hidden,) if isinstance(hidden, int) else tuple(hidden),
            latent=latent,
            activation=activation,
            dropout_rate=dropout_rate,
            anneal_cap=anneal_cap,
            anneal_epochs=anneal_epochs,
            weight_decay=weight_decay,
            learning_rate=learning_rate,
            epochs=epochs,
            batch_size=batch_size,
            patience=patience,
            precision=precision,
            seed=seed,
            gamma=gamma,
            alternating_epochs=alternating_epochs,
            ema=ema,
            linear_l2=linear_l2,
            linear_dropout=linear_dropout,
            linear_user_exponent=linear_user_exponent,
            linear_rank=linear_rank,
            init=init,
        )
        self._model: TrainedModel | None = None

    @classmethod
    def blend(cls, **changes: Any) -> Recommender:
        """RecVAE and a linear branch that rank together: where to begin.

        The settings of configs/blend.py, for any dataset.

        Args:
          **changes: settings of the constructor that are to be others.
        """
        return cls(**{**_BLEND, **changes})

    def __repr__(self) -> str:
        """What it is, and whether it is fitted."""
        if self._model is None:
            path = "+linear" if self._settings["linear_l2"] else ""
            return f"Recommender({self._settings['model']}{path}, not fitted)"
        config = self._model.config
        return (
            f"Recommender({config.title}, {len(self.items):,} items, "
            f"latent {config.model.latent})"
        )

    # --- Where a model comes from -------------------------------------------

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
        """Trains on pairs of (user, item).

        Args:
          interactions: DataFrame (pandas or polars) with the two columns, or a
            scipy.sparse matrix users x items (nonzero = interaction; raw ids
            are then row and column numbers).
          user_column: column of the user ids.
          item_column: column of the item ids.
          validation_users: users held out to choose the best epoch, and what
            a linear branch weighs, a number or a share; 0 keeps the last epoch
            and the path's first weights.
          workdir: keep the run there; None trains in a temporary directory.
          show_progress: None shows a bar on a terminal.

        Returns:
          This recommender.

        Raises:
          VaecfError: the data or a setting is not usable.
        """
        dataset = prepare.in_memory(
            interactions,
            user_column=user_column,
            item_column=item_column,
            validation_users=validation_users,
            seed=self._settings["seed"],
        )
        config = _config(self._settings, dataset.train.n_users)
        if workdir is None and dataset.validation.held_out.nnz == 0:
            # Nothing to choose an epoch by and nothing to resume: one
            # checkpoint, at the end.
            every = dataclasses.replace(
                config.eval, every_epochs=max(1, config.train.epochs)
            )
            config = dataclasses.replace(config, eval=every)
        with tempfile.TemporaryDirectory() as temporary:
            directory = pathlib.Path(workdir or temporary)
            with workdir_lib.locked(directory):
                workdir_lib.check_or_create(directory, config, dataset)
                loop.train(
                    config, dataset, directory, show_progress=show_progress
                )
                # Kept in the directory, so before anybody else may have it.
                model = load(directory)
                validation = Evaluator.for_split(
                    dataset, "validation", config.eval, model.setup.mesh
                )
                self._model = tune_blend(model, validation, log=logging.info)
        return self

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> Recommender:
        """The best model of a run's workdir, or one written by `save`.

        Raises:
          VaecfError: there is none, or it is damaged.
        """
        recommender = cls()
        recommender._model = load(pathlib.Path(directory))
        return recommender

    def save(
        self, directory: str | pathlib.Path, *, overwrite: bool = False
    ) -> pathlib.Path:
        """Writes a self-contained directory for `load`; all or nothing.

        Args:
          directory: new, empty, or (with `overwrite`) one written by `save`.
          overwrite: replace what was saved there.

        Raises:
          VaecfError: nothing is fitted, or the directory is taken.
        """
        return self._fitted().save(pathlib.Path(directory), overwrite=overwrite)

    # --- What it gives ------------------------------------------------------

    @property
    def items(self) -> np.ndarray:
        """Raw ids of all items that can be recommended."""
        return self._fitted().items.ids

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow_items: Iterable[Any] | None = None,
        deny_items: Iterable[Any] | None = None,
        score: str = "log_probability",
        user_column: str = "user",
        item_column: str = "item",
        batch_size: int = 512,
    ) -> pd.DataFrame:
        """The k best items for every history.

        Args:
          histories: DataFrame with the two columns; mapping user -> items;
            sequence of item sequences (users are then 0, 1, ...); or a
            scipy.sparse matrix in the model's item order.
          k: items a user.
          exclude_seen: leave out the items of the history.
          allow_items: recommend only from these; unknown ones are ignored.
          deny_items: never recommend these.
          score: 'log_probability' (natural logarithm of the probability that
            the model gives the item, over the whole catalogue), 'probability',
            or 'logit'.
          user_column: column of the user ids.
          item_column: column of the item ids.
          batch_size: users a dispatch.

        Returns:
          DataFrame with columns user, rank (from 1), item, score; users in
          the order given. A user with fewer than k items left gets fewer rows.
          `attrs['unknown_items']` counts the items of histories that the model
          does not know and left out.
        """
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
        import pandas as pd

        # An empty frame has no type of ids to agree on.
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
        score: str = "log_probability",
        user_column: str = "user",
        item_column: str = "item",
        batch_size: int = 512,
    ) -> Iterator[pd.DataFrame]:
        """As `recommend`, one DataFrame a block of users: bounded memory.

        An empty first frame comes when there are no users.
        """
        fitted = self._fitted()
        _check_length(k)
        if score not in SCORES:
            raise VaecfError(f"score={score!r}: use one of {', '.join(SCORES)}")
        users, matrix, unknown = histories_lib.as_histories(
            histories, fitted.items, user_column, item_column
        )
        if unknown:
            logging.warning(
                "%d items of the histories are not known to the model and are "
                "left out",
                unknown,
            )
        ranker = fitted.ranker(min(k, len(fitted.items)), exclude_seen)
        allowed = _allowed(fitted.items, allow_items, deny_items)
        first = 0
        blocks = ranker.blocks(
            fitted.scorer_params,
            matrix.indptr,
            matrix.indices,
            batch_size=batch_size,
            allowed_I=None if allowed is None else ranker.allow(allowed),
        )
        empty = ranking.RankedLists(
            np.zeros((0, k), np.int32),
            np.zeros((0, k), np.float32),
            np.zeros(0, np.float32),
        )
        for ranked in blocks if len(users) else [empty]:
            last = first + len(ranked.item_UK)
            frame = _frame(users[first:last], ranked, fitted.items, score)
            frame.attrs["unknown_items"] = unknown
            yield frame
            first = last

    def similar_items(self, item: Any, k: int = 10) -> pd.DataFrame:
        """Items whose output weights point the same way (cosine similarity).

        Args:
          item: raw id.
          k: items to return.

        Returns:
          DataFrame with columns rank, item, score (cosine, in [-1, 1]).

        Raises:
          VaecfError: the model does not know the item.
        """
        import pandas as pd

        fitted = self._fitted()
        _check_length(k)
        index = int(fitted.items.index_of([item])[0])
        if index < 0:
            raise VaecfError(f"item {item!r} is not known to the model")
        vector_IH = fitted.item_vectors()
        cosine_I = vector_IH @ vector_IH[index]
        cosine_I[index] = -np.inf
        # A stable sort breaks ties by item index, as ranking does.
        best = np.argsort(-cosine_I, kind="stable")[: min(k, len(cosine_I) - 1)]
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(best) + 1),
                "item": fitted.items.ids[best],
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
        """Users' representations: (users [U], float32 [U, latent])."""
        fitted = self._fitted()
        users, matrix, _ = histories_lib.as_histories(
            histories, fitted.items, user_column, item_column
        )
        return users, fitted.encode(matrix)

    def _fitted(self) -> TrainedModel:
        if self._model is None:
            raise VaecfError(
                "no model yet: call fit() or Recommender.load(workdir)"
            )
        return self._model


def _config(settings: Mapping[str, Any], n_users: int) -> Config:
    """The run's options that the constructor's settings describe.

    Raises:
      VaecfError: a setting is out of range, or not for this model.
    """
    alternating = settings["model"] == "rec_vae"
    # A batch size that is refused below must not fail here.
    steps = -(-n_users // max(1, settings["batch_size"]))
    cap = settings["anneal_cap"]
    # The weight rises by 1 / total_steps a step and meets the cap after
    # anneal_epochs.
    total = round(settings["anneal_epochs"] * steps / cap) if cap else 0
    config = config_lib.replace(
        Config(),
        {
            "seed": settings["seed"],
            "data.dir": "(in memory)",
            "model.name": settings["model"],
            "model.hidden": settings["hidden"],
            "model.latent": settings["latent"],
            "model.activation": settings["activation"],
            "model.dropout_rate": settings["dropout_rate"],
            "model.init": settings["init"],
            "linear.l2": settings["linear_l2"],
            "linear.dropout": settings["linear_dropout"],
            "linear.user_exponent": settings["linear_user_exponent"],
            "linear.rank": settings["linear_rank"],
            "loss.anneal_cap": cap,
            "loss.total_anneal_steps": total,
            "loss.weight_decay": settings["weight_decay"],
            "loss.gamma": settings["gamma"] if alternating else 0.0,
            "optimizer.learning_rate": settings["learning_rate"],
            "train.epochs": settings["epochs"],
            "train.alternating_epochs": (
                settings["alternating_epochs"] if alternating else ()
            ),
            "train.ema": settings["ema"],
            "train.batch_size": settings["batch_size"],
            "eval.patience": settings["patience"],
            "precision.policy": settings["precision"],
        },
    )
    return _by_rounds(config) if alternating else config


def _by_rounds(config: Config) -> Config:
    """The same with a validation a round, for a model trained in turns.

    Raises:
      VaecfError: settings that are not for such a model.
    """
    if not config.train.alternating_epochs:
        raise VaecfError(
            "alternating_epochs=(): rec_vae is trained in turns, give the epochs of its "
            "encoder and of its decoder, such as alternating_epochs=(3, 1)"
        )
    if len(config.model.hidden) != 1:
        raise VaecfError(
            f"hidden={config.model.hidden}: rec_vae takes one size, that of "
            "all layers of its encoder, such as hidden=600"
        )
    every = dataclasses.replace(
        config.eval, every_epochs=sum(config.train.alternating_epochs)
    )
    return dataclasses.replace(config, eval=every)


def _check_length(k: int) -> None:
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise VaecfError(f"k={k!r} must be a whole number of at least 1")


def _allowed(
    items: IdTable, allow: Iterable[Any] | None, deny: Iterable[Any] | None
) -> np.ndarray | None:
    """bool [items], or None when every item is allowed."""
    if allow is None and deny is None:
        return None
    mask = np.full(len(items), allow is None)
    for name, ids, value in (
        ("allow_items", allow, True),
        ("deny_items", deny, False),
    ):
        if ids is None:
            continue
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise VaecfError(f"{name}={ids!r}: pass a list of items")
        known = items.index_of(list(ids))
        if (known < 0).any():
            logging.warning(
                "%d of %s are not known to the model and are left out",
                int((known < 0).sum()),
                name,
            )
        mask[known[known >= 0]] = value
    return mask


def _frame(
    users: np.ndarray, ranked: ranking.RankedLists, items: IdTable, score: str
) -> pd.DataFrame:
    """Long frame of a block's lists, without the ranks nobody fills."""
    import pandas as pd

    columns = list_columns(ranked, items, score)
    row = columns.pop("row")
    return pd.DataFrame({"user": users[row], **columns})


def list_columns(
    ranked: ranking.RankedLists, items: IdTable, score: str = "log_probability"
) -> dict[str, np.ndarray]:
    """Columns row (of the block's user), rank, item (raw id) and score."""
    row, rank = np.nonzero(ranked.item_UK >= 0)
    value = ranked.score_UK[row, rank]
    if score != "logit":
        value = value - ranked.log_total_U[row]
    if score == "probability":
        value = np.exp(value)
    return {
        "row": row,
        "rank": rank + 1,
        "item": items.ids[ranked.item_UK[row, rank]],
        "score": value,
    }
