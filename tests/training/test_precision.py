"""What the precision names mean, and that all of them train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vaecf.errors import VaecfError
from vaecf.models import sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import optimizers, precision
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib


@pytest.mark.parametrize(
    ("name", "dtype", "products", "scaled"),
    [
        ("fp32", jnp.float32, lax.Precision.HIGHEST, False),
        ("bf16", jnp.bfloat16, lax.Precision.DEFAULT, False),
        ("fp16", jnp.float16, lax.Precision.DEFAULT, True),
    ],
)
def test_policy(name, dtype, products, scaled):
    policy = precision.policy(name)
    assert policy == (name, dtype, products, scaled)


def test_amp_is_bfloat16_where_there_is_one():
    assert precision.policy("amp") == precision.policy("bf16")


class Gpu:
    platform = "gpu"

    def __init__(self, capability: str) -> None:
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "name"),
    [("7.5", "fp16"), ("8.0", "bf16"), ("9.0", "bf16"), ("10.0", "bf16")],
)
def test_amp_on_a_gpu(monkeypatch, capability, name):
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(capability)])
    assert precision.policy("amp").name == name


def test_tf32_needs_a_gpu():
    with pytest.raises(VaecfError, match=r"tf32.*NVIDIA.*cpu"):
        precision.policy("tf32")
    policy = precision.policy("tf32", "gpu")
    assert policy.dtype == jnp.float32 and not policy.loss_scaled
    # HIGHEST would be full float32, DEFAULT whatever the device likes.
    assert policy.precision == lax.Precision.HIGH


@pytest.mark.parametrize("name", ["fp64", "", "FP32", "Amp"])
def test_unknown_policy(name):
    with pytest.raises(VaecfError, match=r"amp, fp32, tf32, bf16, fp16") as e:
        precision.policy(name)
    assert repr(name) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "lowering"),
    [("fp32", "dense"), ("bf16", "gather"), ("fp16", "dense")],
)
def test_trains(small, dataset, take, name, lowering):
    config = small(
        precision={"policy": name},
        model={"input": lowering, "dropout_rate": 0.2},
        loss={"anneal_cap": 0.0},
        optimizer={"learning_rate": 0.03},
    )
    setup = state_lib.make_setup(
        config, dataset.n_items, mesh_lib.make_mesh(1, 1)
    )
    batch = sparse_batch.assemble_on_host(
        dataset.train.indptr,
        dataset.train.indices,
        np.arange(60, dtype=np.int32),
        2048,
    )
    state, key = state_lib.init_state(setup, 0), state_lib.step_key(0)
    losses = []
    for _ in range(60):
        state, totals = take(setup, state, batch, key)
        losses.append(float(totals.nll / totals.users))
    # A uniform guess is where training starts; popularity is what is learnt
    # first.
    n = dataset.train.counts
    share = dataset.train.item_counts() / dataset.train.nnz
    uniform = np.mean(n) * np.log(dataset.n_items)
    popular = -np.sum(dataset.train.item_counts() * np.log(share)) / len(n)
    assert losses[0] == pytest.approx(uniform, rel=0.02)
    assert losses[-1] < popular < uniform
    for x in jax.tree.leaves((state.params, loss_scale_free(state.opt_state))):
        assert x.dtype in (jnp.float32, jnp.int32)
    assert isinstance(state.opt_state, optimizers.LossScaleState) == (
        name == "fp16"
    )


def loss_scale_free(opt_state):
    return getattr(opt_state, "inner", opt_state)


def test_policies_really_differ(small, dataset):
    """Losses of one step: close to each other, and not the same."""
    batch = sparse_batch.assemble_on_host(
        dataset.train.indptr,
        dataset.train.indices,
        np.arange(16, dtype=np.int32),
        512,
    )
    loss = {}
    for name in ("fp32", "bf16", "fp16"):
        setup = state_lib.make_setup(
            small(precision={"policy": name}),
            dataset.n_items,
            mesh_lib.make_mesh(1, 1),
        )
        _, totals = jax.jit(step_lib.gradients, static_argnums=0)(
            setup,
            state_lib.init_state(setup, 0).params,
            batch,
            state_lib.step_key(0),
            jnp.int32(0),
        )
        assert totals.loss.dtype == jnp.float32
        loss[name] = float(totals.loss / totals.users)
    assert len(set(loss.values())) == 3
    # 8 and 11 bits of mantissa.
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=2**-8)
    assert loss["fp16"] == pytest.approx(loss["fp32"], rel=2**-11)
