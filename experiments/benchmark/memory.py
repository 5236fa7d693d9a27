"""Memory of a training step on a device, as a formula.

Derived in docs/scaling.md. What it counts is arrays of the items or of the
batch; everything else is kilobytes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax

from vaecf.models import bag_of_items
from vaecf.parallel import mesh as mesh_lib
from vaecf.training.step import TrainSetup


class Shape(NamedTuple):
    """What a step's memory depends on.

    Attributes:
      rows: item rows, padding among them, over all devices.
      widths: units of the layers from the input to the output, such as
        (600, 400, 600) for 600-200-600 (mean and log-variance are 400).
      inner: weights and biases of all layers between the two item matrices,
        the input's bias among them.
      latent: units of the bottleneck.
      data: devices along the users.
      item: devices along the items.
      users: users that a device holds activations of at once.
      parts: microbatches of a device.
      slots: slots for interactions of a microbatch.
      chunk: interactions whose rows of a matrix are gathered together.
      block: items a block of the likelihood, 0 for all.
      dense: the input layer is a product of users x items.
      operand: bytes of the products' operands.
      logit: bytes of a logit.
      in_place: an all-reduce writes over its operand.
      zero: Adam's moments of the item matrices are divided over the users'
        axis too.
    """

    rows: int
    widths: tuple[int, ...]
    inner: int
    latent: int
    data: int
    item: int
    users: int
    parts: int
    slots: int
    chunk: int
    block: int
    dense: bool
    operand: int
    logit: int
    in_place: bool
    zero: bool


class Bytes(NamedTuple):
    """Bytes of a step on a device, by what they are.

    Attributes:
      parameters: float32.
      moments: Adam's two, float32.
      batch: the batch's slots, of all microbatches.
      gradients: float32; twice when microbatches are summed.
      activations: users x units of the layers, and users x items or block.
      reduced: what the all-reduce writes, where that is not in place.
    """

    parameters: int
    moments: int
    batch: int
    gradients: int
    activations: int
    reduced: int

    @property
    def state(self) -> int:
        """What stays between two steps."""
        return self.parameters + self.moments

    @property
    def total(self) -> int:
        """At the worse of two moments: the backward pass and the reduction."""
        return (
            self.state
            + self.batch
            + self.gradients
            + max(self.activations, self.reduced)
        )


def parameters(shape: Shape) -> int:
    """Parameters on a device."""
    items = shape.rows // shape.item
    return items * (shape.widths[0] + shape.widths[-1] + 1) + shape.inner


def step_bytes(shape: Shape) -> Bytes:
    """The formula."""
    items = shape.rows // shape.item
    own = parameters(shape)
    # Of the matrices over the items; the rest is on every device.
    divided = items * (shape.widths[0] + shape.widths[-1]) if shape.zero else 0
    users = shape.users
    # Each layer's input is kept for the backward pass, beside its gradient;
    # the noise, the code's two halves and the sample are of the bottleneck.
    layers = users * 4 * (2 * sum(shape.widths) + 4 * shape.latent)
    if shape.block:
        # A block's logits and their gradient; the padding's mask beside the
        # bias, over all items.
        block = min(shape.block, items)
        likelihood = users * block * (shape.logit + 4 + shape.operand)
        likelihood += 4 * items
    else:
        likelihood = users * items * (shape.logit + shape.operand)
        if shape.operand < shape.logit:
            # The gradient before its cast to the products' operands.
            likelihood += users * items * shape.logit
    inputs = users * items * shape.operand if shape.dense else 0
    # Positions, kept items and rows of the interactions, in and out.
    slots = 32 * shape.slots
    if shape.block or not shape.dense:
        # A row of the item matrix and one of the hidden layer each.
        widest = max(shape.widths[0], shape.widths[-1])
        slots += 2 * 4 * min(shape.chunk, shape.slots) * widest
    return Bytes(
        parameters=4 * own,
        moments=2 * 4 * (own - divided + divided // shape.data),
        batch=shape.parts * (8 * shape.slots + 4 * users),
        gradients=4 * own * (2 if shape.parts > 1 else 1),
        activations=layers + likelihood + inputs + slots,
        reduced=0 if shape.in_place or shape.data == 1 else 4 * own,
    )


def shape_of(setup: TrainSetup, batch_size: int, slots: int) -> Shape:
    """The shape of a problem as this backend compiles it.

    Args:
      setup: static.
      batch_size: users of a step, over all devices.
      slots: slots of a microbatch.
    """
    model = setup.whole
    latent = model.latent
    outwards = tuple(reversed(model.hidden))
    code = (2 if "VAE" in type(model).__name__ else 1) * latent
    inwards = (*model.hidden, code)
    layers = [*itertools.pairwise(inwards)]
    layers += [*itertools.pairwise((latent, *outwards))]
    parts = setup.parts(batch_size)
    on_cpu = jax.default_backend() == "cpu"
    operand = model.dtype(0).itemsize
    sizes: dict[str, int] = dict(setup.mesh.shape)
    return Shape(
        rows=model.item_rows,
        widths=(*inwards, *outwards),
        inner=inwards[0] + sum(a * b + b for a, b in layers),
        latent=latent,
        data=sizes[mesh_lib.DATA],
        item=sizes[mesh_lib.ITEM],
        users=-(-batch_size // parts),
        parts=parts // sizes[mesh_lib.DATA],
        slots=slots,
        chunk=bag_of_items.chunk_size(slots),
        block=model.item_block,
        dense=model.input_lowering == "dense",
        operand=operand,
        logit=4 if on_cpu or model.item_block else operand,
        in_place=not on_cpu,
        zero=setup.zero,
    )


def as_dict(sizes: Bytes) -> dict[str, Any]:
    """For the JSON."""
    return {**sizes._asdict(), "total": sizes.total}
