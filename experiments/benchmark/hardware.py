"""What a step takes on GPUs, predicted from what was counted.

Nothing here was measured: published figures of the hardware, each times an
efficiency that is an assumption and stands beside it. Predictions rank meshes
and say what a step waits for; a measurement may move all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Shares of the published figures that long kernels reach. Assumed: large bf16
# products are commonly seen at 70 to 80 % of an H100's peak, streaming kernels
# at 85 to 90 % of its bandwidth, NCCL's bus bandwidth at 80 to 85 % of a link.
PRODUCT_EFFICIENCY = 0.75
MEMORY_EFFICIENCY = 0.85
LINK_EFFICIENCY = 0.80
# A collective's time without bytes, within a node and between nodes, and what
# a step takes for kernels too small to count. Assumed.
NODE_LATENCY = 15e-6
NETWORK_LATENCY = 40e-6
STEP_OVERHEAD = 200e-6


class Hardware(NamedTuple):
    """A GPU in its node: published figures.

    Attributes:
      name: of the GPU.
      flops: dense FLOP/s of products in bf16, fp32 accumulation.
      memory_rate: bytes a second of its memory.
      memory_bytes: of its memory.
      link: bytes a second of NVLink, one direction.
      network: bytes a second of its own network port, one direction.
      per_node: GPUs that NVLink connects.
    """

    name: str
    flops: float
    memory_rate: float
    memory_bytes: float
    link: float
    network: float
    per_node: int


HARDWARE = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5: 1,979 TFLOP/s bf16 with
    # sparsity, so 989 without; 80 GB of HBM3 at 3.35 TB/s; NVLink 900 GB/s,
    # both directions. DGX H100 data sheet: eight GPUs, eight ConnectX-7 ports
    # of 400 Gb/s (InfiniBand NDR).
    "h100": Hardware("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9, 8),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: the same products and
    # NVLink; 141 GB of HBM3e at 4.8 TB/s. DGX H200: the same network.
    "h200": Hardware("H200", 989e12, 4.8e12, 141e9, 450e9, 50e9, 8),
}

# Passes over the array users x items beside those that the products make.
# Logits: read for the maximum, for the sum and for the gradient, written once;
# the gradient written; the input's zeros written.
_PASSES = 6
# In blocks, all of it float32 but the gradient: logits written twice, read
# three times, the gradient written.
_BLOCK_WIDTH = 5 * 4

# Bytes of a parameter that Adam moves: reads weight, gradient and two moments,
# writes weight and moments; all float32.
_ADAM = 28


class Choice(NamedTuple):
    """What could be done otherwise than the compiled step does.

    Attributes:
      half: gradients are summed over the users' axis in bf16
        (config.mesh.reduce).
      overlap: the output weights' gradients are summed while the encoder's
        are computed.
      zero: each device along the users updates its part of the moments and
        parameters: reduce-scatter, update, all-gather of float32
        (config.mesh.zero).
    """

    half: bool = False
    overlap: bool = False
    zero: bool = False


AS_COMPILED = Choice()


class Seconds(NamedTuple):
    """A step's time on a device, by what it waits for.

    Attributes:
      products: matrix products.
      passes: over users x items in memory, and over gathered rows.
      optimizer: Adam.
      data: bytes of collectives over the users' axis.
      item: the same over the items' axis.
      latency: of all collectives, and the step's own overhead.
    """

    products: float
    passes: float
    optimizer: float
    data: float
    item: float
    latency: float

    @property
    def total(self) -> float:
        """One after the other: nothing overlaps unless a Choice says so."""
        return sum(self)


def ring_share(op: str, n: int) -> float:
    """Bytes that a device sends in a ring of n, over `Collective.bytes`."""
    if n == 1:
        return 0.0
    if op == "collective-permute":
        return 1.0
    return (2 if op == "all-reduce" else 1) * (n - 1) / n


def bandwidth(hardware: Hardware, group: list[int]) -> float:
    """Bytes a second of a ring over a group of devices.

    Between nodes a device has its own port, and NCCL makes as many rings as a
    group has devices in a node, each through another port.
    """
    nodes: dict[int, int] = {}
    for device in group:
        node = device // hardware.per_node
        nodes[node] = nodes.get(node, 0) + 1
    rate = hardware.link
    if len(nodes) > 1:
        rate = min(rate, min(nodes.values()) * hardware.network)
    return LINK_EFFICIENCY * rate


def seconds(
    step: dict[str, Any],
    hardware: Hardware,
    *,
    operand: int = 2,
    item_block: int = 0,
    choice: Choice = AS_COMPILED,
) -> Seconds:
    """Predicted time of a step.

    Args:
      step: of `compiled.step`.
      hardware: of every device.
      operand: bytes of a product's operand; products in fp32 are not
        predicted.
      item_block: items a block of the likelihood.
      choice: what is done otherwise.
    """
    data = step["mesh"]["data"]
    products = step["flop"] / (PRODUCT_EFFICIENCY * hardware.flops)
    entries = step["batch_size"] // data * step["item_rows"]
    width = _BLOCK_WIDTH + operand if item_block else _PASSES * operand
    rate = MEMORY_EFFICIENCY * hardware.memory_rate
    # Sharded, a device updates its share, and receives the others' weights.
    moved = _ADAM / data + 4 if choice.zero and data > 1 else _ADAM
    wire = {"data": 0.0, "item": 0.0}
    latency = STEP_OVERHEAD
    reduced = 0.5 if choice.half else 1.0
    if choice.zero:
        reduced = (reduced + 1.0) / 2
    for collective in step["collectives"]:
        if collective["devices"] == 1:
            continue
        share = ring_share(collective["op"], collective["devices"])
        sent = share * collective["bytes"] * collective["trips"]
        took = sent / bandwidth(hardware, collective["group"])
        axis = "item" if collective["axis"] == "item" else "data"
        wire[axis] += took * (reduced if axis == "data" else 1.0)
        nodes = {d // hardware.per_node for d in collective["group"]}
        once = NODE_LATENCY if len(nodes) == 1 else NETWORK_LATENCY
        latency += collective["trips"] * once
        if choice.zero and axis == "data":
            # Of two matrices each a scatter and a gather, beside the sum.
            latency += 4 * once
    if choice.overlap:
        # Half of the bytes, behind one of the five products.
        wire["data"] -= min(wire["data"] / 2, products / 5)
    return Seconds(
        products=products,
        passes=(entries * width + step["gathered_bytes"]) / rate,
        optimizer=moved * step["parameters"] / rate,
        data=wire["data"],
        item=wire["item"],
        latency=latency,
    )
