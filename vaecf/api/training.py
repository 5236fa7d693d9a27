"""`vaecf.train` and `vaecf.sweep`: the commands of these names as functions."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vaecf import config as config_lib
from vaecf import config_files, experiment
from vaecf import workdir as workdir_lib
from vaecf.api.run import Run
from vaecf.config import Config
from vaecf.data import dataset as dataset_lib
from vaecf.data.dataset import Dataset
from vaecf.data.in_memory import load_dataset
from vaecf.data.manifests import MANIFEST
from vaecf.errors import VaecfError
from vaecf.evaluation.baselines import BASELINES
from vaecf.files import user_path
from vaecf.parallel import processes
from vaecf.training.checkpoints import no_root_handler
from vaecf.tuning import folds

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("vaecf")
_DATASET = "dataset"  # in a workdir: what was in memory


@no_root_handler()
def train(
    config: Config | str | os.PathLike[str],
    data: Any,
    workdir: str | os.PathLike[str],
    *,
    test: bool | None = None,
    baselines: bool | Sequence[str] = (),
    baselines_tuned: bool = False,
    show_progress: bool | None = None,
    log: Callable[[str], None] = _logger.info,
) -> Run:
    """Trains a model in a directory, tests it, and returns the run.

    Does what the commands `train` and `test` do, with the same files. If
    `workdir` holds the run already, training resumes, or is skipped if nothing
    is left to train.

    >>> config = vaecf.load_config("default", {"model.name": "ease"})
    >>> run = vaecf.train(config, split, folder / "runs" / "ease",
    ...                   baselines=["popularity"])
    >>> run.results["model"].unique().tolist()
    ['ease', 'popularity']

    Args:
      config: settings; or the name or path of a config file, as for
        `load_config`.
      data: what `load_dataset` takes, such as a dataset, the directory of a
        prepared one, or a frame, which is split with the defaults of `split`;
        or the directory of folds. What is in memory is written to `workdir`.
      workdir: directory of the run; created if necessary.
      test: whether to evaluate the best model on the test users; None does if
        the dataset has some.
      baselines: names of models to evaluate beside it in the test, of
        'popularity', 'itemknn', 'rp3beta', 'slim', 'ease' and 'ials'; True
        for all.
      baselines_tuned: choose their settings on the validation users.
      show_progress: whether to draw a progress bar; None draws one in a
        notebook and on a terminal.
      log: receives what the commands print, line by line.

    Raises:
      VaecfError: the config, the data or the workdir cannot be used.
      KeyboardInterrupt: training was interrupted; its state is saved, and the
        same call resumes it.
    """
    config, folder = _config(config), user_path(workdir)
    if isinstance(baselines, str):
        raise VaecfError(
            f"baselines={baselines!r} must be a list of names, or True"
        )
    names = (*BASELINES,) if baselines is True else tuple(baselines or ())
    if test is False and names:
        raise VaecfError("baselines have no effect with test=False")
    if baselines_tuned and not names:
        raise VaecfError("baselines_tuned has no effect without baselines")
    place, has_test = _place(data, folder, "run")
    if names and not (test or has_test):
        raise VaecfError(
            "baselines have no effect: the dataset has no test users; leave "
            "them out, or split with test users"
        )
    actions = experiment.Actions(
        train=True,
        test=has_test if test is None else test,
        baselines=names,
        baselines_tuned=baselines_tuned,
        show_progress=show_progress,
    )
    config = config_lib.replace(config, {"data.dir": str(place)})
    run = folds.run if folds.are_in(place) else experiment.run
    run(config, folder, actions, log=log)
    return Run(folder)


@no_root_handler()
def sweep(
    config: Config | str | os.PathLike[str],
    space: Mapping[str, Mapping[str, Any]] | str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    trials: int = 20,
    *,
    data: Any = None,
    workers: int = 1,
    population: int = 1,
    pruner: str = "median",
    prune_after: int | None = None,
    study: str = "sweep",
    storage: str = "",
    seed: int = 0,
    keep_all: bool = False,
    log: Callable[[str], None] = _logger.info,
) -> pd.DataFrame:
    """Searches for settings on the validation users, and returns the trials.

    The same call resumes a sweep that was interrupted. Needs Optuna: `pip
    install 'vaecf[tune]'`.

    >>> config = vaecf.load_config("default", {"model.name": "ease"})
    >>> space = {"baseline.ease_l2": {"low": 1.0, "high": 900.0, "log": True}}
    >>> trials = vaecf.sweep(config, space, folder / "sweep", trials=2,
    ...                      data=split)
    >>> trials["state"].tolist()
    ['complete', 'complete']

    Args:
      config: settings that all trials share, as for `train`.
      space: an interval or choices for each setting, such as
        {"model.latent": {"low": 50, "high": 400, "step": 50}}
        (`vaecf.tuning.space`); or the path of a file with `get_space()`, or the
        name of one in `configs/sweeps/`.
      workdir: directory of the sweep, with a run for each trial in `trials/`.
      trials: number of trials, of all calls together.
      data: as for `train`; None takes the dataset in `config.data.dir`.
      workers: processes that train at the same time. If there are several,
        they import the calling script, whose work must therefore be guarded by
        `if __name__ == "__main__"`.
      population: trials that a worker trains at the same time, in one program.
      pruner: how bad trials are stopped early: 'median', 'hyperband' or 'none'.
      prune_after: epochs before a trial may be stopped; None for a fifth.
      study: name in the storage.
      storage: journal file (.journal, .log) or URL of a database that several
        hosts share; '' for a journal in the workdir.
      seed: of what is tried.
      keep_all: keep all files of the trials, not only the best checkpoints.
      log: receives what the command prints, line by line.

    Returns:
      A row per trial, in their order: 'state' ('complete', 'pruned' or
      'failed'), 'value' (mean of `config.eval.best_metric` over the validation
      users), a column for each setting of the space, 'best_epoch', 'epochs',
      'seconds', 'folder' and 'error'; the index is the number of the trial.
      `attrs['metric']` names the metric. The best trial is
      `frame['value'].idxmax()`.

    Raises:
      VaecfError: the sweep cannot be carried out, or no trial succeeded.
      KeyboardInterrupt: the sweep was interrupted, with everything saved.
    """
    import pandas as pd

    from vaecf.tuning import space as space_lib
    from vaecf.tuning import study as study_lib
    from vaecf.tuning import sweep as sweep_lib

    config, folder = _config(config), user_path(workdir)
    if not isinstance(space, Mapping):
        space = space_lib.load(space)
    if data is not None:
        place, _ = _place(data, folder, "sweep")
        config = config_lib.replace(config, {"data.dir": str(place)})
    plan = study_lib.SweepPlan(
        config,
        {key: dict(values) for key, values in space.items()},
        folder,
        study=study,
        trials=trials,
        storage=storage,
        pruner=pruner,
        prune_after=prune_after,
        population=population,
        seed=seed,
        keep_all=keep_all,
    )
    rows = sweep_lib.sweep(plan, workers=workers, log=log)
    params = pd.DataFrame([row.pop("params") for row in rows])
    frame = pd.DataFrame(rows).drop(columns=["began", "host"])
    at = list(frame).index("value") + 1
    frame = pd.concat([frame.iloc[:, :at], params, frame.iloc[:, at:]], axis=1)
    frame.attrs["metric"] = config.eval.best_metric
    return frame.set_index("number")


def _config(config: Config | str | os.PathLike[str]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, (str, os.PathLike)):
        return config_files.load_config(config)
    raise VaecfError(
        f"config of type {type(config).__name__}: pass what load_config "
        "returns, or the name of a config"
    )


def _place(
    data: Any, workdir: pathlib.Path, kind: str
) -> tuple[pathlib.Path, bool]:
    """Returns the directory of a dataset, and whether it has test users.

    A dataset in memory is written to the workdir, so that the run can be
    resumed and tested without it. `kind` is what the workdir is for: 'run' or
    'sweep'.
    """
    if isinstance(data, (str, os.PathLike)) and folds.are_in(user_path(data)):
        return user_path(data), True
    dataset = load_dataset(data)
    place = dataset.path
    if place is None:
        place = workdir / _DATASET
        with processes.agreement():  # all others wait until it is written
            if processes.is_lead():
                workdir_lib.require_no_other(workdir, kind)
                _write(dataset, workdir)
    return place, dataset.test.held_out.nnz > 0


def _write(dataset: Dataset, workdir: pathlib.Path) -> None:
    """Writes a dataset to a workdir, unless the workdir holds it already.

    It replaces the dataset of a call that failed before it trained anything.
    """
    place, known = workdir / _DATASET, None
    is_written = (place / MANIFEST).exists()
    written = dataset_lib.open_dataset(place).manifest if is_written else None
    if workdir_lib.has_model(workdir):
        known, _ = workdir_lib.read_manifest(workdir / workdir_lib.DATASET)
    elif (workdir / workdir_lib.SWEEP).exists():
        known = written
    if known is not None and known != dataset.manifest:
        raise VaecfError(
            f"workdir {workdir} holds a run on other data: use the same data "
            "to resume it, or choose another workdir"
        )
    if written != dataset.manifest:
        dataset_lib.write_dataset(place, dataset, overwrite=is_written)
