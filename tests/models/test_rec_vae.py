"""RecVAE against a NumPy derivation of the paper's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from oracles import float64
from scipy import special, stats

from vaecf.models import rec_vae
from vaecf.models.sparse_batch import SparseBatch

ITEMS, ROWS, LATENT = 21, 128, 3
HISTORIES = [[0, 4, 20], [3], [], [1, 2, 5, 6, 7], [19, 20]]
BATCH = oracles.batch_of(HISTORIES, 16, padding=1)
X = oracles.dense([*HISTORIES, []], ITEMS)
FIRST_ROW = 5


def make(**config):
    return rec_vae.RecVAE(
        n_items=ITEMS,
        item_rows=ROWS,
        hidden=(7,),
        latent=LATENT,
        precision=lax.Precision.HIGHEST,
        **config,
    )


@pytest.fixture(scope="module")
def params():
    """Random parameters, also for the biases and scales."""
    shapes = jax.eval_shape(make().init, jax.random.key(0), BATCH)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), shapes
    )


def found_terms(model, params, key):
    keys = model.keys(key)
    return model.apply(
        {"params": params}, BATCH, keys, FIRST_ROW, method="loss_terms"
    )


def encode(p, kept=1.0):
    """Section 3.1: dense connections, swish, layer normalisation."""

    def norm(h, k):
        scale, bias = p[f"norm_{k}"]["scale"], p[f"norm_{k}"]["bias"]
        centred = h - h.mean(axis=1, keepdims=True)
        variance = (centred**2).mean(axis=1, keepdims=True)
        return centred / np.sqrt(variance + 0.1) * scale + bias

    def swish(h):
        return h * special.expit(h)

    length = np.sqrt(np.maximum(X.sum(axis=1, keepdims=True), 1))
    entry = X / length * kept
    layers = [
        norm(swish(entry @ p["input_kernel"][:ITEMS] + p["input_bias"]), 1)
    ]
    for k in range(2, 6):
        layer = oracles.layer(p, f"layer_{k}", layers[-1])
        layers.append(norm(swish(layer + sum(layers)), k))
    return [
        oracles.layer(p, name, layers[-1]) for name in ("mean", "log_variance")
    ]


def loss_terms(p, key, rate):
    """(nll, kl) of each user, float64."""
    rows = FIRST_ROW + np.arange(len(X))
    kept, noise = oracles.draws(key, rows, ITEMS, rate, LATENT)
    mean, log_variance = encode(p["posterior"], kept)
    deviation = np.exp(log_variance / 2)
    z = mean + deviation * noise
    before, before_log_variance = encode(p["prior"])
    prior = np.log(
        0.15 * stats.norm.pdf(z)
        + 0.75 * stats.norm.pdf(z, before, np.exp(before_log_variance / 2))
        + 0.1 * stats.norm.pdf(z, 0, np.exp(5.0))
    )
    kl = (stats.norm.logpdf(z, mean, deviation) - prior).sum(axis=1)
    return -(X * special.log_softmax(oracles.decode(p, z, ITEMS), axis=1)).sum(
        axis=1
    ), kl


@pytest.mark.parametrize(
    ("rate", "lowering", "block"),
    [(0.0, "gather", 0), (0.5, "gather", 10), (0.5, "dense", 0)],
)
def test_loss_terms(params, rate, lowering, block):
    model = make(dropout_rate=rate, input_lowering=lowering, item_block=block)
    key = jax.random.key(11)
    found = found_terms(model, params, key)
    for got, expected in zip(found, loss_terms(float64(params), key, rate)):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert np.abs(found[1][:5]).min() > 0.01


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_equal_finite_differences(params, platform):
    model, key = make(dropout_rate=0.5, platform=platform), jax.random.key(2)
    weight = np.linspace(0.5, 1.5, len(X)).astype(np.float32)
    trained = {k: v for k, v in params.items() if k != "prior"}

    def loss(terms):
        nll, kl = terms
        return (nll + weight * kl).sum()

    gradients = jax.jit(
        jax.grad(lambda p: loss(found_terms(model, params | p, key)))
    )(trained)

    def reference(p):
        return loss(loss_terms(float64(params) | p, key, 0.5))

    oracles.assert_gradients(reference, trained, gradients, rtol=1e-4)


def test_scores_are_those_of_the_mean(params):
    """Scoring uses no sample, no dropout, and not the prior's encoder."""
    trained = {k: v for k, v in params.items() if k != "prior"}
    scores = make(dropout_rate=0.5).apply(
        {"params": trained}, BATCH, method="scores"
    )
    params = float64(params)
    mean, _ = encode(params["posterior"])
    expected = oracles.decode(params, mean, ITEMS)
    np.testing.assert_allclose(
        scores[:, :ITEMS], expected, rtol=1e-4, atol=1e-4
    )


def test_initial_parameters():
    """Two encoders, uniform within 1 / sqrt(fan-in) as PyTorch's layers."""
    model = rec_vae.RecVAE(500, item_rows=512, hidden=(64,), latent=32)
    empty = SparseBatch(*(jnp.zeros(1, jnp.int32),) * 3)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
    p = jax.jit(model.init)(key, empty)["params"]
    for encoder in (p["posterior"], p["prior"]):
        for x, fan_in in (
            (encoder["input_kernel"][:500], 500),
            (encoder["layer_3"]["kernel"], 64),
            (encoder["layer_5"]["bias"], 64),
            (encoder["log_variance"]["kernel"], 64),
        ):
            limit = fan_in**-0.5
            assert 0.9 * limit < np.abs(x).max() <= limit
        assert not np.any(encoder["input_kernel"][500:])
        assert np.all(encoder["norm_2"]["scale"] == 1)
    assert np.any(
        p["prior"]["mean"]["kernel"] != p["posterior"]["mean"]["kernel"]
    )
    kernel = np.asarray(p["output_kernel"])
    assert 0.95 * 32**-0.5 < np.abs(kernel).max() <= 32**-0.5
    assert not kernel[:, 500:].any() and not p["output_bias"][500:].any()
