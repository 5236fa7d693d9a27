"""The device mesh, and how arrays are sharded over it.

The mesh axis 'data' shards users. The axis 'item' shards the rows of the input
weights and the columns of the output weights. Optimiser moments are sharded
like their parameters, and optionally over 'data' as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vaecf.errors import VaecfError

DATA, ITEM = "data", "item"

# Item dimensions are padded to a multiple of this, which suits tensor cores.
ITEM_MULTIPLE = 128


def make_mesh(data: int = -1, item: int = 1) -> Mesh:
    """Returns a mesh ('data', 'item') over the devices.

    One size may be -1, which uses all remaining devices. Otherwise the mesh
    has the first data x item devices.

    Raises:
      VaecfError: a size is neither -1 nor positive, the sizes do not fit the
        number of devices, or a process would have no device.
    """
    devices = jax.devices()
    n_devices = len(devices)
    asked = f"config.mesh.data={data} with config.mesh.item={item}"
    rest = -1 in (data, item)
    if min(data, item) < -1 or 0 in (data, item) or data == item == -1:
        raise VaecfError(f"{asked}: one is at least 1, the other may be -1")
    if data == -1:
        data = n_devices // item
    if item == -1:
        item = n_devices // data
    if not 0 < data * item <= n_devices or (rest and data * item < n_devices):
        raise VaecfError(
            f"{asked} does not fit the {n_devices} devices: the product must "
            "not be larger, and the other size must divide it if one is -1"
        )
    if data * item < n_devices and jax.process_count() > 1:
        raise VaecfError(
            f"{asked} leaves devices unused: several processes must use all "
            f"of their {n_devices} devices"
        )
    return jax.make_mesh(
        (data, item),
        (DATA, ITEM),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * item],
    )


def platform(mesh: Mesh) -> str:
    """Returns the platform of a mesh's devices, see `platform_of`."""
    return platform_of(mesh.devices.flat[0])


def platform_of(device: Any) -> str:
    """Returns 'cpu', 'gpu', 'old_gpu' or another platform of JAX.

    An old GPU is one that Triton does not write kernels for: NVIDIA's before
    compute capability 8.0, and those of others.
    """
    name: str = device.platform
    capability = getattr(device, "compute_capability", "")
    major = re.match(r"(\d+)\.\d+$", capability)
    if name == "gpu" and (major is None or int(major[1]) < 8):
        return "old_gpu"
    return name


def on_cpu(platform: str | None) -> bool:
    """Returns whether a platform is a CPU; None means JAX's default."""
    return (platform or jax.default_backend()) == "cpu"


def has_triton(platform: str | None) -> bool:
    """Returns whether Triton writes kernels for it; None: JAX's default."""
    return (platform or platform_of(jax.devices()[0])) == "gpu"


def padded_items(n_items: int, item_shards: int = 1) -> int:
    """Returns the size of the padded item dimension for some item shards."""
    multiple = math.lcm(ITEM_MULTIPLE, item_shards)
    return -(-n_items // multiple) * multiple


def pad_items(array: np.ndarray) -> np.ndarray:
    """Returns a float32 copy whose last axis, the items, is padded with zeros.

    Zeros keep products finite. Ranking masks padding items whatever their
    scores are.
    """
    *rest, n_items = array.shape
    padded = np.zeros((*rest, padded_items(n_items)), np.float32)
    padded[..., :n_items] = array
    return padded


def local_data_shards(mesh: Mesh) -> list[int]:
    """Returns the data shards that this process has devices of."""
    return [
        shard
        for shard, devices in enumerate(mesh.devices)
        if any(d.process_index == jax.process_index() for d in devices)
    ]


def specs(tree: Any, partition: Mapping[str, tuple[str | None, ...]]) -> Any:
    """Returns the PartitionSpec of every leaf of parameters or moments.

    A leaf, for example a moment of Adam, belongs to the parameter whose name
    ends the leaf's path. All other leaves (counts, scales) are replicated.
    `partition` holds the mesh axis of each dimension by parameter name, such
    as `mult_vae.PARTITION`.
    """

    def spec(path: tuple, leaf: Any) -> P:
        name = getattr(path[-1], "key", None) if path else None
        axes = partition.get(name) if isinstance(name, str) else None
        if axes is None or len(axes) != len(leaf.shape):
            return P()
        return P(*axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def spread(shapes: Any, tree_of_specs: Any, shards: int, items: int) -> Any:
    """Returns specs that shard item matrices over 'data' as well.

    'data', with `shards` devices, is added to the item dimension if it divides
    that, else to the other dimension. All other arrays keep their specs: they
    are small, and each would need a collective of its own.
    """

    def add(leaf: Any, spec: P) -> P:
        axes = list(spec) + [None] * (len(leaf.shape) - len(spec))
        divides = [
            d
            for d, size in enumerate(leaf.shape)
            if size % (shards * (items if axes[d] else 1)) == 0 and size
        ]
        if not divides or shards == 1 or ITEM not in axes or len(axes) < 2:
            return spec
        # Prefer the item dimension. If another one is sharded beside it, XLA
        # gathers over all devices instead of over those of the 'data' axis.
        best = max(divides, key=lambda d: axes[d] is not None)
        axes[best] = (axes[best], DATA) if axes[best] else DATA
        return P(*axes)

    return jax.tree.map(add, shapes, tree_of_specs)


def resize_items(
    tree: Any, partition: Mapping[str, tuple[str | None, ...]], rows: int
) -> Any:
    """Returns host arrays with item dimensions cut or padded to `rows`.

    `rows` is at least the number of items, so that only padding is cut off.
    """

    def resize(x: Any, spec: P) -> Any:
        axes = list(spec)
        if ITEM not in axes or x.shape[axes.index(ITEM)] == rows:
            return x
        dimension = axes.index(ITEM)
        kept = np.take(x, range(min(rows, x.shape[dimension])), dimension)
        missing = [(0, 0)] * x.ndim
        missing[dimension] = (0, rows - kept.shape[dimension])
        return np.pad(kept, missing)

    return jax.tree.map(resize, tree, specs(tree, partition))


def axis(mesh: Mesh, name: str) -> str | None:
    """Returns `name` if that axis has several devices, else None.

    An axis of one device needs no collective.
    """
    return name if mesh.shape[name] > 1 else None


def item_axis(array: jax.Array) -> str | None:
    """Returns 'item' if an array varies over that mesh axis, else None."""
    return ITEM if ITEM in varying_axes(array) else None


def item_offset(n_local: int, item_axis: str | None) -> jax.Array | int:
    """Returns the global index of this shard's first item."""
    return lax.axis_index(item_axis) * n_local if item_axis else 0


def varying_axes(*arrays: jax.Array) -> tuple[str, ...]:
    """Returns the mesh axes over which any array varies in `shard_map`."""
    axes = (jax.typeof(x).manual_axis_type.varying for x in arrays)
    return tuple(sorted(set().union(*axes)))


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns arrays marked as varying over mesh axes.

    The derivative of the mark sums cotangents over the axes that it adds. This
    is the all-reduce of the gradient.
    """

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def on_mesh(
    mesh: Mesh, local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns `jax.shard_map` over the axes with more than one device.

    Collectives over an axis of one device would still copy data on a CPU. On
    a single device `local`, which names axes by `axis`, is returned unchanged.
    """
    names = [name for name in (DATA, ITEM) if axis(mesh, name)]
    if not names:
        return local

    def without_single(spec: P) -> P:
        axes = (a if isinstance(a, tuple) else (a,) for a in spec)
        kept = [tuple(name for name in a if name in names) for a in axes]
        return P(*(a if len(a) > 1 else (a[0] if a else None) for a in kept))

    in_specs, out_specs = jax.tree.map(without_single, (in_specs, out_specs))
    # shard_map's axis_names would leave the other axes to XLA. With them,
    # bfloat16 sums on a CPU crash the process (jax 0.10).
    auto = (AxisType.Auto,) * len(names)
    several = Mesh(mesh.devices.squeeze(), names, axis_types=auto)
    return jax.shard_map(
        local, mesh=several, in_specs=in_specs, out_specs=out_specs
    )


def shardings(mesh: Mesh, tree_of_specs: Any) -> Any:
    """Returns the NamedSharding of every PartitionSpec."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), tree_of_specs)
