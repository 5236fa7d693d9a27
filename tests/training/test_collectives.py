"""What devices send each other in a compiled step, and hold, by hand.

Eight devices are more than tests have, so the counting is a command of its
own process, as anybody calls it.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ITEMS, ROWS, FIRST, LATENT, BATCH = 20_108, 20_224, 600, 200, 4096
INNER = FIRST + 600 * 400 + 400 + 200 * 600 + 600
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
VARIANTS = {
    "blocks": ("--precision=fp32", "--input=gather", "--item_block=1024"),
    "microbatches": ("--precision=fp32", "--input=gather", "--microbatch=256"),
    "dense": ("--precision=bf16", "--input=dense"),
}


def counted(path: pathlib.Path, *flags: str) -> list[dict]:
    """The steps that scaling.py counts."""
    subprocess.run(
        [
            sys.executable,
            ROOT / "experiments" / "benchmark" / "scaling.py",
            f"--json={path}",
            "--noweak",
            *flags,
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=250,
    )
    return json.loads(path.read_text())["strong"]


@pytest.fixture(scope="module", params=list(VARIANTS))
def steps(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("counted") / "scaling.json"
    meshes = ",".join(f"{data}x{item}" for data, item in MESHES)
    found = counted(
        path,
        f"--meshes={meshes}",
        f"--batch_size={BATCH}",
        *VARIANTS[request.param],
    )
    assert [tuple(s["mesh"].values()) for s in found] == MESHES
    return request.param, found


def over(step: dict, axis: str) -> int:
    return sum(
        c["bytes"] * c["trips"]
        for c in step["collectives"]
        if c["axis"] == axis
    )


@pytest.mark.slow
def test_nothing_large_is_gathered(steps):
    """Sums, and numbers of each user; nothing as large as users x items."""
    _, found = steps
    for step in found:
        data, item = step["mesh"].values()
        users = BATCH // data // step["microbatches"]
        for c in step["collectives"]:
            assert c["trips_known"], c
            if c["op"] == "all-gather":
                assert c["axis"] == "item", c
                assert c["largest"] == item * 3 * users
                continue
            assert c["op"] == "all-reduce", c
            if c["axis"] == "item":
                assert c["largest"] == users * FIRST, c
            elif c["axis"] == "data":
                assert c["largest"] in (1, ROWS // item * FIRST), c


@pytest.mark.slow
def test_gradients_are_summed_over_the_users_once(steps):
    """A shard's gradients in float32, two sums of the loss, and the users."""
    _, found = steps
    for step in found:
        data, item = step["mesh"].values()
        gradients = ROWS // item * (2 * FIRST + 1) + INNER
        assert step["parameters"] == gradients
        expected = 4 * (gradients + 2 + 1) if data > 1 else 0
        assert over(step, "data") == expected, step["mesh"]
        for c in step["collectives"]:
            # Behind the microbatches, not once for each.
            assert c["axis"] != "data" or c["trips"] == 1, c


@pytest.mark.slow
def test_over_the_items_go_hidden_layers_and_numbers_a_user(steps):
    """Partial sums of both outer layers; three numbers a user and shard.

    In float32, half precision too: that is how a CPU sums bfloat16.
    """
    _, found = steps
    for step in found:
        data, item = step["mesh"].values()
        users = BATCH // data
        numbers = 3 * item  # maximum, sum of exponentials, targets' logits
        expected = 4 * users * (2 * FIRST + numbers) if item > 1 else 0
        assert over(step, "item") == expected, step["mesh"]
        for c in step["collectives"]:
            if c["axis"] == "item":
                assert c["trips"] == step["microbatches"], c


@pytest.mark.slow
def test_products_are_those_of_the_formula(steps):
    """The decoder three times, four in blocks; nothing twice on two devices.

    A last block that is not whole is outside the loop: XLA keeps its logits.
    """
    name, found = steps
    for step in found:
        assert step["flop"] == step["flop_formula"], step["mesh"]
        data, item = step["mesh"].values()
        users = BATCH // data
        decoder = 3 * 2 * FIRST * (ROWS // item) * users
        in_loop = 2 * FIRST * (ROWS // item // 1024 * 1024) * users
        inner = 3 * 2 * users * (600 * 400 + 200 * 600)
        bias = 2 * 8 * users * (ROWS // item)
        expected = decoder + inner
        expected += in_loop if name == "blocks" else bias
        if name == "dense":
            expected += decoder // 3 * 2
        assert step["flop"] == expected


@pytest.mark.slow
def test_memory_is_about_the_formula(steps):
    _, found = steps
    for step in found:
        formula = step["memory_formula"]["total"]
        assert step["memory"]["total"] == pytest.approx(formula, rel=0.2)


@pytest.mark.slow
def test_zero_scatters_gradients_and_gathers_weights(tmp_path):
    """Of the two item matrices only, over the users' axis only."""
    found = counted(
        tmp_path / "zero.json",
        "--zero",
        "--meshes=8x1,4x2",
        f"--batch_size={BATCH}",
        *VARIANTS["blocks"],
    )
    for step in found:
        data, item = step["mesh"].values()
        matrix = 4 * ROWS // item * FIRST
        by_op: dict[str, list[int]] = {}
        for c in step["collectives"]:
            if c["axis"] == "data":
                by_op.setdefault(c["op"], []).append(c["bytes"])
        # What a ring's share is taken of: the whole, on either way.
        assert by_op["reduce-scatter"] == [matrix] * 2
        assert by_op["all-gather"] == [matrix] * 2
        rest = 4 * (ROWS // item + INNER + 2 + 1)
        assert sum(by_op["all-reduce"]) == rest
        assert len(by_op) == 3
        # Moments are divided, weights and gradients are not.
        formula = step["memory_formula"]
        own = step["parameters"]
        assert formula["parameters"] == 4 * own
        assert formula["moments"] == 8 * own - 4 * matrix // data * (data - 1)
        assert step["memory"]["total"] == pytest.approx(
            formula["total"], rel=0.2
        )


@pytest.mark.slow
def test_ten_million_items_on_eight_devices(tmp_path):
    """Nothing is allocated; within 15 % of the formula."""
    found = counted(
        tmp_path / "large.json",
        "--meshes=1x8,2x4,8x1",
        "--items=10000000",
        "--hidden=16",
        "--latent=16",
        "--batch_size=512",
        "--item_block=16384",
        "--input=gather",
        "--precision=fp32",
    )
    for step in found:
        formula = step["memory_formula"]["total"]
        assert step["memory"]["total"] == pytest.approx(formula, rel=0.15)
        item = step["mesh"]["item"]
        inner = 16 + 16 * 32 + 32 + 16 * 16 + 16
        own = 10_000_000 // item * 33 + inner
        assert step["parameters"] == own
        # Weights, two moments, gradients: 16 bytes a parameter.
        assert step["memory"]["total"] > 16 * own
