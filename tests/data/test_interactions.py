"""The matrix against dense brute force."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from oracles import refuses

from vaecf.data import interactions
from vaecf.data.interactions import Interactions


@st.composite
def pairs(draw):
    n_users, n_items = draw(st.integers(0, 8)), draw(st.integers(0, 9))
    pair = st.tuples(
        st.integers(0, max(n_users - 1, 0)), st.integers(0, max(n_items - 1, 0))
    )
    size = 40 if n_users and n_items else 0
    drawn = np.array(draw(st.lists(pair, max_size=size)), np.int64)
    user, item = drawn.reshape(-1, 2).T
    return user, item, n_users, n_items


def dense(matrix):
    """By the definition in the class's docstring, entry by entry."""
    out = np.zeros((matrix.n_users, matrix.n_items), int)
    for u in range(matrix.n_users):
        for i in matrix.indices[matrix.indptr[u] : matrix.indptr[u + 1]]:
            out[u, i] += 1
    return out


def brute_force(user, item, n_users, n_items):
    out = np.zeros((n_users, n_items), int)
    for u, i in zip(user, item):
        out[u, i] = 1
    return out


@given(pairs())
def test_from_pairs_is_the_set_of_pairs(args):
    user, item, n_users, _ = args
    matrix, duplicates = Interactions.from_pairs(*args)
    expected = brute_force(*args)
    np.testing.assert_array_equal(dense(matrix), expected)
    assert duplicates == len(user) - len(set(zip(user, item)))
    assert matrix.indptr.dtype == np.int64 and matrix.indices.dtype == np.int32
    assert (matrix.n_users, matrix.nnz) == (n_users, expected.sum())
    np.testing.assert_array_equal(matrix.counts, expected.sum(1))
    np.testing.assert_array_equal(matrix.item_counts(), expected.sum(0))
    assert matrix.item_counts().dtype == matrix.counts.dtype == np.int64
    matrix.check()


@given(pairs(), st.sampled_from(["csr", "csc", "coo", "lil", "dok"]), st.data())
def test_scipy_round_trip(args, kind, data):
    expected = brute_force(*args)
    values = data.draw(st.sampled_from([1.0, 0.5, -2.0]))
    sparse = scipy.sparse.coo_matrix(expected * values).asformat(kind)
    before = sparse.toarray()
    matrix = Interactions.from_scipy(sparse)
    np.testing.assert_array_equal(dense(matrix), expected)
    np.testing.assert_array_equal(sparse.toarray(), before)
    back = matrix.to_scipy()
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back.toarray(), expected)


def test_from_scipy_never_sums():
    """Entries that cancel out or overflow are interactions all the same."""
    entries = ([1.0, -1.0, 2.0, 3.0, 0.0], ([0, 0, 1, 1, 1], [2, 2, 1, 1, 0]))
    matrix = Interactions.from_scipy(
        scipy.sparse.coo_array(entries, shape=(2, 3))
    )
    np.testing.assert_array_equal(dense(matrix), [[0, 0, 1], [0, 1, 0]])
    clicks = np.ones(256, np.int8), (np.zeros(256, int), np.full(256, 2))
    matrix = Interactions.from_scipy(scipy.sparse.coo_matrix(clicks, (1, 3)))
    np.testing.assert_array_equal(dense(matrix), [[0, 0, 1]])


@given(pairs(), st.data())
def test_rows_equals_dense_indexing(args, data):
    matrix, _ = Interactions.from_pairs(*args)
    n = matrix.n_users
    full = dense(matrix)
    bound = st.none() | st.integers(-n - 2, n + 2)
    steps = st.none() | st.sampled_from([1, 2, -1, -3])
    numbers = (
        st.lists(st.integers(-n, n - 1), max_size=12) if n else st.just([])
    )
    for key in (
        slice(data.draw(bound), data.draw(bound), data.draw(steps)),
        np.array(data.draw(numbers), np.int64),
    ):
        part = matrix.rows(key)
        np.testing.assert_array_equal(dense(part), full[key])
        part.check()
    for u in range(-n, n):
        np.testing.assert_array_equal(matrix.row(u), np.flatnonzero(full[u]))


def test_rows_of_a_slice_and_row_are_views():
    matrix, _ = Interactions.from_pairs([0, 1, 1], [2, 0, 1], 2, 3)
    assert np.shares_memory(matrix.rows(slice(1, 2)).indices, matrix.indices)
    assert np.shares_memory(matrix.row(1), matrix.indices)


def test_more_interactions_than_int32_counts():
    """2^31 and more entries, on a stand-in for an array that we cannot hold."""
    big = 3_000_000_000
    indices = np.broadcast_to(np.int32(0), (big,))
    matrix = Interactions(np.array([0, 5, big], np.int64), indices, 1)
    assert matrix.nnz == big
    np.testing.assert_array_equal(matrix.counts, [5, big - 5])
    assert len(matrix.row(1)) == big - 5
    last = matrix.rows(slice(1, 2))
    assert last.nnz == big - 5 and last.indptr.dtype == np.int64


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (int32(0, 1), int32(0), "int64"),
        ([0, 1], np.zeros(1, np.int64), "int32"),
        ([0, 2], int32(0), "ends at"),
        ([1, 1], int32(0), "must start"),
        ([], int32(), "must start"),
        ([0, 1], [0], "NumPy array"),
        ([0, 2, 3], int32(0, 3, 1), "user 0 has item index 3"),
        ([0, 2, 3], int32(0, 1, -1), "user 1 has item index -1"),
        ([0, 1, 3], int32(2, 1, 1), "user 1 are not ascending"),
        ([0, 2, 3], int32(2, 1, 0), "user 0 are not ascending"),
        ([0, 2, 1, 3], int32(0, 1, 2), "decreases after user 1"),
    ],
)
def test_wrong_arrays_are_refused(indptr, indices, message):
    if isinstance(indptr, list):
        indptr = np.array(indptr, np.int64)
    with refuses(message):
        Interactions(indptr, indices, 3).check()


@given(pairs(), st.integers(1, 5))
def test_check_and_counts_do_not_depend_on_the_block(args, block):
    matrix, _ = Interactions.from_pairs(*args)
    expected = matrix.item_counts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "_BLOCK", block)
        patch.setattr(interactions, "_BLOCK_USERS", block)
        matrix.check()
        np.testing.assert_array_equal(matrix.item_counts(), expected)
        for u in np.flatnonzero(matrix.counts > 1)[:1]:
            spoilt = matrix.indices.copy()
            row = spoilt[matrix.indptr[u] : matrix.indptr[u + 1]]
            row[:2] = row[1::-1]
            with refuses(f"user {u} "):
                Interactions(matrix.indptr, spoilt, matrix.n_items).check()


def test_out_of_range_pairs_are_refused():
    for user, item, message in (
        ([0], [3], r"item indices must be in \[0, 3\)"),
        ([-1], [0], "user indices"),
        ([0, 0], [0], "one length"),
    ):
        with refuses(message):
            Interactions.from_pairs(user, item, 1, 3)
    empty, _ = Interactions.from_pairs([], [], 2, 3)
    for read in (lambda: empty.row(2), lambda: empty.rows(np.array([2]))):
        with pytest.raises(IndexError):
            read()


# --- SciPy matrices ---------------------------------------------------------


def damage(kind, **arrays):
    """A matrix [3, 4] with two entries whose arrays were replaced."""
    matrix = scipy.sparse.coo_array(
        ([1, 1], ([0, 2], [1, 3])), shape=(3, 4)
    ).asformat(kind)
    for name, array in arrays.items():
        setattr(matrix, name, np.array(array))
    return matrix


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # SciPy writes outside its arrays if it is given these.
        (lambda: damage("csr", indices=[1, 10**9]), "column 1000000000"),
        (lambda: damage("csr", indices=[-1, 2]), "column -1"),
        (lambda: damage("csc", indices=[1, 7]), "row 7"),
        (lambda: damage("csr", indptr=[0, 1, 1, 9]), "end with at most 2"),
        (lambda: damage("csr", indptr=[0, 2, 1, 2]), "never decrease"),
        (lambda: damage("csr", indptr=[1, 1, 1, 2]), "start with 0"),
        (lambda: damage("csr", indptr=[0, 1, 2]), "have 4 entries"),
        (lambda: damage("csr", data=[1]), "end with at most"),
        (lambda: damage("coo", data=[1]), "different lengths"),
        (lambda: damage("coo", coords=([0, 5], [1, 1])), "row 5"),
        (lambda: damage("bsr", indices=[1, 10**9]), "index 1000000000"),
        (lambda: damage("csr", data=[1, np.nan]), "nan in row 2, column 3"),
        (lambda: damage("csc", data=[np.inf, 1]), "inf in row 0, column 1"),
        (lambda: damage("csr", data=[1j, 1]), "type complex128"),
        (lambda: scipy.sparse.csr_array((2, 10**9)), "1,000,000,000 columns"),
        (lambda: scipy.sparse.coo_array((2**40, 2)), "rows and 0 entries"),
        (lambda: scipy.sparse.coo_array([1, 0]), "scipy.sparse matrix"),
        (lambda: np.eye(2), "got ndarray"),
    ],
)
def test_matrices_that_are_refused(make, message):
    with refuses(message):
        Interactions.from_scipy(make())


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.longdouble])
@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "dia", "lil", "dok"])
def test_matrices_of_every_type(kind, dtype):
    full = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    matrix = scipy.sparse.csr_array(full.astype(dtype)).asformat(kind)
    np.testing.assert_array_equal(dense(Interactions.from_scipy(matrix)), full)


def test_stored_zeros_and_space_at_the_end_are_no_entries():
    matrix = damage("csr", indices=[1, 3, 99], data=[0, 1, 1])
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    made = Interactions.from_scipy(matrix)
    np.testing.assert_array_equal(dense(made), expected)


def test_negative_entries_are_interactions_with_a_warning(caplog):
    matrix = scipy.sparse.csr_array(np.array([[0, -1], [5, 0]]))
    made = Interactions.from_scipy(matrix)
    np.testing.assert_array_equal(dense(made), [[0, 1], [1, 0]])
    [record] = caplog.records
    assert record.name == "vaecf" and "1 negative" in record.message
