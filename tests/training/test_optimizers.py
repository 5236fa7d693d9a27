"""Adam against its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaecf.training import optimizers, precision


def adam(x, grads, *, rate, b1, b2, eps):
    """Algorithm 1 of Kingma & Ba 2015, float64; x after each step."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        x = x - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield x


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 1e-3, "beta1": 0.5, "beta2": 0.99},
        {"epsilon": 0.1},
    ],
)
def test_adam(small, policy, settings):
    config = small(
        optimizer=settings,
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
    wanted = adam(
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
        # The scale grew three times and changed nothing.
        assert state.scale == 8 * config.precision.initial_loss_scale
        state = state.inner
    else:
        assert not isinstance(state, optimizers.LossScaleState)
    moments = jax.tree.leaves((state[0].mu, state[0].nu))
    assert [m.dtype for m in moments] == [jnp.float32] * 2


def test_loss_scale_settings_arrive(small):
    config = small(
        precision={
            "policy": "fp16",
            "initial_loss_scale": 128.0,
            "loss_scale_growth_interval": 2,
        }
    )
    tx = optimizers.make_optimizer(
        config.optimizer, config.precision, precision.policy("fp16")
    )
    params = jnp.ones(2)
    state = tx.init(params)
    scales = []
    for _ in range(4):
        scales.append(float(state.scale))
        _, state = tx.update(params, state, params)
    assert scales == [128, 128, 256, 256]
