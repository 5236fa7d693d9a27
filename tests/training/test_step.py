"""The step against a float64 re-derivation, on one device and on meshes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import scipy.special

from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import state as state_lib

N_ITEMS = 21
HISTORIES = [
    [0, 3, 7],
    [1],
    [2, 3, 5, 8, 13, 20],
    [],
    [0, 1, 2, 4, 6, 9, 11, 12, 19],
    [4, 20],
    [10, 14, 15, 16],
    [17, 18],
]
INDPTR, INDICES = oracles.csr_of(HISTORIES)


def setup_on(config, data=1, item=1, **changes):
    setup = state_lib.make_setup(
        config, N_ITEMS, mesh_lib.make_mesh(data, item)
    )
    return dataclasses.replace(setup, **changes)


def batch_of(users, n_slots=64, shards=1):
    return sparse_batch.assemble_on_host(
        INDPTR, INDICES, users, n_slots, shards
    )


def shuffled(setup, seed=5):
    """A state with weights and biases far from zero, padding items at zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: state_lib.init_state(setup, 0))
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes.params
    )
    params["input_kernel"][N_ITEMS:] = 0
    params["output_kernel"][:, N_ITEMS:] = 0
    state = state_lib.TrainState(np.int32(0), params, setup.tx.init(params))
    return jax.device_put(state, state_lib.state_shardings(setup))


def draws(config, seed, step, n_users):
    """(dropout factors [B, I], noise [B, Z]) by row and column alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    rows, rate = np.arange(n_users), config.model.dropout_rate
    if config.model.name == "mult_vae":
        return oracles.draws(key, rows, N_ITEMS, rate, config.model.latent)
    key = jax.random.key_data(key)
    return oracles.kept(key, rows, N_ITEMS, rate) / (1 - rate), None


def by_layer(params):
    """[(weights, bias)] from the items inwards and out again, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    middle = [
        (p[name]["kernel"], p[name]["bias"])
        for name in sorted(p, key=lambda n: (n[:2] == "de", n))
        if name[:7] in ("encoder", "decoder")
    ]
    return [
        (p["input_kernel"][:N_ITEMS], p["input_bias"]),
        *middle,
        (p["output_kernel"][:, :N_ITEMS], p["output_bias"][:N_ITEMS]),
    ]


def reference(config, layers, users, kept, noise, step):
    """Loss and gradients of Liang et al. 2018, eq. 7, by hand."""
    x = np.zeros((len(users), N_ITEMS))
    for row, u in enumerate(users):
        x[row, HISTORIES[u] if u < len(HISTORIES) else []] = 1
    n = x.sum(1, keepdims=True)
    real = (n > 0).astype(float)
    n_real = real.sum()
    act, slope = {
        "tanh": (np.tanh, lambda y: 1 - y**2),
        "relu": (lambda a: np.maximum(a, 0), lambda y: (y > 0).astype(float)),
    }[config.model.activation]
    loss, code_at = config.loss, len(config.model.hidden)
    beta = loss.anneal_cap
    if loss.total_anneal_steps:
        beta = min(beta, step / loss.total_anneal_steps)

    h = x * kept / np.sqrt(np.maximum(n, 1))
    inputs, kl = [], np.zeros_like(n)
    for at, (w, b) in enumerate(layers):
        inputs.append(h)
        a = h @ w + b
        if at == code_at and noise is not None:
            mean, log_variance = np.split(a, 2, axis=1)
            deviation = np.exp(log_variance / 2)
            h = mean + deviation * noise
            kl = np.sum(
                (deviation**2 + mean**2 - 1 - log_variance) / 2,
                axis=1,
                keepdims=True,
            )
        elif at < len(layers) - 1:
            h = act(a)
    log_p = a - scipy.special.logsumexp(a, axis=1, keepdims=True)
    nll = -np.sum(x * log_p, axis=1, keepdims=True)
    value = np.sum(nll + beta * kl * real) / n_real
    value += loss.weight_decay * sum(np.sum(w**2) for w, _ in layers)

    d = (n * np.exp(log_p) - x) / n_real
    gradients = []
    for at in reversed(range(len(layers))):
        w, _ = layers[at]
        d_w = inputs[at].T @ d + 2 * loss.weight_decay * w
        gradients.insert(0, (d_w, d.sum(0)))
        d = d @ w.T
        if at == code_at + 1 and noise is not None:
            weight = beta * real / n_real
            d_mean = d + weight * mean
            d_log_variance = (
                d * noise * deviation + weight * (deviation**2 - 1)
            ) / 2
            d = np.concatenate([d_mean, d_log_variance], axis=1)
        elif at:
            d = d * slope(inputs[at])
    totals = (value * n_real, nll.sum(), np.sum(kl * real), n_real)
    return totals, gradients


def adam(o, t, layers, moments, gradients):
    """Algorithm 1 of Kingma & Ba 2015; returns (layers, moments)."""
    m, v = moments
    m = jax.tree.map(lambda m, g: o.beta1 * m + (1 - o.beta1) * g, m, gradients)
    v = jax.tree.map(
        lambda v, g: o.beta2 * v + (1 - o.beta2) * g**2, v, gradients
    )

    def moved(x, m, v):
        m_hat, v_hat = m / (1 - o.beta1**t), v / (1 - o.beta2**t)
        return x - o.learning_rate * m_hat / (np.sqrt(v_hat) + o.epsilon)

    return jax.tree.map(moved, layers, m, v), (m, v)


VARIANTS = {
    "vae": {},
    "vae dense": {"model": {"input": "dense"}},
    "vae blocked": {"model": {"item_block": 7}},
    "vae deep": {"model": {"hidden": (6, 4)}, "loss": {"weight_decay": 0.01}},
    "vae shallow": {"model": {"hidden": ()}},
    "dae": {
        "model": {
            "name": "mult_dae",
            "activation": "relu",
            "dropout_rate": 0.25,
        }
    },
}
# Users in no order, one without items; the last row is padding.
BATCH = np.array([4, 2, 7, 3, 0, 6, len(HISTORIES)], np.int32)


def golden_options(small, variant):
    changes = VARIANTS[variant]
    loss = {"total_anneal_steps": 10, "anneal_cap": 0.15}
    # An epsilon that keeps Adam smooth where a gradient is nearly zero.
    return small(
        optimizer={"epsilon": 0.05, "learning_rate": 0.05},
        loss=loss | changes.get("loss", {}),
        model=changes.get("model", {}),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_gradient_is_the_slope_of_the_reference_loss(small, variant):
    config = golden_options(small, variant)
    layers = by_layer(shuffled(setup_on(config)).params)
    drawn = draws(config, 3, 9, len(BATCH))

    def at(t):
        moved = jax.tree.map(lambda x, d: x + t * d, layers, direction)
        totals, _ = reference(config, moved, BATCH, *drawn, 9)
        return totals[0] / totals[3]

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), layers)
    _, gradients = reference(config, layers, BATCH, *drawn, 9)
    products = jax.tree.map(lambda g, d: np.sum(g * d), gradients, direction)
    slope = sum(jax.tree.leaves(products))
    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def assert_layers_close(params, expected, atol=0.0):
    for pair, wanted in zip(by_layer(params), expected, strict=True):
        for x, y in zip(pair, wanted):
            np.testing.assert_allclose(
                x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max() + atol
            )


@pytest.mark.parametrize(
    ("variant", "microbatch", "mesh"),
    [
        *((variant, 100, (1, 1)) for variant in VARIANTS),
        *itertools.product(("vae dense", "vae deep", "dae"), (1, 3), [(1, 1)]),
        ("vae", 4, (1, 1)),
        ("vae", 100, (4, 1)),
        ("vae", 100, (1, 4)),
        *itertools.product(("vae", "vae deep"), (100, 1), [(2, 2)]),
        ("vae dense", 100, (2, 2)),
    ],
)
def test_golden_gradient(small, take, variant, microbatch, mesh):
    """Loss and gradients in the middle of annealing, by a step of SGD.

    They depend neither on the microbatches nor on the mesh.
    """
    config = golden_options(small, variant)
    setup = setup_on(config, *mesh, tx=optax.sgd(1.0), microbatch=microbatch)
    parts = setup.parts(len(BATCH))
    padding = [len(HISTORIES)] * (-len(BATCH) % parts)
    users = np.append(BATCH, padding).astype(np.int32)
    state = shuffled(setup)._replace(step=jnp.int32(1))
    batch = batch_of(users, 64 if parts == 1 else 32, parts)
    after, totals = take(setup, state, batch, state_lib.step_key(3))
    kernel = after.params["input_kernel"]
    assert len(kernel.sharding.device_set) == mesh[0] * mesh[1]
    layers, drawn = by_layer(state.params), draws(config, 3, 1, len(BATCH))
    wanted, gradients = reference(config, layers, BATCH, *drawn, 1)
    np.testing.assert_allclose(totals, wanted, rtol=1e-5)
    assert totals.users == 5
    difference = jax.tree.map(
        lambda a, b: np.float64(a) - np.float64(b), state.params, after.params
    )
    # The rounding of the parameters themselves comes on top.
    assert_layers_close(difference, gradients, atol=2e-7)
    for name in ("input_kernel", "output_bias"):
        assert not np.any(np.asarray(difference[name])[N_ITEMS:])


def test_a_batch_that_is_not_whole_microbatches_is_refused(small, take):
    setup = setup_on(small(), microbatch=3)
    with pytest.raises(ValueError, match="do not divide into 3 microbatches"):
        take.eval_shape(
            setup, shuffled(setup), batch_of(BATCH), state_lib.step_key(0)
        )


def test_parts_of_a_batch(small):
    for batch_size, devices, microbatch, parts in (
        (8, 1, 8, 1),
        (8, 1, 9, 1),
        (9, 1, 8, 2),
        (8, 4, 8, 4),
        (16, 4, 3, 8),
        (17, 4, 5, 4),
    ):
        setup = setup_on(small(), devices, microbatch=microbatch)
        assert setup.parts(batch_size) == parts
        # The padded batch has as many parts.
        assert setup.parts(-(-batch_size // parts) * parts) == parts
    # By default a CPU takes 1,024 users at once.
    for asked, taken in ((0, 1024), (7, 7)):
        train = {"microbatch": asked, "batch_size": 5000}
        assert setup_on(small(train=train)).microbatch == taken


@pytest.mark.parametrize("variant", ["vae", "dae"])
def test_golden_steps(small, take, variant):
    config = golden_options(small, variant)
    setup = setup_on(config)
    state, key = shuffled(setup), state_lib.step_key(3)
    layers = by_layer(state.params)
    moments = (jax.tree.map(np.zeros_like, layers),) * 2
    for step, users in enumerate((BATCH, BATCH[::-1].copy(), BATCH - 1)):
        users = np.where(users < 0, 1, users).astype(np.int32)
        drawn = draws(config, 3, step, len(users))
        wanted, gradients = reference(config, layers, users, *drawn, step)
        layers, moments = adam(
            config.optimizer, step + 1, layers, moments, gradients
        )
        state, totals = take(setup, state, batch_of(users), key)
        np.testing.assert_allclose(totals, wanted, rtol=1e-5)
        assert_layers_close(state.params, layers)
        assert state.step == step + 1
