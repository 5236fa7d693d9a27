"""The mesh, and the sharding of a training state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles import refuses

from vaecf.models import mult_vae
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import optimizers


@pytest.mark.parametrize(
    ("data", "item", "shape"),
    [
        *((-1, 1, (8, 1)), (-1, 2, (4, 2)), (-1, 8, (1, 8))),
        *((1, -1, (1, 8)), (2, -1, (2, 4)), (8, -1, (8, 1))),
        *((n, m, (n, m)) for n, m in [(1, 1), (3, 1), (1, 3), (2, 3), (2, 2)]),
    ],
)
def test_make_mesh(data, item, shape):
    mesh = mesh_lib.make_mesh(data, item)
    assert mesh.axis_names == ("data", "item")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    first = jax.devices()[: mesh.size]
    assert {d.id for d in mesh.devices.flat} == {d.id for d in first}
    assert mesh_lib.make_mesh().devices.shape == (8, 1)  # the default


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("fit the 8", [(-1, 3), (3, -1), (-1, 16), (9, 1), (1, 9), (2, 5)]),
        ("at least 1", [(0, 1), (1, 0), (-1, 0), (0, -1), (-1, -2), (-4, -1)]),
        ("the other may be -1", [(-1, -1)]),
    ],
)
def test_impossible_meshes(message, sizes):
    for data, item in sizes:
        settings = rf"config\.mesh\.data={data} .*config\.mesh\.item={item}.*"
        with refuses(settings + message):
            mesh_lib.make_mesh(data, item)


@pytest.mark.parametrize(
    ("n_items", "shards", "rows"),
    [
        *((n, 1, rows) for n, rows in ((1, 128), (128, 128), (129, 256))),
        *((20_108, 2**n, 20_224) for n in range(8)),
        *((20_108, n, 20_352) for n in (3, 6)),  # 53 x 384
        *((n, 5, 640) for n in (1, 640)),
    ],
)
def test_padded_items(n_items, shards, rows):
    assert mesh_lib.padded_items(n_items, shards) == rows
    assert rows % shards == rows % 128 == 0


def test_pad_items_copies_and_adds_zeros():
    array = np.arange(1, 7).reshape(2, 3)
    padded = mesh_lib.pad_items(array)
    assert padded.dtype == np.float32 and padded.shape == (2, 128)
    np.testing.assert_array_equal(padded[:, :3], array)
    assert not padded[:, 3:].any()
    full = np.ones(128, np.float32)
    assert not np.shares_memory(mesh_lib.pad_items(full), full)


def test_resized_items_keep_what_is_real():
    tree = params()
    grown = mesh_lib.resize_items(tree, mult_vae.PARTITION, 20)
    shapes = jax.tree.map(np.shape, grown)
    assert shapes == jax.tree.map(np.shape, params(20))
    assert not grown["input_kernel"][16:].any()
    assert not grown["output_kernel"][:, 16:].any()
    back = mesh_lib.resize_items(grown, mult_vae.PARTITION, 16)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_moments_of_item_matrices_are_spread():
    tree = {
        "input_kernel": jnp.zeros((18, 6)),  # 9 items a shard: not for two
        "output_kernel": jnp.zeros((40, 16)),
        "output_bias": jnp.zeros(18),
        "kernel": jnp.zeros((4, 8)),
        "bias": jnp.zeros(7),
        "count": jnp.zeros(()),
        "empty": jnp.zeros((0, 2)),
    }
    specs = mesh_lib.specs(tree, mult_vae.PARTITION)
    assert mesh_lib.spread(tree, specs, 1, 2) == specs
    assert mesh_lib.spread(tree, specs, 2, 2) == {
        "input_kernel": P("item", "data"),
        "output_kernel": P(None, ("item", "data")),
        "output_bias": P("item"),
        "kernel": P(),
        "bias": P(),
        "count": P(),
        "empty": P(),
    }


def params(rows=16, units=3):
    rng = np.random.default_rng(0)
    shapes = {
        "input_kernel": (rows, units),
        "input_bias": (units,),
        "encoder_0": {"kernel": (units, 4), "bias": (4,)},
        "output_kernel": (units, rows),
        "output_bias": (rows,),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAM_SPECS = {
    "input_kernel": P("item", None),
    "input_bias": P(),
    "encoder_0": {"kernel": P(), "bias": P()},
    "output_kernel": P(None, "item"),
    "output_bias": P("item"),
}


def test_specs_of_parameters_moments_and_counts():
    assert mesh_lib.specs(params(), mult_vae.PARTITION) == PARAM_SPECS
    shapes = jax.eval_shape(params)
    assert mesh_lib.specs(shapes, mult_vae.PARTITION) == PARAM_SPECS
    tx = optimizers.dynamic_loss_scale(optax.adam(1e-3), 2.0**15, 2000)
    specs = mesh_lib.specs(tx.init(params()), mult_vae.PARTITION)
    adam = specs.inner[0]
    assert adam.mu == adam.nu == PARAM_SPECS
    counters = ("scale", "finite_steps", "skipped", "skipped_in_a_row")
    counts = [adam.count, *(getattr(specs, name) for name in counters)]
    assert counts == [P()] * 5


def test_a_name_alone_does_not_shard():
    """A moment of another rank (a factored one), or a deeper namesake."""
    tree = {
        "input_kernel": jnp.zeros(16),
        "output_bias": jnp.zeros(()),
        "output_kernel": {"kernel": jnp.zeros((3, 16))},
    }
    specs = mesh_lib.specs(tree, mult_vae.PARTITION)
    assert jax.tree.leaves(specs) == [P()] * 3
    assert mesh_lib.specs(jnp.zeros(3), mult_vae.PARTITION) == P()
