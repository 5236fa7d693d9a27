"""Finished and unfinished runs: `vaecf.open_run` and `vaecf.runs`."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import TYPE_CHECKING, Any

from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.evaluation import baselines
from vaecf.files import user_path
from vaecf.reporting import html, plots, tables, writers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from vaecf.serving.recommender import Recommender

_COLUMNS = ("model", "metric", "mean", "stderr", "users")


class Run:
    """What a run has written to its workdir. Nothing is changed there.

    `train` and `open_run` return runs.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        self.workdir = workdir  # the run's directory

    @functools.cached_property
    def config(self) -> Config:
        """Settings of the run."""
        return workdir_lib.read_config(self.workdir)

    @property
    def dataset(self) -> dict[str, Any]:
        """Manifest of the dataset: 'name', 'protocol', 'counts' and so on."""
        return workdir_lib.read_manifest(self.workdir / workdir_lib.DATASET)[0]

    @property
    def status(self) -> str:
        """'running', 'tested', 'trained', or 'unfinished'."""
        if workdir_lib.is_in_use(self.workdir):
            return "running"
        for part, status in (("test", "tested"), ("train", "trained")):
            if part in self._results:
                return status
        return "unfinished"

    @property
    def history(self) -> pd.DataFrame:
        """Metrics of training and validation, a row per epoch.

        The index is the epoch, from 1. Columns are named as in metrics.jsonl:
        'train/loss' and 'train/nll' (nats per user),
        'train/users_per_second', 'validation/ndcg@100' and so on. Epochs
        without a validation have NaN. A model that is fitted in one go has no
        epochs.
        """
        path = self.workdir / workdir_lib.METRICS
        records = writers.read_records(path) if path.exists() else []
        return plots.history_frame(records)

    @property
    def results(self) -> pd.DataFrame:
        """Metrics of the run's model, the baselines and the oracle.

        Columns are 'model', 'metric', 'mean' and 'stderr' (over users) and
        'users'. `attrs['split']` says whose metrics they are: 'test', or
        'validation' as long as the run has not been tested.
        """
        import pandas as pd

        split, rows = self._rows()
        frame = pd.DataFrame(
            [
                {"model": model, "metric": metric}
                | {key: cell.get(key) for key in ("mean", "stderr", "users")}
                for model, cells in rows.items()
                for metric, cell in cells.items()
            ],
            columns=_COLUMNS,
        )
        frame.attrs["split"] = split
        return frame

    def recommender(self) -> Recommender:
        """Returns a recommender of the run's best model.

        Raises:
          VaecfError: there is no trained model, or a damaged one.
        """
        from vaecf.serving.recommender import Recommender

        if (self.workdir / "fold1").is_dir():
            raise VaecfError(
                f"{self.workdir}: a run on folds has a model for each fold: "
                f"open one of them, such as {self.workdir / 'fold1'}"
            )
        return Recommender.load(self.workdir)

    def plot(self) -> Figure:
        """Returns the learning curves; without epochs, metrics by model.

        Raises:
          VaecfError: there are neither epochs nor metrics yet.
        """
        import matplotlib.pyplot  # noqa: F401  (notebooks show figures then)

        _, validation = self._rows("validation")
        metric = self.config.eval.best_metric
        lines = {
            name: tables.cell_values(cells[metric])[0]
            for name, cells in validation.items()
            if name != self.config.title and metric in cells
        }
        figure = plots.learning_curves(
            self.history, metric=metric, baselines=lines
        )
        references = baselines.grouped(self._results)["references"]
        figure = figure or plots.metrics_bars(self._rows()[1], references)
        if figure is None:
            raise VaecfError(f"{self.workdir}: nothing to plot yet")
        return figure

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}, {self.config.title}, {self.status})"

    def _repr_html_(self) -> str:
        split, rows = self._rows()
        names = tables.metric_names(rows)
        return html.card(
            self.config.title,
            {
                "workdir": self.workdir,
                "dataset": self.dataset.get("name"),
                "protocol": self.dataset.get("protocol"),
                "status": self.status,
                f"{split} users": tables.users_text(rows) if rows else None,
            },
            [
                {"model": model}
                | {
                    tables.metric_label(name): " ".join(
                        tables.cell_texts(cells.get(name))
                    )
                    for name in names
                }
                for model, cells in rows.items()
            ],
        )

    @property
    def _results(self) -> dict[str, Any]:
        path = self.workdir / workdir_lib.RESULTS
        return workdir_lib.read_json(path) if path.exists() else {}

    def _rows(self, split: str = "") -> tuple[str, tables.Rows]:
        """Returns the split, by default that of `results`, and its rows."""
        results = self._results
        split = split or ("test" if "test" in results else "validation")
        return split, tables.results_rows(
            baselines.grouped(results), split=split, name=self.config.title
        )


def open_run(workdir: str | os.PathLike[str]) -> Run:
    """Opens the directory of a run: finished, interrupted or running.

    >>> config = vaecf.load_config("default", {"model.name": "popularity"})
    >>> _ = vaecf.train(config, split, folder / "runs" / "popularity")
    >>> run = vaecf.open_run(folder / "runs" / "popularity")
    >>> run.status, run.config.model.name
    ('tested', 'popularity')
    >>> run.recommender()
    Recommender(popularity, 30 items)

    Raises:
      VaecfError: there is no run, or its settings are damaged.
    """
    path = user_path(workdir)
    if not (path / workdir_lib.CONFIG).is_file():
        raise VaecfError(
            f"{path}: no run there (no {workdir_lib.CONFIG}); "
            "vaecf.runs(folder) lists those of a folder"
        )
    run = Run(path)
    _ = run.config  # raises if it is damaged
    return run


def runs(directory: str | os.PathLike[str] = "runs") -> pd.DataFrame:
    """Returns a table of the runs below a directory, a row per run.

    Trials of a sweep are left out, unless it is the directory itself, and so
    are the single folds of a finished run on folds.

    >>> config = vaecf.load_config("default", {"model.name": "popularity"})
    >>> _ = vaecf.train(config, split, folder / "runs" / "popularity")
    >>> table = vaecf.runs(folder / "runs").sort_values("ndcg@100")
    >>> table.loc["popularity", "status"]
    'tested'

    Returns:
      The index is the run's path below `directory`. Columns: 'status'
      ('tested', 'trained', 'unfinished', 'running', or 'broken' with the
      reason in the column 'error'), 'model', 'dataset', 'protocol', the
      settings that differ between the runs ('train.epochs'), 'epochs' and
      'seconds' of training, the best validation metric
      ('validation/ndcg@100') and the test metrics ('ndcg@100'): means over
      users. What is unknown is NaN or None.

    Raises:
      VaecfError: there is no such directory.
    """
    import pandas as pd

    root = user_path(directory)
    if not root.is_dir():
        raise VaecfError(f"{root}: no such directory")
    facts: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path in _workdirs(root):
        name = str(path.relative_to(root))
        try:
            run = Run(path)
            settings[name] = run.config.flat()
            facts[name] = _facts(run)
        except VaecfError as error:
            facts[name] = {"status": "broken", "error": str(error)}
    first = ("status", "model", "dataset", "protocol")
    differing = _differing(settings)
    rows = [
        {key: fact.get(key) for key in first}
        | {key: settings.get(name, {}).get(key) for key in differing}
        | fact
        for name, fact in facts.items()
    ]
    index = pd.Index(facts, name="run", dtype=object)
    return pd.DataFrame(rows, index, columns=None if rows else first)


def _workdirs(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the directories of runs, without those inside of others."""
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        is_run = workdir_lib.CONFIG in names
        if is_run:
            found.append(pathlib.Path(folder))
        is_inner_sweep = workdir_lib.SWEEP in names and folder != str(root)
        if is_run or is_inner_sweep:
            folders.clear()
    return found


def _facts(run: Run) -> dict[str, Any]:
    results, metric = run._results, run.config.eval.best_metric
    validation = results.get("validation", {}).get(metric, {})
    test = results.get("test", {})
    return {
        "status": run.status,
        "model": run.config.title,
        "dataset": run.dataset.get("name"),
        "protocol": run.dataset.get("protocol"),
        "epochs": results.get("train", {}).get("epochs"),
        "seconds": results.get("train", {}).get("seconds"),
        f"validation/{metric}": validation.get("mean"),
        **{name: cell["mean"] for name, cell in test.items()},
    }


def _differing(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the keys of settings that are not the same in all runs."""
    every = list(settings.values())
    keys = list(every[0]) if every else []
    # The dataset has a column; its directory says nothing of the run.
    keys = [key for key in keys if key not in ("data.dir", "model.name")]
    return [k for k in keys if any(s[k] != every[0][k] for s in every)]
