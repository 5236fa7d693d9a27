"""Passes over users x items, counted in what XLA compiled.

They are what a step's time beyond the matrix products goes into.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaecf.models import likelihood
from vaecf.models.sparse_batch import SparseBatch

USERS, UNITS, ITEMS = 48, 16, 384


def written(program: str) -> list[str]:
    """Operations at the top level that write an array users x items."""
    found, inside = [], False
    for line in program.splitlines():
        if line.endswith("{"):
            inside = line.startswith("ENTRY")
        array = re.match(
            rf"\s+(?:ROOT )?%?(\S+) = \w+\[{USERS},{ITEMS}\]", line
        )
        if inside and array and " bitcast(" not in line:
            found.append(array[1])
    return found


@pytest.mark.parametrize(("dtype", "passes"), [("float32", 4), ("bfloat16", 5)])
def test_loss_and_gradients_write_few_arrays_of_users_by_items(dtype, passes):
    """Product, bias, gradient, targets; and a cast to half precision."""
    rng = np.random.default_rng(0)
    batch = SparseBatch(
        rng.integers(0, ITEMS, 256).astype(np.int32),
        np.sort(rng.integers(0, USERS, 256)).astype(np.int32),
        np.full(USERS, 5, np.int32),
    )

    def loss(hidden_BH, kernel_HI, bias_I):
        nll_B = likelihood.multinomial_nll(
            hidden_BH, kernel_HI, bias_I, batch, dtype=jnp.dtype(dtype)
        )
        return jnp.sum(nll_B)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = program.lower(
        jnp.ones((USERS, UNITS)), jnp.ones((UNITS, ITEMS)), jnp.ones(ITEMS)
    ).compile()
    found = written(compiled.as_text())
    assert 1 <= len(found) <= passes, found


def test_the_count_sees_a_pass():
    """Another array of that shape is another line."""
    x_BI = jnp.ones((USERS, ITEMS))
    once = jax.jit(lambda x: jnp.exp(x)).lower(x_BI).compile().as_text()
    twice = jax.jit(lambda x: (jnp.exp(x), x[::-1] * 2)).lower(x_BI)
    assert len(written(once)) < len(written(twice.compile().as_text()))
