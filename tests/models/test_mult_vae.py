"""Both models against the paper's equations in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import batch_of, dense, float64

from vaecf import config as config_lib
from vaecf.models import mult_vae, registry
from vaecf.parallel import mesh as mesh_lib

USERS, ITEMS, ROWS, LATENT = 8, 10, 16, 3
HISTORIES = oracles.random_histories(0, USERS, ITEMS)
BATCH, X = batch_of(HISTORIES), dense(HISTORIES, ITEMS)
MODELS = pytest.mark.parametrize("name", ["mult_vae", "mult_dae"])


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
    key = jax.random.key(seed, impl="unsafe_rbg")  # compiles fast
    return jax.jit(model.init)(key, BATCH)["params"]


def random_params(model, seed=1):
    """Large biases, and larger values for padding items."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32),
        jax.eval_shape(lambda: init(model)),
    )
    bias_I = params["output_bias"].at[ITEMS:].set(1e6)
    return params | {"output_bias": bias_I}


def apply(model, params, method, *args):
    return model.apply({"params": params}, *args, method=method)


ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}


def representation(model, params, kept=1.0):
    """(mean, log-variance) of the code; None as the log-variance of a DAE."""
    act = ACTIVATIONS[model.activation]
    code = oracles.encode(params, X, act, kept)
    if isinstance(model, mult_vae.MultVAE):
        return code[:, :LATENT], code[:, LATENT:]
    return act(code), None


def decoder(model, params, z):
    return oracles.decode(params, z, ITEMS, ACTIVATIONS[model.activation])


def loss_terms(model, params, kept, noise):
    z, log_variance = representation(model, params, kept)
    kl = np.zeros(USERS)
    if log_variance is not None:
        kl = (np.exp(log_variance) + z**2 - 1 - log_variance).sum(1) / 2
        z = z + np.exp(log_variance / 2) * noise
    logits = decoder(model, params, z)
    return -(X * scipy.special.log_softmax(logits, axis=1)).sum(1), kl


def draws(model, key, first_row=0):
    """The (dropout factors, noise) that the model must draw."""
    rows, rate = first_row + np.arange(USERS), model.dropout_rate
    if isinstance(model, mult_vae.MultVAE):
        return oracles.draws(key, rows, ITEMS, rate, LATENT)
    key = jax.random.key_data(key)
    return oracles.kept(key, rows, ITEMS, rate) / (1 - rate), None


@pytest.mark.parametrize(
    ("hidden", "lowering", "act"),
    [
        ((), "gather", "tanh"),
        ((4,), "dense", "tanh"),
        ((4, 5), "gather", "relu"),
    ],
)
@MODELS
def test_scores_and_representations(name, hidden, lowering, act):
    """Scoring uses no dropout, and padding items have no influence."""
    settings = {"activation": act, "input_lowering": lowering}
    model = make(name, hidden, dropout_rate=0.9, **settings)
    params = random_params(model)
    scores = apply(model, params, "scores", BATCH)
    code = apply(model, params, "encode", BATCH)
    assert scores.dtype == code.dtype == jnp.float32
    assert scores.shape == (USERS, ROWS) and code.shape == (USERS, LATENT)
    params = float64(params)
    expected, _ = representation(model, params)
    for got, want in (
        (code, expected),
        (scores[:, :ITEMS], decoder(model, params, expected)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "rate"), [((), 0.4), ((5,), 0.0), ((40, 20), 0.4)]
)
@MODELS
def test_loss_terms(name, hidden, rate):
    model = make(name, hidden, dropout_rate=rate)
    params, key = random_params(model), jax.random.key(3)
    kept, noise = draws(model, key, first_row=11)
    assert (kept == 1).all() if rate == 0 else {0.0} < set(kept.flat)
    got = apply(model, params, "loss_terms", BATCH, model.keys(key), 11)
    expected = loss_terms(model, float64(params), kept, noise)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == (USERS,) and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    nll, kl = got
    assert nll[1] == 0 and (np.delete(nll, 1) > 0).all()
    assert (kl > 0).all() if name == "mult_vae" else not kl.any()


@MODELS
def test_gradients_equal_finite_differences(name):
    model = make(name, (5, 4), dropout_rate=0.4)
    params, key = random_params(model), jax.random.key(3)
    kept, noise = draws(model, key)
    weight = np.random.default_rng(2).normal(size=(2, USERS))

    @jax.jit
    @jax.grad
    def gradient(params):
        terms = apply(model, params, "loss_terms", BATCH, model.keys(key))
        return sum(jnp.sum(w * t) for w, t in zip(weight, terms))

    def reference(params):
        return (weight * loss_terms(model, params, kept, noise)).sum()

    found = gradient(params)
    oracles.assert_gradients(reference, params, found, rtol=1e-3)
    assert not found["input_kernel"][ITEMS:].any()
    assert not found["output_kernel"][:, ITEMS:].any()
    assert not found["output_bias"][ITEMS:].any()


@MODELS
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
    assert {k: kernel.shape for k, kernel in kernels.items()} == fans
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
    ("name", "hidden", "sizes"),
    [
        # MovieLens 20M; the paper's Mult-VAE is [I -> 600 -> 200 -> 600 -> I].
        ("mult_vae", (600,), [(20_108, 600), (600, 400), (200, 600)]),
        ("mult_vae", (), [(20_108, 400)]),
        # The paper's Mult-DAE: [I -> 200 -> I].
        ("mult_dae", (), [(20_108, 200)]),
        ("mult_dae", (600,), [(20_108, 600), (600, 200), (200, 600)]),
    ],
)
def test_number_of_parameters(name, hidden, sizes):
    model = make(name, hidden, n_items=20_108, item_rows=20_108, latent=200)
    shapes = jax.eval_shape(lambda: init(model))
    sizes = [*sizes, ((*hidden, 200)[0], 20_108)]
    expected = sum(rows * columns + columns for rows, columns in sizes)
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


@pytest.mark.parametrize(
    ("name", "dtype", "platform"),
    [
        ("mult_vae", jnp.bfloat16, "cpu"),
        ("mult_vae", jnp.float16, "cpu"),
        ("mult_dae", jnp.bfloat16, "cpu"),
        ("mult_vae", jnp.bfloat16, "gpu"),
        ("mult_dae", jnp.float16, "gpu"),
        ("rec_vae", jnp.bfloat16, "gpu"),
    ],
)
def test_half_precision_keeps_parameters_and_results_in_float32(
    name, dtype, platform
):
    single = make(name, dropout_rate=0.3)
    half = make(
        name, dropout_rate=0.3, dtype=dtype, precision=None, platform=platform
    )
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init(half)))
    assert {x.dtype for x in shapes} == {jnp.dtype("float32")}
    params = random_params(half)
    key = jax.random.key(0)

    @functools.partial(jax.jit, static_argnums=0)
    def results(model):
        def loss(params):
            terms = apply(model, params, "loss_terms", BATCH, model.keys(key))
            return sum(t.sum() for t in terms), terms

        scores = apply(model, params, "scores", BATCH)[:, :ITEMS]
        code = apply(model, params, "encode", BATCH)
        return jax.tree.leaves(
            (jax.grad(loss, has_aux=True)(params), scores, code)
        )

    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(results(half), results(single), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 8 * eps * np.linalg.norm(b)
        # The DAE's KL is zero in any precision.
        assert np.linalg.norm(a - b) > 0 or not b.any()


@pytest.mark.parametrize(
    ("name", "shape", "lowering"),
    [
        ("mult_vae", (1, 4), "gather"),
        ("mult_vae", (2, 2), "dense"),
        ("mult_dae", (1, 4), "dense"),
        ("mult_dae", (4, 1), "dense"),
        ("rec_vae", (2, 2), "gather"),
    ],
)
def test_a_mesh_equals_one_device(name, shape, lowering):
    whole = make(name, dropout_rate=0.4, input_lowering=lowering)
    shard = whole.clone(item_rows=ROWS // shape[1], item_axis="item")
    params, keys = random_params(whole), whole.keys(jax.random.key(7))
    size = USERS // shape[0]

    def single(params, batch, model=whole, first_row=0):
        terms = apply(model, params, "loss_terms", batch, keys, first_row)
        scores = apply(model, params, "scores", batch)
        return *terms, scores

    def local(params, batch):
        return single(params, batch, shard, lax.axis_index("data") * size)

    sharded = jax.shard_map(
        local,
        mesh=mesh_lib.make_mesh(*shape),
        in_specs=(mesh_lib.specs(params, mult_vae.PARTITION), P("data")),
        out_specs=(P("data"), P("data"), P("data", "item")),
    )
    weight = *np.random.default_rng(2).normal(size=(2, USERS)), 0.0
    one, many = (
        oracles.weighted_gradients(f, weight, (params,), batch)
        for f, batch in (
            (single, BATCH),
            (sharded, batch_of(HISTORIES, shards=shape[0])),
        )
    )
    oracles.assert_same_on_mesh(many, one, 1e-4, 1e-5)
    trained = {k: v for k, v in one[0][0].items() if k != "prior"}
    assert all(x.any() for x in jax.tree.leaves(trained))


def test_the_config_offers_every_model():
    rule = config_lib.settings()["model.name"].metadata["rule"]
    assert set(rule.choices) == registry.MODELS.keys() | registry.FITTED.keys()
