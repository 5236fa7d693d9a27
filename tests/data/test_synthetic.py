"""Generated data: its distributions, its oracle and its calibration."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from oracles import ndcg, ranked, refuses

from vaecf.data import synthetic
from vaecf.data.dataset import open_dataset, write_dataset

# Real held-out part of MovieLens 20M under the split of Liang et al. (2018),
# 20,000 users: aggregate statistics.
ML20M_QUANTILES = {
    0.0: 1, 0.01: 1, 0.05: 2, 0.1: 2, 0.25: 3, 0.5: 7, 0.75: 17, 0.9: 34,
    0.95: 49, 0.99: 94, 0.999: 196.001, 1.0: 475,
}  # fmt: skip
ML20M_MEAN = 14.11445
ML20M_SHARES = {
    10: 0.04414, 30: 0.10548, 100: 0.23404, 300: 0.43638, 1000: 0.71855,
    2000: 0.86129, 5000: 0.97137, 8000: 0.99427,
}  # fmt: skip
ML20M_INTERACTIONS = 9_990_682
ML20M_DISTINCT_ITEMS = 9_617


@pytest.fixture(scope="module")
def dataset():
    return synthetic.make("synthetic")


@pytest.fixture(scope="module")
def ml20m_held_out():
    """As many held-out users as the statistics are of, few to train on."""
    return synthetic.make("ml-20m-shape", n_train_users=2_000)


def rng_of(seed):
    return np.random.Generator(np.random.PCG64(seed))


def test_draws_follow_successive_sampling(monkeypatch):
    """Pair frequencies against the sum over both orders of drawing."""
    theta = np.array([0.3, 0.7])
    phi = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.2, 0.6]])
    p = theta @ phi
    expected = {
        (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i in range(4)
        for j in range(i + 1, 4)
    }
    n = 40_000
    # No rounds, one round, all rounds: the Gumbel finish has the same law.
    for rounds in (1, 4):
        monkeypatch.setattr(synthetic, "_ROUNDS", rounds)
        drawn = synthetic.draw_histories(
            np.tile(theta, (n, 1)), phi, np.full(n, 2), rng_of(rounds)
        )
        pairs = drawn.indices.reshape(n, 2)
        for pair, probability in expected.items():
            share = (pairs == pair).all(axis=1).mean()
            deviation = (probability * (1 - probability) / n) ** 0.5
            assert abs(share - probability) < 4.5 * deviation


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_drawn_histories_are_what_was_asked_for(data):
    n_items = data.draw(st.integers(2, 40))
    n_groups = data.draw(st.integers(1, 4))
    lengths = np.array(
        data.draw(st.lists(st.integers(0, n_items), min_size=1, max_size=12))
    )
    rng = rng_of(data.draw(st.integers(0, 99)))
    # Powers make some items nearly impossible: the slow path has to work.
    phi = rng.random((n_groups, n_items)) ** 8 + 1e-12
    theta = rng.random((len(lengths), n_groups)) ** 4
    chunk = data.draw(st.integers(1, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_CHUNK", chunk)
        drawn = synthetic.draw_histories(
            theta / theta.sum(axis=1, keepdims=True),
            phi / phi.sum(axis=1, keepdims=True),
            lengths,
            rng,
        )
    drawn.check()  # ascending, unique, in range
    np.testing.assert_array_equal(drawn.counts, lengths)
    assert drawn.n_items == n_items


def test_too_few_possible_items_is_an_error():
    phi = np.array([[0.5, 0.5, 0, 0]])
    with refuses(r"3 items, but only 2 of 4 items"):
        synthetic.draw_histories(np.ones((1, 1)), phi, np.array([3]), rng_of(0))


def test_groups_keep_the_popularity():
    recipe = synthetic.RECIPES["synthetic"]
    weights = synthetic.popularity(recipe)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) < 0).all()
    group_item, mass = synthetic.plant_groups(weights, recipe, rng_of(1))
    np.testing.assert_allclose(group_item.sum(axis=1), 1)
    np.testing.assert_allclose(mass @ group_item, weights, rtol=1e-9)
    assert mass.sum() == pytest.approx(1)


def test_mixtures_have_one_to_three_groups_and_the_groups_mass():
    mass = np.array([0.5, 0.3, 0.15, 0.05])
    mixture = synthetic.draw_mixtures(mass, 50_000, rng_of(2))
    assert mixture.dtype == np.float32
    np.testing.assert_allclose(mixture.sum(axis=1), 1, rtol=1e-5)
    assert set(np.unique((mixture > 0).sum(axis=1))) == {1, 2, 3}
    np.testing.assert_allclose(mixture.mean(axis=0), mass, atol=0.006)


def test_same_seed_same_arrays_other_seed_other_arrays():
    sizes = {"n_train_users": 300, "n_held_out_users": 30, "n_items": 200}
    one, two = (synthetic.make("synthetic", **sizes) for _ in range(2))
    assert one.manifest_hash == two.manifest_hash
    np.testing.assert_array_equal(one.train.indices, two.train.indices)
    other = synthetic.make("synthetic", seed=1, **sizes)
    assert other.manifest_hash != one.manifest_hash
    assert not np.array_equal(other.train.indices, one.train.indices)


def test_shape_of_the_default(dataset):
    assert dataset.split_sizes == (4_000, 400, 400)
    assert dataset.n_items == 1_000
    assert dataset.protocol == "vaecf"
    assert 25 < dataset.manifest["counts"]["interactions"] / 4_800 < 35
    assert dataset.items.ids[0] == "item-0001"
    assert dataset.users.ids[-1] == 4_800
    assert dataset.train.item_counts().min() > 0
    for matrix in (dataset.train, *dataset.validation, *dataset.test):
        matrix.check()


def test_a_fifth_is_held_out(dataset):
    for fold_in, held_out in (dataset.validation, dataset.test):
        total = fold_in.counts + held_out.counts
        assert total.min() >= 5
        np.testing.assert_array_equal(held_out.counts, total // 5)
        both = fold_in.to_scipy() + held_out.to_scipy()
        assert both.max() == 1  # nothing is in both


def test_every_item_is_seen_in_training_however_few_users():
    tiny = synthetic.make(
        "ml-20m-shape", n_train_users=40, n_held_out_users=5, n_items=900
    )
    assert tiny.train.item_counts().min() == 1
    tiny.train.check()
    with refuses("raise n_train_users"):
        synthetic.make(
            "ml-20m-shape", n_train_users=4, n_held_out_users=0, n_items=5_000
        )


def test_oracle_describes_the_users_in_the_tables_order(dataset):
    """The likelihood of a user's items is best under the user's own row."""
    user_group = dataset.oracle["user_group"]
    group_item = dataset.oracle["group_item"]
    assert (user_group.shape, group_item.shape) == ((4_800, 20), (20, 1_000))
    for array in (user_group, group_item):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array.sum(axis=1), 1, rtol=1e-5)
    for start, matrix in (
        (0, dataset.train),
        (4_000, dataset.validation.fold_in),
        (4_400, dataset.test.held_out),
    ):
        log_p = np.log(user_group[start : start + 400] @ group_item)
        x = matrix.rows(slice(0, 400)).to_scipy().toarray()
        other = np.roll(log_p, 1, axis=0)
        assert ((x * log_p).sum(1) > (x * other).sum(1)).mean() > 0.8


def test_oracle_beats_popularity_by_far(dataset):
    fold_in, held_out = dataset.test
    popular = dataset.train.item_counts().astype(np.float64)
    of_oracle, of_popularity = [], []
    for user in range(150):
        wanted = set(held_out.row(user).tolist())
        seen = set(fold_in.row(user).tolist())
        mixture = dataset.oracle["user_group"][4_400 + user]
        scores = mixture @ dataset.oracle["group_item"]
        of_oracle.append(ndcg(ranked(scores, seen), wanted, 100))
        of_popularity.append(ndcg(ranked(popular, seen), wanted, 100))
    assert np.mean(of_oracle) > 0.4
    assert np.mean(of_popularity) < 0.5 * np.mean(of_oracle)


def test_oracle_survives_the_disk(tmp_path):
    sizes = {"n_train_users": 60, "n_held_out_users": 6, "n_items": 100}
    made = synthetic.make("synthetic", **sizes)
    write_dataset(tmp_path / "d", made)
    opened = open_dataset(tmp_path / "d", verify=True)
    assert opened.manifest == made.manifest
    assert opened.manifest["oracle"]["generator"]["n_items"] == 100
    for name, array in made.oracle.items():
        np.testing.assert_array_equal(opened.oracle[name], array)


def test_lengths_have_the_real_total_at_full_size():
    recipe = synthetic.RECIPES["ml-20m-shape"]
    lengths = synthetic.history_lengths(recipe, recipe.n_users)
    assert recipe.n_users == 136_677
    assert lengths.min() == 5
    assert lengths.sum() == pytest.approx(ML20M_INTERACTIONS, rel=1e-4)


def test_held_out_lengths_match_movielens(ml20m_held_out):
    splits = (ml20m_held_out.validation, ml20m_held_out.test)
    counts = np.concatenate([split.held_out.counts for split in splits])
    assert len(counts) == 20_000
    assert counts.mean() == pytest.approx(ML20M_MEAN, rel=0.02)
    for quantile, expected in ML20M_QUANTILES.items():
        found = np.quantile(counts, quantile)
        # Which of the heaviest users are held out is chance.
        tolerance = 0.15 if quantile == 1.0 else 0.05
        assert found == pytest.approx(expected, rel=tolerance), quantile


def test_popularity_matches_movielens(ml20m_held_out):
    counts = (
        ml20m_held_out.validation.held_out.item_counts()
        + ml20m_held_out.test.held_out.item_counts()
    )
    shares = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    for k, expected in ML20M_SHARES.items():
        assert shares[k - 1] == pytest.approx(expected, abs=0.006), k
    distinct = np.count_nonzero(counts)
    assert distinct == pytest.approx(ML20M_DISTINCT_ITEMS, rel=0.03)


def test_bad_arguments_are_named():
    for name, fields, message in (
        ("x", {}, r"cannot generate 'x'; known are"),
        ("synthetic", {"n_items": 3}, "n_items must be at least 20"),
        ("synthetic", {"focus": 1}, r"focus=1 must be in \[0, 1\)"),
    ):
        with refuses(message):
            synthetic.make(name, **fields)
