"""Spectral output weights against decompositions by NumPy."""

import numpy as np
import pytest
from oracles import refuses

from vaecf.models import low_rank
from vaecf.training import spectral_init
from vaecf.training import state as state_lib

N_ITEMS, N_UNITS = 33, 6


def begun(setup, dataset, tmp_path, seed=7):
    """(the random state, the one that begins from vectors)."""
    before = state_lib.init_state(setup, seed)
    kept = np.asarray(before.params["output_kernel"]).copy()
    after = spectral_init.start(
        before, seed, dataset.train, tmp_path, log=lambda line: None
    )
    return kept, before, after


def test_items_lie_as_their_users_have_it(
    small, setup_of, dataset, tmp_path, monkeypatch
):
    """Inner products of a full decomposition in float64, up to a factor."""
    # Of directions this close to each other, six turns find some per cent off.
    monkeypatch.setattr(low_rank, "_POWER_ITERATIONS", 300)
    before, state, after = begun(setup_of(small()), dataset, tmp_path)
    kernel = np.asarray(after.params["output_kernel"], np.float64)
    assert kernel.shape == before.shape == (N_UNITS, 128)
    assert not kernel[:, N_ITEMS:].any()
    assert np.linalg.norm(kernel) == pytest.approx(
        np.linalg.norm(before), rel=1e-5
    )
    x = dataset.train.to_scipy().toarray().astype(float)
    n = x.sum(axis=1)
    weight = (n / n.mean()) ** -0.5
    count = weight @ x
    a = np.sqrt(weight)[:, None] * x / np.sqrt(150 + count)
    _, s, v = np.linalg.svd(a, full_matrices=False)
    kept = s[:N_UNITS] ** 2 / (1 + s[:N_UNITS] ** 2)
    expected = (v[:N_UNITS].T * kept) @ v[:N_UNITS]
    ours = (kernel.T @ kernel)[:N_ITEMS, :N_ITEMS]
    ours *= np.trace(expected) / np.trace(ours)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.max())
    # All else is as it was.
    for name, value in after.params.items():
        if name != "output_kernel":
            assert value is state.params[name]
    assert after.opt_state is state.opt_state and int(after.step) == 0


def test_no_unit_is_above_others(dataset):
    vectors = low_rank.item_vectors(
        dataset.train, 8, l2=150.0, dropout=0.5, user_exponent=0.5, advice=""
    )
    lengths = np.linalg.norm(vectors, axis=0)
    assert lengths[0] > 2 * lengths[-1]
    turned = np.stack(
        [spectral_init.rotated(vectors, seed) for seed in range(40)]
    )
    np.testing.assert_allclose(  # a rotation
        turned[3] @ turned[3].T, vectors @ vectors.T, atol=1e-6
    )
    means = np.square(turned).sum(axis=1).mean(axis=0)
    np.testing.assert_allclose(means, np.square(lengths).mean(), rtol=0.4)
    assert not np.allclose(turned[0], turned[1])


def test_the_average_begins_there_too(small, setup_of, dataset, tmp_path):
    setup = setup_of(small(train={"ema": 0.9}))
    _, _, state = begun(setup, dataset, tmp_path)
    ours, average = (
        tree["output_kernel"] for tree in (state.params, state.average)
    )
    np.testing.assert_array_equal(ours, average)
    pointers = {x.unsafe_buffer_pointer() for x in (ours, average)}
    assert len(pointers) == 2  # each may be donated


def test_on_any_mesh_it_is_the_same(small, setup_of, dataset, tmp_path):
    _, _, one = begun(setup_of(small()), dataset, tmp_path)
    _, state, other = begun(setup_of(small(), (2, 4)), dataset, tmp_path)
    ours, theirs = (s.params["output_kernel"] for s in (one, other))
    np.testing.assert_allclose(
        np.asarray(ours)[:, :N_ITEMS],
        np.asarray(theirs)[:, :N_ITEMS],
        rtol=1e-5,
    )
    assert theirs.sharding == state.params["output_kernel"].sharding


def test_more_units_than_items(dataset):
    vectors = low_rank.item_vectors(
        dataset.train, 50, l2=1.0, dropout=0.0, user_exponent=0.0, advice=""
    )
    assert vectors.shape == (N_ITEMS, 50) and not vectors[:, N_ITEMS:].any()
    x = dataset.train.to_scipy().toarray().astype(float)
    gram = x.T @ x
    np.testing.assert_allclose(
        vectors @ vectors.T,
        gram @ np.linalg.inv(np.eye(N_ITEMS) + gram),
        atol=1e-4,
    )


def test_it_counts_at_the_start_alone(small, train, tmp_path, assert_same):
    runs, said = [], []
    for name, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        config = small(model={"init": "spectral"}, train={"epochs": epochs})
        said.clear()
        runs.append(train(tmp_path / name, config, log=said.append))
        lines = sum("output weights: 6 singular" in line for line in said)
        assert lines == (len(runs) < 3)
    assert_same(runs[0].params, runs[2].params)


def test_what_does_not_fit_names_the_key(
    small, setup_of, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(low_rank.memory, "host_free_bytes", lambda: 1000)
    with refuses(r"set model\.init='random'"):
        begun(setup_of(small()), dataset, tmp_path)
