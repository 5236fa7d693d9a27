"""The kernels for GPUs, interpreted, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import special

from vaecf.models import gpu_kernels
from vaecf.parallel import mesh as mesh_lib


@pytest.mark.parametrize("n_items", [5, 384])
@pytest.mark.parametrize("block", [32, 32_768])
@pytest.mark.parametrize("few_users", [5, 10])
def test_nll_and_gradient(monkeypatch, n_items, block, few_users):
    """Several blocks of items and of targets, and padding in the last ones."""
    monkeypatch.setattr(gpu_kernels, "_FEW_USERS", few_users)
    monkeypatch.setattr(gpu_kernels, "_ITEMS", block)
    monkeypatch.setattr(gpu_kernels, "_TARGETS", 8)
    rng = np.random.default_rng(n_items)
    real = n_items - n_items // 5
    users = [rng.permutation(real)[:n] for n in (0, 1, 3, 8, real, 0, 9)]
    batch = oracles.batch_of(users, 2 + sum(map(len, users)))
    logits = rng.normal(0, 30, (len(users), n_items)).astype(np.float32)
    logits[3] += 1000  # no overflow
    logits[:, real:] = -np.inf  # padding items
    x = np.array([np.isin(np.arange(n_items), user) for user in users])
    count, y = x.sum(axis=1), logits.astype(float)
    nll = count * special.logsumexp(y, axis=1)
    nll -= np.where(x, y, 0).sum(axis=1)
    gradient = count[:, None] * special.softmax(y, axis=1) - x
    interpreted = functools.partial(gpu_kernels.nll_kernel, interpret=True)
    for program in (interpreted, gpu_kernels.nll_and_gradient):
        got = jax.jit(program)(logits, batch)
        np.testing.assert_allclose(got[0], nll, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(got[1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_lists_of_rows(dtype):
    """Empty lists, several tiles, indices out of bounds and repeated."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(50, 300)), dtype)
    counts = np.array([0, 3, 1100, 0, 512, 513, 1, 0])
    starts = np.cumsum(counts) - counts
    index = rng.integers(0, 55, counts.sum() + 40)
    lists = gpu_kernels.Lists(
        *(jnp.asarray(x, jnp.int32) for x in (index, starts, counts))
    )
    rows = np.vstack([np.asarray(table, float), np.zeros((5, 300))])
    expected = [
        rows[index[start : start + count]].sum(axis=0)
        for start, count in zip(starts, counts)
    ]
    interpreted = functools.partial(
        gpu_kernels.sum_lists_kernel, interpret=True
    )
    for program in (
        interpreted,
        gpu_kernels.sum_lists,
        gpu_kernels.sum_uneven_lists,
    ):
        got = jax.jit(program)(table, lists)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "capability", "platform"),
    [
        ("cpu", None, "cpu"),
        ("gpu", "9.0", "gpu"),
        ("gpu", "12.0", "gpu"),
        ("gpu", "7.0", "old_gpu"),
        ("gpu", "gfx942", "old_gpu"),
        ("gpu", None, "old_gpu"),
    ],
)
def test_triton_needs_a_gpu_of_compute_capability_8(name, capability, platform):
    class Device:
        pass

    Device.platform = name
    if capability:
        Device.compute_capability = capability
    assert mesh_lib.platform_of(Device) == platform
    assert mesh_lib.has_triton(platform) == (platform == "gpu")
