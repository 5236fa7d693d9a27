"""Precision policies of the matrix products.

Every policy keeps parameters, optimiser moments, softmax, KL and metrics in
float32. Only the operands of the matrix products and the logits change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vaecf.errors import VaecfError


class Policy(NamedTuple):
    """A precision policy."""

    name: str
    dtype: Any  # dtype of operands and logits
    # `lax.Precision` of the products. The default of JAX would let float32
    # products run in TF32 on a GPU.
    precision: lax.Precision
    loss_scaled: bool  # whether training needs dynamic loss scaling


POLICIES: dict[str, Policy] = {
    "fp32": Policy("fp32", jnp.float32, lax.Precision.HIGHEST, False),
    "tf32": Policy("tf32", jnp.float32, lax.Precision.HIGH, False),
    "bf16": Policy("bf16", jnp.bfloat16, lax.Precision.DEFAULT, False),
    "fp16": Policy("fp16", jnp.float16, lax.Precision.DEFAULT, True),
}


def policy(name: str, platform: str | None = None) -> Policy:
    """Returns the policy of a name; 'amp' is bf16, or fp16 on an old GPU.

    `platform` is that of the devices that compute, such as 'cpu'; None takes
    JAX's default.

    Raises:
      VaecfError: the name is 'tf32', and there is no NVIDIA GPU of compute
        capability 8.0 or higher.
    """
    if name == "amp":
        name = "bf16" if _has_bfloat16() else "fp16"
    platform = platform or jax.default_backend()
    if name == "tf32" and platform != "gpu":
        raise VaecfError(
            "config.precision.policy='tf32' needs an NVIDIA GPU of compute "
            "capability 8.0 or higher (Ampere): use 'fp32' or 'bf16'"
        )
    return POLICIES[name]


def _has_bfloat16() -> bool:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return True
    # compute_capability is e.g. '8.0'; bf16 tensor cores came with 8 (Ampere).
    capability = getattr(device, "compute_capability", "8.0")
    return float(capability) >= 8.0
