"""What the precision names mean, and that all of them train."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import refuses

from vaecf import config as config_lib
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import optimizers, precision
from vaecf.training import state as state_lib


@pytest.mark.parametrize(
    ("name", "dtype", "products", "scaled"),
    [
        ("fp32", jnp.float32, lax.Precision.HIGHEST, False),
        # HIGHEST would be full float32, DEFAULT whatever the device likes.
        ("tf32", jnp.float32, lax.Precision.HIGH, False),
        ("bf16", jnp.bfloat16, lax.Precision.DEFAULT, False),
        ("fp16", jnp.float16, lax.Precision.DEFAULT, True),
    ],
)
def test_policy(name, dtype, products, scaled):
    assert precision.policy(name, "gpu") == (name, dtype, products, scaled)


def test_amp(monkeypatch):
    """It is bfloat16 on a CPU and on GPUs from compute capability 8."""
    assert precision.policy("amp").name == "bf16"
    for capability, name in (
        ("7.5", "fp16"),
        ("8.0", "bf16"),
        ("10.0", "bf16"),
    ):
        gpu = types.SimpleNamespace(
            platform="gpu", compute_capability=capability
        )
        monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        assert precision.policy("amp").name == name


def test_policies_that_are_refused():
    for platform in (None, "old_gpu"):
        with refuses(r"tf32.*NVIDIA.*8\.0"):
            precision.policy("tf32", platform)


def test_every_name_is_a_policy():
    rule = config_lib.settings()["precision.policy"].metadata["rule"]
    assert set(rule.choices) == {"amp", *precision.POLICIES}


def test_all_policies_train_and_differ(
    small, dataset, take, setup_of, host_batch
):
    """The first losses are close to each other; the curves differ."""
    n, counts = dataset.train.counts, dataset.train.item_counts()
    uniform = np.mean(n) * np.log(dataset.n_items)
    popular = -np.sum(counts * np.log(counts / counts.sum())) / len(n)
    batch, key = host_batch(range(60), 2048), state_lib.step_key(0)
    first, curves = {}, set()
    for name, lowering in (
        ("fp32", "dense"),
        ("bf16", "gather"),
        ("fp16", "dense"),
    ):
        setup = setup_of(
            small(
                precision={"policy": name},
                model={"input": lowering, "dropout_rate": 0.2},
                loss={"anneal_cap": 0.0},
                optimizer={"learning_rate": 0.03},
            )
        )
        state, losses = state_lib.init_state(setup, 0), []
        for _ in range(60):
            state, totals = take(setup, state, batch, key)
            losses.append(float(totals.nll / totals.users))
        assert totals.loss.dtype == jnp.float32
        # Training starts with a uniform guess and learns popularity first.
        assert losses[0] == pytest.approx(uniform, rel=0.02)
        assert losses[-1] < popular < uniform
        for x in jax.tree.leaves(state):
            assert x.dtype in (jnp.float32, jnp.int32)
        scaled = isinstance(state.opt_state, optimizers.LossScaleState)
        assert scaled == (name == "fp16")
        first[name], curves = losses[0], curves | {tuple(losses[:9])}
    assert len(curves) == 3
    # 8 and 11 bits of mantissa.
    assert first["bf16"] == pytest.approx(first["fp32"], rel=2**-8)
    assert first["fp16"] == pytest.approx(first["fp32"], rel=2**-11)


def test_what_depends_on_the_platform_follows_the_argument(small):
    """A GPU takes the whole batch at once."""
    config = small(train={"batch_size": 5000})
    mesh = mesh_lib.make_mesh(1, 1)
    for platform, users in (("cpu", 1024), ("gpu", 5000)):
        setup = state_lib.make_setup(config, 33, mesh, platform)
        assert (setup.model.platform, setup.microbatch) == (platform, users)
