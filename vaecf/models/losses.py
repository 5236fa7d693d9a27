"""Terms of the evidence lower bound, one value per user."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def gaussian_kl(mean_BZ: jax.Array, log_variance_BZ: jax.Array) -> jax.Array:
    """KL(N(mean, variance) || N(0, 1)) of each user.

    1/2 · sum_z (variance + mean² - 1 - log variance), Kingma & Welling 2014,
    appendix B.

    Args:
      mean_BZ: float32 [B, Z].
      log_variance_BZ: float32 [B, Z].

    Returns:
      float32 [B].
    """
    return 0.5 * jnp.sum(
        jnp.exp(log_variance_BZ) + jnp.square(mean_BZ) - 1.0 - log_variance_BZ,
        axis=-1,
    )


def anneal_weight(
    step: jax.Array | int, *, cap: float, total_steps: int
) -> jax.Array:
    """Weight β of the KL term: min(cap, step / total_steps).

    Liang et al. 2018, section 2.2.2, in the form of the authors' and NVIDIA's
    code. `step` is the global step, which is in the checkpoint: annealing
    neither restarts with an epoch nor with a resumed run.

    Args:
      step: int32 scalar, steps taken before this one.
      cap: largest weight, reached at step cap · total_steps.
      total_steps: steps in which the weight would reach 1; 0 means `cap` from
        the first step on.

    Returns:
      float32 scalar.
    """
    if total_steps == 0:
        return jnp.float32(cap)
    slope = jnp.asarray(step, jnp.float32) / jnp.float32(total_steps)
    return jnp.minimum(jnp.float32(cap), slope)


def squared_norm_of_kernels(params: Any) -> jax.Array:
    """Sum of the squares of all weight matrices, biases left out.

    The regulariser of the authors' code: `weight_decay` times this is added to
    the loss.
    """
    leaves = jax.tree.leaves(params)
    return sum(
        (jnp.sum(jnp.square(x)) for x in leaves if x.ndim == 2),
        start=jnp.float32(0.0),
    )
