"""The step against a float64 re-derivation, and against itself on meshes."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import input_pipeline
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib

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
INDPTR = np.cumsum([0, *(len(row) for row in HISTORIES)]).astype(np.int64)
INDICES = np.concatenate([np.array(row, np.int32) for row in HISTORIES])
USERS = np.arange(len(HISTORIES), dtype=np.int32)


def setup_on(config, data: int = 1, item: int = 1, **changes: Any):
    setup = state_lib.make_setup(
        config, N_ITEMS, mesh_lib.make_mesh(data, item)
    )
    return dataclasses.replace(setup, **changes)


def batch_of(users: np.ndarray, n_slots: int = 64, shards: int = 1):
    return sparse_batch.assemble_on_host(
        INDPTR, INDICES, users, n_slots, shards
    )


def shuffled(setup, seed: int = 5) -> state_lib.TrainState:
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


# --- The reference ----------------------------------------------------------


def threefry(key: np.ndarray, x: np.ndarray, y: np.ndarray):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011)."""
    with np.errstate(over="ignore"):
        k = [np.uint32(key[0]), np.uint32(key[1])]
        k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
        x, y = x.astype(np.uint32) + k[0], y.astype(np.uint32) + k[1]
        for block in range(5):
            for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
                x = x + y
                y = (y << np.uint32(turn)) | (y >> np.uint32(32 - turn))
                y = y ^ x
            x = x + k[(block + 1) % 3]
            y = y + k[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known answers of the authors' Random123 library.
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_reference_threefry(key, counter, expected):
    x, y = threefry(
        np.array(key, np.uint32), *(np.array([c], np.uint32) for c in counter)
    )
    assert (x[0], y[0]) == expected


def draws(config, seed: int, step: int, n_users: int):
    """(kept [B, I], noise [B, Z]) of a step, by row and column alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    drop, noise = key, None
    if config.model.name == "mult_vae":
        drop, noise = jax.random.split(key)
    row, item = np.indices((n_users, N_ITEMS))
    bits, _ = threefry(np.asarray(jax.random.key_data(drop)), row, item)
    kept = bits.astype(float) >= config.model.dropout_rate * 2**32
    if noise is None:
        return kept, None
    row, column = np.indices((n_users, config.model.latent))
    bits, _ = threefry(np.asarray(jax.random.key_data(noise)), row, column)
    uniform = ((bits >> np.uint32(9)).astype(float) + 0.5) / 2**22 - 1
    return kept, np.sqrt(2) * scipy.special.erfinv(uniform)


def by_layer(params: Any) -> list[tuple[np.ndarray, np.ndarray]]:
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

    h = x * kept / np.sqrt(np.maximum(n, 1)) / (1 - config.model.dropout_rate)
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


class Adam:
    """Algorithm 1 of Kingma & Ba 2015."""

    def __init__(self, config) -> None:
        self.o, self.t, self.m, self.v = config, 0, None, None

    def __call__(self, layers, gradients):
        o = self.o
        self.t += 1
        if self.m is None:
            self.m = [[np.zeros_like(x) for x in pair] for pair in layers]
            self.v = [[np.zeros_like(x) for x in pair] for pair in layers]
        new = []
        for at, (pair, grads) in enumerate(zip(layers, gradients)):
            moved = []
            for k, (x, g) in enumerate(zip(pair, grads)):
                m, v = self.m[at], self.v[at]
                m[k] = o.beta1 * m[k] + (1 - o.beta1) * g
                v[k] = o.beta2 * v[k] + (1 - o.beta2) * g**2
                m_hat = m[k] / (1 - o.beta1**self.t)
                v_hat = v[k] / (1 - o.beta2**self.t)
                moved.append(
                    x - o.learning_rate * m_hat / (np.sqrt(v_hat) + o.epsilon)
                )
            new.append(tuple(moved))
        return new


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


def golden_options(small, variant: str):
    changes = VARIANTS[variant]
    # An epsilon that keeps Adam smooth where a gradient is nearly zero.
    return small(
        optimizer={"epsilon": 0.05, "learning_rate": 0.05},
        loss={
            "total_anneal_steps": 10,
            "anneal_cap": 0.15,
            **changes.get("loss", {}),
        },
        model=changes.get("model", {}),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_gradient_is_the_slope_of_the_reference_loss(small, variant):
    config = golden_options(small, variant)
    layers = by_layer(shuffled(setup_on(config)).params)
    drawn = draws(config, 3, 9, len(BATCH))

    def at(t: float) -> float:
        moved = [
            tuple(x + t * d for x, d in zip(pair, ds))
            for pair, ds in zip(layers, direction)
        ]
        totals, _ = reference(config, moved, BATCH, *drawn, 9)
        return totals[0] / totals[3]

    rng = np.random.default_rng(0)
    direction = [[rng.normal(size=x.shape) for x in pair] for pair in layers]
    _, gradients = reference(config, layers, BATCH, *drawn, 9)
    slope = sum(
        np.sum(g * d)
        for gs, ds in zip(gradients, direction)
        for g, d in zip(gs, ds)
    )
    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def assert_layers_close(params: Any, expected: Any, atol: float = 0.0) -> None:
    for at, (pair, wanted) in enumerate(zip(by_layer(params), expected)):
        for name, x, y in zip(("weights", "bias"), pair, wanted):
            np.testing.assert_allclose(
                x,
                y,
                rtol=1e-5,
                atol=1e-5 * np.abs(y).max() + atol,
                err_msg=f"{name} of layer {at}",
            )


@pytest.mark.parametrize(
    ("variant", "microbatch"),
    [
        *((variant, 100) for variant in VARIANTS),
        *itertools.product(("vae dense", "vae deep", "dae"), (1, 3, 4)),
    ],
)
def test_golden_gradient(small, take, variant, microbatch):
    """Loss and gradients in the middle of annealing, by a step of SGD.

    Those of the microbatches add up to those of the whole batch.
    """
    config = golden_options(small, variant)
    setup = setup_on(config, tx=optax.sgd(1.0), microbatch=microbatch)
    parts = setup.parts(len(BATCH))
    assert parts == max(1, -(-len(BATCH) // microbatch))
    padding = [len(HISTORIES)] * (-len(BATCH) % parts)
    users = np.append(BATCH, padding).astype(np.int32)
    state = shuffled(setup)._replace(step=jnp.int32(1))
    batch = batch_of(users, 64 if parts == 1 else 32, parts)
    after, totals = take(setup, state, batch, state_lib.step_key(3))
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


def test_a_batch_that_is_not_whole_microbatches_is_refused(small):
    setup = setup_on(small(), microbatch=3)
    with pytest.raises(ValueError, match="do not divide into 3 microbatches"):
        jax.eval_shape(
            lambda state: step_lib.train_step(
                setup, state, batch_of(BATCH), state_lib.step_key(0)
            ),
            shuffled(setup),
        )


@pytest.mark.parametrize(
    ("batch_size", "devices", "microbatch", "parts"),
    [
        (8, 1, 8, 1),
        (8, 1, 9, 1),
        (9, 1, 8, 2),
        (8, 4, 8, 4),
        (16, 4, 3, 8),
        (17, 4, 5, 4),
    ],
)
def test_parts_of_a_batch(small, batch_size, devices, microbatch, parts):
    setup = setup_on(small(), devices, microbatch=microbatch)
    assert setup.parts(batch_size) == parts
    padded = -(-batch_size // parts) * parts
    # The padded batch is of as many.
    assert setup.parts(padded) == parts


def test_a_cpu_takes_1024_users_at_once(small):
    for asked, batch_size, taken in ((0, 5000, 1024), (7, 5000, 7)):
        setup = setup_on(
            small(train={"microbatch": asked, "batch_size": batch_size})
        )
        assert setup.microbatch == taken


@pytest.mark.parametrize("variant", ["vae", "dae"])
def test_golden_steps(small, take, variant):
    """Parameters after one and after three steps of Adam."""
    config = golden_options(small, variant)
    setup = setup_on(config)
    state, key = shuffled(setup), state_lib.step_key(3)
    layers, adam = by_layer(state.params), Adam(config.optimizer)
    for step, users in enumerate((BATCH, BATCH[::-1].copy(), BATCH - 1)):
        users = np.where(users < 0, 1, users).astype(np.int32)
        drawn = draws(config, 3, step, len(users))
        wanted, gradients = reference(config, layers, users, *drawn, step)
        layers = adam(layers, gradients)
        state, totals = take(setup, state, batch_of(users), key)
        np.testing.assert_allclose(totals, wanted, rtol=1e-5)
        assert_layers_close(state.params, layers)
        assert state.step == step + 1


def test_another_key_draws_other_dropout_and_noise(small, take):
    """What the golden step fixes matters: the losses differ by far more."""
    setup = setup_on(golden_options(small, "vae"))
    state = shuffled(setup)
    _, a = take(setup, state, batch_of(BATCH), state_lib.step_key(3))
    _, b = take(setup, state, batch_of(BATCH), state_lib.step_key(4))
    _, c = take(
        setup,
        state._replace(step=jnp.int32(1)),
        batch_of(BATCH),
        state_lib.step_key(3),
    )
    for other in (b, c):
        assert abs(a.nll / other.nll - 1) > 1e-3
        assert abs(a.kl / other.kl - 1) > 1e-3


# --- Terms of the loss ------------------------------------------------------


def test_weight_decay_adds_its_term_and_is_off_by_default(small, take):
    from configs import default

    assert default.get_config().loss.weight_decay == 0
    rate = 0.125
    off, on = (
        setup_on(small(loss={"weight_decay": w}), tx=optax.sgd(1.0))
        for w in (0.0, rate)
    )
    state, key = shuffled(off), state_lib.step_key(0)
    without, plain = take(off, state, batch_of(USERS), key)
    with_it, decayed = take(on, state, batch_of(USERS), key)
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim == 2]
    norm = sum(np.sum(np.float64(x) ** 2) for x in kernels)
    more = (decayed.loss - plain.loss) / plain.users
    assert more == pytest.approx(rate * norm, rel=1e-5)
    assert (decayed.nll, decayed.kl) == (plain.nll, plain.kl)
    extra = jax.tree.map(
        lambda a, b: np.asarray(a - b), without.params, with_it.params
    )
    for x, d in zip(jax.tree.leaves(state.params), jax.tree.leaves(extra)):
        wanted = 2 * rate * np.asarray(x) if x.ndim == 2 else 0.0 * d
        np.testing.assert_allclose(d, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "total", "weight"),
    [(0, 20, 0), (2, 20, 0.1), (4, 20, 0.2), (4000, 20, 0.2), (0, 0, 0.2)],
)
def test_kl_weight_is_a_function_of_the_global_step(
    small, take, step, total, weight
):
    setup = setup_on(small(loss={"total_anneal_steps": total}))
    state = shuffled(setup)._replace(step=jnp.int32(step))
    after, totals = take(setup, state, batch_of(USERS), state_lib.step_key(0))
    assert totals.kl > 1
    found = (totals.loss - totals.nll) / totals.kl
    assert found == pytest.approx(weight, abs=1e-5)
    assert after.step == step + 1


def test_padding_weighs_nothing(small, take, assert_close):
    """A partial batch is the batch of its users, whatever is behind them."""
    setup = setup_on(small(loss={"total_anneal_steps": 0}), tx=optax.sgd(1.0))
    state, key = shuffled(setup), state_lib.step_key(0)
    padded = np.append(USERS[:6], [len(HISTORIES)] * 4).astype(np.int32)
    alone = take(setup, state, batch_of(USERS[:6], 32), key)
    beside = take(setup, state, batch_of(padded, 64), key)
    whole = take(setup, state, batch_of(USERS, 64), key)
    assert alone[1].users == beside[1].users == 5
    assert_close(alone, beside)
    assert abs(whole[1].loss / alone[1].loss - 1) > 1e-3


# --- Meshes -----------------------------------------------------------------

MESHES = [(4, 1), (2, 2), (1, 4)]


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        *(("vae", mesh) for mesh in MESHES),
        *((v, (2, 2)) for v in ("vae dense", "vae deep")),
    ],
)
@pytest.mark.parametrize("microbatch", [100, 1])
def test_gradients_do_not_depend_on_the_mesh(
    small, take, assert_close, variant, mesh, microbatch
):
    config = small(
        loss={
            "total_anneal_steps": 0,
            **VARIANTS[variant].get("loss", {}),
        },
        model=VARIANTS[variant].get("model", {}),
    )
    one = setup_on(config, tx=optax.sgd(1.0))
    many = setup_on(config, *mesh, tx=optax.sgd(1.0), microbatch=microbatch)
    key = state_lib.step_key(0)
    results, used = [], []
    for setup in (one, many):
        state = shuffled(setup)
        batch = batch_of(USERS, 32, setup.parts(len(USERS)))
        after, totals = take(setup, state, batch, key)
        gradients = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b),
            state.params,
            after.params,
        )
        results.append((totals, gradients))
        used.append(len(after.params["input_kernel"].sharding.device_set))
    assert used == [1, 4]
    assert np.abs(results[0][1]["input_kernel"]).max() > 0.01
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [(2, 2)])
def test_state_is_sharded_by_the_table_and_the_same_everywhere(
    small, assert_same, mesh
):
    setup = setup_on(small(), *mesh)
    state = state_lib.init_state(setup, 11)
    item = mesh[1]
    parts = {"input_kernel": (0,), "output_kernel": (1,), "output_bias": (0,)}
    seen = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = getattr(path[-1], "key", None)
        shape = list(x.shape)
        for axis in parts.get(name, ()):
            assert shape[axis] == 128
            shape[axis] //= item
            seen.append(name)
        assert x.sharding.device_set == set(setup.mesh.devices.flat)
        for shard in x.addressable_shards:
            assert shard.data.shape == tuple(shape), path
    # Parameter and both moments.
    assert sorted(seen) == sorted(3 * list(parts))
    assert_same(state, state_lib.init_state(setup_on(small()), 11))
    other = state_lib.init_state(setup, 12)
    assert np.any(
        np.asarray(other.params["input_kernel"])
        != np.asarray(state.params["input_kernel"])
    )


def test_fresh_parameters_are_what_the_authors_start_from(small):
    """Glorot uniform over the real items; padding items are zero."""
    params = state_lib.init_state(
        setup_on(small(model={"hidden": (64,)})), 0
    ).params
    for kernel in (params["input_kernel"], params["output_kernel"].T):
        kernel = np.asarray(kernel)
        limit = np.sqrt(6 / (N_ITEMS + 64))
        assert not np.any(kernel[N_ITEMS:])
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert kernel[:N_ITEMS].std() == pytest.approx(
            limit / np.sqrt(3), rel=0.05
        )
    assert 0 < np.abs(np.asarray(params["input_bias"])).max() < 0.003


# --- Many steps in one dispatch ---------------------------------------------


def test_many_steps_in_a_dispatch_are_single_steps(
    small, take, dataset, assert_same, assert_close
):
    setup = state_lib.make_setup(
        small(), dataset.n_items, mesh_lib.make_mesh(1, 1)
    )
    order = input_pipeline.epoch_order(3, 0, 60, 16)
    feed = input_pipeline.make_pipeline("resident", setup, dataset.train, 3)
    epoch = feed.prepare(order)
    fresh = state_lib.init_state(setup, 3)
    together, totals = feed.run(
        jax.tree.map(jnp.copy, fresh), epoch, 0, epoch.steps
    )
    one_by_one = jax.tree.map(jnp.copy, fresh)
    parts = []
    for step, users in enumerate(order):
        batch = sparse_batch.assemble_on_host(
            dataset.train.indptr, dataset.train.indices, users, epoch.n_slots
        )
        fresh, alone = take(setup, fresh, batch, state_lib.step_key(3))
        one_by_one, part = feed.run(one_by_one, epoch, step, step + 1)
        assert_close([x[0] for x in part], list(alone))
        parts.append(part)
    # One program: bit for bit. Another program: as floats go.
    assert_same(together, one_by_one)
    assert_close(together, fresh)
    np.testing.assert_array_equal(totals, np.concatenate(parts, axis=1))
    assert together.step == 4
    assert totals.users.tolist() == [16, 16, 16, 12]


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_state_is_donated(small, dataset, kind):
    setup = state_lib.make_setup(
        small(), dataset.n_items, mesh_lib.make_mesh(1, 1)
    )
    feed = input_pipeline.make_pipeline(kind, setup, dataset.train, 0)
    epoch = feed.prepare(input_pipeline.epoch_order(0, 0, 60, 16))
    state = state_lib.init_state(setup, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, _ = feed.run(state, epoch, 0, 2)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))
