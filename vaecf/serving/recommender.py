"""Recommender: fits or loads a model and recommends items by raw ids."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vaecf import config as config_lib
from vaecf.data import in_memory
from vaecf.data.dataset import Dataset
from vaecf.errors import VaecfError, short
from vaecf.files import user_path
from vaecf.reporting import html, plots
from vaecf.serving import fit, growth, inspection, keywords
from vaecf.serving.histories import count
from vaecf.serving.queries import Queries
from vaecf.serving.trained_model import load
from vaecf.training.checkpoints import no_root_handler

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_VALIDATION_USERS = 0.1


class Recommender(Queries):
    """A model of users' interactions with items, with raw ids.

    Users are represented by their histories. Nothing about a user is stored, so
    that a fitted model serves new users like known ones. `update` adds new
    items, and trains the model further.

    >>> ease = vaecf.Recommender("ease").fit(frame)  # columns user, item
    >>> ease.recommend({"ann": ["sku-01", "sku-07"]}, k=10).shape
    (10, 4)

    A copy shares the model, which no method changes in place. A pickle holds
    the bytes of `save`.
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
            - gamma: weight of the KL term per interaction of the user; 0 uses
              the annealed weight; default 0.005 for rec_vae, else 0.
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
          VaecfError: the model is unknown.
        """
        self._settings = keywords.complete(model, settings)

    @classmethod
    def blend(cls, **changes: Any) -> Recommender:
        """Returns a recommender of a blend, with changes of its settings.

        `Recommender(**changes)` is the same. Here `model` may also name the
        autoencoder beside the linear branch.

        >>> vaecf.Recommender.blend(model="mult_vae", hidden=64, latent=8)
        Recommender(mult_vae+linear, not fitted)
        """
        return cls(**keywords.blend(changes))

    def __repr__(self) -> str:
        """Returns the model's name, and its size if it is fitted."""
        if self._model is None:
            branch = "+linear" if self._settings.get("linear_l2") else ""
            name = keywords.name_of(self._settings["model"] + branch)
            return f"Recommender({name}, not fitted)"
        config = self._model.config
        latent = "" if config.is_fitted else f", latent {config.model.latent}"
        name = keywords.name_of(config.title)
        return f"Recommender({name}, {len(self.items):,} items{latent})"

    def _repr_html_(self) -> str:
        """Returns the card that a notebook shows."""
        if self._model is None:
            return html.card(repr(self), {})
        name, facts = inspection.facts(self._model)
        return html.card(f"Recommender: {name}", facts)

    def __copy__(self) -> Recommender:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Recommender:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        model = self._model and inspection.packed(self._model)
        return {**self.__dict__, "_model": model}

    @no_root_handler()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_model"] is not None:
            self._model = inspection.unpacked(state["_model"])

    # --- Fit, load, save ----------------------------------------------------

    @no_root_handler()
    def fit(
        self,
        interactions: Any,
        *,
        user_column: str = "user",
        item_column: str = "item",
        validation_users: int | float = _VALIDATION_USERS,
        workdir: str | pathlib.Path | None = None,
        show_progress: bool | None = None,
    ) -> Recommender:
        """Trains the model on interactions of users with items.

        An interrupt (of a notebook's kernel, or Ctrl-C) ends the training with
        a warning and keeps the best model so far. So does a loss that becomes
        infinite.

        >>> vaecf.Recommender("ease", l2=100).fit(frame)
        Recommender(ease, 30 items)
        >>> vaecf.Recommender("ease", l2=100).fit(split)  # without test users
        Recommender(ease, 30 items)

        Args:
          interactions: anything that `recommend` accepts as histories; or a
            `Dataset`, such as a result of `vaecf.split`, whose test users the
            model never sees. The raw ids of a SciPy matrix are its row and
            column numbers, and every entry other than 0 is an interaction. Ids
            that are neither integers nor strings, such as dates, become strings
            (`vaecf.data.id_table.text_of`).
          user_column: column of the user ids.
          item_column: column of the item ids.
          validation_users: number of users, or share in [0, 1), whose
            interactions choose the best epoch and the weights of a blend
            before the model learns from them, too, for `refit_epochs`. 0 keeps
            the last epoch. A model that is fitted in one go needs none. A
            `Dataset` has its own, from whom such a model learns nothing.
          workdir: directory to keep the run in; calling `fit` again with the
            same arguments resumes it. None trains in a temporary directory.
          show_progress: False shows nothing. None draws a bar on a terminal
            or in a notebook, and prints a line in ten seconds elsewhere.

        Returns:
          This recommender.

        Raises:
          VaecfError: the interactions or a setting cannot be used, or the loss
            diverged before the first epoch was saved.
          KeyboardInterrupt: interrupted before there was a model.
        """
        # A wrong setting is an error before the work.
        config = keywords.make_config(self._settings, n_users=1)
        if isinstance(interactions, Dataset):
            dataset = interactions
            if validation_users != _VALIDATION_USERS:
                raise VaecfError(
                    f"validation_users={short(validation_users)} has no effect:"
                    " the dataset has validation users of its own; leave it out"
                )
        else:
            dataset = in_memory.without_test(
                interactions,
                user_column=user_column,
                item_column=item_column,
                validation_users=0 if config.is_fitted else validation_users,
                seed=config.seed,
                keep_all_items=config.train.refit_epochs > 0,
            )
        config = keywords.make_config(self._settings, dataset.train.n_users)
        if dataset.path is not None:
            place = {"data.dir": str(dataset.path)}
            config = config_lib.replace(config, place)
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

        >>> more = pd.concat([frame, pd.DataFrame({"user": ["eve"] * 2,
        ...                                        "item": ["sku-01", "new"]})])
        >>> ease = vaecf.Recommender("ease").fit(frame)
        >>> "new" in ease.items, "new" in ease.update(more).items
        (False, True)

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

        `update` trains it further. `fit` would train a blend with the default
        settings instead.

        >>> path = recommender.save(folder / "first")
        >>> vaecf.Recommender.load(path)
        Recommender(mult_vae, 30 items, latent 4)

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

        >>> recommender.save(folder / "model").name
        'model'

        The directory is written atomically. It must be new or empty; with
        `overwrite` it may also hold a saved model.

        Raises:
          VaecfError: nothing is fitted, or the directory holds other files or
            cannot be written.
        """
        model = self._fitted()
        return model.save(user_path(directory), overwrite=overwrite)

    # --- How good it is -----------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """Training and validation by epoch.

        The index is the epoch. Columns are names such as 'train/loss' (nats per
        user), 'validation/ndcg@100' and 'validation/ndcg@100_stderr'; an epoch
        without validation has NaN there. Empty for a model that is fitted in
        one go, or was saved by an earlier version.

        >>> recommender.history["train/loss"].index.tolist()
        [1, 2, 3]

        Raises:
          VaecfError: nothing is fitted.
        """
        return plots.history_frame(self._fitted().records)

    def plot_history(
        self, name: str | None = None, axes: Axes | None = None
    ) -> Axes:
        """Plots a column of `history` by epoch, and returns the Axes.

        >>> recommender.plot_history("train/loss").get_xlabel()
        'epoch'

        Args:
          name: column to plot; None plots the validation metric by which the
            best epoch was chosen, or the training loss if there is none.
          axes: matplotlib's Axes to draw on; None makes a figure.

        Raises:
          VaecfError: nothing is fitted, or there is no such column.
        """
        return inspection.plot_history(self._fitted(), name, axes)

    def evaluate(
        self,
        dataset: Dataset,
        *,
        split: str = "test",
        metrics: Iterable[str] | str | None = None,
        baselines: Iterable[str] | str = (),
        tuned: bool = False,
    ) -> pd.DataFrame:
        """Returns metrics of the model, and of baselines, on held-out users.

        The model sees the fold-in items of each user, ranks all others, and is
        scored by the ranks of the held-out items.

        >>> table = recommender.evaluate(split, metrics="recall@5",
        ...                              baselines="popularity")
        >>> table[["model", "metric", "users"]]
                model    metric  users
        0    mult_vae  recall@5      6
        1  popularity  recall@5      6

        Args:
          dataset: the dataset that the model was fitted to, such as a result of
            `vaecf.split`.
          split: 'test' or 'validation' users.
          metrics: names such as 'ndcg@100' (`vaecf.evaluation.metrics`); None
            takes NDCG@100, recall@20 and recall@50, or those of the run.
          baselines: models to evaluate beside this one: 'ease', 'ials', 'slim',
            'rp3beta', 'itemknn', 'popularity'. They learn from the same users
            as the model: also from the validation users if it was refitted.
          tuned: choose the settings of the baselines on the validation users.

        Returns:
          DataFrame with columns metric, mean, stderr (standard error over
          users; NaN where there is none) and users; with baselines also model,
          first. `attrs['settings']` has the settings of the baselines.

        Raises:
          VaecfError: nothing is fitted, the dataset has other items than the
            model, there are no such users, the model has learned from them, or
            an argument cannot be used.
        """
        return inspection.evaluate(
            self._fitted(),
            dataset,
            split=split,
            metrics=metrics,
            baselines=baselines,
            tuned=tuned,
        )
