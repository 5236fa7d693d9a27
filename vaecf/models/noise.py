"""Random numbers keyed by a user's row in the global batch.

`jax.random` draws by position in an array. Here the position is the pair
(global row, column) itself, so that neither the layout of the batch, nor its
padding, nor the number of devices changes what a user draws.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import random as extended_random


def counter_bits(
    key: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Returns random bits as a pure function of (key, row, column), uint32.

    The generator is Threefry-2x32 (Salmon et al. 2011). The key is the raw
    uint32 [2] of `jax.random.key_data`; row and column are int32 of one shape.
    """
    counters = jnp.stack([row, column]).astype(jnp.uint32)
    bits = extended_random.threefry_2x32(key, counters.reshape(-1))
    return bits.reshape(counters.shape)[0]


def counter_normal(
    key: jax.Array, row_B: jax.Array, n_columns: int
) -> jax.Array:
    """Returns standard normal noise, float32 [B, n_columns].

    `row_B` are the users' rows in the global batch, int32.
    """
    shape = (row_B.shape[0], n_columns)
    bits = counter_bits(
        key,
        jnp.broadcast_to(row_B[:, None], shape),
        jnp.broadcast_to(jnp.arange(n_columns, dtype=jnp.int32), shape),
    )
    # 23 bits choose one of 2^23 cells of (-1, 1). The midpoint of a cell is
    # never ±1, where erf_inv is infinite.
    cell = (bits >> 9).astype(jnp.float32)
    uniform = (cell + 0.5) * jnp.float32(2.0**-22) - 1.0
    return jnp.float32(2.0**0.5) * lax.erf_inv(uniform)


def sample_gaussian(
    mean_BZ: jax.Array,
    log_variance_BZ: jax.Array,
    key: jax.Array,
    first_row: jax.Array | int,
) -> jax.Array:
    """Returns a reparametrised sample of each user's Gaussian, float32 [B, Z].

    z = mean + exp(log_variance / 2) · noise, Kingma & Welling 2014, section
    2.4. `first_row` is the row of the first user in the global batch.
    """
    n_users, n_columns = mean_BZ.shape
    row_B = jnp.arange(n_users, dtype=jnp.int32) + first_row
    noise_BZ = counter_normal(jax.random.key_data(key), row_B, n_columns)
    return mean_BZ + jnp.exp(0.5 * log_variance_BZ) * noise_BZ
