"""A sweep: workers that take trials from a study until N are over."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import vaecf
from vaecf import workdir as workdir_lib
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError
from vaecf.evaluation import metrics
from vaecf.tuning import results, space
from vaecf.tuning import study as study_lib
from vaecf.tuning.study import Plan

Say = Callable[[str], None]

# So many failures in a row are not the trials' own.
_MAX_FAILED = 5
_WORKER = "from vaecf.tuning import sweep; sweep.worker()"


def sweep(plan: Plan, *, workers: int = 1, log: Say = print) -> None:
    """Does the trials of the plan that are still to do, and sums up.

    Hyper-parameters are chosen on the validation users: the test users are
    never looked at. Other processes, on this host or others, may work on the
    same study at the same time.

    Args:
      plan: what to do.
      workers: processes on this machine; one is this process.
      log: gets lines of text.

    Raises:
      VaecfError: the plan cannot be carried out.
      KeyboardInterrupt: stopped, with everything saved.
    """
    for flag, value in (
        ("trials", plan.trials),
        ("workers", workers),
        ("population", plan.population),
    ):
        if value < 1:
            raise VaecfError(f"--{flag}={value} must be at least 1")
    if plan.prune_after is not None and plan.prune_after < 0:
        raise VaecfError(f"--prune_after={plan.prune_after} must be at least 0")
    workdir_lib.require_no_other(plan.workdir, "sweep")
    metrics.parse(plan.base.eval.best_metric)
    space.check(plan.space, plan.base)
    if plan.population > 1:
        _check_population(plan)
    plan = dataclasses.replace(
        plan,
        storage=study_lib.storage_of(plan.workdir, plan.storage),
        # So many that every worker has some.
        population=min(plan.population, -(-plan.trials // workers)),
    )
    dataset = _dataset(plan)
    study = study_lib.open_study(plan, dataset.manifest_hash)
    _claim(plan)
    log(
        f"study {plan.study}: {len(study_lib.ended(study))} of {plan.trials} "
        f"trials are over; {study_lib.public(plan.storage)}"
    )
    try:
        with _sigterm_interrupts():
            if workers == 1:
                _work(plan, dataset, bars=True, log=log)
            else:
                _work_in_processes(plan, workers, log)
    except KeyboardInterrupt:
        results.write(plan, study, log)
        raise KeyboardInterrupt(
            f"{len(study_lib.ended(study))} of {plan.trials} trials are over; "
            f"the same command goes on from here ({plan.workdir})"
        ) from None
    results.write(plan, study, log)
    left = plan.trials - len(study_lib.ended(study))
    if left > 0:
        log(
            f"{left} of {plan.trials} trials are not over: other workers are "
            "at them, or the same command goes on with them"
        )


def _check_population(plan: Plan) -> None:
    """Refuses what cannot be trained in one program."""
    from vaecf.training import population

    for key in plan.space:
        if key not in population.VARIED:
            raise VaecfError(
                f"--population={plan.population} with {key} in --space: it "
                "changes the program or the shapes of its arrays, so leave "
                "one of them out; trials trained at once may differ in "
                f"{', '.join(population.VARIED)}"
            )


def _dataset(plan: Plan) -> Dataset:
    dataset = find_dataset(plan.base.data.dir)
    if dataset.validation.held_out.nnz == 0:
        raise VaecfError(
            f"{plan.base.data.dir}: the dataset has no validation users to "
            "choose by; prepare it with --held_out_users above 0"
        )
    return dataset


def _claim(plan: Plan) -> None:
    """A workdir's trials are those of one study.

    Raises:
      VaecfError: it cannot be written, or has the trials of another study.
    """
    path = plan.workdir / workdir_lib.SWEEP
    # A folder may be moved, and be called by several names.
    where = study_lib.public(plan.storage)
    if "://" not in where:
        where = os.path.relpath(where, plan.workdir)
    mine = {"study": plan.study, "storage": where}
    try:
        plan.workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            workdir_lib.write_json(path, mine)
    except OSError as error:
        raise VaecfError(
            f"--workdir={plan.workdir}: cannot be written ({error.strerror})"
        ) from error
    theirs = workdir_lib.read_json(path)
    for flag, value in mine.items():
        if theirs.get(flag) != value:
            raise VaecfError(
                f"--workdir={plan.workdir} holds the trials of "
                f"--{flag}={theirs.get(flag)}, not {value}: give the same, or "
                "another workdir"
            )


def _work(plan: Plan, dataset: Dataset, *, bars: bool, log: Say) -> None:
    """Takes trials until there is none to take."""
    from vaecf.parallel import mesh as mesh_lib
    from vaecf.training import population, precision
    from vaecf.tuning import trial as trial_lib

    # What this machine cannot do would fail every trial.
    precision.policy(plan.base.precision.policy)
    mesh_lib.make_mesh(plan.base.mesh.data, plan.base.mesh.item)
    if plan.population > 1:
        population.check([plan.base])
    # A study of this process's own: storages do not survive a fork.
    study = study_lib.open_study(plan, dataset.manifest_hash)
    failed = 0
    while trials := study_lib.next_trials(study, plan):
        how: dict[str, Any] = {"bars": bars, "say": log}
        if plan.population > 1:
            done = trial_lib.run_together(plan, study, trials, dataset, **how)
        else:
            done = [
                trial_lib.run(plan, study, t, dataset, **how) for t in trials
            ]
        for frozen in done:
            is_sound = frozen is not None and frozen.value is not None
            failed = 0 if is_sound else failed + 1
        if failed >= _MAX_FAILED:
            raise VaecfError(
                f"{failed} trials in a row failed, see above: a full disk and "
                "a space of bad values look like this. Mend it, then the same "
                "command goes on"
            )


# --- Several processes ------------------------------------------------------


def _work_in_processes(plan: Plan, workers: int, log: Say) -> None:
    """Starts workers, waits for them, passes an interrupt on.

    Raises:
      KeyboardInterrupt: after the workers have saved.
      VaecfError: a worker gave up.
    """
    package = pathlib.Path(vaecf.__file__).resolve().parents[1]
    processes = []
    for number in range(workers):
        environment = os.environ | share(number, workers, os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(package), os.environ.get("PYTHONPATH")])
        )
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            env=environment,
            # A Ctrl-C comes from here, once.
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(pickle.dumps((plan, _cores(number, workers))))
        processes.append(process)
    interrupted = False
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        interrupted = True
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            if process.poll() is None:  # a second Ctrl-C
                process.kill()
    if interrupted:
        raise KeyboardInterrupt
    failed = 0
    for number, process in enumerate(processes):
        if process.returncode:
            failed += 1
            log(
                f"worker {number} ended with status {process.returncode}; its "
                "trial is gone on with by another worker, or by the same "
                "command"
            )
    if failed == workers:
        raise VaecfError(
            "every worker gave up: see what they said above, mend it, and give "
            "the same command"
        )


def _cores(number: int, workers: int) -> list[int]:
    """A worker's share of the cores; none where they cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    # Neighbours share caches.
    first, end = (n * len(cores) // workers for n in (number, number + 1))
    return cores[first:end] or [cores[number % len(cores)]]


def share(
    number: int, workers: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """A worker's share of GPUs, as variables of its environment.

    GPUs are dealt out if CUDA_VISIBLE_DEVICES names at least one for each;
    else all workers use all of them, and a part of the memory each.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(devices) >= workers > 1:
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[number::workers])}
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if name in environment:
        return {}
    return {name: f"{0.9 / workers:.3f}"}


def worker() -> None:
    """A process of `_work_in_processes`: its plan comes through stdin."""
    plan, cores = pickle.loads(sys.stdin.buffer.read())
    if cores:  # before XLA looks how many threads to start
        os.sched_setaffinity(0, cores)
    from vaecf.training import compilation_cache

    try:
        with contextlib.suppress(OSError):  # the parent has warned of it
            compilation_cache.keep_programs()
        with _sigterm_interrupts():
            _work(
                plan,
                _dataset(plan),
                bars=False,
                log=lambda text: print(text, flush=True),
            )
    except VaecfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM between two trials is a Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
