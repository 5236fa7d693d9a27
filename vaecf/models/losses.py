"""Terms of the evidence lower bound, one value per user, and their weights.

Shapes in names: B users, Z dimensions of the code, P parts of the mixture.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vaecf.config import LossConfig


def gaussian_kl(mean_BZ: jax.Array, log_variance_BZ: jax.Array) -> jax.Array:
    """Returns KL(N(mean, variance) || N(0, 1)) of each user.

    1/2 · sum_z (variance + mean² - 1 - log variance), float32 [B]: Kingma &
    Welling 2014, appendix B.
    """
    return 0.5 * jnp.sum(
        jnp.exp(log_variance_BZ) + jnp.square(mean_BZ) - 1.0 - log_variance_BZ,
        axis=-1,
    )


def composite_log_prior(
    z_BZ: jax.Array,
    previous_mean_BZ: jax.Array,
    previous_log_variance_BZ: jax.Array,
) -> jax.Array:
    """Returns the log density of RecVAE's composite prior, float32 [B].

    Σ_z log(.15 N(z; 0, 1) + .75 N(z; previous posterior) + .1 N(z; 0, e^10)),

    Shenbin et al. 2020, section 3.2. As in the authors' code, which has these
    constants, the mixture is taken in each dimension, and its third part is a
    wide Gaussian that the paper does not have.
    """
    zeros_BZ = jnp.zeros_like(z_BZ)
    parts = (
        (0.15, zeros_BZ, zeros_BZ),
        (0.75, previous_mean_BZ, previous_log_variance_BZ),
        (0.1, zeros_BZ, jnp.full_like(z_BZ, 10.0)),
    )
    log_density_PBZ = jnp.stack(
        [
            jnp.log(weight) + log_normal(z_BZ, mean, log_variance)
            for weight, mean, log_variance in parts
        ]
    )
    return jnp.sum(jax.nn.logsumexp(log_density_PBZ, axis=0), axis=-1)


def log_normal(
    z_BZ: jax.Array, mean_BZ: jax.Array, log_variance_BZ: jax.Array
) -> jax.Array:
    """Returns log N(z; mean, variance) of each dimension, float32 [B, Z]."""
    return -0.5 * (
        log_variance_BZ
        + jnp.log(2.0 * jnp.pi)
        + jnp.square(z_BZ - mean_BZ) / jnp.exp(log_variance_BZ)
    )


def is_left_out(weight: Any) -> bool:
    """Returns whether the program leaves out a term with this weight.

    A traced weight may be 0 as well, but its term is always computed.
    """
    return isinstance(weight, int | float) and weight == 0


def anneal_weight(step: jax.Array | int, config: LossConfig) -> jax.Array:
    """Returns the KL term's weight β, min(cap, step / total_steps), float32.

    Liang et al. 2018, section 2.2.2, in the form of the authors' and NVIDIA's
    code. β is a function of the global step, which checkpoints hold, so that
    annealing restarts neither with an epoch nor with a resumed run.

    `step`, int32, counts the steps before this one. The numbers of `config` may
    be traced.
    """
    cap, total_steps = config.anneal_cap, config.total_anneal_steps
    if is_left_out(total_steps):
        return jnp.float32(cap)
    slope = jnp.asarray(step, jnp.float32) / jnp.float32(total_steps)
    weight = jnp.minimum(jnp.float32(cap), slope)
    if isinstance(total_steps, jax.Array):
        weight = jnp.where(total_steps == 0, jnp.float32(cap), weight)
    return weight


def squared_norm_of_kernels(params: Any) -> jax.Array:
    """Returns the sum of squares of all weight matrices, without biases.

    As in the authors' code of Liang et al. 2018, the loss adds `weight_decay`
    times this value.
    """
    leaves = jax.tree.leaves(params)
    return sum(
        (jnp.sum(jnp.square(x)) for x in leaves if x.ndim == 2),
        start=jnp.float32(0.0),
    )
