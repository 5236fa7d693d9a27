"""Compiles all that runs on a GPU, in small sizes, and lists what compiles.

    python experiments/benchmark/gpu_program.py --all --json=compiled.json

Every model, precision, feed, input layer, mesh, population, evaluation, blend
and baseline, each for the compute capabilities that support it. Sizes are
small: a program that compiles for them compiles for larger ones.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.benchmark import gpu_compile, gpu_devices, machine
from vaecf import cli, workdir
from vaecf import config as config_lib
from vaecf.config import Config, fitted_settings
from vaecf.data import synthetic
from vaecf.errors import VaecfError
from vaecf.evaluation import packing, scorers
from vaecf.evaluation.ranking import Ranker
from vaecf.models import bag_of_items, blend, registry
from vaecf.parallel import mesh as mesh_lib

ITEMS, USERS, HISTORY, BATCH = 4096, 512, 20, 128
# A policy of half precision for each compute capability, and the others.
PRECISIONS = {
    "v100": ("fp16", "fp32"),
    "a100": ("bf16", "fp16", "tf32", "fp32"),
    "h100": ("bf16", "fp16", "tf32", "fp32"),
}
MESHES = ((8, 1), (4, 2), (1, 8))
_SIZES = (ITEMS, USERS, HISTORY)


def cases(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields (name, function that compiles) of all programs of a device."""
    gpu, (half, *others) = gpu_devices.GPUS[device], PRECISIONS[device]
    one = gpu_devices.mesh(gpu)

    def config(**changes: Any) -> Config:
        small = {
            "model.hidden": (64,),
            "model.latent": 32,
            "train.batch_size": BATCH,
            "eval.batch_size": BATCH,
            "precision.policy": half,
        }
        named = {key.replace("__", "."): v for key, v in changes.items()}
        if named.get("model.name") == "rec_vae":
            named["train.alternating_epochs"] = (3, 1)
        return config_lib.replace(Config(), small | named)

    def steps(name: str, mesh: Any = one, **changes: Any) -> Any:
        more = {k: changes.pop(k) for k in _MORE if k in changes}
        made = config(**changes)
        return f"train {name}", lambda: gpu_compile.train(
            made, mesh, *_SIZES, **more
        )

    def ranks(name: str, mesh: Any = one, **changes: Any) -> Any:
        made = config(**changes)
        return f"rank {name}", lambda: gpu_compile.rankings(
            made, mesh, ITEMS, HISTORY
        )

    for model in registry.MODELS:
        for policy in (half, *others):
            named = {"model__name": model, "precision__policy": policy}
            yield steps(f"{model} {policy}", **named)
            yield ranks(f"{model} {policy}", **named)
    for lowering in ("gather", "dense"):
        yield steps(f"input {lowering}", model__input=lowering)
    yield steps("streamed", streamed=True)
    yield steps("item blocks", model__item_block=256)
    yield steps("microbatches", train__microbatch=BATCH // 2)
    yield steps("nadam, ema, decay", **_OPTIONS)
    numbers = {"optimizer.learning_rate": np.float32(1e-3)}
    numbers["model.dropout_rate"] = bag_of_items.traced_rate(0.5)
    yield steps("population", numbers=numbers)
    for shape in MESHES:
        mesh = gpu_devices.mesh(gpu, *shape)
        text = "x".join(map(str, shape))
        yield steps(f"mesh {text}", mesh)
        yield steps(f"mesh {text} streamed", mesh, streamed=True)
        if shape[0] > 1:
            less = {"mesh__zero": True, "mesh__reduce": "compute"}
            yield steps(f"mesh {text} zero, reduce=compute", mesh, **less)
        yield ranks(f"mesh {text}", mesh)
    yield from _closed_form(gpu, one, config())


_MORE = ("streamed", "numbers")
_OPTIONS = {
    "optimizer__name": "nadam",
    "train__ema": 0.99,
    "loss__weight_decay": 1e-4,
    "loss__gamma": 0.005,
}


def _closed_form(
    gpu: gpu_devices.Gpu, one: Any, config: Config
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the fitted models, as models and baselines, and the blends."""
    data = synthetic.make(
        "ml-20m-shape",
        0,
        n_train_users=USERS,
        n_held_out_users=0,
        n_items=ITEMS,
    )
    meshes = {"1x1": one, "4x2": gpu_devices.mesh(gpu, 4, 2)}

    def rank(scorer: Any, mesh: Any, params: Any, users: int) -> Any:
        ranker = Ranker(scorer, mesh, gpu_compile.LIST)
        rows = mesh_lib.padded_items(ITEMS, mesh.shape[mesh_lib.ITEM])
        params = mesh_lib.resize_items(params, scorer.partition, rows)
        slots = packing.bucket(users * HISTORY)
        shape = packing.Shape(users, slots)
        return gpu_compile.ranking(ranker, params, shape)

    for name, module in registry.FITTED.items():
        settings = {k: s.default for k, s in fitted_settings(name).items()}
        params = module.fit(data.train, **settings)
        scorer = scorers.fitted(name, ITEMS, mesh_lib.platform(one))
        for text, mesh in meshes.items():
            for users in (mesh.shape[mesh_lib.DATA], BATCH):
                yield (
                    f"rank {name} {text}, {users} users",
                    functools.partial(rank, scorer, mesh, params, users),
                )
    for kind, rank_of in (("full", 0), ("low rank", 16)):
        branch = blend.fit(
            data.train,
            l2=500.0,
            dropout=0.5,
            user_exponent=0.5,
            rank=rank_of,
            experts=tuple(blend.GAINS),
        )
        weights = blend.default_weights(tuple(blend.GAINS))
        branch |= {k: np.float32(v) for k, v in weights.items()}
        for text, mesh in meshes.items():
            setup = gpu_compile.state_lib.make_setup(config, ITEMS, mesh)
            params = gpu_compile.state_lib.abstract_state(setup).params
            both = scorers.ModelParams(params, branch)
            scorer = scorers.model(setup.model)
            yield (
                f"rank blend {kind} {text}",
                functools.partial(rank, scorer, mesh, both, BATCH),
            )


def main(path: str | None) -> None:
    """Compiles everything; writes the list as JSON.

    Raises:
      VaecfError: a program does not compile.
    """
    rows, failed = [], 0
    for device in PRECISIONS:
        version = f"{gpu_devices.GPUS[device].major}.0"
        for name, compile_it in cases(device):
            began, error = time.perf_counter(), ""
            try:
                compile_it()
            except Exception as e:  # whatever the compiler raises is listed
                error = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
                failed += 1
            row = {"capability": version, "program": name}
            rows.append({**row, "error": error})
            spent = time.perf_counter() - began
            cli.log(f"{version} {name}: {error or 'compiles'} ({spent:.0f} s)")
    if path is not None:
        result = {"compiled": rows, "versions": machine.versions()}
        workdir.write_json(pathlib.Path(path), result)
    cli.log(f"{len(rows) - failed} of {len(rows)} programs compile")
    if failed:
        raise VaecfError(f"{failed} programs do not compile: see above")
