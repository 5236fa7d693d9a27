"""Optimisers and the schedule of the loss scale against their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaecf.errors import VaecfError
from vaecf.models import sparse_batch
from vaecf.training import optimizers, precision
from vaecf.training import state as state_lib


def reference(name, x, grads, *, rate, b1, b2, eps):
    """Algorithm 1 of Kingma & Ba 2015, float64; x after each step.

    Nadam (Dozat 2016) looks one step of the first moment ahead.
    """
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        if name == "nadam":
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        x = x - rate * m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
        yield x


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("fp32", {}),
        ("bf16", {"learning_rate": 1e-3, "beta1": 0.5, "beta2": 0.99}),
        ("fp16", {"epsilon": 0.1}),
    ],
)
def test_optimizer(small, name, policy, settings):
    config = small(
        optimizer={"name": name, **settings},
        precision={"policy": policy, "loss_scale_growth_interval": 2},
    )
    o = config.optimizer
    tx = optimizers.make_optimizer(
        o, config.precision, precision.policy(policy)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    grads = rng.normal(size=(6, 5, 3)).astype(np.float32)
    grads *= np.float32(10.0) ** rng.integers(-6, 3, (1, 5, 3))
    params = {"w": jnp.asarray(x)}
    state, update = tx.init(params), jax.jit(tx.update)
    wanted = reference(
        name,
        x.astype(np.float64),
        grads.astype(np.float64),
        rate=o.learning_rate,
        b1=o.beta1,
        b2=o.beta2,
        eps=o.epsilon,
    )
    for g, w in zip(grads, wanted, strict=True):
        scaled = {"w": g * optimizers.loss_scale_of(state)}
        updates, state = update(scaled, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(
            params["w"], w, rtol=1e-5, atol=1e-5 * o.learning_rate
        )
    if policy == "fp16":
        # The scale grew three times, by the settings, and changed nothing.
        assert state.scale == 8 * config.precision.initial_loss_scale
        state = state.inner
    else:
        assert not isinstance(state, optimizers.LossScaleState)
    moments = jax.tree.leaves((state[0].mu, state[0].nu))
    assert [m.dtype for m in moments] == [jnp.float32] * 2


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(VaecfError, match=r"optimizer.name='adan'.*adam\?"):
        optimizers.require_known("adan")


def test_each_group_has_its_own_adam():
    """As two optimisers of optax would do it."""
    groups = {"a": ("x", "y"), "b": ("z",)}
    params = {name: np.ones(3, np.float32) for name in "xyz"}
    grads = {name: np.full(3, i + 1.0, np.float32) for i, name in enumerate("xyz")}  # fmt: skip
    tx = optimizers.alternating(optax.adam(0.1), groups)
    state, alone = tx.init(params), optax.adam(0.1)
    expected = {
        g: alone.init({n: params[n] for n in names})
        for g, names in groups.items()
    }
    for turn in ("a", "b", "a"):
        part = {n: grads[n] for n in groups[turn]}
        updates, state = tx.update(part, state)
        wanted, expected[turn] = alone.update(part, expected[turn])
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([0.25])}


def gradients(value=1.0):
    return jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)


@settings(deadline=None)
@given(
    st.text("+-", min_size=1, max_size=30),
    st.integers(1, 4),
    st.sampled_from([4.0, 2.0**22]),
)
def test_schedule_is_the_papers(flags, interval, scale):
    """Micikevicius et al. 2018, section 3.2, as a loop over floats."""
    tx = optimizers.dynamic_loss_scale(optax.identity(), scale, interval)
    since = 0
    update = _UPDATES.setdefault(interval, jax.jit(tx.update))
    state = tx.init(PARAMS)
    for flag in flags:
        value = 1.0 if flag == "+" else np.nan
        _, state = update(gradients(value), state)
        if flag == "+":
            since += 1
            if since == interval:
                scale, since = min(scale * 2, 2.0**24), 0
        else:
            scale, since = max(scale / 2, 1.0), 0
        assert (float(state.scale), int(state.finite_steps)) == (scale, since)
    trailing = len(flags) - len(flags.rstrip("-"))
    assert int(state.skipped) == flags.count("-")
    assert int(state.skipped_in_a_row) == trailing
    assert state.scale.dtype == np.float32


_UPDATES = {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["w", "b"])
def test_bad_gradients_change_nothing(assert_same, bad, leaf):
    """However many come in a row, unlike with `optax.apply_if_finite`."""
    tx = optimizers.dynamic_loss_scale(optax.adam(0.1), 2.0**15, 2000)
    update, grads = jax.jit(tx.update), gradients(1e3)
    updates, first = update(grads, tx.init(PARAMS), PARAMS)
    assert np.all(np.asarray(updates["w"]) != 0)
    grads[leaf] = grads[leaf].at[(0,) * grads[leaf].ndim].set(bad)
    state = first
    for _ in range(60):
        updates, state = update(grads, state, PARAMS)
        assert_same(optax.apply_updates(PARAMS, updates), PARAMS)
    assert_same(state.inner, first.inner)
    assert state.skipped_in_a_row == 60 and state.scale == 1.0


def test_scale_and_skips_without_the_wrapper():
    state = optax.adam(0.1).init(PARAMS)
    assert optimizers.loss_scale_of(state) == 1
    assert optimizers.skips_of(state) == 0
    wrapped = optimizers.dynamic_loss_scale(optax.adam(0.1), 64.0, 2000)
    assert optimizers.loss_scale_of(wrapped.init(PARAMS)) == 64


def test_float16_overflows_recovers_and_all_devices_agree(
    small, setup_of, host_batch, take, assert_same
):
    """With a scale far too large, steps are skipped until it fits."""
    fp16 = {"policy": "fp16", "initial_loss_scale": 2.0**24}
    setup = setup_of(small(precision=fp16), (2, 2))
    batch = host_batch(range(16), parts=2)
    state, key = state_lib.init_state(setup, 0), state_lib.step_key(0)
    losses, skipped = [], [0]
    for _ in range(40):
        before = state
        state, totals = take(setup, state, batch, key)
        losses.append(float(totals.nll))
        skipped.append(int(state.opt_state.skipped))
        if skipped[-1] > skipped[-2]:
            assert_same(state.params, before.params)
            assert_same(state.opt_state.inner, before.opt_state.inner)
            assert state.opt_state.scale == before.opt_state.scale / 2
        assert state.step == before.step + 1
        # Replicated values are the same on every device.
        for x in (*state.opt_state[:4], state.params["input_bias"]):
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, x)
    assert skipped[1] == 1 and skipped[-1] == skipped[-10] <= 20
    assert int(state.opt_state.inner[0].count) == 40 - skipped[-1]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert np.all(np.isfinite(losses))


def test_one_shards_overflow_makes_all_devices_skip(
    small, setup_of, take, assert_same
):
    """A weight of one item shard overflows float16; nobody may apply."""
    config = small(precision={"policy": "fp16", "initial_loss_scale": 8.0})
    setup = setup_of(config, (2, 2), 200)
    state = state_lib.init_state(setup, 0)
    kernel = np.array(state.params["output_kernel"])
    # Item 199 is on the second item shard, and in one user's history.
    kernel[:, 199] = 1e6
    state.params["output_kernel"] = jax.device_put(
        kernel, state.params["output_kernel"].sharding
    )
    indptr = np.array([0, 2, 4, 6, 8])
    items = np.array([0, 1, 2, 3, 0, 2, 1, 199], np.int32)
    batch = sparse_batch.assemble_on_host(
        indptr, items, np.arange(4, dtype=np.int32), 16, 2
    )
    after, _ = take(setup, state, batch, state_lib.step_key(0))
    assert after.opt_state.skipped == 1 and after.opt_state.scale == 4
    assert_same(after.params, state.params)
    assert_same(after.opt_state.inner, state.opt_state.inner)
