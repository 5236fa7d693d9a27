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
from vaecf.data.ids import IdTable
from vaecf.models import sharding
from vaecf.options import Options, flatten, from_config
from vaecf.serving.model import Model
from vaecf.training import precision
from vaecf.training import step as step_lib

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
METRICS = ("ndcg@100", "recall@20", "recall@50")

# Without ml_collections, which a machine with a GPU may lack.
_PAPER: dict[str, Any] = {
    "seed": 0,
    "data": {"dir": "generated", "feed": "resident"},
    "model": {
        "name": "mult_vae",
        "hidden": (600,),
        "latent": 200,
        "activation": "tanh",
        "dropout_rate": 0.5,
        "input": "auto",
        "item_block": 0,
        "init": "random",
    },
    "linear": {"l2": 0.0, "dropout": 0.0, "user_exponent": 0.0, "rank": 0},
    "loss": {
        "anneal_cap": 0.2,
        "total_anneal_steps": 200_000,
        "weight_decay": 0.0,
        "gamma": 0.0,
    },
    "optimizer": {
        "learning_rate": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
    },
    "train": {
        "epochs": 1,
        "alternate": (),
        "ema": 0.0,
        "batch_size": 500,
        "microbatch": 0,
        "drop_remainder": True,
        "warm_up_epochs": 0,
    },
    "eval": {
        "every_epochs": 1,
        "batch_size": 2000,
        "metrics": METRICS,
        "best_metric": METRICS[0],
        "patience": None,
    },
    "precision": {
        "policy": "fp32",
        "initial_loss_scale": 2.0**15,
        "loss_scale_growth_interval": 2000,
        "max_skipped_in_a_row": 50,
    },
    "mesh": {
        "data": -1,
        "item": 1,
        "zero": False,
        "reduce": "fp32",
        "peer_timeout": 300.0,
    },
}


def paper_options(changes: Mapping[str, Any]) -> Options:
    """Liang et al. 2018's sizes; only these and the precision matter here.

    Args:
      changes: values by flat key, such as {"train.batch_size": 512}.
    """
    nested: dict[str, Any] = {}
    for key, value in (flatten(_PAPER) | dict(changes)).items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return from_config(nested)


def random_model(n_items: int, policy: str) -> Model:
    """A model that was never trained, ready to rank."""
    options = paper_options({"precision.policy": policy})
    problem = step_lib.make_problem(options, n_items, sharding.make_mesh())
    return Model(
        options,
        manifest={},
        items=IdTable(np.arange(n_items)),
        problem=problem,
        params=step_lib.init_state(problem, 0).params,
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
