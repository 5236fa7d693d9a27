"""Everything that is known before the test."""

import numpy as np
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from vaecf.data.dataset import make_dataset
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import HeldOut, Interactions


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
