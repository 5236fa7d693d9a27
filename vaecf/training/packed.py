"""The state of training as the steps of a dispatch on a GPU keep it.

A GPU launches a kernel for the update of every array, and launches bound small
steps. During the steps of a dispatch, the small arrays of the parameters and of
the moments are therefore parts of one vector each, which a single kernel
updates. In half precision, the kernel that updates a large matrix also writes
the rounded copy that the next step multiplies. The values are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vaecf.models import losses, mult_vae
from vaecf.parallel import mesh as mesh_lib
from vaecf.training.state import TrainSetup, TrainState

_LARGEST = 2**19  # entries of a small array


class Packing(NamedTuple):
    """Functions of trees with the structure of the trained parameters.

    A packed tree keeps its top-level names, by which an optimiser knows a group
    of parameters: the first one has all arrays.
    """

    pack: Callable[[Any], Any] = lambda tree: tree
    unpack: Callable[[Any], Any] = lambda tree: tree
    pack_state: Callable[[TrainState], TrainState] = lambda state: state
    unpack_state: Callable[[TrainState], TrainState] = lambda state: state
    pack_specs: Callable[[Any], Any] = lambda tree: tree  # PartitionSpecs


NONE = Packing()


def packing(setup: TrainSetup, params: Any) -> Packing:
    """Returns the packing for the steps of a setup; none on a CPU."""
    trained = setup.trained(params)
    structure: Any
    leaves, structure = jax.tree.flatten(trained)
    specs = mesh_lib.specs(trained, mult_vae.PARTITION)
    names, one = sorted(trained), setup.mesh.shape[mesh_lib.ITEM] == 1
    is_small = [
        x.size <= _LARGEST and (one or not any(spec))
        for x, spec in zip(leaves, structure.flatten_up_to(specs))
    ]
    if mesh_lib.on_cpu(setup.model.platform) or sum(is_small) < 2:
        return NONE
    ends = np.cumsum([x.size for x, s in zip(leaves, is_small) if s])[:-1]

    def pack(tree: Any) -> Any:
        arrays = structure.flatten_up_to(tree)
        vector = [x.reshape(-1) for x, s in zip(arrays, is_small) if s]
        large = [x for x, s in zip(arrays, is_small) if not s]
        packed = (jnp.concatenate(vector), large)
        return dict.fromkeys(names, ()) | {names[0]: packed}

    def unpack(packed: Any) -> Any:
        vector, large = packed[names[0]]
        parts, large = iter(jnp.split(vector, ends)), iter(large)
        return structure.unflatten(
            next(parts).reshape(x.shape) if s else next(large)
            for x, s in zip(leaves, is_small)
        )

    def pack_specs(tree: Any) -> Any:
        specs = structure.flatten_up_to(tree)
        large = [x for x, s in zip(specs, is_small) if not s]
        return dict.fromkeys(names, ()) | {names[0]: (P(), large)}

    packed_structure = jax.tree.structure(jax.eval_shape(pack, trained))

    def of_state(change: Any, structure: Any, state: TrainState) -> TrainState:
        def is_tree(x: Any) -> bool:
            return jax.tree.structure(x) == structure

        changed = change(setup.trained(state.params))
        return state._replace(
            params={**state.params, **changed},
            opt_state=jax.tree.map(
                lambda x: change(x) if is_tree(x) else x,
                state.opt_state,
                is_leaf=is_tree,
            ),
        )

    return Packing(
        pack,
        unpack,
        lambda state: of_state(pack, structure, state),
        lambda state: of_state(unpack, packed_structure, state),
        pack_specs,
    )


class Copies(NamedTuple):
    """Rounded copies of the trained matrices, made when these are updated."""

    rounded: Callable[[jax.Array], jax.Array]  # a parameter as steps use it
    # Function from packed parameters to them, and their copies to keep.
    write: Callable[[Any], tuple[Any, Any]]
    # Function from packed parameters, and kept copies, to float32 parameters
    # of the copies' values.
    read: Callable[[Any, Any], Any]


def copies(setup: TrainSetup, params: Any, packing: Packing) -> Copies:
    """Returns the copies for the steps of a setup.

    With `setup.zero`, each device of the 'data' axis keeps its part of the
    matrices alone, and the copies are gathered before each step.
    """
    dtype = setup.model.dtype

    def rounded(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.ndim > 1 else x

    half = jnp.dtype(dtype).itemsize < 4
    if (
        mesh_lib.on_cpu(setup.model.platform)
        or not (half or setup.zero)
        # The regulariser takes the float32 parameters.
        or not losses.is_left_out(setup.loss.weight_decay)
    ):
        return Copies(rounded, lambda params: (params, None), lambda p, _: p)
    trained = setup.trained(params)
    specs = mesh_lib.specs(trained, mult_vae.PARTITION)
    whole = mesh_lib.shardings(setup.mesh, packing.pack_specs(specs))
    parts = setup.moment_specs(trained, specs)
    parts = mesh_lib.shardings(setup.mesh, packing.pack_specs(parts))

    def place(tree: Any, places: Any) -> Any:
        if not setup.zero:
            return tree
        return jax.tree.map(
            lambda x, place: (
                jax.lax.with_sharding_constraint(x, place) if x.ndim > 1 else x
            ),
            tree,
            places,
        )

    def write(params: Any) -> tuple[Any, Any]:
        params = place(params, parts)
        return params, jax.tree.map(
            lambda x: rounded(x) if half and x.ndim > 1 else None, params
        )

    def read(params: Any, copied: Any) -> Any:
        merged = jax.tree.map(
            lambda x, copy: x if copy is None else copy, params, copied
        )
        merged = place(merged, whole)
        return jax.tree.map(lambda x: x.astype(jnp.float32), merged)

    return Copies(rounded, write, read)
