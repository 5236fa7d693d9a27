"""The Optuna study of a sweep: storage, trials to run next, lost workers.

Optuna proposes trials. This module lets several workers run N trials together,
and hands the trial of a lost worker to another, which resumes it. (Optuna's
heartbeats need a database, and restart trials.)

- A trial counts unless it failed without the attribute `error`: a worker that
  asked for one trial too many gives it back.
- The trial of a lost worker is marked as failed, which succeeds in one process
  only, and enqueued again under a new number.
- A worker is lost if this host can lock its trial's directory, or if it runs
  on another host and its last heartbeat is `GRACE_SECONDS` old.
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

from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.errors import VaecfError, did_you_mean
from vaecf.tuning import space as space_lib

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise VaecfError(
        f"sweeps need optuna ({error}): pip install 'vaecf[tune]'"
    ) from error

BEAT_SECONDS, GRACE_SECONDS = 60.0, 600.0
# A trial that exceeds the memory of its host kills its worker each time.
MAX_LOST = 3

# Raised by Optuna for a trial that has ended.
ENDED = (ValueError, optuna.exceptions.UpdateFinishedTrialError)

# Attributes of a trial.
BEAT, HOST, FOLDER, ERROR = "beat", "host", "folder", "error"
LOST = "lost"  # number of workers that were lost while they ran the trial

# Settings that may differ between the workers of a study: they say where a
# trial runs, not what it computes.
_PER_WORKER = (
    *("data.dir", "data.feed", "train.microbatch", "eval.batch_size"),
    *("mesh.data", "mesh.item", "mesh.zero", "mesh.peer_timeout"),
)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep does; every worker has a copy."""

    base: Config  # settings that all trials share
    space: dict[str, dict[str, Any]]  # see `vaecf.tuning.space`
    workdir: pathlib.Path  # on this host, with the trials in `trials/`
    study: str = "sweep"  # name in the storage
    trials: int = 20  # of all workers and all calls
    # A journal file (.journal, .log) or the URL of a database; '' for a
    # journal in the workdir.
    storage: str = ""
    pruner: str = "median"  # or 'hyperband' or 'none'
    # Epochs before a trial may be pruned; None for a fifth of all.
    prune_after: int | None = None
    population: int = 1  # trials that a worker trains in one program
    seed: int = 0  # of the sampler
    keep_all: bool = False  # all files of trials, not only best checkpoints

    def __post_init__(self) -> None:
        least = {"trials": 1, "population": 1, "prune_after": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise VaecfError(f"{name}={value} must be at least {bound}")
        if not self.storage:
            journal = str(self.workdir / "study.journal")
            object.__setattr__(self, "storage", journal)

    @property
    def storage_name(self) -> str:
        """The storage without its password, for messages."""
        return re.sub(r"://[^/@]*@", "://***@", self.storage)

    def trial_directory(self, number: int) -> pathlib.Path:
        """Returns the workdir of a trial on this host."""
        return self.workdir.absolute() / "trials" / f"{number:05d}"


class _Sampler(optuna.samplers.TPESampler):
    """TPE, seeded for each trial by (seed, number of the trial).

    Workers need no seeds of their own, and a resumed sweep proposes what an
    uninterrupted one would.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._sweep_seed = seed

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        text = f"{self._sweep_seed} {trial.number}"
        digest = hashlib.sha256(text.encode()).digest()
        super().__init__(
            seed=int.from_bytes(digest[:4], "little"),
            multivariate=True,
            # Keeps workers from proposing what others already run.
            constant_liar=True,
        )
        super().before_trial(study, trial)


def open_study(plan: SweepPlan, dataset: str) -> optuna.Study:
    """Opens the study of the plan and a `manifest_hash`, or creates it.

    Raises:
      VaecfError: the storage cannot be used, or the study belongs to another
        base config, space or dataset.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    pruner = _pruner(plan)  # an unknown name creates no storage
    study = optuna.create_study(
        study_name=plan.study,
        storage=_open_storage(plan),
        sampler=_Sampler(plan.seed),
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )
    # Trials can be compared if all of this is equal, as JSON values.
    base = plan.base.flat()
    fixed = base.keys() - plan.space.keys() - {*_PER_WORKER}
    new = {f"config.{key}": base[key] for key in fixed}
    new |= {f"space of {key}": value for key, value in plan.space.items()}
    new = json.loads(json.dumps({**new, "dataset": dataset}))
    old = study.user_attrs.get("identity")
    if old is None:
        study.set_user_attr("identity", new)
    elif old != new:
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        raise VaecfError(
            f"study={plan.study} began with another {', '.join(sorted(keys))}: "
            "use the same to resume it, or choose another study and workdir"
        )
    return study


def _open_storage(plan: SweepPlan) -> optuna.storages.BaseStorage:
    storage, where = plan.storage, f"storage={plan.storage_name}"
    if "://" not in storage:
        if not storage.endswith((".journal", ".log")):
            raise VaecfError(
                f"{where} must be a file ending in .journal or .log, or the "
                "URL of a database, such as sqlite:///sweep.db"
            )
        try:
            pathlib.Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(storage))
        except (OSError, ValueError) as error:  # ValueError: not a journal
            raise VaecfError(
                f"{where} cannot be written as a journal ({error})"
            ) from error
    # SQLite locks the whole file while another worker writes.
    wait = {"connect_args": {"timeout": 60}}
    arguments: Any = wait if storage.startswith("sqlite") else None
    reason = ""
    for _ in range(3):  # of two hosts that create the tables at once, one fails
        try:
            return optuna.storages.RDBStorage(storage, arguments)
        except Exception as error:  # depends on the database's driver
            reason = str(error).strip().splitlines()[0]
            time.sleep(0.5)
    raise VaecfError(f"{where} cannot be used ({reason})")


def _pruner(plan: SweepPlan) -> optuna.pruners.BasePruner:
    epochs, after = plan.base.train.epochs, plan.prune_after
    after = max(1, epochs // 5 if after is None else after)
    pruners: dict[str, optuna.pruners.BasePruner] = {
        "median": optuna.pruners.MedianPruner(n_warmup_steps=after),
        "hyperband": optuna.pruners.HyperbandPruner(after, max(after, epochs)),
        "none": optuna.pruners.NopPruner(),
    }
    if plan.pruner not in pruners:
        raise VaecfError(
            f"pruner={plan.pruner} must be one of {', '.join(pruners)}"
            f"{did_you_mean(plan.pruner, pruners)}"
        )
    return pruners[plan.pruner]


# --- Which trial is next ----------------------------------------------------


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that count: not given back, not enqueued again."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL or ERROR in trial.user_attrs
    ]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that count and are finished."""
    return [trial for trial in counted(study) if trial.state.is_finished()]


def next_trial(study: optuna.Study, plan: SweepPlan) -> Trial | None:
    """Returns a trial to run now, or None if enough are running or finished.

    Trials that were interrupted come first.
    """
    distributions = space_lib.distributions(plan.space, plan.base)
    while True:
        for running in study.get_trials(False, (TrialState.RUNNING,)):
            if _is_lost(running):
                enqueue_again(study, running.number, lost=True)
        begun = [t for t in counted(study) if t.state != TrialState.WAITING]
        if len(begun) >= plan.trials:
            return None
        trial = study.ask(distributions)
        before = [t for t in counted(study) if t.number < trial.number]
        if len(before) < plan.trials:
            return trial
        # Another worker asked between the two checks.
        study.tell(trial, state=TrialState.FAIL)


def next_trials(study: optuna.Study, plan: SweepPlan) -> Iterator[Trial]:
    """Yields up to `plan.population` trials to train together now.

    A trial that lost a worker is yielded alone: it may be the reason.
    """
    for n_before in range(plan.population):
        trial = next_trial(study, plan)
        if trial is None:
            return
        was_lost = trial.user_attrs.get(LOST)
        if was_lost and n_before:
            enqueue_again(study, trial.number)
            return
        yield trial
        if was_lost:
            return


def enqueue_again(
    study: optuna.Study, number: int, *, lost: bool = False
) -> bool:
    """Enqueues a running trial again; returns False if it has ended.

    `lost` says that its worker was lost.
    """
    try:
        study.tell(number, state=TrialState.FAIL)
    except ENDED:
        return False
    trial = study.get_trials()[number]
    kept = {LOST: trial.user_attrs.get(LOST, 0) + lost}
    if FOLDER in trial.user_attrs:
        kept[FOLDER] = trial.user_attrs[FOLDER]
    hopeless = kept[LOST] >= MAX_LOST
    if hopeless:
        kept[ERROR] = (
            f"{MAX_LOST} workers were lost while they ran the trial; does it "
            "fit the memory of the host?"
        )
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL if hopeless else TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=kept,
            intermediate_values=trial.intermediate_values,
        )
    )
    return True


def _is_lost(trial: FrozenTrial) -> bool:
    attributes = trial.user_attrs
    if attributes.get(HOST) == socket.gethostname():
        directory = pathlib.Path(attributes[FOLDER])
        if directory.is_dir():
            return is_free(directory)
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - attributes.get(BEAT, began) > GRACE_SECONDS


def is_free(directory: pathlib.Path) -> bool:
    """Returns whether no process of this host works in a trial's directory."""
    try:
        with workdir_lib.locked(directory):
            return True
    except VaecfError:
        return False


@contextlib.contextmanager
def heartbeat(trial: Trial, directory: pathlib.Path) -> Iterator[None]:
    """Tells other workers that this one runs, and has locked, the trial."""
    trial.set_user_attr(BEAT, time.time())
    trial.set_user_attr(FOLDER, str(directory))
    # The host comes last: from then on the lock of the directory decides.
    trial.set_user_attr(HOST, socket.gethostname())
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_SECONDS):
            # The storage may be away for a while. A trial that another worker
            # has taken over learns of it at its next report.
            with contextlib.suppress(Exception):
                trial.set_user_attr(BEAT, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
