"""Encoder and decoder of RecVAE, trained in alternation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import checkpoints, input_pipeline
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import BEST, Checkpoints


@pytest.fixture(scope="module")
def config(small):
    def make(**sections):
        defaults = {
            "model": {"name": "rec_vae"},
            "loss": {"gamma": 0.01},
            "train": {"alternating_epochs": (2, 1), "epochs": 6},
        }
        merged = {
            key: {**defaults.get(key, {}), **sections.get(key, {})}
            for key in defaults | sections
        }
        return small(**merged)

    return make


def test_phases(config):
    """Encoder, encoder, decoder, in alternation; then no dropout."""
    setup = state_lib.make_setup(config(), 33, mesh_lib.make_mesh(1, 1))
    phases = [setup.model.phase(e, config().train) for e in range(7)]
    turns = [setup.in_phase(phase) for phase in phases]
    names = ["encoder", "encoder", "decoder"] * 2 + ["encoder"]
    assert [phase.group for phase in phases] == names
    assert [bool(phase.copies) for phase in phases] == [
        n == "decoder" for n in names
    ]
    rates = {"encoder": 0.5, "decoder": 0.0}
    assert [t.model.dropout_rate for t in turns] == [rates[n] for n in names]
    # The later of two decoder epochs copies nothing, and needs no program of
    # its own.
    train = config(train={"alternating_epochs": (1, 2)}).train
    first, second = (setup.model.phase(e, train) for e in (1, 2))
    assert first.copies and not second.copies
    assert setup.in_phase(first) == setup.in_phase(second)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_a_phase_changes_only_its_own_group(config, dataset, mesh, assert_same):
    setup = state_lib.make_setup(
        config(), dataset.n_items, mesh_lib.make_mesh(*mesh)
    )
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
    order = input_pipeline.epoch_order(7, 0, 60, 16)
    state = state_lib.init_state(setup, 7)
    own = {
        "encoder": {"posterior"},
        "decoder": {"output_kernel", "output_bias"},
    }
    for epoch in (0, 2):
        before = jax.tree.map(np.asarray, state)
        turn = setup.in_phase(setup.model.phase(epoch, config().train))
        state, _ = feed.run(state, feed.prepare(order, turn), 0, 4)
        for name, value in state.params.items():
            same = all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(value), jax.tree.leaves(before.params[name])
                )
            )
            assert same == (name not in own[turn.phase.group]), name
        for group, inner in state.opt_state.items():
            count = int(inner[0].count) - int(before.opt_state[group][0].count)
            assert count == (4 if group == turn.phase.group else 0)
    state = state_lib.begin_phase(
        setup, state, setup.model.phase(2, config().train)
    )
    assert_same(state.params["prior"], state.params["posterior"])
    kernels = [
        state.params[name]["input_kernel"] for name in ("prior", "posterior")
    ]
    assert kernels[0].sharding == kernels[1].sharding
    pointers = [
        k.addressable_shards[0].data.unsafe_buffer_pointer() for k in kernels
    ]
    assert pointers[0] != pointers[1]


def test_losses_do_not_depend_on_the_mesh(config, dataset):
    losses = []
    for mesh in ((1, 1), (2, 2)):
        setup = state_lib.make_setup(
            config(), dataset.n_items, mesh_lib.make_mesh(*mesh)
        )
        feed = input_pipeline.make_pipeline("streamed", setup, dataset.train, 7)
        state, seen = state_lib.init_state(setup, 7), []
        for epoch in (1, 2):
            phase = setup.model.phase(epoch, config().train)
            state = state_lib.begin_phase(setup, state, phase)
            order = input_pipeline.epoch_order(7, epoch, 60, 16)
            turn = setup.in_phase(setup.model.phase(epoch, config().train))
            state, totals = feed.run(state, feed.prepare(order, turn), 0, 4)
            seen.extend(totals.loss)
        losses.append(seen)
    np.testing.assert_allclose(losses[1:], [losses[0]], rtol=1e-5)


@pytest.mark.parametrize("epoch", [0, 2], ids=["encoder", "decoder"])
def test_microbatches_sum_to_the_whole_batch(
    config, dataset, assert_close, epoch
):
    """Loss and gradients of either phase; the last part has padding users."""
    n_users, train = 11, dataset.train
    # Compiled quickly rather than well.
    gradients = jax.jit(
        step_lib.gradients,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},
    )

    def take(mesh, microbatch):
        setup = state_lib.make_setup(
            config(train={"microbatch": microbatch}),
            dataset.n_items,
            mesh_lib.make_mesh(*mesh),
        )
        turn = setup.in_phase(setup.model.phase(epoch, config().train))
        parts = turn.parts(n_users)
        padding = [train.n_users] * (-n_users % parts)
        users = np.append(np.arange(7, 7 + n_users), padding).astype(np.int32)
        batch = sparse_batch.assemble_on_host(
            train.indptr, train.indices, users, 256, parts
        )
        key = jax.random.fold_in(state_lib.step_key(7), 5)
        state = state_lib.init_state(turn, 7)
        grads, totals = gradients(turn, state.params, batch, key, state.step)
        return parts, grads, totals

    parts, wanted, wanted_totals = take((1, 1), n_users)
    assert parts == 1
    own = [{"posterior"}, {"output_kernel", "output_bias"}]
    assert wanted.keys() == own[epoch == 2]
    assert max(np.abs(g).max() for g in jax.tree.leaves(wanted)) > 0.01
    assert float(wanted_totals.users) == n_users
    assert float(wanted_totals.kl) > 0
    for mesh, microbatch, pieces in (
        ((1, 1), 1, 11),
        ((1, 1), 4, 3),
        ((2, 2), 2, 6),
    ):
        parts, grads, totals = take(mesh, microbatch)
        assert parts == pieces
        np.testing.assert_allclose(totals, wanted_totals, rtol=1e-5)
        assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


def test_the_kl_weighs_gamma_times_a_users_items(config, dataset):
    """By hand, of the terms of each user."""
    setup = state_lib.make_setup(
        config(loss={"gamma": 0.25}),
        dataset.n_items,
        mesh_lib.make_mesh(1, 1),
    )
    state = state_lib.init_state(setup, 7)
    order = input_pipeline.epoch_order(7, 0, 60, 16)
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
    epoch = feed.prepare(order, setup)
    batch = step_lib.assemble(
        setup, epoch.window(0), epoch.order[3], epoch.n_slots
    )
    key = jax.random.fold_in(state_lib.step_key(7), 0)
    terms = jax.jit(
        lambda params: setup.model.apply(
            {"params": params}, batch, key, method="loss_terms"
        )
    )
    nll_B, kl_B = terms(state.params)
    turn = setup.in_phase(setup.model.phase(0, config().train))
    _, totals = jax.jit(step_lib.gradients, static_argnums=0)(
        turn, state.params, batch, key, state.step
    )
    count_B = np.asarray(batch.count_B)
    assert totals.users == 12
    nll_B = np.asarray(nll_B)
    expected = np.sum(nll_B) + 0.25 * np.sum(count_B * np.asarray(kl_B))
    assert float(totals.loss) == pytest.approx(expected, rel=1e-5)
    assert float(totals.nll) == pytest.approx(np.sum(nll_B), rel=1e-5)
    real = np.asarray(kl_B)[count_B > 0]
    assert float(totals.kl) == pytest.approx(real.sum(), rel=1e-5)


def test_resumed_between_phases(config, train, tmp_path, assert_same):
    """Right before a decoder phase, which begins with a new prior."""
    whole = train(tmp_path / "whole", config())
    train(tmp_path / "halves", config(train={"epochs": 2}))
    halves = train(tmp_path / "halves", config())
    assert_same(whole.params, halves.params)
    assert "prior" not in whole.params
    saved = Checkpoints(tmp_path / "whole" / "checkpoints")
    best = checkpoints.restore_params(
        saved, whole.setup.whole, whole.setup.mesh
    )
    assert best.keys() == whole.params.keys()
    assert saved.step(BEST) is not None
    saved.close()


def test_float16_skips_a_groups_step(config, dataset):
    setup = state_lib.make_setup(
        config(precision={"policy": "fp16", "initial_loss_scale": 2.0**24}),
        dataset.n_items,
        mesh_lib.make_mesh(1, 1),
    )
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 7)
    state = state_lib.init_state(setup, 7)
    order = input_pipeline.epoch_order(7, 0, 60, 16)
    turn = setup.in_phase(setup.model.phase(0, config().train))
    state, totals = feed.run(state, feed.prepare(order, turn), 0, 4)
    taken = int(state.opt_state.inner["encoder"][0].count)
    assert taken + int(state.opt_state.skipped) == 4
    assert int(state.opt_state.inner["decoder"][0].count) == 0
    assert np.all(np.isfinite(totals.loss))
