"""The training step compiled for a mesh, without an array of its size."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import collectives, memory, models
from vaecf.errors import VaecfError
from vaecf.models import sparse_batch
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import step as step_lib
from vaecf.training.step import TrainSetup


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled.

    Attributes:
      items: of the catalogue.
      hidden: widths of the hidden layers, from the items inwards.
      latent: units of the bottleneck.
      batch_size: users a step, over all devices.
      microbatch: users a device holds activations of; 0 for all of its own.
      item_block: items a block of the likelihood; 0 for all at once.
      input: 'dense', what a GPU takes of itself, or 'gather'.
      precision: policy.
      history: interactions of a user, on average.
      zero: moments are divided over the users' devices too.
    """

    items: int
    hidden: tuple[int, ...]
    latent: int
    batch_size: int
    microbatch: int
    item_block: int
    input: str
    precision: str
    history: int
    zero: bool = False


def make_setup(settings: Settings, data: int, item: int) -> TrainSetup:
    """The problem on a mesh of so many devices along users and items."""
    config = models.paper_config(
        {
            "model.hidden": settings.hidden,
            "model.latent": settings.latent,
            "model.item_block": settings.item_block,
            "model.input": settings.input,
            "train.batch_size": settings.batch_size,
            "train.microbatch": settings.microbatch or settings.batch_size,
            "precision.policy": settings.precision,
            "mesh.data": data,
            "mesh.item": item,
            "mesh.zero": settings.zero,
        }
    )
    mesh = mesh_lib.make_mesh(data, item)
    return step_lib.make_setup(config, settings.items, mesh)


def step(settings: Settings, data: int, item: int) -> dict[str, Any]:
    """Compiles and counts.

    Returns:
      What the JSON holds of a step: mesh, collectives of a device, FLOP and
      bytes of a device, all for one step.

    Raises:
      VaecfError: the batch does not divide over the mesh and microbatches.
    """
    setup = make_setup(settings, data, item)
    parts = setup.parts(settings.batch_size)
    if settings.batch_size % parts:
        raise VaecfError(
            f"--batch_size={settings.batch_size} does not divide into {parts} "
            f"parts on {data} x {item} devices"
        )
    slots = sparse_batch.bucket(settings.batch_size // parts * settings.history)
    began = time.perf_counter()
    program = _compile(setup, settings.batch_size, slots)
    seconds = time.perf_counter() - began
    counted = collectives.count(program.as_text())
    if counted.opaque:
        raise VaecfError(f"products that cannot be counted: {counted.opaque}")
    mesh = {"data": data, "item": item}
    shape = memory.shape_of(setup, settings.batch_size, slots)
    on_gpu = shape._replace(
        in_place=True,
        chunk=slots,
        logit=4 if settings.item_block else shape.operand,
    )
    return {
        "mesh": mesh,
        "batch_size": settings.batch_size,
        "microbatches": parts // data,
        "compile_seconds": seconds,
        "flop": counted.flop,
        "flop_formula": flop(setup, settings.batch_size),
        "parameters": memory.parameters(shape),
        "item_rows": setup.model.item_rows,
        "gathered_bytes": _gathered(shape),
        "collectives": [
            {
                "op": c.op,
                "axis": c.axis(mesh),
                "devices": c.size,
                "bytes": c.bytes,
                "trips": c.trips,
                "trips_known": c.counted,
                "largest": c.largest,
                "arrays": [
                    f"{array.dtype}{list(array.shape)}" for array in c.arrays
                ],
                "group": list(c.groups[0]),
                "name": c.name,
            }
            for c in counted.collectives
        ],
        "memory": _memory(program),
        "memory_formula": memory.as_dict(memory.step_bytes(shape)),
        "memory_on_gpu": memory.as_dict(memory.step_bytes(on_gpu)),
    }


def flop(setup: TrainSetup, batch_size: int) -> int:
    """FLOP of the matrix products of a step on a device, by hand.

    Each layer multiplies three times, forward and for two gradients; the
    input layer has no gradient of its input, and gathered it has no product
    at all. Blocks compute the logits once more, but for those outside the
    loop, which XLA sees to be the same. The output bias's gradient is a
    product with eight rows of ones, except with blocks.
    """
    model, shape = setup.whole, memory.shape_of(setup, batch_size, 0)
    users = batch_size // shape.data
    items = shape.rows // shape.item
    first, last = shape.widths[0], shape.widths[-1]
    inner = shape.inner - first  # weights and biases; biases do not multiply
    inner -= sum(shape.widths) - first
    if model.item_block:
        whole = items // model.item_block
        again = whole * model.item_block if whole > 1 else 0
        output = (3 * items + again) * last
    else:
        output = items * (3 * last + 8)
    entry = 2 * items * first if shape.dense else 0
    return 2 * users * (output + entry + 3 * inner)


def _gathered(shape: memory.Shape) -> int:
    """Bytes of the float32 rows that interactions gather, read or written.

    Written and read, forward and backward: one row at a gathered input, a
    weight's and a user's row at targets in blocks. Every item shard goes
    through all of its users' interactions.
    """
    rows = 0 if shape.dense else 4 * shape.widths[0]
    rows += 8 * shape.widths[-1] if shape.block else 0
    return 4 * rows * shape.slots * shape.parts


def _compile(setup: TrainSetup, batch_size: int, slots: int) -> Any:
    """`step.train_step` for arrays that are never made."""

    def place(shape: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    shardings = step_lib.state_shardings(setup)
    everywhere = NamedSharding(setup.mesh, P())
    by_user = NamedSharding(setup.mesh, P(mesh_lib.DATA))
    state = jax.eval_shape(lambda: step_lib.init_state(setup, 0))
    slots *= setup.parts(batch_size)
    batch = SparseBatch(
        *(
            jax.ShapeDtypeStruct((n,), jnp.int32, sharding=by_user)
            for n in (slots, slots, batch_size)
        )
    )
    key = jax.eval_shape(lambda: step_lib.step_key(0))
    return (
        jax.jit(
            functools.partial(step_lib.train_step, setup),
            donate_argnums=0,
            out_shardings=(shardings, everywhere),
        )
        .lower(
            jax.tree.map(place, state, shardings), batch, place(key, everywhere)
        )
        .compile()
    )


def _memory(program: Any) -> dict[str, int]:
    """Bytes of a device; what is donated counts once."""
    sizes = program.memory_analysis()
    found = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliases": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
    }
    total = (
        found["arguments"]
        + found["outputs"]
        - found["aliases"]
        + found["temporaries"]
    )
    return {**found, "total": total}


def meshes(n: int, most_items: int) -> list[tuple[int, int]]:
    """(data, item) factorisations of n devices."""
    return [
        (n // item, item)
        for item in (2**k for k in range(int(math.log2(most_items)) + 1))
        if n % item == 0
    ]
