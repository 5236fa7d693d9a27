"""Counter-based random numbers against NumPy and statistics."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vaecf.models import noise

KEY = jax.random.key_data(jax.random.key(5))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Known answers of the Random123 library, threefry2x32 20.
        ((0, 0), (0, 0), 0x6B200159),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, 0x1CB996FC),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            0xC4923A9C,
        ),
    ],
)
def test_counter_bits_are_threefry(threefry, key, counter, expected):
    key = np.array(key, np.uint32)
    row, column = np.array(counter, np.uint32).view(np.int32)[:, None]
    assert noise.counter_bits(key, row, column).tolist() == [expected]
    assert threefry(key, row, column).tolist() == [expected]


def test_counter_bits_of_any_shape(threefry):
    row, column = np.mgrid[0:7, 0:5].astype(np.int32)
    bits = noise.counter_bits(KEY, row, column)
    assert bits.dtype == jnp.uint32
    np.testing.assert_array_equal(bits, threefry(KEY, row, column))
    assert len(np.unique(bits)) == row.size


def test_counter_normal_equals_its_definition(threefry):
    rows = np.array([3, 0, 2**31 - 1], np.int32)
    bits = threefry(KEY, rows[:, None], np.arange(50)[None, :])
    uniform = ((bits >> 9) + 0.5) / 2**22 - 1
    expected = np.sqrt(2) * scipy.special.erfinv(uniform)
    got = noise.counter_normal(KEY, rows, 50)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_counter_normal_is_standard_normal():
    x = np.asarray(
        noise.counter_normal(KEY, np.arange(500, dtype=np.int32), 200)
    ).astype(float)
    n = x.size
    assert abs(x.mean()) < 4.5 / n**0.5
    assert abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3
    # Neighbouring users and dimensions are uncorrelated.
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 / n**0.5
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4.5 / n**0.5


def test_counter_normal_depends_on_key_row_and_column_alone():
    rows = np.arange(8, dtype=np.int32)
    whole = np.asarray(noise.counter_normal(KEY, rows, 6))
    order = np.array([5, 1, 7], np.int32)
    part = noise.counter_normal(KEY, order, 4)
    np.testing.assert_array_equal(part, whole[order, :4])
    other = jax.random.key_data(jax.random.key(6))
    assert not np.isin(noise.counter_normal(other, rows, 6), whole).any()


@pytest.mark.parametrize("jitted", [False, True])
def test_counter_normal_is_never_infinite(monkeypatch, jitted):
    extremes = jnp.array([[0, 2**32 - 1, 2**31, 2**31 - 1]], jnp.uint32)
    monkeypatch.setattr(noise, "counter_bits", lambda *_: extremes)
    draw = functools.partial(noise.counter_normal, n_columns=4)
    got = np.asarray((jax.jit(draw) if jitted else draw)(KEY, jnp.zeros(1)))[0]
    furthest = np.sqrt(2) * scipy.special.erfinv(1 - 2.0**-23)
    nearest = np.sqrt(2) * scipy.special.erfinv(2.0**-23)
    expected = [-furthest, furthest, nearest, -nearest]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
