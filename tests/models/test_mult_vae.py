"""Both models against the paper's equations in float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax
from jax.sharding import PartitionSpec as P

from vaecf.models import mult_vae, registry
from vaecf.models.sparse_batch import SparseBatch, assemble_on_host
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS, ROWS, LATENT, SLOTS = 8, 10, 16, 3, 80
MODELS = ["mult_vae", "mult_dae"]
HIDDEN = [(), (5,), (40, 20)]


def batch_of(users, n_slots=SLOTS, shards=1) -> SparseBatch:
    indptr = np.cumsum([0, *map(len, users)])
    items = np.array([i for items in users for i in items], np.int32)
    every = np.arange(len(users))
    return assemble_on_host(indptr, items, every, n_slots, shards)


def histories() -> list[list[int]]:
    rng = np.random.default_rng(0)
    users = [
        sorted(rng.permutation(ITEMS)[: rng.integers(1, ITEMS)].tolist())
        for _ in range(USERS)
    ]
    users[2] = []
    return users


HISTORIES = histories()
BATCH = batch_of(HISTORIES)


def make(name, hidden=(5,), **config):
    config = {
        "n_items": ITEMS,
        "item_rows": ROWS,
        "latent": LATENT,
        "dropout_rate": 0.0,
        "precision": lax.Precision.HIGHEST,
    } | config
    return registry.MODELS[name](hidden=hidden, **config)


def init(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), BATCH)["params"]


def random_params(model, seed=1):
    """Large biases, and larger values for padding items."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32),
        jax.eval_shape(lambda: init(model)),
    )
    bias_I = params["output_bias"].at[ITEMS:].set(1e6)
    return params | {"output_bias": bias_I}


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, float), params)


def apply(model, params, method, *args):
    return model.apply({"params": params}, *args, method=method)


# --- the equations -----------------------------------------------------------


def bag(users=HISTORIES) -> np.ndarray:
    x = np.zeros((len(users), ITEMS))
    for u, items in enumerate(users):
        x[u, items] = 1
    return x


def activation(model):
    return {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}[
        model.activation
    ]


def layer(params, name, h):
    return h @ params[name]["kernel"] + params[name]["bias"]


def encoder(model, params, x, kept=1.0):
    """The code of x / |x| · kept; the last layer is linear."""
    act = activation(model)
    norm = np.sqrt(np.maximum(x.sum(1, keepdims=True), 1))
    h = (x / norm * kept) @ params["input_kernel"][:ITEMS]
    h = h + params["input_bias"]
    for k in range(len(model.hidden)):
        h = layer(params, f"encoder_{k}", act(h))
    return h


def decoder(model, params, z):
    for k in range(len(model.hidden)):
        z = activation(model)(layer(params, f"decoder_{k}", z))
    kernel = params["output_kernel"][:, :ITEMS]
    return z @ kernel + params["output_bias"][:ITEMS]


def representation(model, params, x):
    code = encoder(model, params, x)
    if isinstance(model, mult_vae.MultVAE):
        return code[:, :LATENT]
    return activation(model)(code)


def loss_terms(model, params, x, kept=1.0, noise=None):
    code = encoder(model, params, x, kept)
    if isinstance(model, mult_vae.MultVAE):
        mean, log_variance = code[:, :LATENT], code[:, LATENT:]
        z = mean + np.exp(log_variance / 2) * noise
        kl = (np.exp(log_variance) + mean**2 - 1 - log_variance).sum(1) / 2
    else:
        z, kl = activation(model)(code), np.zeros(len(x))
    logits = decoder(model, params, z)
    log_softmax = logits - scipy.special.logsumexp(
        logits, axis=1, keepdims=True
    )
    return -(x * log_softmax).sum(1), kl


def draws(model, key, threefry, first_row=0):
    """The (dropout factors, noise) that the model must draw."""
    dropout_key, noise_key = key, None
    if isinstance(model, mult_vae.MultVAE):
        dropout_key, noise_key = jax.random.split(key)
    row = first_row + np.arange(USERS)[:, None]

    def bits(key, width):
        return threefry(
            np.asarray(jax.random.key_data(key)), row, np.arange(width)[None, :]
        )

    rate = model.dropout_rate
    kept = (bits(dropout_key, ITEMS) >= round(rate * 2**32)) / (1 - rate)
    if noise_key is None:
        return kept, None
    uniform = ((bits(noise_key, LATENT) >> 9) + 0.5) / 2**22 - 1
    return kept, np.sqrt(2) * scipy.special.erfinv(uniform)


@pytest.mark.parametrize(
    ("hidden", "lowering", "act"),
    [
        ((), "gather", "tanh"),
        ((5,), "dense", "tanh"),
        ((40, 20), "gather", "relu"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_representations(name, hidden, lowering, act):
    """Scoring uses no dropout, and padding items have no influence."""
    model = make(
        name,
        hidden,
        activation=act,
        input_lowering=lowering,
        dropout_rate=0.9,
    )
    params = random_params(model)
    scores = apply(model, params, "scores", BATCH)
    code = apply(model, params, "encode", BATCH)
    assert scores.dtype == code.dtype == jnp.float32
    assert scores.shape == (USERS, ROWS) and code.shape == (USERS, LATENT)
    expected = representation(model, float64(params), bag())
    np.testing.assert_allclose(code, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        scores[:, :ITEMS],
        decoder(model, float64(params), expected),
        rtol=1e-4,
        atol=1e-5,
    )
    assert np.isneginf(scores[:, ITEMS:]).all()


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("name", MODELS)
def test_loss_terms(threefry, name, hidden, rate):
    model = make(name, hidden, dropout_rate=rate)
    params, key = random_params(model), jax.random.key(3)
    kept, noise = draws(model, key, threefry, first_row=11)
    assert (kept == 1).all() if rate == 0 else {0.0} < set(kept.flat)
    got = apply(model, params, "loss_terms", BATCH, key, 11)
    expected = loss_terms(model, float64(params), bag(), kept, noise)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == (USERS,) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    nll, kl = got
    assert nll[2] == 0 and (np.delete(nll, 2) > 0).all()
    assert (kl > 0).all() if name == "mult_vae" else not kl.any()


@pytest.mark.parametrize("name", MODELS)
def test_gradient_along_random_directions(threefry, name):
    model = make(name, (5, 4), dropout_rate=0.4)
    params, key = random_params(model), jax.random.key(3)
    kept, noise = draws(model, key, threefry)
    weight = np.random.default_rng(2).normal(size=(2, USERS))

    def loss(params):
        terms = apply(model, params, "loss_terms", BATCH, key)
        return sum(jnp.sum(w * t) for w, t in zip(weight, terms))

    gradient = float64(jax.jit(jax.grad(loss))(params))
    params = float64(params)

    def reference(step, direction):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        terms = loss_terms(model, moved, bag(), kept, noise)
        return (weight * np.array(terms)).sum()

    # One direction per parameter, so that errors cannot cancel.
    for at, leaf in enumerate(jax.tree.leaves(params)):
        direction = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
        direction[at] = np.random.default_rng(at).normal(size=leaf.shape)
        numeric = [
            reference(
                step, jax.tree.unflatten(jax.tree.structure(params), direction)
            )
            for step in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(
            (jax.tree.leaves(gradient)[at] * direction[at]).sum(),
            (numeric[0] - numeric[1]) / 2e-5,
            rtol=1e-3,
            atol=1e-3,
        )
    assert not gradient["input_kernel"][ITEMS:].any()
    assert not gradient["output_kernel"][:, ITEMS:].any()
    assert not gradient["output_bias"][ITEMS:].any()


# --- parameters --------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_initial_parameters(name):
    """Glorot & Bengio 2010, equation 16, over the real items."""
    model = make(name, (40, 20), n_items=100, item_rows=128, latent=10)
    params = init(model)
    bottleneck = 20 if name == "mult_vae" else 10
    fans = {
        "encoder_0": (40, 20),
        "encoder_1": (20, bottleneck),
        "decoder_0": (10, 20),
        "decoder_1": (20, 40),
    }
    kernels = {name: params[name]["kernel"] for name in fans}
    for k, (rows, columns) in fans.items():
        assert kernels[k].shape == (rows, columns)
    kernels["input_kernel"] = params["input_kernel"][:100]
    kernels["output_kernel"] = params["output_kernel"][:, :100]
    for kernel in kernels.values():
        limit = (6 / sum(kernel.shape)) ** 0.5
        assert np.abs(kernel).max() <= limit
        assert np.abs(kernel).max() > 0.97 * limit
        assert abs(kernel.mean()) < 4.5 * limit / (3 * kernel.size) ** 0.5
        assert abs(kernel.std() / (limit / 3**0.5) - 1) < 0.15
    assert not params["input_kernel"][100:].any()
    assert not params["output_kernel"][:, 100:].any()
    # The authors' biases: normal of 0.001, truncated at two deviations.
    for k in ("input_bias", "output_bias"):
        assert 0 < np.abs(params[k]).max() <= 0.002
    jax.tree.map(np.testing.assert_array_equal, params, init(model))
    other = jax.tree.map(lambda a, b: (a != b).any(), params, init(model, 1))
    assert all(jax.tree.leaves(other))


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        # MovieLens 20M, 20,108 items, [I -> 600 -> 200 -> 600 -> I].
        (
            "mult_vae",
            (600,),
            20_108 * 600 + 600 + 600 * 400 + 400
            + 200 * 600 + 600 + 600 * 20_108 + 20_108,
        ),
        # The paper's Mult-DAE: [I -> 200 -> I].
        ("mult_dae", (), 20_108 * 200 + 200 + 200 * 20_108 + 20_108),
        (
            "mult_dae",
            (600,),
            20_108 * 600 + 600 + 600 * 200 + 200
            + 200 * 600 + 600 + 600 * 20_108 + 20_108,
        ),
        ("mult_vae", (), 20_108 * 400 + 400 + 200 * 20_108 + 20_108),
    ],
)  # fmt: skip
def test_number_of_parameters(name, hidden, expected):
    model = make(name, hidden, n_items=20_108, item_rows=20_108, latent=200)
    shapes = jax.eval_shape(lambda: init(model))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("name", registry.MODELS)
def test_partition_names_every_item_dimension(name):
    rows = 384
    shapes = jax.eval_shape(lambda: init(make(name, item_rows=rows)))
    by_name = {
        path[-1].key: x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    with_items = {
        k: tuple("item" if size == rows else None for size in shape)
        for k, shape in by_name.items()
        if rows in shape
    }
    assert with_items == mult_vae.PARTITION


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_keeps_parameters_and_results_in_float32(name, dtype):
    single = make(name, dropout_rate=0.3)
    half = make(name, dropout_rate=0.3, dtype=dtype, precision=None)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init(half)))
    assert {x.dtype for x in shapes} == {jnp.dtype("float32")}
    params = random_params(half)
    key = jax.random.key(0)

    @functools.partial(jax.jit, static_argnums=0)
    def results(model):
        def loss(params):
            terms = apply(model, params, "loss_terms", BATCH, key)
            return sum(t.sum() for t in terms), terms

        gradient, terms = jax.grad(loss, has_aux=True)(params)
        return (
            *terms,
            apply(model, params, "scores", BATCH)[:, :ITEMS],
            apply(model, params, "encode", BATCH),
            *jax.tree.leaves(gradient),
        )

    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(results(half), results(single), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 8 * eps * np.linalg.norm(b)
        # The DAE's KL is zero in any precision.
        assert np.linalg.norm(a - b) > 0 or not b.any()


# --- on a mesh ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "lowering"),
    [
        ("mult_vae", (1, 4), "gather"),
        ("mult_vae", (1, 4), "dense"),
        ("mult_vae", (2, 2), "gather"),
        ("mult_vae", (4, 1), "dense"),
        ("mult_dae", (2, 2), "dense"),
        ("rec_vae", (2, 2), "gather"),
    ],
)
def test_a_mesh_equals_one_device(name, shape, lowering):
    whole = make(name, dropout_rate=0.4, input_lowering=lowering)
    shard = whole.clone(item_rows=ROWS // shape[1], item_axis="item")
    params, key = random_params(whole), jax.random.key(7)
    mesh, size = mesh_lib.make_mesh(*shape), USERS // shape[0]
    weight = np.random.default_rng(2).normal(size=(2, USERS))
    sharded = batch_of(HISTORIES, shards=shape[0])
    specs = mesh_lib.specs(params, mult_vae.PARTITION)

    def local(params, batch):
        first_row = lax.axis_index("data") * size
        terms = apply(shard, params, "loss_terms", batch, key, first_row)
        return *terms, apply(shard, params, "scores", batch)

    def single(params, batch):
        terms = apply(whole, params, "loss_terms", batch, key)
        return *terms, apply(whole, params, "scores", batch)

    many = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=(P("data"), P("data"), P("data", "item")),
    )

    def gradient(outputs, batch):
        def loss(params):
            nll, kl, scores = outputs(params, batch)
            return jnp.sum(weight[0] * nll + weight[1] * kl), (nll, kl, scores)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected, got = gradient(single, BATCH), gradient(many, sharded)
    assert len(got[1][0].sharding.device_set) == 4
    assert len(expected[1][0].sharding.device_set) == 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    trained = {k: v for k, v in expected[0].items() if k != "prior"}
    assert all(x.any() for x in jax.tree.leaves(trained))
