"""The Optuna study of a sweep: storage, trials to run next, lost workers.

Optuna proposes trials. This module lets several workers run N trials together,
and hands the trial of a lost worker to another, which resumes it. (Optuna's
heartbeats need a database, and restart trials.)

- A trial counts unless it failed without the attribute `error`: a worker that
  asked for one trial too many gives it back.
- The trial of a lost worker is marked as failed, which succeeds in one process
  only, and enqueued again under a new number.
- A worker is lost if this host can lock its trial's directory, or if it runs
  on another host and its last heartbeat is `GRACE_SECONDS` old, or if it asked
  for a trial and did not begin it within `ASK_SECONDS`.
- A trial keeps its place among the trials that count when it is enqueued again.
  The place seeds its values and chooses its bracket, so that a sweep with lost
  workers tries what an undisturbed one would.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import socket
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.errors import VaecfError, did_you_mean
from vaecf.tuning import space as space_lib

try:
    import optuna
    from optuna.storages.journal import (
        JournalFileBackend,
        JournalFileSymlinkLock,
    )
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise VaecfError(
        f"sweeps need optuna ({error}): pip install 'vaecf[tune]'"
    ) from error

BEAT_SECONDS, GRACE_SECONDS, ASK_SECONDS = 60.0, 600.0, 20.0
# A trial that exceeds the memory of its host kills its worker each time.
MAX_LOST = 3

# Raised by Optuna for a trial that has ended.
ENDED = (ValueError, optuna.exceptions.UpdateFinishedTrialError)

_SPACE_OF = "space of "  # and a setting: a key of the study's identity

# Attributes of a trial.
BEAT, HOST, FOLDER, ERROR = "beat", "host", "folder", "error"
PLACE = "place"  # among the trials that count, from 0
LOST = "lost"  # number of workers that were lost while they ran the trial

# Settings that may differ between the workers of a study: they say where a
# trial runs, not what it computes.
_PER_WORKER = (
    *("data.dir", "data.feed", "train.microbatch", "train.trackers"),
    *("eval.batch_size",),
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
        if self.prune_after is not None and self.pruner == "none":
            raise VaecfError(
                f"prune_after={self.prune_after} has no effect with pruner="
                "none: leave it out"
            )
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
    """TPE, seeded for each trial by (seed, place of the trial).

    Workers need no seeds of their own.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._sweep_seed = seed

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        place = _place(study, trial)
        if PLACE not in trial.user_attrs:
            study._storage.set_trial_user_attr(trial._trial_id, PLACE, place)
            trial.user_attrs[PLACE] = place
        text = f"{self._sweep_seed} {place}"
        digest = hashlib.sha256(text.encode()).digest()
        super().__init__(
            seed=int.from_bytes(digest[:4], "little"),
            multivariate=True,
            # Keeps workers from proposing what others already run.
            constant_liar=True,
        )
        super().before_trial(study, trial)


class _Hyperband(optuna.pruners.HyperbandPruner):
    """Chooses the bracket of a trial by its place instead of its number."""

    def _get_bracket_id(self, study: Any, trial: FrozenTrial) -> int:
        placed = copy.copy(trial)
        placed.number = _place(study, trial)
        return super()._get_bracket_id(study, placed)


def _place(study: Any, trial: FrozenTrial) -> int:
    """Returns the place of a trial; for a new one, the first that is free."""
    if PLACE in trial.user_attrs or trial.state.is_finished():
        return trial.user_attrs.get(PLACE, trial.number)
    # `get_trials` of a study within a bracket would ask for places.
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
    taken = {
        other.user_attrs.get(PLACE, other.number)
        for other in trials
        if other.number != trial.number and _counts(other)
    }
    return next(place for place in itertools.count() if place not in taken)


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
    new |= {f"{_SPACE_OF}{key}": value for key, value in plan.space.items()}
    new = json.loads(json.dumps({**new, "dataset": dataset}))
    old = _identity(study)
    if not old:
        study.set_user_attr("identity", new)
    elif old != new:
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        raise VaecfError(
            f"study={plan.study} began with another {', '.join(sorted(keys))}: "
            "use the same to resume it, or choose another study and workdir"
        )
    return study


def _identity(study: optuna.Study) -> dict[str, Any]:
    return study.user_attrs.get("identity", {})


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
            _drop_cut_line(storage)
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


def _drop_cut_line(journal: str) -> None:
    """Removes a last line that was cut by a full disk or the end of a process.

    Optuna would append to that line, and then read nothing any more.
    """
    if not os.path.exists(journal):
        return
    lock = JournalFileSymlinkLock(journal)
    lock.acquire()
    try:
        with open(journal, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _pruner(plan: SweepPlan) -> optuna.pruners.BasePruner:
    epochs, after = plan.base.train.epochs, plan.prune_after
    after = max(1, epochs // 5 if after is None else after)
    pruners: dict[str, optuna.pruners.BasePruner] = {
        "median": optuna.pruners.MedianPruner(n_warmup_steps=after),
        "hyperband": _Hyperband(after, max(after, epochs)),
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
    return [*filter(_counts, study.get_trials(deepcopy=False))]


def _counts(trial: FrozenTrial) -> bool:
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that count and are finished."""
    return [trial for trial in counted(study) if trial.state.is_finished()]


def next_trial(
    study: optuna.Study, plan: SweepPlan, own: Collection[int] = ()
) -> Trial | None:
    """Returns a trial to run now, or None if enough are running or finished.

    Trials that were interrupted come first. While a worker has asked for a
    trial and not begun it, others wait: the worker may be lost. `own` are
    numbers of trials that the caller has asked for and not begun.
    """
    distributions = space_lib.distributions(plan.space, plan.base)
    while True:
        must_wait = False  # for what another worker has asked for
        for running in study.get_trials(False, (TrialState.RUNNING,)):
            if running.number in own:
                continue
            if _is_lost(running):
                enqueue_again(study, running.number, lost=True)
            elif HOST not in running.user_attrs:
                must_wait = not own  # else two populations would wait
        if must_wait:
            time.sleep(0.05)
            continue
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
    own: list[int] = []
    while len(own) < plan.population:
        trial = next_trial(study, plan, own)
        if trial is None:
            return
        was_lost = trial.user_attrs.get(LOST)
        if was_lost and own:
            enqueue_again(study, trial.number)
            return
        own.append(trial.number)
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
    for name in {FOLDER, PLACE} & trial.user_attrs.keys():
        kept[name] = trial.user_attrs[name]
    # If a worker was lost while it drew the values, all are drawn again, in the
    # same order.
    n_values = sum(key.startswith(_SPACE_OF) for key in _identity(study))
    is_drawn = len(trial.params) == n_values
    hopeless = kept[LOST] >= MAX_LOST
    if hopeless:
        kept[ERROR] = (
            f"{MAX_LOST} workers were lost while they ran the trial; does it "
            "fit the memory of the host?"
        )
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL if hopeless else TrialState.WAITING,
            params=trial.params if is_drawn else {},
            distributions=trial.distributions if is_drawn else {},
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
    grace = GRACE_SECONDS if HOST in attributes else ASK_SECONDS
    return time.time() - attributes.get(BEAT, began) > grace


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
