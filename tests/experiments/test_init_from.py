"""main.py --init_from: a run on more items that starts from another run."""

import shutil

import numpy as np
import pytest
from oracles import generated

from vaecf.data import dataset
from vaecf.serving import trained_model
from vaecf.training import linear_branch


@pytest.fixture(scope="module")
def more_items(tmp_path_factory):
    """50 items, of which the run knows 40; no validation users."""
    path = tmp_path_factory.mktemp("more") / "data"
    return dataset.write_dataset(path, generated(60, 0, 50, 4, seed=1)).path


def test_a_run_starts_from_another(
    trained, tiny, more_items, tmp_path, succeeds, refused
):
    workdir = tmp_path / "run"
    flags = (*tiny, f"--data_dir={more_items}", "--train")
    earlier = tmp_path / "earlier"
    shutil.copytree(trained.workdir, earlier)
    (earlier / "linear").mkdir()
    weights = {"gain": 0.5, "prior": 0.125}
    linear_branch.write_weights(earlier, weights)
    start = f"--init_from={earlier}"
    # Steps so small that the parameters stay what they were.
    still = (*flags, "--epochs=1", "--lr=1e-12", start)
    still += ("--config.linear.l2=5", "--config.linear.experts=('ease',)")
    out = succeeds("main", *still, f"--workdir={workdir}")
    assert "start: 40 items keep their parameters, 10 new ones" in out
    old, new = map(trained_model.load, (trained.workdir, workdir))
    # No validation users choose other weights of the blend.
    assert linear_branch.weights_of(new.branch) == weights
    place = new.items.index_of(old.items.ids)
    np.testing.assert_allclose(
        np.asarray(new.params["input_kernel"])[place],
        np.asarray(old.params["input_kernel"])[:40],
        atol=1e-9,
    )
    again = succeeds("main", *still, f"--workdir={workdir}")
    assert "start:" not in again and "nothing left to train" in again

    run = f"--workdir={tmp_path / 'other'}"
    for changes, words in (
        ([start, "--config.model.latent=5"], ["--config.model.latent=5", "6"]),
        ([start, "--config.model.name=ease"], ["in one go"]),
        ([f"--init_from={tmp_path / 'none'}"], ["none", "config.json"]),
    ):
        refused("main", [*flags, *changes, run], *words)
    without = [flag for flag in still if flag != start]
    refused("main", [*without, f"--workdir={workdir}"], "init_from")
    refused("main", ["--test", start, f"--workdir={workdir}"], "--train")
