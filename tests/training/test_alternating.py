"""Encoder and decoder of RecVAE in alternation; the average of parameters."""

import jax
import numpy as np
import pytest

from vaecf.training import checkpoints, first_state
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib
from vaecf.training.checkpoints import LATEST, Checkpoints

OWN = {"encoder": {"posterior"}, "decoder": {"output_kernel", "output_bias"}}


@pytest.fixture(scope="module")
def config(small):
    def make(*, alternating_epochs=(2, 1), train=None, gamma=0.01, **sections):
        train = {"alternating_epochs": alternating_epochs, **(train or {})}
        sections |= {"loss": {"gamma": gamma}, "train": train}
        return small(model={"name": "rec_vae"}, **sections)

    return make


def test_phases(config, setup_of):
    """Encoder, encoder, decoder, in alternation; then no dropout."""
    setup = setup_of(config())
    phases = [setup.model.phase(e, config().train) for e in range(7)]
    turns = [setup.in_phase(phase) for phase in phases]
    names = ["encoder", "encoder", "decoder"] * 2 + ["encoder"]
    assert [phase.group for phase in phases] == names
    assert [bool(p.copies) for p in phases] == [n == "decoder" for n in names]
    rates = {"encoder": 0.5, "decoder": 0.0}
    assert [t.model.dropout_rate for t in turns] == [rates[n] for n in names]
    # The later of two decoder epochs copies nothing, and needs no program of
    # its own.
    train = config(alternating_epochs=(1, 2)).train
    first, second = (setup.model.phase(e, train) for e in (1, 2))
    assert first.copies and not second.copies
    assert setup.in_phase(first) == setup.in_phase(second)


def test_a_phase_changes_only_its_own_group(
    config, setup_of, run_epochs, assert_same
):
    """On one device and on four, which see the same losses."""
    losses = []
    for mesh, kind in (((1, 1), "resident"), ((2, 2), "streamed")):
        setup = setup_of(config(), mesh)
        state = state_lib.init_state(setup, 7)
        for epoch, group in ((1, "encoder"), (2, "decoder")):
            phase = setup.model.phase(epoch, config().train)
            state = state_lib.begin_phase(setup, state, phase)
            if group == "decoder":
                assert_same(state.params["prior"], state.params["posterior"])
                kernels = [
                    state.params[name]["input_kernel"]
                    for name in ("prior", "posterior")
                ]
                assert kernels[0].sharding == kernels[1].sharding
                pointers = {
                    k.addressable_shards[0].data.unsafe_buffer_pointer()
                    for k in kernels
                }
                assert len(pointers) == 2
            before = jax.tree.map(np.asarray, state)
            state, metrics = run_epochs(
                setup, config(), [epoch], state=state, kind=kind
            )
            losses.append(metrics.loss)
            for name, value in state.params.items():
                same = jax.tree.all(
                    jax.tree.map(np.array_equal, value, before.params[name])
                )
                assert same == (name not in OWN[group]), name
            for name, inner in state.opt_state.items():
                count = inner[0].count - before.opt_state[name][0].count
                assert count == (4 if name == group else 0)
    np.testing.assert_allclose(losses[2:], losses[:2], rtol=1e-5)


@pytest.mark.parametrize("epoch", [0, 2], ids=["encoder", "decoder"])
def test_microbatches_sum_to_the_whole_batch(
    config, setup_of, dataset, host_batch, assert_close, epoch
):
    """Loss and gradients; the last part has padding users.

    The loss is nll + γ · items · KL, summed by hand over the users' terms.
    """
    gradients = jax.jit(step_lib.gradients, static_argnums=0)
    key = jax.random.fold_in(state_lib.step_key(7), 5)

    def take(mesh, microbatch):
        changed = config(gamma=0.25, train={"microbatch": microbatch})
        setup = setup_of(changed, mesh)
        turn = setup.in_phase(setup.model.phase(epoch, changed.train))
        parts = turn.parts(11)
        padding = [dataset.train.n_users] * (-11 % parts)
        batch = host_batch([*range(7, 18), *padding], 256, parts)
        state = state_lib.init_state(turn, 7)
        keys = turn.model.keys(key)
        grads, metrics = gradients(turn, state.params, batch, keys, state.step)
        return turn, state, batch, parts, grads, metrics

    turn, state, batch, parts, wanted, metrics = take((1, 1), 11)
    assert parts == 1
    assert wanted.keys() == list(OWN.values())[epoch == 2]
    assert max(np.abs(g).max() for g in jax.tree.leaves(wanted)) > 0.01
    terms = jax.jit(
        lambda params: turn.model.apply(
            {"params": params},
            *(batch, turn.model.keys(key)),
            method="loss_terms",
        )
    )
    nll_B, kl_B = (np.asarray(x) for x in terms(state.params))
    loss = np.sum(nll_B + 0.25 * np.asarray(batch.count_B) * kl_B)
    by_hand = step_lib.StepMetrics(loss, nll_B.sum(), kl_B.sum(), 11)
    np.testing.assert_allclose(metrics, by_hand, rtol=1e-5)
    for mesh, microbatch, pieces in (((1, 1), 4, 3), ((2, 2), 2, 6)):
        *_, parts, grads, found = take(mesh, microbatch)
        assert parts == pieces
        np.testing.assert_allclose(found, metrics, rtol=1e-5)
        assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


def test_float16_skips_a_groups_step(config, setup_of, run_epochs):
    fp16 = {"policy": "fp16", "initial_loss_scale": 2.0**24}
    changed = config(precision=fp16)
    state, metrics = run_epochs(setup_of(changed), changed, [0])
    taken = int(state.opt_state.inner["encoder"][0].count)
    assert taken + int(state.opt_state.skipped) == 4
    assert int(state.opt_state.inner["decoder"][0].count) == 0
    assert np.all(np.isfinite(metrics.loss))


DECAY = 0.2  # reached in the third epoch: (1 + 2) / (10 + 2) is above it


def test_resumed_and_averaged(
    config, setup_of, run_epochs, train, tmp_path, assert_same, assert_close
):
    """Resumes right before a decoder phase, which begins with a new prior.

    The scoring parameters are the average over the ends of the epochs, here
    by NumPy, without the prior.
    """

    def averaged(epochs):
        return config(
            alternating_epochs=(1, 1), train={"ema": DECAY, "epochs": epochs}
        )

    whole = train(tmp_path / "whole", averaged(3))
    train(tmp_path / "parts", averaged(1))
    parts = train(tmp_path / "parts", averaged(3))
    assert_same(parts.params, whole.params)
    states, setup = [], whole.setup
    for name in ("whole", "parts"):
        saved = Checkpoints(tmp_path / name / "checkpoints")
        states.append(first_state.restore_state(setup, saved))
        assert saved.step(LATEST) == 12
        best = checkpoints.restore_params(saved, setup.whole, setup.mesh)
        assert best.keys() == whole.params.keys()
        saved.close()
    assert_same(*states)

    plain = averaged(3)
    setup = setup_of(plain, averaged=False)
    state = state_lib.init_state(setup, 7)

    def scoring():
        kept = {n: x for n, x in state.params.items() if n != "prior"}
        return jax.tree.map(lambda x: np.asarray(x, np.float64), kept)

    average = scoring()
    for epoch in range(3):
        state, _ = run_epochs(setup, plain, [epoch], state=state)
        kept = min(DECAY, (1 + epoch) / (10 + epoch))
        average = jax.tree.map(
            lambda a, b, d=kept: d * a + (1 - d) * b, average, scoring()
        )
    assert_close(whole.params, average, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(
        whole.params["output_kernel"], state.params["output_kernel"]
    )


def test_the_average_is_sharded_like_the_parameters(small, setup_of):
    setup = setup_of(small(train={"ema": DECAY}), (2, 2))
    places = state_lib.state_shardings(setup)
    assert places.average == places.params
    state = state_lib.init_state(setup_of(small(), (2, 2)), 7)
    assert state.average is None
    assert state_lib.update_average(state, 0.5, 3) is state
