"""The linear branch of a blend on disk, and in a run that resumes."""

import numpy as np
import pytest
from oracles import recorded, refuses

from vaecf.data import array_folder
from vaecf.models import blend
from vaecf.parallel import mesh as mesh_lib
from vaecf.training import linear_branch


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "linear"


@pytest.fixture(params=[0, 5], ids=["whole", "low rank"])
def prepare(request, small, dataset, folder):
    """prepare(l2, train) returns (branch, number of lines logged)."""

    def prepare(l2=5.0, train=dataset.train):
        config = small(linear={"l2": l2, "rank": request.param}).linear
        mesh, lines = mesh_lib.make_mesh(1, 1), []
        branch = linear_branch.prepare(
            config, train, folder.parent, mesh, log=lines.append
        )
        return branch, len(lines)

    return prepare


def test_a_fit_is_kept_with_what_it_is_of(
    prepare, dataset, folder, assert_same
):
    first, fits = prepare()
    assert fits == 1
    assert_same(prepare(), (first, 0))
    with pytest.MonkeyPatch.context() as later_version:
        later_version.setattr(blend, "default_experts", lambda n: ("ease",))
        assert_same(prepare(), (first, 0))
    other, fits = prepare(6.0)
    assert fits == 1
    assert any(not np.array_equal(other[name], first[name]) for name in first)
    assert prepare(6.0, dataset.validation.fold_in)[1] == 1
    (folder / "fit.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with refuses("is in the way"):
        prepare(6.0)
    assert (folder / "notes.txt").read_text() == "mine"


def test_damaged_files_are_named(prepare, folder):
    prepare()
    for content in ("[]", '{"gain": 1}', '{"prior": "x"}'):
        (folder / "weights.json").write_text(content)
        with refuses(r"weights\.json"):
            linear_branch.read_weights(folder.parent)
    (folder / "weights.json").unlink()
    assert linear_branch.read_weights(folder.parent) == {}
    (folder / "fit.json").rename(folder / "moved")  # as in a saved model
    with refuses(r"weights\.json is missing"):
        linear_branch.read_weights(folder.parent)
    (folder / "moved").rename(folder / "fit.json")
    for file in folder.glob("*.npy"):
        kept = file.read_bytes()
        for damaged in (np.zeros((3, 3), np.float32), b"", None):
            if damaged is None:
                file.unlink()
            elif isinstance(damaged, bytes):
                file.write_bytes(damaged)
            else:
                np.save(file, damaged)
            with refuses(rf"linear/{file.name}"):
                prepare()
        file.write_bytes(kept)


def test_a_branch_without_padding_is_read(
    small, dataset, folder, tmp_path, assert_same
):
    """As earlier versions wrote it, with EASE alone."""
    config = small(linear={"l2": 5.0, "experts": ("ease",)}).linear
    mesh, n_items = mesh_lib.make_mesh(1, 1), dataset.n_items
    branch = linear_branch.prepare(
        config, dataset.train, folder.parent, mesh, log=lambda line: None
    )
    assert n_items % mesh_lib.ITEM_MULTIPLE
    old = tmp_path / "old" / "linear"
    old.mkdir(parents=True)
    cut = {
        name: array[tuple(slice(n_items) for _ in array.shape)]
        for name, array in array_folder.read(folder, "").items()
    }
    array_folder.write(old, cut)
    assert_same(linear_branch.load(old.parent, mesh, n_items), branch)


def test_runs_share_the_files_of_a_branch(prepare, folder, tmp_path):
    prepare()
    linear_branch.write_weights(folder.parent, {"gain": 1.0, "prior": 0.5})
    for _ in range(2):  # the second time, the files are there already
        linear_branch.share(folder.parent, tmp_path)
    own = {"weights.json", ".verified.json"}
    names = {file.name for file in folder.iterdir()} - own
    assert {p.name for p in (tmp_path / "linear").iterdir()} == names
    for name in names:
        assert (folder / name).samefile(tmp_path / "linear" / name)
    assert linear_branch.read_weights(tmp_path) == {}


def test_a_resumed_run_validates_with_the_first_weights(small, train, tmp_path):
    """Weights chosen in between do not reach later validations."""

    def validations(name, epochs):
        workdir = tmp_path / name
        train(workdir, small(linear={"l2": 5.0}, train={"epochs": epochs}))
        return [*recorded(workdir, "validation/ndcg@10").values()]

    validations("parts", 1)
    # Far from the first weights.
    far = {"gain": 64.0, "prior": 0.5, "epoch": 0}
    linear_branch.write_weights(tmp_path / "parts", far)
    ours, theirs = (validations(name, 2) for name in ("parts", "whole"))
    assert ours == pytest.approx(theirs, abs=1e-6) and len(ours) == 2
