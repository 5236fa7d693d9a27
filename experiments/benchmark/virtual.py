"""Devices that a CPU stands in for."""

from __future__ import annotations

import jax


def ask_for_devices(n: int) -> None:
    """At least n CPU devices, unless devices have started already.

    Whoever needs more than there then are is told by `sharding.make_mesh`.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        more = max(n, jax.config.jax_num_cpu_devices)
        jax.config.update("jax_num_cpu_devices", more)
    except RuntimeError:
        return
