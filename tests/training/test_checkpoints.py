"""Saved arrays restore on any mesh; damage is reported in one line."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import refuses

from vaecf.training import checkpoints, first_state
from vaecf.training import state as state_lib
from vaecf.training.checkpoints import BEST, LATEST, Checkpoints

# Of orbax's readers, when what they read is damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected():
    """Complaints of these readers belong to the test that damaged a file."""
    yield
    gc.collect()


POSITION = {"epoch": 3, "best": 0.125, "none": None, "sums": [1.5, 1e-30]}


def like(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return checkpoints.abstract(tree, jax.tree.map(lambda _: device, tree))


def test_every_dtype_comes_back(tmp_path, assert_same):
    values = np.array([0.0, 1.5, -3.0, 100.0])
    tree = {
        str(np.dtype(dtype)): jnp.asarray(values, dtype)
        for dtype in (
            jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32, jnp.int8,
            jnp.uint32, jnp.bool_,
        )
    }  # fmt: skip
    tree["special"] = jnp.array([np.nan, np.inf, -0.0, 1e-45], jnp.float32)
    tree["scalar"] = (jnp.int32(2**31 - 1), [jnp.zeros((1, 3))])
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(LATEST, 12, tree, POSITION)
    saved.close()
    again = Checkpoints(tmp_path / "checkpoints")
    back = again.restore(LATEST, like(tree))
    assert_same(back, tree)
    assert np.signbit(back["special"][2])
    assert again.position(LATEST) == POSITION
    assert again.step(LATEST) == 12 and again.step(BEST) is None
    again.close()


@pytest.fixture(scope="module")
def state_on(small, setup_of):
    """state_on(mesh): a float16 state with a random number everywhere."""

    def make(mesh):
        setup = setup_of(small(precision={"policy": "fp16"}), mesh, 21)
        rng = np.random.default_rng(5)
        values = jax.tree.map(
            lambda x: rng.normal(0, 100, x.shape).astype(x.dtype),
            state_lib.abstract_state(setup),
        )
        state = jax.device_put(values, state_lib.state_shardings(setup))
        return setup, state

    return make


@pytest.mark.parametrize("mesh", [(4, 1), (1, 1), (1, 4)])
def test_restores_onto_another_mesh(tmp_path, state_on, assert_same, mesh):
    _, state = state_on((2, 2))
    saved = Checkpoints(tmp_path)
    saved.save(LATEST, 0, state, POSITION)
    saved.save(BEST, 0, state.params, POSITION)
    setup, _ = state_on(mesh)
    back = first_state.restore_state(setup, saved)
    best = checkpoints.restore_params(saved, setup.whole, setup.mesh)
    assert_same(back, state)
    assert_same(best, state.params)
    places = jax.tree.map(lambda x: x.sharding, back)
    assert places == state_lib.state_shardings(setup)
    saved.close()


def test_which_checkpoints_are_kept(tmp_path, assert_same):
    saved = Checkpoints(tmp_path)
    for step in (1, 2, 10):
        saved.save(LATEST, step, {"x": jnp.full(3, step)}, {"epoch": step})
    # Saving a step again keeps the first checkpoint.
    saved.save(LATEST, 10, {"x": jnp.zeros(3, jnp.int32)}, {"epoch": 11})
    assert saved.position(LATEST) == {"epoch": 10}
    for step in (2, 3):
        saved.save(BEST, step, {"x": jnp.zeros(3)}, {"epoch": 2})
    saved.close()
    # The latest two, because one may be damaged; the best.
    assert {p.name for p in (tmp_path / LATEST).iterdir()} == {"2", "10"}
    assert [p.name for p in (tmp_path / BEST).iterdir()] == ["3"]
    assert (saved.step(LATEST), saved.step(BEST)) == (10, 3)
    assert_same(
        saved.restore(LATEST, like({"x": jnp.zeros(3, jnp.int32)})),
        {"x": jnp.full(3, 10)},
    )
    saved.close()


def test_opening_creates_nothing(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.step(LATEST) is None and saved.step(BEST) is None
    for which in (LATEST, BEST):
        place = rf"checkpoints.{which}: no checkpoint"
        with refuses(place):
            saved.position(which)
        with refuses(place):
            saved.restore(which, {})
    saved.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def written(tmp_path_factory, state_on):
    """A checkpoint of a whole state, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("written")
    saved = Checkpoints(directory)
    setup, state = state_on((1, 1))
    saved.save(LATEST, 7, state, POSITION)
    saved.close()
    return directory, setup


def one_line_error(directory, setup):
    saved = Checkpoints(directory)
    with refuses() as e:
        saved.position(LATEST)
        first_state.restore_state(setup, saved)
    saved.close()
    message = str(e.value)
    assert "\n" not in message and str(directory / LATEST / "7") in message
    return message


def flipped(data):
    start = len(data) // 2
    middle = bytes(byte ^ 255 for byte in data[start : start + 64])
    return data[:start] + middle + data[start + 64 :]


@pytest.mark.parametrize(
    "damaged",
    [lambda data: data[: len(data) // 2], lambda data: b"", flipped, None],
    ids=["cut", "emptied", "flipped", "removed"],
)
@pytest.mark.parametrize(
    "pattern",
    ["state/**/d/*", "state/**/manifest.ocdbt", "state/_METADATA",
     "position/metadata"],
)  # fmt: skip
def test_damage_is_one_line(tmp_path, written, pattern, damaged):
    directory = tmp_path / "copy"
    shutil.copytree(written[0], directory)
    files = [p for p in (directory / LATEST / "7").glob(pattern) if p.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        path.unlink()
        if damaged:
            path.write_bytes(damaged(data))
    one_line_error(directory, written[1])


def test_files_of_others_are_no_damage(tmp_path, written, assert_same):
    directory, setup = tmp_path / "copy", written[1]
    shutil.copytree(written[0], directory)
    for folder in ("", "state"):
        (directory / LATEST / "7" / folder / ".DS_Store").write_bytes(b"x")
    (directory / LATEST / "8").write_bytes(b"no folder")
    saved = Checkpoints(directory)
    assert saved.position(LATEST, 7) == POSITION
    original = Checkpoints(written[0])
    want = first_state.restore_state(setup, original)
    assert_same(first_state.restore_state(setup, saved, 7), want)
    saved.remove_after(LATEST, 7)
    assert saved.steps(LATEST) == [7]
    saved.close(), original.close()


@pytest.mark.parametrize(
    ("changes", "n_items"),
    [
        ({"model": {"hidden": (7,)}}, 21),
        ({"model": {"hidden": (6, 6)}}, 21),
        ({"model": {"name": "mult_dae"}}, 21),
        ({"precision": {"policy": "fp32"}}, 21),
        ({}, 129),
    ],
)
def test_another_model_is_refused(written, small, setup_of, changes, n_items):
    config = small(**{"precision": {"policy": "fp16"}, **changes})
    setup = setup_of(config, (1, 1), n_items)
    assert "does not fit this model" in one_line_error(written[0], setup)


def test_disk_that_refuses(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.step(LATEST) is None
    with refuses("cannot write a checkpoint"):
        saved.save(LATEST, 1, {"x": jnp.zeros(3)}, {})
