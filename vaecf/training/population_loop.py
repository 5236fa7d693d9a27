"""The training loop of a population: `loop.train` for several runs at once.

Every member is a run directory like any other. Members that are equally far
are trained together; after an interrupt all are, and where a crash has parted
them those behind catch up first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vaecf.config import Config
from vaecf.errors import VaecfError
from vaecf.reporting.progress import Progress
from vaecf.training import (
    input_pipeline,
    linear_branch,
    loop,
    signals,
    spectral_init,
)
from vaecf.training import population as population_lib
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.progress import TrainProgress


@dataclasses.dataclass
class Member:
    """A member while it is trained.

    Attributes:
      name: for messages.
      config: its run.
      workdir: its directory, held and claimed by the caller.
      position: where it is.
      summary: of its training, as `loop.train` gives it, once it is over. Of
        the time, a member has its share; `compile_seconds` is that of the
        population's program.
      error: what it failed of; the others go on.
      goes_on: asked with the record of every validation; False ends it there.
      stopped: whether it was ended so.
    """

    name: str
    config: Config
    workdir: pathlib.Path
    position: TrainProgress = dataclasses.field(default_factory=TrainProgress)
    summary: dict[str, Any] | None = None
    error: str | None = None
    goes_on: Callable[[Mapping[str, Any]], bool] | None = None
    stopped: bool = False

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train."""
        return (
            self.error is not None
            or self.stopped
            or self.position.epoch >= self.config.train.epochs
            or self.position.out_of_patience(self.config.eval.patience)
        )

    def step(self, steps: int) -> int:
        """Global step, with `steps` an epoch."""
        return self.position.epoch * steps + self.position.step_in_epoch


def train(
    members: Sequence[Member],
    dataset: Any,
    workdir: pathlib.Path,
    *,
    show_progress: bool | None = None,
    stacked: bool | None = None,
    log: Callable[[str], None] = print,
) -> bool:
    """Trains members, or goes on with them where they left off.

    Args:
      members: their options differ in `population.VARIED` only; `position`,
        `summary`, `error` and `stopped` are filled in.
      dataset: `data.dataset.Dataset`.
      workdir: of the population, for messages.
      show_progress: None decides by whether stderr is a terminal.
      stacked: as of `population.Population`.
      log: gets one line of text at a time.

    Returns:
      Whether there was a SIGINT or SIGTERM so late that all were over.

    Raises:
      signals.Interrupted: after SIGINT or SIGTERM, with all states saved.
      VaecfError: members that are no population, or a damaged checkpoint.
    """
    population_lib.check([m.config for m in members])
    config = members[0].config
    if config.data.feed == "auto":
        kind, why = input_pipeline.choose(dataset.train)
        if kind != "resident":
            raise VaecfError(
                f"a population keeps the interactions on the device: {why}; "
                "train separate runs"
            )
    whole = population_lib.Population(
        [m.config for m in members],
        dataset.n_items,
        dataset.train,
        stacked=stacked,
    )
    with contextlib.ExitStack() as stack:
        runs = [_Run(member, whole.steps, stack) for member in members]
        interrupted = stack.enter_context(signals.interrupts())
        clock = signals.Clock()
        validate: Any = None
        while waiting := [r for r in runs if not r.member.over]:
            steps_taken = [r.step for r in waiting]
            first = min(steps_taken)
            together = [r for r in waiting if r.step == first]
            states = _states(whole, runs, together, dataset, workdir, log)
            population = whole.only([runs.index(r) for r in together])
            if validate is None:
                path = _linear_path(members, dataset, whole.setup.mesh, log)
                validate = loop.make_validator(
                    config, dataset, whole.setup, path
                )
            if len(members) > 1 and len(together) < len(members):
                log(
                    f"{len(together)} of {len(members)} members are at "
                    f"epoch {together[0].member.position.epoch}"
                )
            _Together(
                population,
                together,
                # Where others wait for them.
                until=min((s for s in steps_taken if s > first), default=None),
                validate=validate,
                interrupted=interrupted,
                clock=clock,
                workdir=workdir,
            ).train(states, show_progress)
            del states
        for run in runs:
            run.finish(whole)
        return interrupted()


def _states(
    whole: population_lib.Population,
    runs: Sequence[_Run],
    together: Sequence[_Run],
    dataset: Any,
    workdir: pathlib.Path,
    log: Callable[[str], None],
) -> list[state_lib.TrainState]:
    """Of the checkpoints, or the first ones."""
    if together[0].saved.step(LATEST) is None:
        states = whole.only([runs.index(r) for r in together]).first_states()
        if together[0].member.config.model.init == "spectral":
            seeds = [run.member.config.seed for run in together]
            states = spectral_init.start(
                states, seeds, dataset.train, workdir, log=log
            )
        return states
    return [loop.restore_state(whole.setup, run.saved) for run in together]


def _linear_path(
    members: Sequence[Member],
    dataset: Any,
    mesh: Any,
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    """One for all members, each of which has it in its directory."""
    first, *others = members
    path = linear_branch.prepare(
        first.config.linear, dataset.train, first.workdir, mesh, log=log
    )
    if path is not None:
        for member in others:
            linear_branch.share(first.workdir, member.workdir)
    return path


class _Run:
    """What a member has open."""

    def __init__(
        self, member: Member, steps: int, stack: contextlib.ExitStack
    ) -> None:
        self.member, self._steps = member, steps
        self.saved = Checkpoints(member.workdir / "checkpoints")
        stack.callback(self.saved.close)
        if self.saved.step(LATEST) is not None:
            member.position = TrainProgress(**self.saved.position(LATEST))
            if self.saved.step(LATEST) != self.step:
                raise VaecfError(
                    f"{member.workdir}: the checkpoint is of step "
                    f"{self.saved.step(LATEST)}, and with {steps} steps an "
                    f"epoch its position is step {self.step}: it is damaged, "
                    "or of another batch size or dataset"
                )
        self.began_at = self.step
        self.writer = loop.open_writers(member.workdir, self.step, None)
        stack.callback(self.writer.close)

    @property
    def step(self) -> int:
        return self.member.step(self._steps)

    def write(self, record: dict[str, Any]) -> None:
        self.writer.write(record, step=self.step)

    def save(self, which: str, tree: Any) -> None:
        if self.saved.step(which) != self.step:
            position = dataclasses.asdict(self.member.position)
            self.saved.save(which, self.step, tree, position)

    def finish(self, whole: population_lib.Population) -> None:
        member = self.member
        if member.error is not None:
            return
        member.summary = {
            **loop.summarise(
                member.position, whole, member.config, whole.setup.mesh
            ),
            "members": len(whole.members),
        }
        if self.step > self.began_at:
            summary = {f"final/{k}": v for k, v in member.summary.items()}
            self.write(summary)


class _Together:
    """Members at one position, on their way to another."""

    def __init__(
        self,
        population: population_lib.Population,
        runs: Sequence[_Run],
        *,
        until: int | None,
        validate: Callable[[Any], dict[str, Any]],
        interrupted: Callable[[], bool],
        clock: signals.Clock,
        workdir: pathlib.Path,
    ) -> None:
        self._population, self._runs = population, list(runs)
        self._options = runs[0].member.config
        self._until = until
        self._validate, self._interrupted = validate, interrupted
        self._clock, self._workdir = clock, workdir
        self._last_saved = time.monotonic()

    @property
    def _active(self) -> list[tuple[int, _Run]]:
        """Places in the population and runs of those that are not over."""
        return [(m, r) for m, r in enumerate(self._runs) if not r.member.over]

    def _left(self, step: int) -> int | None:
        return None if self._until is None else self._until - step

    def train(
        self, states: list[state_lib.TrainState], show_progress: bool | None
    ) -> None:
        """Until all are over, or at `until`; they are saved then."""
        train, steps = self._options.train, self._population.steps
        first = self._runs[0].member.position
        joined = self._population.join(states)
        states.clear()
        with Progress(
            train.epochs,
            steps,
            initial_epoch=first.epoch,
            enabled=show_progress,
        ) as progress:
            while active := self._active:
                # All that are not over are at one position.
                position = active[0][1].member.position
                if self._left(active[0][1].step) == 0:
                    self._save(joined)
                    return
                joined = self._drop(joined, active)
                if position.step_in_epoch == 0:
                    phase = self._population.phase(position.epoch)
                    joined = self._population.begin_phase(joined, phase)
                joined = self._epoch(joined, progress)
                if not self._active:
                    return
                position = self._active[0][1].member.position
                if position.step_in_epoch:
                    continue  # at `until`
                self._save_if_due(joined, position)

    def _epoch(self, joined: Any, progress: Progress) -> Any:
        """The rest of an epoch, with its validation."""
        population, steps = self._population, self._population.steps
        number = self._active[0][1].member.position.epoch
        epoch = population.prepare(number)
        while active := self._active:
            start = active[0][1].member.position.step_in_epoch
            left = self._left(active[0][1].step)
            end = steps if left is None else min(steps, start + left)
            if start == steps:
                break
            if start == end:
                return joined
            stop = self._clock.next_stop(start, end)
            compiled_before = population.compile_seconds
            began = time.perf_counter()
            joined, totals = population.run(joined, epoch, start, stop)
            seconds = time.perf_counter() - began
            seconds -= population.compile_seconds - compiled_before
            self._clock.ran(stop - start, seconds)
            self._book(joined, totals, seconds)
            losses = totals.loss.sum(axis=1) / totals.users.sum(axis=1)
            losses = losses[np.isfinite(losses)]
            progress.update(
                epoch=number + 1,
                step_in_epoch=stop,
                loss=float(losses.mean()) if len(losses) else None,
                users_per_second=float(totals.users.sum() / seconds),
            )
            if not self._active:
                return joined  # all failed: nothing to save
            if stop < steps and (self._interrupted() or self._overdue()):
                self._save(joined)
                if self._interrupted():
                    raise self._stopped()
        joined = population.average(joined, self._options.train.ema, number)
        self._end_epoch(joined, progress)
        return joined

    def _book(self, joined: Any, totals: Any, seconds: float) -> None:
        """A stretch of all members."""
        for m, run in self._active:
            own = step_lib.StepMetrics(*(x[m] for x in totals))
            member = run.member
            try:
                loop.check_health(
                    member.config,
                    self._population.loss_scale_of(joined, m),
                    own,
                    member.position,
                )
            except VaecfError as error:
                member.error = str(error)
                continue
            member.position.add(
                own, seconds / len(self._runs), self._options.train
            )

    def _end_epoch(self, joined: Any, progress: Progress) -> None:
        """Records, validation and the best of every member."""
        config, population = self._options, self._population
        values: dict[str, float] = {}
        for m, run in self._active:
            position = run.member.position
            record = loop.training_record(
                run.member.config,
                population.loss_scale_of(joined, m),
                position,
                population.steps,
            )
            position.next_epoch()
            run.write(record)
            last = position.epoch == config.train.epochs
            if not last and position.epoch % config.eval.every_epochs:
                continue
            params = population.params_of(joined, m)
            record = self._validate(params)
            if record:
                value = record[f"validation/{config.eval.best_metric}"]
                values[run.member.name] = value
                better = position.validated(value)
                record = {"epoch": position.epoch, **record}
                run.write(record)
                if better:
                    run.save(BEST, params)
                goes_on = run.member.goes_on
                run.member.stopped = goes_on is not None and not goes_on(record)
            elif last:
                # No validation users: the last parameters are the best.
                run.save(BEST, params)
            if run.member.over:
                run.save(LATEST, population.state_of(joined, m))
        if values:
            best = max(values, key=values.__getitem__)
            progress.note(
                f"epoch {position.epoch}  validation: "
                f"{config.eval.best_metric} {min(values.values()):.4f} to "
                f"{values[best]:.4f} ({best})"
            )

    def _drop(self, joined: Any, active: list[tuple[int, _Run]]) -> Any:
        """Leaves out those that are over, where that pays."""
        population = self._population
        # Stacked, fewer members are another program to compile.
        enough = len(self._runs) / 2 if population.stacked else len(self._runs)
        if len(active) == len(self._runs) or len(active) > enough:
            return joined
        kept = [m for m, _ in active]
        states = [population.state_of(joined, m) for m in kept]
        self._population = population.only(kept)
        self._runs = [run for _, run in active]
        return self._population.join(states)

    def _save_if_due(self, joined: Any, position: TrainProgress) -> None:
        """After an epoch that is not the last."""
        due = position.epoch % self._options.eval.every_epochs == 0
        if due or self._interrupted() or self._overdue():
            self._save(joined)
        if self._interrupted():
            raise self._stopped()

    def _save(self, joined: Any) -> None:
        for m, run in self._active:
            run.save(LATEST, self._population.state_of(joined, m))
        self._last_saved = time.monotonic()

    def _overdue(self) -> bool:
        return time.monotonic() - self._last_saved > loop.CHECKPOINT_SECONDS

    def _stopped(self) -> signals.Interrupted:
        return loop.stopped(self._active[0][1].member.position, self._workdir)
