"""Protocols for known users, re-derived pair by pair in plain Python."""

import collections

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import refuses

import vaecf
from vaecf.data.dataset import make_dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions

WORDS = ["train", "validation", "test"]


def by_user(pairs):
    found = collections.defaultdict(set)
    for user, item in pairs:
        found[user].add(item)
    return dict(found)


def read(made):
    """Returns {'train': {user: items}, ...} in raw ids, and checks the rows."""
    sizes = made.split_sizes
    ends = np.cumsum((0, *sizes))
    found = {}
    for name, matrix in made.matrices.items():
        matrix.check()
        which = WORDS.index(name.split(".")[0])
        ids = made.users.ids[ends[which] : ends[which + 1]].tolist()
        assert ids == sorted(set(ids))
        found[name] = {
            user: set(made.items.ids[matrix.row(u)].tolist())
            for u, user in enumerate(ids)
        }
    return found


def check_contract(made, rows):
    """Checks what holds under every protocol; returns what the test took.

    `rows` are {(user, item): (part, time)}, the earliest of each pair.
    """
    found = read(made)
    everything = made.everything()
    known = {
        user: set(made.items.ids[everything.row(u)].tolist())
        for u, user in enumerate(made.users.ids[: made.split_sizes[0]].tolist())
    }
    assert everything.n_users == len(known)
    pairs = {(u, i) for u, items in known.items() for i in items}
    assert pairs <= rows.keys()
    assert set(made.items.ids.tolist()) == {i for _, i in pairs}
    # Training users have all that is known but for their validation items.
    held = found["validation.held_out"]
    for user, items in found["train"].items():
        assert items == known[user] - held.get(user, set()) and items
    for user, items in held.items():
        assert items and items <= known[user]
        assert found["validation.fold_in"][user] == found["train"][user]
    # The test is what is not known, if user and item are.
    taken = rows.keys() - pairs
    wanted = by_user(
        (u, i) for u, i in taken if u in known and i in made.items.ids
    )
    assert found["test.held_out"] == wanted
    assert found["test.fold_in"] == {user: known[user] for user in wanted}
    counts = made.manifest["counts"]
    outside = {(u, i) for u, i in taken if i not in made.items.ids}
    cold = {(u, i) for u, i in taken if u not in known}
    assert counts["interactions_without_history"] == len(cold)
    assert counts["test_users_without_history"] == len({u for u, _ in cold})
    assert counts["interactions_outside_vocabulary"] == len(outside - cold)
    assert counts["users"] == len(known) == counts["train_users"]
    assert counts["users_without_test"] == len(known) - len(wanted)
    assert counts["interactions_before_test"] == len(pairs)
    n_test = sum(map(len, wanted.values()))
    assert counts["interactions"] == len(pairs) + n_test
    return taken, found


ROWS = st.lists(
    st.tuples(
        st.integers(0, 5),  # user
        st.integers(0, 7),  # item
        st.sampled_from([0, 0, 0, 1, 2]),  # part
        st.integers(0, 9),  # time
    ),
    min_size=1,
    max_size=60,
)


def frame_of(rows):
    frame = pd.DataFrame(rows, columns=["user", "item", "split", "time"])
    frame["split"] = [WORDS[part] for part in frame["split"]]
    return frame


def earliest(rows, key):
    """Returns {(user, item): (part, time)} of the row with the lowest key."""
    pairs = {}
    for user, item, part, time in rows:
        value = (part, time)
        old = pairs.get((user, item), value)
        pairs[user, item] = min(old, value, key=key)
    return pairs


def split(rows, protocol, **more):
    """Returns the dataset, or the error if no test is possible."""
    more = {"min_items_per_user": 0, **more}
    try:
        return vaecf.split(frame_of(rows), protocol=protocol, **more)
    except vaecf.VaecfError as error:
        return str(error)


def shares(n, proportion):
    """Number of held-out items of n, as documented."""
    return 0 if n < 2 else min(n - 1, max(1, int(proportion * n + 1e-9)))


def check_sizes(taken, among, number):
    """Checks that every user of `among` lost number(n) of n pairs."""
    n_taken = collections.Counter(user for user, _ in taken)
    for user, n in collections.Counter(user for user, _ in among).items():
        assert n_taken[user] == number(n)


def check_latest(taken, among, rows):
    """Checks that the taken pairs are the last of their users, up to ties."""
    for user in {user for user, _ in taken}:
        mine = [pair for pair in among if pair[0] == user]
        rest = [rows[pair][1] for pair in mine if pair not in taken]
        assert min(rows[p][1] for p in taken if p[0] == user) >= max(rest)


def check_validation(made, found, rows, share=0.2, last=False):
    """Checks the default validation: share of a tenth of the users."""
    known = {(u, i) for u, items in found["train"].items() for i in items}
    held = {
        (u, i)
        for u, items in found["validation.held_out"].items()
        for i in items
    }
    known |= held
    n_U = collections.Counter(user for user, _ in known)
    able = sum(n >= 2 for n in n_U.values())
    chosen = {user for user, _ in held}
    assert len(chosen) == min(max(1, len(n_U) // 10), able)
    check_sizes(
        held, [p for p in known if p[0] in chosen], lambda n: shares(n, share)
    )
    if last:
        check_latest(held, known, rows)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_weak(rows, share):
    made = split(rows, "weak", test_share=share)
    pairs = earliest(rows, key=lambda value: value[1])
    if isinstance(made, str):
        alone = all(
            shares(n, share) == 0
            for n in collections.Counter(u for u, _ in pairs).values()
        )
        assert alone or "users of the test must be known" in made
        return
    taken, found = check_contract(made, pairs)
    check_sizes(taken, pairs, lambda n: shares(n, share))
    check_validation(made, found, pairs)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_leave_last(rows, n_test):
    made = split(rows, "leave_last", test_items=n_test)
    pairs = earliest(rows, key=lambda value: value[1])
    if isinstance(made, str):
        assert "test" in made
        return
    taken, found = check_contract(made, pairs)
    check_sizes(taken, pairs, lambda n: min(n_test, n - 1))
    check_latest(taken, pairs, pairs)
    rest = pairs.keys() - taken
    held = {
        (u, i)
        for u, items in found["validation.held_out"].items()
        for i in items
    }
    check_sizes(held, rest, lambda n: min(n_test, n - 1))
    check_latest(held, rest, pairs)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from([0.2, 0.5]), st.integers(0, 10), st.booleans())
def test_temporal(rows, share, time, by_share):
    how = {"test_share": share} if by_share else {"test_time": time}
    made = split(rows, "temporal", **how)
    pairs = earliest(rows, key=lambda value: value[1])
    times = [t for _, t in pairs.values()]
    limit = int(share * len(times) + 1e-9)
    cuts = [t for t in set(times) if sum(x >= t for x in times) <= limit]
    if by_share:
        time = min(cuts, default=99)
    if isinstance(made, str):
        wanted = {p for p, (_, t) in pairs.items() if t >= time}
        rest = pairs.keys() - wanted
        known = [{pair[k] for pair in rest} for k in (0, 1)]
        assert not any(u in known[0] and i in known[1] for u, i in wanted)
        return
    taken, found = check_contract(made, pairs)
    assert taken == {p for p, (_, t) in pairs.items() if t >= time}
    assert made.manifest["protocol_constants"]["test_time"] >= time
    check_validation(made, found, pairs, last=True)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.booleans())
# The only interaction with item 1 before the test is for validation.
@example([(0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 0, 0), (1, 1, 2, 0)], True)
def test_given(rows, has_validation):
    if not has_validation:
        rows = [(u, i, p if p != 1 else 0, t) for u, i, p, t in rows]
    made = split(rows, "given")
    pairs = earliest(rows, key=lambda value: value[0])
    test = {pair for pair, (part, _) in pairs.items() if part == 2}
    rest = pairs.keys() - test
    known = [{pair[k] for pair in rest} for k in (0, 1)]
    if isinstance(made, str):
        assert not any(u in known[0] and i in known[1] for u, i in test)
        return
    taken, found = check_contract(made, pairs)
    assert taken == test
    several = collections.defaultdict(set)
    for u, i, part, _ in rows:
        several[u, i].add(part)
    counts = made.manifest["counts"]
    several = sum(len(parts) > 1 for parts in several.values())
    assert counts["pairs_in_several_parts"] == several
    assert counts["duplicates_collapsed"] == len(rows) - len(pairs)
    train = {u for (u, _), (part, _) in pairs.items() if part == 0}
    held = {pair for pair, (part, _) in pairs.items() if part == 1}
    if {u for u, _ in held} & train:
        kept = {(u, i) for u, i in held if u in train}
        assert found["validation.held_out"] == by_user(kept)
        assert counts["validation_moved_to_train"] == len(held - kept)
    else:
        check_validation(made, found, pairs)


def shop(n_users=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        (u, i, rng.choice(3, p=[0.7, 0.1, 0.2]), int(rng.integers(50)))
        for u in range(n_users)
        for i in rng.choice(30, rng.integers(2, 20), replace=False)
    ]
    return frame_of(rows)


@pytest.mark.parametrize("protocol", ["weak", "leave_last", "temporal"])
def test_the_seed_and_not_the_order_decides(protocol):
    frame = shop()
    made, again, other = (
        vaecf.split(rows, protocol=protocol, seed=seed)
        for rows, seed in (
            (frame, 3), (frame.sample(frac=1, random_state=0), 3), (frame, 4),
        )
    )  # fmt: skip
    assert made.manifest == again.manifest
    assert made.manifest["arrays"] != other.manifest["arrays"]
    assert made.protocol == made.manifest["protocol"] == protocol


def test_number_of_validation_users():
    frame = shop()
    for n in (0, 7):
        made = vaecf.split(frame, protocol="weak", held_out_users=n)
        assert made.split_sizes[1] == n
    with refuses("held_out_users=41 must be at most"):
        vaecf.split(frame, protocol="weak", held_out_users=41)
    with refuses("held_out_users=3 has no effect"):
        vaecf.split(frame, protocol="given", held_out_users=3)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=12),
)
def test_everything_joins_the_users_of_train_and_validation(seed, sizes, ids):
    rng = np.random.default_rng(seed)

    def matrix(n_users):
        dense = rng.random((n_users, 6)) < 0.4
        return Interactions.from_scipy(scipy.sparse.csr_matrix(dense))

    parts = [
        HeldOut(matrix(n), matrix(n)) if split else matrix(n)
        for split, n in enumerate(sizes)
    ]
    made = make_dataset(
        name="x",
        protocol="weak",
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        items=IdTable(np.arange(6)),
        users=IdTable(ids[: sum(sizes)]),
    )
    wanted = {}
    for place, part in enumerate((parts[0], *parts[1])):
        first = sizes[0] if place else 0
        for u in range(part.n_users):
            history = wanted.setdefault(ids[first + u], set())
            history.update(part.row(u).tolist())
    if not sizes[1]:  # the training matrix itself, whatever its users are
        assert made.everything() is made.train
        return
    found = made.everything()
    found.check()
    rows = [found.row(u).tolist() for u in range(found.n_users)]
    assert rows == [sorted(items) for items in wanted.values()]
    assert found.n_items == 6
