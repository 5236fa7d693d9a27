"""The counting of collectives and products, against programs counted by hand."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.benchmark import (  # noqa: E402
    collectives,
    hardware,
    memory,
    scaling_tables,
)
from vaecf.parallel import mesh as mesh_lib

MESH = {"data": 2, "item": 2}


def counted(local, *shapes, in_specs, out_specs) -> collectives.Program:
    mesh = mesh_lib.make_mesh(2, 2)
    program = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
    arguments = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for shape, spec in zip(shapes, in_specs)
    ]
    compiled = jax.jit(program).lower(*arguments).compile()
    return collectives.count(compiled.as_text())


def test_a_sum_in_a_loop_counts_as_often_as_the_loop_runs():
    def local(x):
        def body(i, x):
            return lax.psum(jnp.sin(x), "item") * 0.5

        return lax.fori_loop(0, 7, body, x)

    program = counted(
        local, (6, 10), in_specs=(P("data"),), out_specs=P("data")
    )
    (found,) = program.collectives
    assert (found.op, found.trips, found.counted) == ("all-reduce", 7, True)
    assert found.bytes == 4 * 3 * 10 and found.largest == 30
    assert found.axis(MESH) == "item" and found.size == 2
    assert found.groups == ((0, 1), (2, 3))


def test_loops_within_loops_and_of_unknown_length():
    def local(x, n):
        def inner(i, x):
            return lax.psum(jnp.sin(x), "data")

        def outer(i, x):
            return lax.fori_loop(0, 3, inner, x) + i

        known = lax.fori_loop(0, 5, outer, x)
        return lax.fori_loop(0, n.astype(int)[0], inner, known)

    program = counted(
        local, (8,), (1,), in_specs=(P("item"), P()), out_specs=P("item")
    )
    by_trips = {c.trips: c.counted for c in program.collectives}
    assert by_trips == {15: True, 1: False}
    assert {c.axis(MESH) for c in program.collectives} == {"data"}
    assert all(c.groups == ((0, 2), (1, 3)) for c in program.collectives)


def test_every_kind_of_collective():
    def local(x):
        gathered = lax.all_gather(x, "data", tiled=True)
        scattered = lax.psum_scatter(gathered, "item", tiled=True)
        highest = lax.pmax(x, ("data", "item"))
        turned = lax.ppermute(jnp.sin(x), "item", [(0, 1), (1, 0)])
        swapped = lax.all_to_all(jnp.cos(x), "data", 0, 0, tiled=True)
        return scattered + highest + turned + swapped

    spec = P(("data", "item"))
    program = counted(local, (16, 5), in_specs=(spec,), out_specs=spec)
    found = {
        c.op: (c.bytes, c.largest, c.axis(MESH), c.size)
        for c in program.collectives
    }
    own = 4 * 5
    assert found == {
        "all-gather": (4 * 2 * own, 2 * own, "data", 2),
        "reduce-scatter": (4 * 2 * own, own, "item", 2),
        "all-reduce": (4 * own, own, "data+item", 4),
        "collective-permute": (4 * own, own, "item", 2),
        "all-to-all": (4 * own, own, "data", 2),
    }


def test_products_in_loops():
    def local(x, y):
        def body(i, x):
            return jnp.tanh(x @ y)

        return lax.fori_loop(0, 4, body, x)

    program = counted(
        local,
        (64, 128),
        (128, 128),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )
    assert program.flop == 4 * 2 * 32 * 128 * 128
    assert not program.opaque and not program.collectives


def test_ways_to_write_groups():
    text = """HloModule written, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[3,4], y: f32[]) -> bf16[3,4] {
  %x = bf16[3,4]{1,0} parameter(0)
  %y = f32[] parameter(1)
  %one = (bf16[3,4]{1,0}, /*index=1*/f32[]) all-reduce(%x, %y), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %two = bf16[3,4]{1,0} all-reduce(%x), replica_groups=[2,2]<=[4], to_apply=%add
  %three = bf16[3,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  %four = bf16[3,4]{1,0} all-reduce-start(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %done = bf16[3,4]{1,0} all-reduce-done(%four)
}
"""
    found = collectives.count(text).collectives
    assert [c.axis(MESH) for c in found] == ["data", "item", "data+item", ""]
    assert [c.bytes for c in found] == [28, 24, 24, 24]
    with pytest.raises(ValueError, match="no axes"):
        found[0].axis({"data": 4, "item": 1})
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives.count("module @stable {}")


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        (range(8), 450e9),  # one node
        (range(16), 400e9),  # two: eight ports each
        (range(0, 64, 8), 50e9),  # one device a node: its own port
        ((0, 1, 8, 9), 100e9),
    ],
)
def test_bandwidth_of_a_group(group, rate):
    h100 = hardware.HARDWARE["h100"]
    assert hardware.bandwidth(h100, list(group)) == pytest.approx(0.8 * rate)


def test_time_of_a_step_by_hand():
    step = {
        "mesh": {"data": 8, "item": 1},
        "batch_size": 800,
        "item_rows": 1000,
        "flop": 0.75 * 989e12,
        "parameters": 10**9,
        "gathered_bytes": 0,
        "collectives": [
            {
                "op": "all-reduce",
                "axis": "data",
                "devices": 8,
                "bytes": 4 * 10**9,
                "trips": 1,
                "group": list(range(8)),
            }
        ],
    }
    h200 = hardware.HARDWARE["h200"]
    took = hardware.seconds(step, h200)
    assert took.products == pytest.approx(1)
    assert took.passes == pytest.approx(6 * 2 * 100 * 1000 / (0.85 * 4.8e12))
    assert took.optimizer == pytest.approx(28e9 / (0.85 * 4.8e12))
    assert took.data == pytest.approx(7 / 4 * 4e9 / (0.8 * 450e9))
    assert took.latency == pytest.approx(215e-6)
    assert took.total == pytest.approx(sum(took))
    half = hardware.seconds(step, h200, choice=hardware.Choice(half=True))
    assert half.data == pytest.approx(took.data / 2)
    zero = hardware.seconds(step, h200, choice=hardware.Choice(zero=True))
    assert zero.optimizer == pytest.approx(took.optimizer * 7.5 / 28)
    # Scattered and gathered, the bytes are those of the sum; bf16 halves the
    # first half of them.
    assert zero.data == pytest.approx(took.data)
    assert zero.latency == pytest.approx(took.latency + 4 * 15e-6)
    both = hardware.Choice(half=True, zero=True)
    assert hardware.seconds(step, h200, choice=both).data == pytest.approx(
        0.75 * took.data
    )


def test_memory_by_hand():
    shape = memory.Shape(
        rows=1024,
        widths=(16, 8, 16),
        inner=300,
        latent=4,
        data=2,
        item=4,
        users=32,
        parts=1,
        slots=0,
        chunk=0,
        block=0,
        dense=False,
        operand=4,
        logit=4,
        in_place=True,
        zero=False,
    )
    found = memory.step_bytes(shape)
    own = 256 * 33 + 300
    assert found.state == 12 * own and found.gradients == 4 * own
    assert found.activations == 32 * 4 * (2 * 40 + 16) + 32 * 256 * 8
    assert found.total == 16 * own + found.batch + found.activations
    zero = memory.step_bytes(shape._replace(zero=True))
    # Two matrices of 256 x 16 are halved, biases and inner layers are not.
    assert zero.moments == 8 * (256 * 16 + 256 + 300)


# --- The commands -----------------------------------------------------------


def test_scaling(tmp_path, command) -> None:
    path, page = tmp_path / "scaling.json", tmp_path / "page.md"
    done = command(
        "benchmark/scaling",
        "--devices=1,4",
        "--items=500",
        "--hidden=32",
        "--latent=8",
        "--batch_size=64",
        f"--json={path}",
    )
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    meshes = [tuple(s["mesh"].values()) for s in result["strong"]]
    assert meshes == [(1, 1), (4, 1), (2, 2), (1, 4)]
    assert [s["batch_size"] for s in result["weak"]] == [64, 256, 256, 256]
    for step in result["strong"] + result["weak"]:
        assert step["flop"] == step["flop_formula"]
    assert result["strong"][0]["collectives"] == []
    assert "H100, weak scaling" in done.out
    page.write_text(
        "Before.\n\n<!-- table: scaling scaling weak h200 -->\nold\n<!-- end -->\n\n"
        "<!-- table: scaling choices h100 4 -->\n<!-- end -->\nAfter.\n"
    )
    flags = (f"--markdown={page}", f"--results={tmp_path}")
    for _ in range(2):
        done = command("benchmark/scaling", *flags)
        assert done.status == 0, done.err
        text = page.read_text()
        assert text.startswith("Before.\n") and text.endswith("After.\n")
        assert "old" not in text and text.count("<!-- end -->") == 2
        assert "| 4 devices | 4 × 1 | 2 × 2 | 1 × 4 |" in text
        assert "| 1 | 1 × 1 | 64 |" in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--meshes=4", "--meshes like 4x2,8x1"),
        ("--meshes=64x64", "does not fit"),
        ("--batch_size=63", "does not divide"),
    ],
)
def test_scaling_refused(tmp_path, command, flag, message) -> None:
    path = tmp_path / "scaling.json"
    sizes = ("--items=500", "--hidden=32", "--latent=8", "--meshes=2x1")
    done = command("benchmark/scaling", *sizes, flag, f"--json={path}")
    assert done.status == 2 and message in done.err, done.err
    assert done.err.count("\n") == 1 and not path.exists()


def test_large_catalogue(tmp_path, command) -> None:
    path = tmp_path / "large.json"
    done = command(
        "benchmark/large_catalogue",
        "--items=3000",
        "--hidden=8",
        "--latent=4",
        "--batch_size=32",
        "--item_block=256",
        "--devices=4",
        "--mesh_item=4",
        "--steps=5",
        f"--json={path}",
    )
    assert done.status == 0, done.err
    result = json.loads(path.read_text())
    assert result["mesh"] == {"data": 1, "item": 4}
    assert result["losses"][0] == pytest.approx(result["log_items"], rel=0.01)
    assert result["losses"][-1] < result["losses"][0]
    assert result["peak_rss_bytes"] >= result["peak_rss_bytes_initialised"]


def test_the_page_shows_the_results_here() -> None:
    """docs/scaling.md is what --markdown makes of the results."""
    results = ROOT / "experiments" / "benchmark" / "results"
    text = (ROOT / "docs" / "scaling.md").read_text()
    made = scaling_tables.replace(
        text, lambda name: json.loads((results / f"{name}.json").read_text())
    )
    assert made == text
    assert text.count("<!-- table:") >= 8
