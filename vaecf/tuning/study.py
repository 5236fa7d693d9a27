"""The study of a sweep: where its trials are kept, and whose turn it is.

Optuna hands out trials; what it leaves open is how many workers do N trials
in all, and what becomes of a trial whose worker is gone. Its heartbeats are
for databases only and start a trial over; here both storages are treated
alike, and a trial goes on from its checkpoint:

- a trial counts if it runs, waits, has ended, or has failed for a reason of
  its own (the attribute `error`). A new trial that N others come before is
  put back;
- the trial of a dead worker is failed, which only one process succeeds in,
  and enqueued again with its parameters, its reports, its seconds and where
  its files are.
  A worker is dead if this host can lock the trial's folder, or, on another
  host, if it gave no sign of life for `GRACE_SECONDS`. After `MAX_LOST`
  workers the trial counts as failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.tuning import space as space_lib

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise VaecfError(
        f"sweeps need optuna ({error}): pip install 'vaecf[tune]'"
    ) from error

PRUNERS = ("median", "hyperband", "none")
BEAT_SECONDS, GRACE_SECONDS = 60.0, 600.0
# A trial that the host's memory cannot hold takes its worker with it.
MAX_LOST = 3

# Attributes of a trial.
BEAT, HOST, FOLDER, ERROR = "beat", "host", "folder", "error"
LOST = "lost"  # workers that died of it, or with it
EPOCHS, BEST_EPOCH, SECONDS = "epochs", "best_epoch", "seconds"

# Trials may differ in these from host to host: where and how they run.
_FREE = frozenset(
    {
        *("data.dir", "data.feed", "train.microbatch", "eval.batch_size"),
        *("mesh.data", "mesh.item", "mesh.zero", "mesh.peer_timeout"),
    }
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep, as every worker of it knows it.

    Attributes:
      base: the run that trials vary.
      space: what they vary: see `space`.
      workdir: of this host; trials are in `trials/`.
      study: its name in the storage.
      trials: how many, over all workers and calls.
      storage: a journal file (.journal, .log) or a database's URL.
      pruner: one of `PRUNERS`.
      prune_after: epochs before a trial may be stopped; None: a fifth.
      population: trials that a worker trains at once, in one program.
      seed: of the sampler.
      keep_all: keep all of a trial's files, not only those of use.
      overrides: what the command line changed in the base config.
      config_file: file of the base config, for the command to paste.
    """

    base: Config
    space: dict[str, dict[str, Any]]
    workdir: pathlib.Path
    study: str = "sweep"
    trials: int = 20
    storage: str = ""
    pruner: str = "median"
    prune_after: int | None = None
    population: int = 1
    seed: int = 0
    keep_all: bool = False
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_file: str = ""


class _Sampler(optuna.samplers.BaseSampler):
    """TPE that draws by (seed, number of the trial).

    Workers need no seeds of their own, and a resumed sweep goes on as if it
    had not stopped.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._current: tuple[int, Any] = (-1, None)

    def _of(self, trial: FrozenTrial) -> Any:
        if self._current[0] != trial.number:
            digest = hashlib.sha256(f"{self._seed} {trial.number}".encode())
            tpe = optuna.samplers.TPESampler(
                seed=int.from_bytes(digest.digest()[:4], "little"),
                multivariate=True,
                # Trials of the other workers count as bad ones meanwhile.
                constant_liar=True,
            )
            self._current = (trial.number, tpe)
        return self._current[1]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, how: Any
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, name, how)


def open_study(plan: Plan, dataset: str) -> optuna.Study:
    """The study of the plan, created if there is none.

    Args:
      plan: the sweep.
      dataset: its `manifest_hash`.

    Raises:
      VaecfError: the storage cannot be had, or the study is one of another
        base config, space or dataset.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        study_name=plan.study,
        storage=_storage(plan),
        sampler=_Sampler(plan.seed),
        pruner=_pruner(plan),
        direction="maximize",
        load_if_exists=True,
    )
    mine = _identity(plan, dataset)
    theirs = study.user_attrs.get("identity")
    if theirs is None:
        study.set_user_attr("identity", mine)
        return study
    if keys := sorted(
        key
        for key in mine.keys() | theirs.keys()
        if mine.get(key) != theirs.get(key)
    ):
        raise VaecfError(
            f"--study={plan.study} was begun with another {', '.join(keys)}: "
            "use the same to go on with it, or give another --study and "
            "--workdir"
        )
    return study


def _identity(plan: Plan, dataset: str) -> dict[str, Any]:
    """What must be the same for trials to compare; plain JSON."""
    base = config_lib.flatten(plan.base.to_dict())
    mine = {
        **{
            f"config.{key}": value
            for key, value in base.items()
            if key not in _FREE | plan.space.keys()
        },
        **{f"space of {key}": value for key, value in plan.space.items()},
        "dataset": dataset,
    }
    if plan.base.linear.l2 or "linear.l2" in plan.space:
        # Before, with the weights that a blend begins with.
        mine["value of a blend"] = "as it is weighed"
    return json.loads(json.dumps(mine))


def storage_of(workdir: pathlib.Path, storage: str | None) -> str:
    """Where the trials are kept: as asked, or a journal in the workdir.

    Raises:
      VaecfError: neither a journal file nor a URL.
    """
    if not storage:
        return str(workdir / "study.journal")
    if not storage.endswith((".journal", ".log")) and "://" not in storage:
        raise VaecfError(
            f"--storage={storage} must be a file ending in .journal or .log, "
            "or the URL of a database, such as sqlite:///sweep.db"
        )
    return storage


def public(storage: str) -> str:
    """The storage without a database's password."""
    return re.sub(r"://[^/@]*@", "://***@", storage)


def _storage(plan: Plan) -> optuna.storages.BaseStorage:
    where = f"--storage={public(plan.storage)}"
    if "://" not in plan.storage:
        path = pathlib.Path(plan.storage)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        except OSError as error:
            raise VaecfError(
                f"{where} cannot be written ({error.strerror})"
            ) from error
        except ValueError as error:  # among them JSON's
            raise VaecfError(f"{where} is no journal ({error})") from error
    arguments: dict[str, Any] = {}
    if plan.storage.startswith("sqlite"):
        # Others may be writing.
        arguments = {"connect_args": {"timeout": 60}}
    for attempt in range(3):
        try:
            return optuna.storages.RDBStorage(
                plan.storage, engine_kwargs=arguments
            )
        except Exception as error:  # whatever the database's driver raises
            # Two hosts that create the tables at once: one of them fails.
            if attempt == 2:
                reason = str(error).strip().splitlines()[0]
                raise VaecfError(f"{where} cannot be used ({reason})") from None
            time.sleep(0.5)
    raise AssertionError


def _pruner(plan: Plan) -> optuna.pruners.BasePruner:
    epochs = plan.base.train.epochs
    after = plan.prune_after
    if after is None:
        after = max(1, epochs // 5)
    if plan.pruner == "none":
        return optuna.pruners.NopPruner()
    if plan.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=after
        )
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, after), max_resource=max(1, after, epochs)
        )
    raise VaecfError(
        f"--pruner={plan.pruner} is unknown: use {', '.join(PRUNERS)}"
    )


# --- Whose turn it is -------------------------------------------------------


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count: not those put back, nor those tried again."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL or ERROR in trial.user_attrs
    ]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count and are over."""
    return [trial for trial in counted(study) if trial.state.is_finished()]


def next_trial(study: optuna.Study, plan: Plan) -> Trial | None:
    """A trial to run now, or None if N are under way or over.

    One that waits goes first: it has been begun before.
    """
    distributions = space_lib.distributions(plan.space, plan.base)
    while True:
        _enqueue_orphans(study, plan)
        begun = [t for t in counted(study) if t.state != TrialState.WAITING]
        if len(begun) >= plan.trials:
            return None
        trial = study.ask(distributions)
        before = [t for t in counted(study) if t.number < trial.number]
        if len(before) < plan.trials:
            return trial
        # Another worker was faster between the two looks.
        study.tell(trial, state=TrialState.FAIL)


def next_trials(study: optuna.Study, plan: Plan) -> list[Trial]:
    """Trials to train together now, `plan.population` at most; [] for none.

    One whose worker died goes alone: it may have been its fault.
    """
    taken: list[Trial] = []
    try:
        while len(taken) < plan.population:
            if (trial := next_trial(study, plan)) is None:
                break
            suspect = trial.user_attrs.get(LOST, 0) > 0
            if suspect and taken:
                enqueue_again(study, trial.number)
                break
            taken.append(trial)
            if suspect:
                break
    except BaseException:  # interrupted: nobody would train them
        for trial in taken:
            enqueue_again(study, trial.number)
        raise
    return taken


def folder_of(plan: Plan, number: int) -> pathlib.Path:
    """Workdir of a trial on this host."""
    return plan.workdir.absolute() / "trials" / f"{number:05d}"


def enqueue_again(
    study: optuna.Study, number: int, *, lost: bool = False
) -> bool:
    """Ends a running trial and lets it wait with all that is known of it.

    Args:
      study: the trial's.
      number: the trial's.
      lost: whether its worker died, which is borne a few times.

    Returns:
      Whether it was this process that did.
    """
    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False  # another process was faster
    trial = study.get_trials()[number]
    attributes = {
        key: value
        for key, value in trial.user_attrs.items()
        if key in (FOLDER, SECONDS)
    }
    attributes[LOST] = trial.user_attrs.get(LOST, 0) + lost
    state = TrialState.WAITING
    if attributes[LOST] >= MAX_LOST:
        state = TrialState.FAIL
        attributes[ERROR] = (
            f"{MAX_LOST} workers died at it: is the memory of the host enough?"
        )
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=attributes,
            intermediate_values=trial.intermediate_values,
        )
    )
    return True


def _enqueue_orphans(study: optuna.Study, plan: Plan) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_orphan(trial):
            enqueue_again(study, trial.number, lost=True)


def _is_orphan(trial: FrozenTrial) -> bool:
    attributes = trial.user_attrs
    if attributes.get(HOST) == socket.gethostname():
        folder = pathlib.Path(attributes[FOLDER])
        if folder.is_dir():
            return is_free(folder)
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - attributes.get(BEAT, began) > GRACE_SECONDS


def is_free(folder: pathlib.Path) -> bool:
    """Whether nobody works in a trial's folder: locks die with processes."""
    try:
        with workdir_lib.locked(folder):
            return True
    except VaecfError:
        return False


@contextlib.contextmanager
def alive(trial: Trial, folder: pathlib.Path) -> Iterator[None]:
    """Says now and then that the trial's worker lives.

    Args:
      trial: running.
      folder: locked by this process.
    """
    # The host comes last: with it, the folder decides.
    trial.set_user_attr(BEAT, time.time())
    trial.set_user_attr(FOLDER, str(folder))
    trial.set_user_attr(HOST, socket.gethostname())
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            # A storage that is away for once is no reason to stop; a trial
            # that was taken over hears of it at its next report.
            with contextlib.suppress(Exception):
                trial.set_user_attr(BEAT, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
