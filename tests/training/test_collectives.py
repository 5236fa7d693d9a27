"""Holds the compiled training step to the formulas of docs/scaling.md.

The programs are compiled for eight devices and read, not run: nothing of the
step's size is allocated.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.models import sparse_batch
from vaecf.models.bag_of_items import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import checkpoints
from vaecf.training import state as state_lib
from vaecf.training import step as step_lib

pytestmark = pytest.mark.slow

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
ITEMS, ROWS, FIRST, HISTORY = 20_108, 20_224, 600, 73
INNER = FIRST + 600 * 400 + 400 + 200 * 600 + 600
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
BLOCKS = {"model.item_block": 1024, "train.batch_size": 4096}
VARIANTS = {
    "blocks": BLOCKS,
    "microbatches": {"train.batch_size": 4096, "train.microbatch": 256},
    "dense": {
        "model.input": "dense",
        "precision.policy": "bf16",
        "train.batch_size": 24_576,
    },
}


class Collective(NamedTuple):
    """A collective of a program, as one device sees it.

    `bytes` are those of the whole arrays, `largest` the elements of the
    largest result, and `trips` is NaN in a loop whose length XLA does not know.
    """

    op: str
    axis: str
    bytes: int
    largest: int
    trips: float


class Step(NamedTuple):
    """A compiled training step; sizes are those of one device."""

    data: int
    item: int
    users: int
    microbatches: int
    rows: int
    collectives: list[Collective]
    flop: float
    parameters: int
    formula_bytes: int
    bytes: int

    def over(self, axis):
        return sum(
            c.bytes * c.trips for c in self.collectives if c.axis == axis
        )


def count(text, data, item):
    """Returns the collectives and the FLOP of the matrix products in HLO."""
    computations = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            instructions = computations["" if head[1] else head[2]] = []
        elif found := re.match(
            r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line
        ):
            instructions.append(found)
    place = np.arange(data * item).reshape(data, item)
    axes = {"item": place.tolist(), "data": place.T.tolist()}
    collectives, flop = [], 0.0

    def walk(name, trips):
        nonlocal flop
        shapes = {}
        for result, types, op, rest in (m.groups() for m in computations[name]):
            arrays = [
                (2 if dtype == "bf16" else 4, _numbers(shape))
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types)
            ]
            shapes[result] = arrays[0][1] if arrays else []
            if op == "dot":
                left = shapes[re.findall(r"%([\w.\-]+)", rest)[0]]
                [summed] = re.findall(r"lhs_contracting_dims=\{(\d+)\}", rest)
                terms = left[int(summed)]
                flop += trips * 2 * math.prod(shapes[result]) * terms
            elif re.match("all-|reduce-scatter|collective-", op):
                groups = _groups(rest)
                [axis] = [name for name in axes if axes[name] == groups]
                sizes = [math.prod(shape) for _, shape in arrays]
                n_bytes = sum(n * b for n, (b, _) in zip(sizes, arrays))
                n_bytes *= len(groups[0]) if op == "reduce-scatter" else 1
                collectives.append(
                    Collective(op, axis, n_bytes, max(sizes), trips)
                )
            # A matrix product in a library's custom call would be missed.
            assert op != "custom-call" or not re.search("gemm|matmul", rest)
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            times = float(known[1] if known else "nan") if op == "while" else 1
            for called in re.findall(r"(?:calls|body)=%([\w.\-]+)", rest):
                walk(called, trips * times)

    walk("", 1)
    return collectives, flop


def _numbers(text):
    return [int(n) for n in text.split(",") if n]


def _groups(attributes):
    """Returns the replica groups, which HLO writes in one of three ways."""
    if written := re.search(r"replica_groups=\{(.*?\})\}", attributes):
        return [_numbers(g) for g in re.findall(r"[\d,]*\d", written[1])]
    if moved := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?",
        attributes,
    ):
        shape, source, order = (_numbers(text or "") for text in moved.groups())
        devices = np.arange(math.prod(source)).reshape(source)
        return devices.transpose(order or None).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{'(\w+)'\}", attributes)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    shape = [int(n) for n in sizes.values()]
    devices = np.arange(math.prod(shape)).reshape(shape)
    axis = list(sizes).index(named[2])
    return np.moveaxis(devices, axis, -1).reshape(-1, shape[axis]).tolist()


def formula(config, rows, users, parts, slots):
    """Returns (parameters, bytes) of a step on one device of a CPU mesh.

    The table "What a device holds" of docs/scaling.md, for one hidden layer.
    """
    [width], latent = config.model.hidden, config.model.latent
    data = config.mesh.data
    layers = [(width, 2 * latent), (latent, width)]
    inner = width + sum(n * m + m for n, m in layers)
    matrices = 2 * rows * width
    parameters = matrices + rows + inner
    divided = matrices if config.mesh.zero else 0
    operand = 2 if config.precision.policy == "bf16" else 4
    activations = 4 * users * (2 * (2 * width + 2 * latent) + 4 * latent)
    if block := min(config.model.item_block, rows):
        activations += users * block * (8 + operand) + 4 * rows
    else:
        casts = 4 if operand < 4 else 0
        activations += users * rows * (4 + operand + casts)
    if config.model.input == "dense":
        activations += users * rows * operand
    if config.model.input == "gather" or block:
        activations += 8 * min(slots, 2048) * width
    activations += 32 * slots
    return parameters, (
        4 * parameters
        + 8 * (parameters - divided + divided // data)
        + 4 * parameters * (2 if parts > 1 else 1)
        + parts * (8 * slots + 4 * users)
        + max(activations, 4 * parameters if data > 1 else 0)
    )


def compiled(mesh, changes, items=ITEMS):
    data, item = mesh
    defaults = {
        "model.input": "gather",
        "train.microbatch": 10**6,
        "mesh.data": data,
        "mesh.item": item,
    }
    config = config_lib.replace(Config(), defaults | changes)
    device_mesh = mesh_lib.make_mesh(data, item)
    setup = state_lib.make_setup(config, items, device_mesh)
    batch_size = config.train.batch_size
    parts = setup.parts(batch_size)
    slots = sparse_batch.bucket(batch_size // parts * HISTORY)

    abstract = checkpoints.abstract
    places = state_lib.state_shardings(setup)
    everywhere = mesh_lib.shardings(device_mesh, P())
    by_user = mesh_lib.shardings(device_mesh, P(mesh_lib.DATA))
    batch = SparseBatch(
        *(
            jax.ShapeDtypeStruct((n,), jnp.int32, sharding=by_user)
            for n in (slots * parts, slots * parts, batch_size)
        )
    )
    keys = jax.eval_shape(
        lambda: step_lib.step_keys(setup, state_lib.step_key(0), 0)
    )
    step = jax.jit(
        functools.partial(step_lib.train_step, setup),
        donate_argnums=0,
        out_shardings=(places, everywhere),
    )
    state = abstract(state_lib.abstract_state(setup), places)
    program = step.lower(state, batch, abstract(keys, everywhere)).compile()
    memory = program.memory_analysis()
    rows, users = setup.whole.item_rows // item, batch_size // data
    return Step(
        data,
        item,
        users,
        parts // data,
        rows,
        *count(program.as_text(), data, item),
        *formula(config, rows, batch_size // parts, parts // data, slots),
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


@pytest.fixture(scope="module", params=list(VARIANTS))
def steps(request):
    name = request.param
    return name, [compiled(mesh, VARIANTS[name]) for mesh in MESHES]


def test_nothing_large_is_gathered(steps):
    """Sums, and numbers of each user; nothing as large as users x items."""
    for step in steps[1]:
        users = step.users // step.microbatches
        for c in step.collectives:
            if c.op == "all-gather":
                assert c.axis == "item", c
                assert c.largest == step.item * 3 * users, c
                continue
            assert c.op == "all-reduce", c
            expected = (
                (users * FIRST,)
                if c.axis == "item"
                else (1, ROWS // step.item * FIRST)
            )
            assert c.largest in expected, c


def test_gradients_are_summed_over_the_users_once(steps):
    """A shard's gradients in float32, two sums of the loss, and the users."""
    for step in steps[1]:
        gradients = ROWS // step.item * (2 * FIRST + 1) + INNER
        assert step.parameters == gradients
        expected = 4 * (gradients + 2 + 1) if step.data > 1 else 0
        assert step.over("data") == expected, step[:2]
        # After the microbatches, not once for each.
        assert {c.trips for c in step.collectives if c.axis == "data"} <= {1}


def test_hidden_layers_and_three_numbers_a_user_go_over_the_items(steps):
    """In float32 in half precision too: a CPU sums bfloat16 so."""
    for step in steps[1]:
        numbers = 3 * step.item  # maximum, sum of exponentials, targets' logits
        expected = 4 * step.users * (2 * FIRST + numbers)
        assert step.over("item") == (expected if step.item > 1 else 0)
        for c in step.collectives:
            assert c.axis == "data" or c.trips == step.microbatches, c


def test_products_are_those_of_the_formula(steps):
    """Three products of the decoder, four in blocks; none on two devices.

    XLA keeps the logits of a last, incomplete block, which is outside the loop.
    """
    name, found = steps
    for step in found:
        decoder = 3 * 2 * FIRST * step.rows * step.users
        in_loop = 2 * FIRST * (step.rows // 1024 * 1024) * step.users
        inner = 3 * 2 * step.users * (600 * 400 + 200 * 600)
        bias = 2 * 8 * step.users * step.rows
        expected = decoder + inner
        expected += in_loop if name == "blocks" else bias
        expected += decoder // 3 * 2 if name == "dense" else 0
        assert step.flop == expected, step[:2]


def test_memory_is_about_the_formula_and_the_page_has_the_counts(steps):
    """The table of docs/scaling.md, row by row."""
    name, found = steps
    for step in found:
        assert step.bytes == pytest.approx(step.formula_bytes, rel=0.2)
    for step in found if name == "dense" else ():
        row = (
            f"| {step.data} × {step.item} | {step.flop / 1e9:,.1f} "
            f"| {step.over('data') / 1e6:,.2f} | {step.over('item') / 1e6:,.2f} "
            f"| {len(step.collectives)} | {step.bytes / 1e9:.2f} "
            f"| {step.formula_bytes / 1e9:.2f} |"
        )
        assert row in PAGE.read_text().splitlines(), row


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_zero_scatters_gradients_and_gathers_weights(mesh):
    """Of the two item matrices only, over the users' axis only."""
    step = compiled(mesh, BLOCKS | {"mesh.zero": True})
    matrix = 4 * step.rows * FIRST
    by_op = {}
    for c in step.collectives:
        if c.axis == "data":
            by_op.setdefault(c.op, []).append(c.bytes)
    assert by_op.pop("reduce-scatter") == [matrix] * 2
    assert by_op.pop("all-gather") == [matrix] * 2
    assert sum(by_op.pop("all-reduce")) == 4 * (step.rows + INNER + 2 + 1)
    assert not by_op
    # The formula divides the moments, not the weights and gradients.
    assert step.bytes == pytest.approx(step.formula_bytes, rel=0.2)


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1)])
def test_ten_million_items_on_eight_devices(mesh):
    changes = {
        "model.hidden": (16,),
        "model.latent": 16,
        "model.item_block": 16_384,
        "train.batch_size": 512,
    }
    step = compiled(mesh, changes, items=10_000_000)
    assert step.bytes == pytest.approx(step.formula_bytes, rel=0.15)
    inner = 16 + 16 * 32 + 32 + 16 * 16 + 16
    assert step.parameters == 10_000_000 // step.item * 33 + inner
    # Weights, two moments, gradients: 16 bytes a parameter.
    assert step.bytes > 16 * step.parameters
