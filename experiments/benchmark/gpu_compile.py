"""The production programs, compiled for the devices of a mesh from shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.benchmark import gpu_devices
from vaecf.config import Config
from vaecf.evaluation import packing, scorers
from vaecf.evaluation.ranking import Ranker, Scorer
from vaecf.models import bag_of_items, mult_vae, registry, sparse_batch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import checkpoints, input_pipeline, shared_pipeline
from vaecf.training import state as state_lib

LIST = 100  # items of a list
QUERY_SLOTS = 128  # of the query of one user


def input_of(config: Config, mesh: Mesh, items: int) -> str:
    """Returns the input layer of a training step on these devices."""
    setup = state_lib.make_setup(config, items, mesh)
    users = min(setup.microbatch, config.train.batch_size // setup.data_shards)
    return bag_of_items.choose_lowering(
        setup.model.input_lowering,
        *(users, setup.model.item_rows, setup.model.platform),
    )


def train(
    config: Config,
    mesh: Mesh,
    items: int,
    users: int,
    history: int,
    *,
    streamed: bool = False,
    numbers: dict[str, Any] | None = None,
) -> dict[str, tuple[Any, int]]:
    """Returns (compiled steps, users of a batch) of each phase of training.

    Args:
      users: training users, of whom each has `history` interactions.
      streamed: whether the interactions come in windows of one step.
      numbers: settings that a population takes as arguments.
    """
    base = state_lib.make_setup(config, items, mesh)
    batch = min(config.train.batch_size, users)
    parts = base.parts(batch)
    batch = -(-batch // parts) * parts
    slots = sparse_batch.bucket(batch // parts * history)
    spec, rows = P(), users + 1
    if streamed:
        spec, rows, users = P(mesh_lib.DATA), batch, batch
    steps = max(1, users // batch)

    def array(
        shape: tuple[int, ...], *axes: str | None, dtype: Any = jnp.int32
    ) -> Any:
        place = mesh_lib.shardings(mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    state = checkpoints.abstract(
        state_lib.abstract_state(base), state_lib.state_shardings(base)
    )
    csr = sparse_batch.Csr(
        *(array((n,), *spec) for n in (rows, rows, users * history))
    )
    key = jax.eval_shape(lambda: state_lib.step_key(0))
    args = (
        state,
        jax.tree.map(lambda x: array(x.shape, dtype=x.dtype), numbers or {}),
        csr,
        array((steps, batch), None, mesh_lib.DATA),
        array(key.shape, dtype=key.dtype),
        *(array(()), array(())),
    )

    def setup_with(numbers: Any, setup: state_lib.TrainSetup) -> Any:
        return shared_pipeline.setup_with(config, numbers, setup)

    phases = {"train": mult_vae.ALL}
    if base.model.GROUPS:
        epochs = range(sum(config.train.alternating_epochs))
        by_epoch = [base.model.phase(e, config.train) for e in epochs]
        phases = {f"train {phase.group}": phase for phase in by_epoch}
    with gpu_devices.described(mesh):
        return {
            name: (
                input_pipeline.compile_steps(
                    *(base.in_phase(phase), slots, spec, args, setup_with),
                    whole=input_pipeline.is_short(base, steps, batch),
                ),
                batch,
            )
            for name, phase in phases.items()
        }


def rankings(
    config: Config, mesh: Mesh, items: int, history: int
) -> dict[str, tuple[Any, int]]:
    """Returns (compiled program, users) of an evaluation and of a query."""
    setup = state_lib.make_setup(config, items, mesh)
    params = state_lib.abstract_state(setup).params
    params = registry.scoring_params(setup.model, params)
    ranker = Ranker(scorers.model(setup.model), mesh, LIST)
    data = mesh.shape[mesh_lib.DATA]
    found = {}
    for name, users, slots in (
        ("evaluation", config.eval.batch_size, None),
        ("query", data, QUERY_SLOTS),
    ):
        slots = slots or packing.bucket(users // data * history)
        shape = packing.Shape(users, slots)
        found[name] = ranking(ranker, scorers.ModelParams(params), shape), users
    return found


def ranking(ranker: Ranker, params: Any, shape: packing.Shape) -> Any:
    """Returns the compiled ranking of a scorer, from its parameters' shapes."""
    scorer: Scorer = ranker.scorer
    specs = mesh_lib.specs(params, scorer.partition)
    places = mesh_lib.shardings(ranker.mesh, specs)

    def resident(path: Any, x: Any, place: Any) -> jax.ShapeDtypeStruct:
        cast = scorer.casts and x.ndim > 1 and path[-1].key not in scorer.kept
        dtype = scorer.casts[-1] if cast else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)

    shapes = jax.tree_util.tree_map_with_path(resident, params, places)
    with gpu_devices.described(ranker.mesh):
        return ranker.compile(shapes, shape)
