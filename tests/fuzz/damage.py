"""Flips, cuts and rewrites bytes of every file of datasets and workdirs.

What is opened afterwards is what was written, or there is a `VaecfError` of one
line. For a run there is a third way: it resumes from the checkpoint before the
damaged one and says so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import random
import shutil
import tempfile
from typing import Any

import numpy as np

from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.data import dataset as datasets
from vaecf.data import synthetic
from vaecf.reporting import writers
from vaecf.workdir import read_json

CONFIG = config_lib.replace(
    Config(),
    {
        "model.hidden": (6,),
        "model.latent": 3,
        "train.epochs": 2,
        "train.batch_size": 32,
        "eval.batch_size": 64,
        "eval.metrics": ("ndcg@10",),
        "eval.best_metric": "ndcg@10",
        "linear.l2": 10.0,
        "mesh.data": 1,
    },
)


@functools.cache
def scratch() -> pathlib.Path:
    """Returns a directory of this process, removed at its end."""
    path = tempfile.mkdtemp(prefix="vaecf-damage-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return pathlib.Path(path)


@functools.cache
def original_dataset() -> datasets.Dataset:
    """Returns a small dataset on the disk, with an oracle."""
    made = synthetic.make(
        *("synthetic",),
        n_train_users=60,
        n_held_out_users=16,
        n_items=33,
        n_groups=3,
    )
    return datasets.write_dataset(scratch() / "dataset", made)


@functools.cache
def original_run() -> pathlib.Path:
    """Returns the workdir of a trained and tested blend.

    The long campaign's has all experts, which take ten seconds to compile.
    """
    from vaecf import experiment

    workdir = scratch() / "run"
    data: dict[str, Any] = {"data.dir": str(original_dataset().path)}
    if "PYTEST_CURRENT_TEST" not in os.environ:
        data["linear.experts"] = ("ease", "graph", "ials", "slim")
    actions = experiment.Actions(train=True, test=True)
    quiet = {"log": lambda line: None}
    experiment.run(config_lib.replace(CONFIG, data), workdir, actions, **quiet)
    return workdir


@functools.cache
def original_model() -> pathlib.Path:
    """Returns the files of the run that are read after its training."""
    unread = shutil.ignore_patterns("latest")
    return shutil.copytree(original_run(), scratch() / "model", ignore=unread)


# --- Damage -----------------------------------------------------------------


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns other bytes: flipped, cut, longer, zeroed or exchanged."""
    kind = rng.choice(["bit", "byte", "cut", "longer", "zeros", "digit"])
    n, result = len(data), bytearray(data)
    at = int(rng.integers(n)) if n else 0
    if kind == "bit" and n:
        result[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte" and n:
        result[at] = int(rng.integers(256))
    elif kind == "zeros" and n:
        result[at : at + 512] = bytes(len(result[at : at + 512]))
    elif kind == "digit" and any(chr(byte).isdigit() for byte in data):
        places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        result[int(rng.choice(places))] = ord(str(rng.integers(10)))
    elif kind == "longer" or not n:
        result += rng.bytes(int(rng.integers(1, 600)))
    else:
        del result[at:]
    return bytes(result)


@functools.cache
def _tree(original: pathlib.Path) -> tuple[list[str], dict[str, bytes]]:
    """Returns the folders and files of a directory: much faster to copy."""
    paths = [original, *sorted(original.rglob("*"))]
    names = {path: str(path.relative_to(original)) for path in paths}
    folders = [names[path] for path in paths if path.is_dir()]
    files = [path for path in paths if path.is_file()]
    return folders, {names[path]: path.read_bytes() for path in files}


def damaged_copy(
    original: pathlib.Path,
    rng: random.Random,
    folder: pathlib.Path,
    pattern: str = "**/*",
) -> tuple[pathlib.Path, str]:
    """Returns a copy of a directory, and the name of its one damaged file.

    One copy of twelve is whole: it must not be refused.
    """
    copy = folder / "copy"
    folders, contents = _tree(original)
    for name in folders:
        os.mkdir(copy / name)
    for name, data in contents.items():
        (copy / name).write_bytes(data)
    if pattern == "nothing" or rng.random() < 1 / 12:
        return copy, "nothing"
    files = [path for path in copy.glob(pattern) if path.is_file()]
    file = rng.choice(sorted(f for f in files if f.name != ".lock"))
    data = file.read_bytes()
    generator = np.random.default_rng(rng.getrandbits(64))
    while (bad := damaged(data, generator)) == data:
        pass
    file.write_bytes(bad)
    return copy, str(file.relative_to(copy))


# --- What must be unchanged -------------------------------------------------


def contents(dataset: datasets.Dataset) -> dict[str, Any]:
    """Returns all that results can depend on."""
    return {
        **{name: a.tobytes() for name, a in dataset.arrays.items()},
        "items": dataset.items.ids.tolist(),
        "users": dataset.users.ids.tolist(),
        "manifest": dataset.manifest,
    }


def loaded(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns results, and all that recommendations depend on."""
    import jax

    from vaecf.evaluation import per_user
    from vaecf.parallel import mesh as mesh_lib
    from vaecf.serving import trained_model

    model = trained_model.load(workdir, mesh=mesh_lib.make_mesh(1, 1))
    frames = per_user.read(workdir / "per_user.parquet")
    writers.read_records(workdir / "metrics.jsonl")  # a log has no digest
    arrays = jax.tree.leaves_with_path(model.scorer_params)
    return {
        **{jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in arrays},
        "items": model.items.ids.tolist(),
        "config": model.config,
        "manifest": model.manifest,
        "progress": model.progress,
        "results": read_json(workdir / "results.json"),
        "per user": {name: f.to_dicts() for name, f in frames.items()},
    }


@functools.cache
def wanted(what: str) -> Any:
    """Returns the undamaged results."""
    if what == "dataset":
        return contents(original_dataset())
    if what == "model":
        return loaded(original_run())
    newest = resumed(original_run())
    copy = shutil.copytree(original_run(), scratch() / "earlier")
    shutil.rmtree(copy / "checkpoints" / "latest" / "4")
    return dict([newest, resumed(copy)])


@functools.cache
def _setup() -> Any:
    from vaecf.parallel import mesh as mesh_lib
    from vaecf.training import state as state_lib

    n_items = original_dataset().n_items
    return state_lib.make_setup(CONFIG, n_items, mesh_lib.make_mesh(1, 1))


def resumed(workdir: pathlib.Path) -> tuple[int, list[bytes]]:
    """Returns the step and arrays with which training would go on."""
    import jax

    from vaecf.training import first_state
    from vaecf.training.checkpoints import Checkpoints

    saved = Checkpoints(workdir / "checkpoints")
    with contextlib.closing(saved):
        _, state = first_state.resume(
            _setup(), saved, steps=2, log=lambda line: None
        )
    arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    return int(state.step), arrays


# --- Targets ----------------------------------------------------------------


def dataset(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages a dataset and opens it as training does."""
    original = original_dataset().path
    copy, name = damaged_copy(original, rng, folder)
    for _ in range(2):  # what was remembered must not hide the damage
        found = contents(datasets.find_dataset(copy))
        assert found == wanted("dataset"), f"{name}: another dataset"
    return "unchanged"


def structure(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages a dataset's arrays; all that opens can be computed with."""
    original = original_dataset().path
    copy, name = damaged_copy(original, rng, folder, "t*.npy")
    for matrix in datasets.open_dataset(copy).matrices.values():
        rows = matrix.to_scipy()
        rows.check_format()
        assert (np.diff(rows.indptr) >= 0).all(), name
        assert rows.has_canonical_format, name
    return "sound"


def model(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages a workdir and loads the model."""
    copy, name = damaged_copy(original_model(), rng, folder)
    assert loaded(copy) == wanted("model"), f"{name}: another model"
    return "unchanged"


def resume(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages the checkpoints and resumes training."""
    # The older of the latest two is read if the newer is damaged.
    newer, best = "checkpoints/latest/4/**/*", "checkpoints/best/**/*"
    pattern = rng.choice([newer, best] * 5 + ["checkpoints/**/*"])
    copy, name = damaged_copy(original_run(), rng, folder, pattern)
    step, arrays = resumed(copy)
    assert step in (2, 4)
    assert arrays == wanted("resume")[step], f"{name}: another state"
    if step == 4:
        return "unchanged"
    # The damaged checkpoint is gone.
    assert os.listdir(copy / "checkpoints" / "latest") == ["2"]
    return "earlier checkpoint"
