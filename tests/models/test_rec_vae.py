"""RecVAE against a NumPy derivation of the paper's formulas."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

from vaecf.models import losses, noise, rec_vae, sparse_batch
from vaecf.models.sparse_batch import SparseBatch

ITEMS, ROWS, WIDTH, LATENT = 21, 128, 7, 3
HISTORIES = [[0, 4, 20], [3], [], [1, 2, 5, 6, 7], [19, 20]]
FIRST_ROW = 5


def make(**config) -> rec_vae.RecVAE:
    return rec_vae.RecVAE(
        n_items=ITEMS,
        item_rows=ROWS,
        hidden=(WIDTH,),
        latent=LATENT,
        precision=lax.Precision.HIGHEST,
        **config,
    )


@pytest.fixture(scope="module")
def batch() -> SparseBatch:
    indptr = np.cumsum([0, *map(len, HISTORIES)])
    items = np.array([i for h in HISTORIES for i in h], np.int32)
    users = np.arange(len(HISTORIES) + 1, dtype=np.int32)  # one is padding
    return jax.tree.map(
        jnp.asarray, sparse_batch.assemble_on_host(indptr, items, users, 16)
    )


@pytest.fixture(scope="module")
def params(batch):
    """Random parameters, also for the biases and scales."""
    tree = jax.jit(make().init)(jax.random.key(3), batch)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32),
        tree,
    )


def dense() -> np.ndarray:
    """0/1 [B, I] with a row of zeros for the padding user."""
    x = np.zeros((len(HISTORIES) + 1, ITEMS))
    for u, history in enumerate(HISTORIES):
        x[u, history] = 1
    return x


def kept(key, rate: float) -> np.ndarray:
    """Which entries of [B, I] survive, by global row."""
    rows, columns = np.indices((len(HISTORIES) + 1, ITEMS))
    bits = noise.counter_bits(
        jax.random.key_data(key),
        jnp.asarray(rows + FIRST_ROW),
        jnp.asarray(columns),
    )
    return np.asarray(bits) >= np.uint32(rate * 2**32)


def encode(p, x, keep=None, rate=0.0):
    """Section 3.1: dense connections, swish, layer normalisation."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def norm(h, k):
        scale, bias = p[f"norm_{k}"]["scale"], p[f"norm_{k}"]["bias"]
        centred = h - h.mean(axis=1, keepdims=True)
        variance = (centred**2).mean(axis=1, keepdims=True)
        return centred / np.sqrt(variance + 0.1) * scale + bias

    def swish(h):
        return h * special.expit(h)

    length = np.sqrt(np.maximum(x.sum(axis=1, keepdims=True), 1))
    entry = x / length
    if keep is not None:
        entry = entry * keep / (1 - rate)
    layers = [
        norm(swish(entry @ p["input_kernel"][:ITEMS] + p["input_bias"]), 1)
    ]
    for k in range(2, 6):
        layer = layers[-1] @ p[f"layer_{k}"]["kernel"] + p[f"layer_{k}"]["bias"]
        layers.append(norm(swish(layer + sum(layers)), k))
    return tuple(
        layers[-1] @ p[name]["kernel"] + p[name]["bias"]
        for name in ("mean", "log_variance")
    )


def loss_terms(p, key, rate):
    """(nll, kl) of each user, float64."""
    dropout_key, noise_key = jax.random.split(key)
    x = dense()
    keep = kept(dropout_key, rate) if rate else None
    mean, log_variance = encode(p["posterior"], x, keep, rate)
    drawn = np.asarray(
        noise.counter_normal(
            jax.random.key_data(noise_key),
            jnp.arange(len(x)) + FIRST_ROW,
            LATENT,
        ),
        np.float64,
    )
    deviation = np.exp(log_variance / 2)
    z = mean + deviation * drawn
    before, before_log_variance = encode(p["prior"], x)
    prior = np.log(
        0.15 * stats.norm.pdf(z)
        + 0.75 * stats.norm.pdf(z, before, np.exp(before_log_variance / 2))
        + 0.1 * stats.norm.pdf(z, 0, np.exp(5.0))
    )
    kl = (stats.norm.logpdf(z, mean, deviation) - prior).sum(axis=1)
    kernel = np.asarray(p["output_kernel"], np.float64)[:, :ITEMS]
    bias = np.asarray(p["output_bias"], np.float64)[:ITEMS]
    nll = -(x * special.log_softmax(z @ kernel + bias, axis=1)).sum(axis=1)
    return nll, kl


@pytest.mark.parametrize(
    ("rate", "lowering", "block"),
    [(0.0, "gather", 0), (0.5, "gather", 10), (0.5, "dense", 0)],
)
def test_loss_terms(batch, params, rate, lowering, block):
    model = make(dropout_rate=rate, input_lowering=lowering, item_block=block)
    key = jax.random.key(11)
    found = model.apply(
        {"params": params}, batch, key, FIRST_ROW, method="loss_terms"
    )
    for got, expected in zip(found, loss_terms(params, key, rate)):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert np.abs(found[1][:5]).min() > 0.01


def test_gradients_equal_finite_differences(batch, params):
    model, key = make(dropout_rate=0.5), jax.random.key(2)
    weight = np.linspace(0.5, 1.5, len(HISTORIES) + 1)

    def loss(p):
        nll, kl = model.apply(
            {"params": p}, batch, key, FIRST_ROW, method="loss_terms"
        )
        return jnp.sum(nll + jnp.asarray(weight, jnp.float32) * kl)

    gradients = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(1)
    for name in ("posterior", "output_kernel", "output_bias"):
        direction = jax.tree.map(
            lambda x, chosen=name: np.zeros(x.shape), params
        )
        direction[name] = jax.tree.map(
            lambda x: rng.normal(size=x.shape), params[name]
        )

        def along(t, d=direction):
            moved = jax.tree.map(
                lambda a, b: np.asarray(a, np.float64) + t * b, params, d
            )
            nll, kl = loss_terms(moved, key, 0.5)
            return (nll + weight * kl).sum()

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        inner = sum(
            float(np.sum(np.asarray(g, np.float64) * d))
            for g, d in zip(
                jax.tree.leaves(gradients), jax.tree.leaves(direction)
            )
        )
        assert inner == pytest.approx(slope, rel=1e-4, abs=1e-4), name


def test_scores_are_those_of_the_mean(batch, params):
    """Scoring uses no sample, no dropout, and not the prior's encoder."""
    model = make(dropout_rate=0.5)
    scores = model.apply(
        {"params": {k: v for k, v in params.items() if k != "prior"}},
        batch,
        method="scores",
    )
    mean, _ = encode(params["posterior"], dense())
    expected = mean @ np.asarray(params["output_kernel"])[:, :ITEMS]
    expected = expected + np.asarray(params["output_bias"])[:ITEMS]
    np.testing.assert_allclose(
        np.asarray(scores)[:, :ITEMS], expected, rtol=1e-4, atol=1e-4
    )
    assert np.all(np.asarray(scores)[:, ITEMS:] == -np.inf)


def test_composite_prior():
    """The wide part bounds the cost of an outlier."""
    z = jnp.array([[0.3, -40.0, 100.0]])
    mean = jnp.array([[0.2, -39.5, 0.0]])
    log_variance = jnp.array([[-2.0, 1.0, 0.0]])
    log_density = losses.composite_log_prior(z, mean, log_variance)
    parts = [
        (0.15, 0.0, 0.0),
        (0.75, np.asarray(mean), np.asarray(log_variance)),
        (0.1, 0.0, 10.0),
    ]
    each = special.logsumexp(
        [
            np.log(w) + stats.norm.logpdf(np.asarray(z), m, np.exp(v / 2))
            for w, m, v in parts
        ],
        axis=0,
    )
    np.testing.assert_allclose(log_density, each.sum(axis=1), rtol=1e-5)
    assert log_density[0] > -20


def test_initial_parameters():
    """Two encoders, uniform within 1 / sqrt(fan-in) as PyTorch's layers."""
    model = functools.partial(
        rec_vae.RecVAE, n_items=500, item_rows=512, hidden=(64,), latent=32
    )
    empty = SparseBatch(*(jnp.zeros(1, jnp.int32),) * 3)
    p = jax.jit(model().init)(jax.random.key(0), empty)["params"]
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
