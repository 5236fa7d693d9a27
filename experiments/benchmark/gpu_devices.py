"""GPUs as XLA's compiler sees them, and meshes of GPUs that are not here."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {gpu.major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{gpu.name}"
"""


class Gpu(NamedTuple):
    """A GPU. Sizes in bytes, rates per second; `half` is bf16 or fp16."""

    name: str
    major: int  # compute capability
    cores: int
    fpus: int  # float32 units of a core
    clock: float  # GHz
    l2: int
    shared: int  # of a core
    memory: int
    bandwidth: float
    l2_bandwidth: float
    link: float  # bytes to the other devices, in one direction
    half: float  # FLOP, with sums in float32
    tf32: float
    fp32: float


# Bandwidths and FLOP are those of the data sheets. Hopper's in half precision
# and the bandwidth of the H200 were seen on such machines; the bandwidths of
# the L2 caches are rough.
_HOPPER = (9, 132, 128, 1.98, 50 << 20, 233_472)
_HOPPER_RATES = (0.45e12, 790e12, 395e12, 67e12)
_A100 = (8, 108, 64, 1.41, 40 << 20, 167_936, 80 << 30)
_V100 = (7, 80, 64, 1.53, 6 << 20, 98_304, 32 << 30)
GPUS = {
    "v100": Gpu(
        "Tesla V100", *_V100, 0.9e12, 2.2e12, 0.15e12, 125e12, 15.7e12, 15.7e12
    ),
    "a100": Gpu(
        "NVIDIA A100", *_A100, 2.04e12, 4.5e12, 0.3e12, 312e12, 156e12, 19.5e12
    ),
    "h100": Gpu(
        "NVIDIA H100", *_HOPPER, 79 << 30, 3.35e12, 5.5e12, *_HOPPER_RATES
    ),
    "h200": Gpu(
        "NVIDIA H200", *_HOPPER, 140 << 30, 4.3e12, 5.5e12, *_HOPPER_RATES
    ),
}


def without_gpu() -> None:
    """Keeps JAX off this machine's GPU, and XLA from timing kernels.

    To be called before JAX is imported.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0",
    }


def mesh(gpu: Gpu, data: int = 1, item: int = 1) -> Any:
    """Returns a mesh ('data', 'item') of described, absent GPUs."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    optin = gpu.shared - 1024 if gpu.major > 7 else gpu.shared
    target = _TARGET.format(gpu=gpu, bandwidth=int(gpu.bandwidth), optin=optin)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{data * item}"
    )
    devices = np.array(topology.devices).reshape(data, item)
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(devices, ("data", "item"), axis_types=auto)


def described(mesh: Any) -> Any:
    """Returns the context in which Pallas knows the GPU of a described mesh.

    On several devices, `jax.shard_map` is this context.
    """
    import jax

    if mesh.size > 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
