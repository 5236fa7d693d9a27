"""Splits against a literal pandas re-derivation, and their invariants.

``literal`` follows the description of Liang et al.'s notebook and of
NVIDIA's script step by step, with the global generator, group by group.
"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import refuses

from vaecf.data import filters, splits
from vaecf.data.readers import read_ratings


def literal(frame, n_heldout, seed, reseed, prop=0.2):
    """The five matrices, item ids and user ids; slow and plain."""
    counts = frame.groupby("user").size()  # a Series indexed by sorted id
    np.random.seed(seed)
    unique_uid = counts.index.to_numpy()
    unique_uid = unique_uid[np.random.permutation(unique_uid.size)]
    n = unique_uid.size
    blocks = {
        "train": unique_uid[: n - 2 * n_heldout],
        "validation": unique_uid[n - 2 * n_heldout : n - n_heldout],
        "test": unique_uid[n - n_heldout :],
    }
    train_rows = frame[frame["user"].isin(blocks["train"])]
    unique_sid = pd.unique(train_rows["item"])
    sid = {raw: i for i, raw in enumerate(unique_sid)}
    uid = {raw: i for i, raw in enumerate(unique_uid)}

    def matrix(rows, start, n_rows):
        u = [uid[raw] - start for raw in rows["user"]]
        i = [sid[raw] for raw in rows["item"]]
        out = np.zeros((n_rows, len(sid)), int)
        out[u, i] = 1
        return out

    result = {"train": matrix(train_rows, 0, len(blocks["train"]))}
    for name in ("validation", "test"):
        rows = frame[frame["user"].isin(blocks[name])]
        rows = rows[rows["item"].isin(unique_sid)]
        if reseed:
            np.random.seed(seed)
        fold_in, held_out = [rows[:0]], [rows[:0]]
        for _, group in rows.groupby("user"):
            k = len(group)
            held = np.zeros(k, bool)
            if k >= 5:
                n_held = int(prop * k)
                held[np.random.choice(k, size=n_held, replace=False)] = True
            fold_in.append(group[~held])
            held_out.append(group[held])
        fold_in, held_out = pd.concat(fold_in), pd.concat(held_out)
        uids = [uid[raw] for raw in rows["user"]]
        start, end = (min(uids), max(uids) + 1) if uids else (0, 0)
        result[f"{name}_fold_in"] = matrix(fold_in, start, end - start)
        result[f"{name}_held_out"] = matrix(held_out, start, end - start)
        result[f"{name}_users"] = list(unique_uid[start:end])
    result["users"] = [
        *blocks["train"],
        *result.pop("validation_users"),
        *result.pop("test_users"),
    ]
    result["items"] = list(unique_sid)
    return result


def matrices(split):
    return {
        "train": split.train,
        "validation_fold_in": split.validation.fold_in,
        "validation_held_out": split.validation.held_out,
        "test_fold_in": split.test.fold_in,
        "test_held_out": split.test.held_out,
    }


def assert_same(split, ratings, expected):
    for name, matrix in matrices(split).items():
        matrix.check()
        np.testing.assert_array_equal(
            matrix.to_scipy().toarray(), expected[name], err_msg=name
        )
    assert list(ratings.item_ids[split.item_codes]) == expected["items"]
    assert list(ratings.user_ids[split.user_codes]) == expected["users"]


def random_frame(seed, n_users, n_items, n, strings=False, repeats=False):
    rng = np.random.default_rng(seed)
    user = rng.integers(0, n_users, n) * 7 - 20
    item = (rng.random(n) ** 2 * n_items).astype(int) + 100
    frame = pd.DataFrame({"user": user, "item": item})
    if not repeats:
        frame = frame.drop_duplicates(ignore_index=True)
    if strings:
        frame = frame.astype(str) + "x"
    return frame


@pytest.mark.parametrize("seed", range(4))
def test_paper_and_recipe_equal_the_literal_split(seed):
    strings, repeats = seed % 2 == 1, seed >= 2
    frame = random_frame(seed, 150, 60, 2000, strings, repeats)
    ratings = read_ratings(frame)
    for held_out in (0, 1, 30):
        expected = literal(frame, held_out, 98765, reseed=True)
        assert_same(splits.paper(ratings, held_out), ratings, expected)
        expected = literal(frame, held_out, seed, reseed=False)
        got = splits.recipe(ratings, held_out, seed=seed)
        assert_same(got, ratings, expected)


def test_the_two_protocols_differ():
    """Else the parity tests above would show less than they seem to."""
    ratings = read_ratings(random_frame(0, 150, 60, 2000))
    a, b = splits.paper(ratings, 30), splits.recipe(ratings, 30, seed=98765)
    assert a.train.nnz == b.train.nnz
    np.testing.assert_array_equal(a.user_codes, b.user_codes)
    assert not np.array_equal(a.test.held_out.indices, b.test.held_out.indices)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(3, 25), st.integers(1, 20),
    st.integers(1, 150), st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_literal_on_small_data(seed, n_users, n_items, n, strings, repeats, d):
    """Few rows: users lose all their items, splits are empty."""
    frame = random_frame(seed, n_users, n_items, n, strings, repeats)
    ratings = read_ratings(frame)
    n_present = frame["user"].nunique()
    held_out = d.draw(st.integers(0, (n_present - 1) // 2))
    protocol_seed = d.draw(st.integers(0, 2**32 - 1))
    for reseed, split in ((True, splits.paper), (False, splits.recipe)):
        expected = literal(frame, held_out, protocol_seed, reseed)
        got = split(ratings, held_out, seed=protocol_seed)
        assert_same(got, ratings, expected)
        lost = got.counts["held_out_users_without_items"]
        assert len(got.user_codes) + lost == n_present


def test_the_global_generator_is_left_alone():
    ratings = read_ratings(random_frame(1, 60, 40, 800))
    np.random.seed(5)
    expected = np.random.random(4)
    np.random.seed(5)
    splits.paper(ratings, 10)
    splits.recipe(ratings, 10)
    splits.vaecf(ratings, 10)
    np.testing.assert_array_equal(np.random.random(4), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(3, 25), st.integers(1, 20),
    st.integers(1, 200), st.sampled_from([0.2, 0.5, 0.05, 0.9]), st.data(),
)  # fmt: skip
def test_vaecf_invariants(seed, n_users, n_items, n, proportion, data):
    frame = random_frame(seed, n_users, n_items, n)
    ratings = read_ratings(frame)
    n_present = frame["user"].nunique()
    validation = data.draw(st.integers(0, n_present - 1))
    test = data.draw(st.integers(0, n_present - 1 - validation))
    split = splits.vaecf(
        ratings, validation, test, seed=seed, test_proportion=proportion
    )
    users = ratings.user_ids[split.user_codes]
    items = ratings.item_ids[split.item_codes]
    # Users are partitioned, in the sizes asked for.
    assert sorted(users) == sorted(frame["user"].unique())
    assert split.validation.fold_in.n_users == validation
    assert split.test.fold_in.n_users == test
    # The vocabulary is what training users have.
    history = {u: set(g) for u, g in frame.groupby("user")["item"]}
    n_train = len(users) - validation - test
    assert list(items) == sorted(
        set().union(*(history[u] for u in users[:n_train]))
    )
    for matrix in matrices(split).values():
        matrix.check()
        assert matrix.n_items == len(items)
    for u in range(n_train):
        assert set(items[split.train.row(u)]) == history[users[u]]
    start = n_train
    for part in (split.validation, split.test):
        for u in range(part.fold_in.n_users):
            fold_in = set(items[part.fold_in.row(u)])
            held_out = set(items[part.held_out.row(u)])
            known = history[users[start + u]] & set(items)
            assert fold_in | held_out == known
            assert not fold_in & held_out
            if len(known) >= 2:
                wanted = int(proportion * len(known) + 1e-9)
                assert len(held_out) == min(max(wanted, 1), len(known) - 1)
            else:
                assert fold_in == known
        start += part.fold_in.n_users


def test_vaecf_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    frame = random_frame(3, 100, 50, 1500, repeats=True)
    shuffled = frame.sample(frac=1, random_state=1)
    a, b, c = (
        splits.vaecf(read_ratings(f), 20, seed=s)
        for f, s in ((frame, 0), (shuffled, 0), (frame, 1))
    )
    for x, y in zip(matrices(a).values(), matrices(b).values(), strict=True):
        np.testing.assert_array_equal(x.indptr, y.indptr)
        np.testing.assert_array_equal(x.indices, y.indices)
    np.testing.assert_array_equal(a.user_codes, b.user_codes)
    assert a.duplicates == len(frame) - len(frame.drop_duplicates())
    assert not np.array_equal(a.user_codes, c.user_codes)


def test_vaecf_holds_out_uniformly():
    """Every one of ten items is held out by a fifth of 4,000 users."""
    n = 4200
    frame = pd.DataFrame(
        {"user": np.repeat(np.arange(n), 10), "item": np.tile(range(10), n)}
    )
    split = splits.vaecf(read_ratings(frame), 4000, 100)
    counts = split.validation.held_out.item_counts()
    assert counts.sum() == 8000
    # 800 each, standard deviation sqrt(4000 * .2 * .8) = 25.3: five of them.
    assert np.abs(counts - 800).max() < 127


@pytest.mark.parametrize("split", [splits.paper, splits.recipe, splits.vaecf])
def test_too_few_users(split):
    ratings = read_ratings(random_frame(0, 20, 9, 300))
    with refuses(r"held_out_users to at most 9$"):
        split(ratings, 10)
    with refuses("negative"):
        split(ratings, -1)
    with refuses("above 0 and below 1"):
        split(ratings, 1, test_proportion=1.0)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(0, 6), st.integers(0, 6), st.booleans()
)
def test_filters_against_pandas(seed, per_user, per_item, iterate):
    frame = random_frame(seed, 15, 12, 60, repeats=bool(seed % 2))
    expected = frame
    while True:
        before = len(expected)
        by_item = expected.groupby("item")["user"].transform("size")
        expected = expected[by_item >= per_item]
        by_user = expected.groupby("user")["item"].transform("size")
        expected = expected[by_user >= per_user]
        if not iterate or len(expected) == before:
            break
    ratings = read_ratings(frame)
    limits = {"min_items_per_user": per_user, "min_users_per_item": per_item}
    limits["iterate"] = iterate
    if expected.empty:
        with refuses("min_"):
            filters.filter_ratings(ratings, **limits)
        return
    got, report = filters.filter_ratings(ratings, **limits)
    assert list(ratings.user_ids[got.user]) == list(expected["user"])
    assert list(ratings.item_ids[got.item]) == list(expected["item"])
    n_users, n_items = expected.nunique()[["user", "item"]]
    assert report["users_after_filters"] == n_users
    assert report["dropped_users"] == frame["user"].nunique() - n_users
    assert report["dropped_items"] == frame["item"].nunique() - n_items
    assert report["dropped_interactions"] == len(frame) - len(expected)
