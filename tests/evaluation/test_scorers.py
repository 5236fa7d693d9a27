"""The scorer of a model, in every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaecf.evaluation import scorers
from vaecf.evaluation.ranking import Ranker
from vaecf.models import mult_vae, sparse_batch
from vaecf.parallel import mesh as mesh_lib

N_USERS, N_ITEMS = 5, 200
HISTORY = np.arange(N_USERS * 8, dtype=np.int32) * 5
INDPTR = np.arange(N_USERS + 1, dtype=np.int64) * 8


def make(dtype, lowering="gather"):
    """(module over all items, parameters with spread-out scores)."""
    module = mult_vae.MultVAE(
        n_items=N_ITEMS,
        item_rows=mesh_lib.padded_items(N_ITEMS),
        hidden=(24,),
        latent=6,
        input_lowering=lowering,
        dtype=dtype,
    )
    params = module.init(jax.random.key(0), batch())["params"]
    return module, jax.tree.map(lambda x: x * 2, params)


def batch():
    users = np.arange(N_USERS, dtype=np.int32)
    host = sparse_batch.assemble_on_host(INDPTR, HISTORY, users, 256)
    return jax.tree.map(jnp.asarray, host)


@pytest.mark.parametrize(
    ("batch_size", "lowering", "platform"),
    [
        (1, "gather", "cpu"),
        (1, "dense", "cpu"),
        (8, "gather", "cpu"),
        (1, "dense", "gpu"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_the_modules(dtype, batch_size, lowering, platform):
    """The shortcuts of rankers do not change the scores."""
    module, params = make(jnp.dtype(dtype), lowering)
    expected = module.apply({"params": params}, batch(), method="scores")
    expected = np.asarray(expected)[:, :N_ITEMS]
    scorer = scorers.model(module.clone(platform=platform))
    ranker = Ranker(
        scorer, mesh_lib.make_mesh(1, 1), N_ITEMS, exclude_seen=False
    )
    got = ranker(
        scorers.ModelParams(params), INDPTR, HISTORY, batch_size=batch_size
    )
    scores = np.take_along_axis(expected, got.item_UK, axis=1)
    # The hidden layers may round differently.
    atol = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert expected.std() > 10 * atol
    np.testing.assert_allclose(got.score_UK, scores, rtol=0, atol=atol)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shards_module_on_one_device_and_on_several(dtype, mesh):
    whole, params = make(jnp.dtype(dtype))
    shard = whole.clone(
        item_rows=whole.item_rows // mesh[1], item_axis=mesh_lib.ITEM
    )
    got, expected = (
        Ranker(scorers.model(module), mesh_lib.make_mesh(*size), 30)(
            scorers.ModelParams(params), INDPTR, HISTORY, batch_size=4
        )
        for module, size in ((shard, mesh), (whole, (1, 1)))
    )
    atol = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(got.score_UK, expected.score_UK, atol=atol)
    if dtype == "float32":
        np.testing.assert_array_equal(got.item_UK, expected.item_UK)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_query_converts_no_item_matrix(dtype):
    """The product reads the stored matrix, in every half precision."""
    module, params = make(jnp.dtype(dtype))
    scorer = scorers.model(module)
    ranker = Ranker(scorer, mesh_lib.make_mesh(1, 1), 10)
    ranker(scorers.ModelParams(params), INDPTR[:2], HISTORY[:8], batch_size=1)
    (program,) = ranker._programs.values()
    rows = mesh_lib.padded_items(N_ITEMS)
    # Only results in the entry computation are stored in memory.
    entry = program.as_text().split("\nENTRY ")[1].splitlines()[1:]
    results = [line.split(" = ")[1] for line in entry if " = " in line]
    assert any("parameter(" in made for made in results)
    for made in results:
        if made.startswith((f"f32[24,{rows}]", f"f32[{rows},24]")):
            assert "parameter(" in made, made
