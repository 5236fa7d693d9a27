"""What benchmarks measure: Mult-VAE as the paper has it, and the machine."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.benchmark import machine
from vaecf import __version__
from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.data.id_table import IdTable
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving.trained_model import TrainedModel
from vaecf.training import precision
from vaecf.training import state as state_lib

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
METRICS = ("ndcg@100", "recall@20", "recall@50")


def paper_config(changes: Mapping[str, Any]) -> Config:
    """Returns the defaults (Liang et al. 2018) with some settings changed.

    Args:
      changes: values by dotted key, such as {"train.batch_size": 512}.
    """
    benchmark = {
        "data.feed": "resident",
        "train.epochs": 1,
        "train.drop_remainder": True,
        "train.warm_up_epochs": 0,
    }
    return config_lib.replace(Config(), benchmark | dict(changes))


def random_model(n_items: int, policy: str) -> TrainedModel:
    """A model that was never trained, ready to rank."""
    config = paper_config({"precision.policy": policy})
    setup = state_lib.make_setup(config, n_items, mesh_lib.make_mesh())
    return TrainedModel(
        config,
        manifest={},
        items=IdTable(np.arange(n_items)),
        setup=setup,
        params=state_lib.init_state(setup, 0).params,
        directory=pathlib.Path(),
        position={},
    )


def describe(policy: precision.Policy, mesh: Mesh) -> dict[str, Any]:
    """Precision, device, host, mesh and versions, for the JSON."""
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    kind = machine.processor() if on_cpu else devices[0].device_kind
    name = kind if len(devices) == 1 else f"{len(devices)} x {kind}"
    return {
        "precision": policy.name,
        "device": name,
        "platform": devices[0].platform,
        "host": machine.processor(),
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "versions": {"vaecf": __version__, **machine.versions(_PACKAGES)},
    }


def device_memory() -> dict[str, int] | None:
    """What the first device says of its memory; a CPU says nothing."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return None
    keys = ("peak_bytes_in_use", "bytes_in_use", "bytes_limit")
    return {key: int(stats[key]) for key in keys if key in stats}
