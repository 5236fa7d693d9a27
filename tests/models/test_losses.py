"""The terms of the loss against closed forms and quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from scipy import special, stats

from vaecf.config import LossConfig
from vaecf.models import losses


def kl_by_quadrature(mean, log_variance):
    """∫ q log(q / p) over one dimension."""
    q, p = stats.norm(mean, np.exp(log_variance / 2)), stats.norm()
    value, _ = scipy.integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)),
        mean - 12 * q.std(),
        mean + 12 * q.std(),
        points=[mean],
    )
    return value


def test_kl_equals_the_integral():
    mean, log_variance = np.random.default_rng(0).normal(size=(2, 2, 2))
    expected = np.vectorize(kl_by_quadrature)(mean, log_variance).sum(axis=1)
    got = losses.gaussian_kl(
        jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    )
    assert got.shape == (2,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_composite_prior():
    """The wide part bounds the cost of an outlier."""
    z, mean = np.array([[[0.3, -40.0, 100.0]], [[0.2, -39.5, 0.0]]])
    log_variance = np.array([[-2.0, 1.0, 0.0]])
    log_density = losses.composite_log_prior(
        *(jnp.asarray(x, jnp.float32) for x in (z, mean, log_variance))
    )
    parts = [(0.15, 0.0, 0.0), (0.75, mean, log_variance), (0.1, 0.0, 10.0)]
    each = special.logsumexp(
        [
            np.log(weight) + stats.norm.logpdf(z, m, np.exp(v / 2))
            for weight, m, v in parts
        ],
        axis=0,
    )
    np.testing.assert_allclose(log_density, each.sum(axis=1), rtol=1e-5)
    assert log_density[0] > -20


@pytest.mark.parametrize(
    ("step", "cap", "total", "expected"),
    [
        # The paper's settings: 0.2 after 40,000 of 200,000 steps.
        (0, 0.2, 200_000, 0.0),
        (1, 0.2, 200_000, 5e-6),
        (20_000, 0.2, 200_000, 0.1),
        (40_000, 0.2, 200_000, 0.2),
        (1_000_000, 0.2, 200_000, 0.2),
        (50, 1.0, 100, 0.5),
        (100, 1.0, 100, 1.0),
        (7, 0.0, 100, 0.0),
        (0, 0.3, 0, 0.3),
        (9, 0.3, 0, 0.3),
    ],
)
def test_anneal_weight(step, cap, total, expected):
    config = LossConfig(anneal_cap=cap, total_anneal_steps=total)
    weight = functools.partial(losses.anneal_weight, config=config)
    for got in (weight(step), jax.jit(weight)(jnp.int32(step))):
        assert got.shape == () and got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
