"""A population from the outside: members of a grid, a run directory each."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import pathlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vaecf import config as config_lib
from vaecf import workdir as workdir_lib
from vaecf.config import Config
from vaecf.data.dataset import Dataset, find_dataset
from vaecf.errors import VaecfError, did_you_mean
from vaecf.evaluation import metrics
from vaecf.reporting import tables
from vaecf.training import population as population_lib
from vaecf.training import population_loop, precision, signals
from vaecf.training.population_loop import Member
from vaecf.tuning import weighing

MEMBERS = workdir_lib.MEMBERS
_TYPES = {"seed": int, "loss.total_anneal_steps": int}


def grid(flags: Sequence[str], base: Config) -> dict[str, Config]:
    """Members by name: every combination of the values of all keys.

    Args:
      flags: 'seed=0,1,2', 'loss.anneal_cap=0.1,0.2', ...; values of
        --members.
      base: what members have in common.

    Returns:
      {'seed=0,anneal_cap=0.1': options, ...}, the first key slowest; the name
      is one of a directory.

    Raises:
      VaecfError: a key or value that is unknown, repeated, of the wrong type,
        out of range, or not one that members may differ in.
    """
    if not flags:
        raise VaecfError(
            "--members is missing: give a key and its values, such as "
            "--members='seed=0,1,2'"
        )
    values = dict[str, list[Any]]()
    for flag in flags:
        key, found = _parse(flag, base)
        if key in values:
            raise VaecfError(
                f"--members={flag}: {key} is there twice: give all of its "
                "values in one --members"
            )
        values[key] = found
    members = {}
    for combination in itertools.product(*values.values()):
        overrides = dict(zip(values, combination, strict=True))
        try:
            config = config_lib.replace(base, overrides)
        except VaecfError as error:
            raise VaecfError(f"--members: {error}") from None
        members[name(overrides)] = config
    return members


def name(overrides: Mapping[str, Any]) -> str:
    """'seed=0,anneal_cap=0.1': no two keys that may vary end alike."""
    return ",".join(
        f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items()
    )


def _parse(flag: str, base: Config) -> tuple[str, list[Any]]:
    key, equals, text = flag.partition("=")
    where = f"--members={flag}"
    known = config_lib.flatten(base.to_dict())
    if key not in known:
        raise VaecfError(
            f"{where}: {key!r} is not a key of the config"
            f"{did_you_mean(key, known)}"
        )
    if key not in population_lib.VARIED:
        raise VaecfError(
            f"{where}: {key} changes the program or the shapes of its arrays, "
            "so train separate runs with it (experiments/sweep.py); members "
            f"may differ in {', '.join(population_lib.VARIED)}"
        )
    if not equals or not text:
        raise VaecfError(f"{where}: give values, such as {key}={known[key]}")
    kind = _TYPES.get(key, float)
    values = []
    for word in text.split(","):
        try:
            values.append(kind(word))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise VaecfError(f"{where}: {word!r} must be {what}") from None
        if values[-1] in values[:-1]:
            raise VaecfError(f"{where}: {word!r} is there twice: leave one out")
    return key, values


def train(
    base: Config,
    flags: Sequence[str],
    workdir: pathlib.Path,
    *,
    log: Callable[[str], None] = print,
) -> list[Member]:
    """Trains a population, or goes on with it; writes and prints a table.

    Args:
      base: what members have in common.
      flags: as of `grid`.
      workdir: gets a run directory for each member, and `members.csv`. Members
        of earlier calls stay; those of this call that are over are not
        trained again.
      log: gets lines of text.

    Returns:
      The members, best first.

    Raises:
      VaecfError: bad input; or all members failed.
      signals.Interrupted: stopped, with everything saved.
    """
    members = grid(flags, base)
    population_lib.check([*members.values()])
    for metric in (*base.eval.metrics, base.eval.best_metric):
        metrics.parse(metric)
    precision.policy(base.precision.policy)
    dataset = find_dataset(base.data.dir)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        workdir_lib.require_no_other(workdir, "population")
        runs = [
            _claimed(name, config, workdir / name, dataset, stack)
            for name, config in members.items()
        ]
        if not (workdir / MEMBERS).exists():
            _write_table(workdir / MEMBERS, runs, {}, base)
        log(
            f"training {len(runs)} members of {base.title} on "
            f"{dataset.name}: {dataset.train.n_users:,} users, "
            f"{dataset.n_items:,} items, {dataset.train.nnz:,} interactions"
        )
        interrupted = population_loop.train(runs, dataset, workdir, log=log)
        for member in runs:
            _write_results(member)
        if interrupted:
            raise signals.Interrupted(
                f"all members are trained; the same command sums up ({workdir})"
            )
        values = {m.name: _value_of(m, dataset) for m in runs}
        ranked = sorted(runs, key=lambda m: _place(m, values.get(m.name)))
        _write_table(workdir / MEMBERS, ranked, values, base)
    seconds = time.perf_counter() - began
    _say_results(ranked, values, base, seconds, workdir, log)
    return ranked


def _claimed(
    name: str,
    config: Config,
    folder: pathlib.Path,
    dataset: Dataset,
    stack: contextlib.ExitStack,
) -> Member:
    stack.enter_context(workdir_lib.locked(folder))
    workdir_lib.check_or_create(folder, config, dataset)
    return Member(name, config, folder)


def _value_of(member: Member, dataset: Dataset) -> float | None:
    """What the member is worth; None, and why, if it failed."""
    if member.error is not None:
        return None
    try:
        return weighing.value(
            member.config, member.workdir, dataset, member.position
        )
    except VaecfError as error:
        member.error = str(error)
        return None


def _place(member: Member, best: float | None) -> tuple[bool, float]:
    """Best first; those that failed last."""
    return (member.error is not None, -(best if best is not None else 0.0))


def _write_results(member: Member) -> None:
    """As main.py --train does; what was measured of an earlier model goes."""
    if member.summary is None:
        return
    path = member.workdir / workdir_lib.RESULTS
    results = workdir_lib.read_json(path) if path.exists() else {}
    if results.get("train", {}).get("epochs") != member.summary["epochs"]:
        (member.workdir / workdir_lib.PER_USER).unlink(missing_ok=True)
        workdir_lib.write_json(path, {"train": member.summary})


def _write_table(
    path: pathlib.Path,
    ranked: Sequence[Member],
    values: Mapping[str, float | None],
    base: Config,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [
        key
        for key in population_lib.VARIED
        if len({_value(m, key) for m in ranked}) > 1
    ]
    writer.writerow(
        [
            *("member", *keys, f"validation/{base.eval.best_metric}"),
            *("best_epoch", "epochs", "seconds", "error"),
        ]
    )
    for member in ranked:
        position = member.position
        writer.writerow(
            [
                member.name,
                *(_value(member, key) for key in keys),
                values.get(member.name, position.best),
                (member.summary or {}).get("best_epoch", position.best_epoch),
                position.epoch,
                round(position.seconds, 3),
                member.error,
            ]
        )
    workdir_lib.write_bytes(path, text.getvalue().encode())


def _value(member: Member, key: str) -> Any:
    return config_lib.flatten(member.config.to_dict())[key]


def _say_results(
    ranked: Sequence[Member],
    values: Mapping[str, float | None],
    base: Config,
    seconds: float,
    workdir: pathlib.Path,
    log: Callable[[str], None],
) -> None:
    sound = [m for m in ranked if m.error is None]
    for member in ranked:
        if member.error is not None:
            log(f"{member.name} failed: {member.error}")
    if not sound:
        raise VaecfError(
            "every member failed, see above: mend it, and choose another "
            "--workdir"
        )
    rows: list[dict[str, Any]] = [
        {
            "number": member.name,
            "value": values[member.name],
            "epochs": member.position.epoch,
            "best_epoch": (member.summary or {}).get("best_epoch", 0),
            "seconds": member.position.seconds,
            "params": {},
        }
        for member in sound
    ]
    log("")
    log(
        tables.trials_table(
            rows,
            metric=base.eval.best_metric,
            title=f"{len(sound)} members by validation users; seconds are "
            "each one's share",
            first="member",
        )
    )
    summary = sound[0].summary
    assert summary is not None
    log(
        f"\n{seconds:.1f} s in this call with validations, checkpoints and "
        f"{summary['compile_seconds']:.1f} s of compilation\n"
        f"table: {workdir / MEMBERS}\n\npython experiments/main.py "
        f"--workdir={shlex.quote(str(sound[0].workdir))} --test"
    )
