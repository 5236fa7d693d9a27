"""A population beside separate runs, which know nothing of it."""

from __future__ import annotations

import contextlib
import itertools
import pathlib

import jax
import numpy as np
import pytest

from vaecf.errors import VaecfError
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting.writers import read_records
from vaecf.training import input_pipeline, loop, population, signals
from vaecf.training import population_loop as members_lib
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints
from vaecf.training.population_loop import Member

MODELS = {
    # With all that a run may have beside its parameters.
    "mult_vae": {"linear": {"l2": 5.0}, "train": {"ema": 0.5}},
    "rec_vae": {
        "model": {"name": "rec_vae", "init": "spectral"},
        "loss": {"gamma": 0.01},
        "train": {"alternating_epochs": (2, 1), "epochs": 4},
    },
}
# Everything that may differ, also from what is left out of a program.
OTHER = {
    "seed": 8,
    "model": {"dropout_rate": 0.0},
    "loss": {
        "anneal_cap": 0.1,
        "total_anneal_steps": 0,
        "weight_decay": 1e-3,
        "gamma": 0.02,
    },
    "optimizer": {"learning_rate": 0.02},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Many programs of a few steps: compiled quickly rather than well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def make(small):
    """Options with sections of several dicts put together."""

    def config(*changes):
        merged = {}
        for sections in changes:
            for key, value in sections.items():
                if isinstance(value, dict):
                    merged[key] = {**merged.get(key, {}), **value}
                else:
                    merged[key] = value
        return small(**merged)

    return config


@pytest.fixture(scope="module")
def pair(make, train, tmp_path_factory):
    """Model -> options and separate runs of two members."""
    made = {}

    def of(model):
        if model not in made:
            config = [make(MODELS[model], o) for o in ({}, OTHER)]
            folders = [tmp_path_factory.mktemp(model) for _ in config]
            runs = [train(f, o) for f, o in zip(folders, config)]
            made[model] = (config, folders, runs)
        return made[model]

    return of


def together(folder: pathlib.Path, config, dataset, **arguments):
    members = [
        Member(f"member {m}", o, folder / str(m)) for m, o in enumerate(config)
    ]
    members_lib.train(
        members,
        dataset,
        folder,
        show_progress=False,
        **{"log": lambda line: None} | arguments,
    )
    return members


def records(folder):
    """Without what the clock says."""
    return [
        {k: v for k, v in r.items() if not k.endswith(("seconds", "_second", "time"))}
        for r in read_records(folder / "metrics.jsonl")
        if not any(k.startswith("final/") for k in r)
    ]  # fmt: skip


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "stacked"),
    [
        ("mult_vae", False),
        ("mult_vae", True),
        pytest.param("rec_vae", True, marks=pytest.mark.slow),
    ],
)
def test_members_are_their_separate_runs(
    model, stacked, pair, dataset, tmp_path, assert_close
):
    config, folders, runs = pair(model)
    members = together(tmp_path, config, dataset, stacked=stacked)
    assert records(folders[0]) != records(folders[1])
    for member, folder, run in zip(members, folders, runs):
        assert_alike(records(member.workdir), records(folder))
        assert member.position.best == pytest.approx(run.position.best)
        assert member.position.best_epoch == run.position.best_epoch
        assert member.position.timed_users == run.position.timed_users
        saved, reference = (
            Checkpoints(f / "checkpoints") for f in (member.workdir, folder)
        )
        for which in (BEST, LATEST):
            assert saved.step(which) == reference.step(which)
        state, expected = (
            loop.restore_state(run.setup, c) for c in (saved, reference)
        )
        assert_close(state, expected, rtol=1e-3, atol=1e-4)
        saved.close()
        reference.close()


@pytest.mark.parametrize(
    ("stacked", "policy"),
    [
        (True, "fp16"),
        pytest.param(False, "bf16", marks=pytest.mark.slow),
    ],
)
def test_members_with_one_seed(make, dataset, stacked, policy):
    """Stacked they share batches; float16 skips steps of each on its own."""
    config = [
        make(
            {"precision": {"policy": policy, "initial_loss_scale": 2.0**24}},
            {"optimizer": {"learning_rate": rate}},
        )
        for rate in (0.01, 0.3)
    ]
    one = population.Population(config, 33, dataset.train, stacked=stacked)
    states = one.join(one.first_states())
    for number in range(2):
        states, ours = one.run(states, one.prepare(number), 0, 4)
    for m, own in enumerate(config):
        setup = state_lib.make_setup(own, 33, mesh_lib.make_mesh(1, 1))
        feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
        state = state_lib.init_state(setup, 7)
        for number in range(2):
            order = input_pipeline.epoch_order(7, number, 60, 16)
            state, theirs = feed.run(state, feed.prepare(order), 0, 4)
        np.testing.assert_allclose(ours.loss[m], theirs.loss, rtol=2e-3)
        np.testing.assert_array_equal(ours.users[m], theirs.users)
        mine = one.loss_scale_of(states, m)
        if policy == "fp16":
            assert int(mine.skipped) == int(state.opt_state.skipped) > 0
            assert float(mine.scale) == float(state.opt_state.scale)
        else:
            assert mine == ()


def test_first_states_are_those_of_separate_runs(make, dataset, assert_same):
    config = [make(), make({"seed": 8})]
    one = population.Population(config, 33, dataset.train)
    for state, own in zip(one.first_states(), config):
        assert_same(state, state_lib.init_state(one.setup, own.seed))


def test_members_that_are_not_equally_far(
    pair, train, dataset, tmp_path, assert_same, make
):
    """One was trained alone for two epochs; the other starts."""
    config, _, runs = pair("mult_vae")
    shorter = {"train": {"epochs": 2}}
    train(tmp_path / "1", make(MODELS["mult_vae"], OTHER, shorter))
    said = []
    members = together(tmp_path, config, dataset, log=said.append)
    linear, equally = said
    assert "linear branch" in linear
    assert equally == "1 of 2 members are at epoch 0"
    for member, run in zip(members, runs):
        assert member.position.best == pytest.approx(run.position.best)
        assert member.position.epoch == 3
    again = together(tmp_path, config, dataset)
    assert [m.position for m in again] == [m.position for m in members]


def test_stopped_in_an_epoch_it_goes_on_bit_for_bit(
    pair, dataset, tmp_path, monkeypatch
):
    stacked = True
    config = pair("mult_vae")[0]
    whole = together(tmp_path / "a", config, dataset, stacked=stacked)
    asked = itertools.count()

    @contextlib.contextmanager
    def interrupts():
        yield lambda: next(asked) >= 5

    with monkeypatch.context() as patch:
        patch.setattr(signals, "interrupts", interrupts)
        patch.setattr(signals.Clock, "next_stop", lambda s, start, n: start + 1)
        with pytest.raises(signals.Interrupted, match="in epoch 2; the same"):
            together(tmp_path / "b", config, dataset, stacked=stacked)
    halves = together(tmp_path / "b", config, dataset, stacked=stacked)
    for a, b in zip(whole, halves):
        assert records(a.workdir) == records(b.workdir)
        assert a.position.best == b.position.best


def test_an_interrupt_when_all_have_failed(
    make, dataset, tmp_path, monkeypatch
):
    asked = itertools.count()

    @contextlib.contextmanager
    def interrupts():
        yield lambda: next(asked) >= 1

    monkeypatch.setattr(signals, "interrupts", interrupts)
    monkeypatch.setattr(
        signals.Clock, "next_stop", lambda s, start, n: start + 1
    )
    config = [make({"optimizer": {"learning_rate": 1e30}})]
    (member,) = together(tmp_path, config, dataset)
    assert member.error is not None
    assert "epoch 1, step 2" in member.error


def test_who_fails_or_stops_early_does_not_hold_up_the_others(
    make, train, dataset, tmp_path
):
    stacked = True  # so that those who are left are another program
    rates = (1e-12, 1e30, 0.01, 0.02)
    config = [
        make(
            {"optimizer": {"learning_rate": rate}},
            {"train": {"epochs": 4}, "eval": {"patience": 2}},
        )
        for rate in rates
    ]
    members = together(tmp_path / "pop", config, dataset, stacked=stacked)
    idle, lost, sound, _ = members
    assert lost.error is not None and lost.error.startswith("the loss is nan")
    assert lost.summary is None
    # Nothing is learned: no gain after the first validation.
    assert (idle.error, idle.position.epoch, idle.position.best_epoch) == (
        None, 3, 1,
    )  # fmt: skip
    alone = train(tmp_path / "alone", config[2])
    assert sound.position.best == pytest.approx(alone.position.best)
    assert sound.position.epoch == alone.position.epoch
    assert sound.summary is not None and sound.summary["members"] == 4


def test_without_validation_users_the_last_is_the_best(
    make, without_validation, tmp_path
):
    config = [make({"seed": s, "train": {"epochs": 1}}) for s in (1, 2)]
    for member in together(tmp_path, config, without_validation):
        assert member.position.best is None
        saved = Checkpoints(member.workdir / "checkpoints")
        assert saved.step(BEST) == saved.step(LATEST) == 4
        saved.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"model": {"latent": 4}}], "config.model.latent is 3 and 4 in"),
        ([{}, {"optimizer": {"beta1": 0.8}}], "config.optimizer.beta1 is 0.9"),
        ([{"mesh": {"data": 2}}] * 2, "on one device, and this mesh has 2"),
        ([{"data": {"feed": "streamed"}}], "config.data.feed='streamed' is not"),
        ([{"train": {"epochs": 0}}], "config.train.epochs=0 must be"),
        ([], "needs at least one member"),
    ],
)  # fmt: skip
def test_what_is_no_population(make, changes, message):
    with pytest.raises(VaecfError, match=message):
        population.check([make(change) for change in changes])
