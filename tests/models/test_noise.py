"""Counter-based random numbers against NumPy and statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from oracles import gaussian, threefry

from vaecf.models import noise

KEY = jax.random.key_data(jax.random.key(5))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known answers of the Random123 library, threefry2x32 20.
        ((0, 0), (0, 0), 0x6B200159),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, 0x1CB996FC),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
    ],
)
def test_counter_bits_are_threefry(key, counter, expected):
    key = np.array(key, np.uint32)
    row, column = np.array(counter, np.uint32).view(np.int32)[:, None]
    assert noise.counter_bits(key, row, column).tolist() == [expected]
    assert threefry(key, row, column).tolist() == [expected]


@pytest.mark.parametrize("rows", [[3, 0, 2**31 - 1], [*range(8)]])
def test_counter_normal_equals_its_definition(rows):
    """A function of the key, the row and the column alone."""
    rows = np.array(rows, np.int32)
    got = noise.counter_normal(KEY, rows, 50)
    assert got.dtype == jnp.float32
    expected = gaussian(KEY, rows, 50)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    other = jax.random.key_data(jax.random.key(6))
    assert not np.isin(noise.counter_normal(other, rows, 50), got).any()


def test_counter_normal_is_standard_normal():
    drawn = noise.counter_normal(KEY, np.arange(500, dtype=np.int32), 200)
    x = np.asarray(drawn, float)
    n = x.size
    assert abs(x.mean()) < 4.5 / n**0.5
    assert abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    # Neighbouring users and dimensions are uncorrelated.
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 / n**0.5
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4.5 / n**0.5


def test_counter_normal_is_never_infinite(monkeypatch):
    extremes = jnp.array([[0, 2**32 - 1, 2**31, 2**31 - 1]], jnp.uint32)
    monkeypatch.setattr(noise, "counter_bits", lambda *_: extremes)
    draw = functools.partial(noise.counter_normal, n_columns=4)
    furthest, nearest = 2**0.5 * scipy.special.erfinv([1 - 2.0**-23, 2.0**-23])
    expected = [[-furthest, furthest, nearest, -nearest]]
    for got in (draw(KEY, jnp.zeros(1)), jax.jit(draw)(KEY, jnp.zeros(1))):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
