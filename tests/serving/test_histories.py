"""Histories in all accepted forms, and in wrong ones."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from oracles import refuses

from vaecf.data.id_table import IdTable
from vaecf.serving.histories import as_histories

ITEMS = ["c", "a", "b", "d"]  # index order is not alphabetical
LISTS = {"x": ["a", "c"], "y": ["d"]}
PAIRS = {"user": ["x", "y", "x", "x"], "item": ["c", "d", "a", "c"]}


def ask(histories, ids=ITEMS, **columns):
    users, matrix, unknown = as_histories(
        histories,
        IdTable(ids),
        columns.get("user_column", "user"),
        columns.get("item_column", "item"),
    )
    matrix.check()
    assert matrix.n_items == len(ids) and matrix.n_users == len(users)
    sets = [{ids[i] for i in matrix.row(u)} for u in range(len(users))]
    return list(users), sets, unknown


@pytest.mark.parametrize(
    ("histories", "users"),
    [
        (LISTS, ["x", "y"]),
        ({u: np.array(v) for u, v in LISTS.items()}, ["x", "y"]),
        ({u: pd.Series(v, index=range(5, 5 + len(v))) for u, v in LISTS.items()}, ["x", "y"]),
        ({u: iter(v) for u, v in LISTS.items()}, ["x", "y"]),
        (list(LISTS.values()), [0, 1]),
        (tuple(map(tuple, LISTS.values())), [0, 1]),
        (pd.DataFrame(PAIRS), ["x", "y"]),
        (pd.DataFrame(PAIRS, index=[9, 9, 3, 1]), ["x", "y"]),
        (pd.DataFrame(PAIRS).astype("category"), ["x", "y"]),
        (pl.DataFrame(PAIRS), ["x", "y"]),
        (pl.DataFrame(PAIRS).cast(pl.Categorical), ["x", "y"]),
        (scipy.sparse.csr_matrix([[2, 1, 0, 0], [0, 0, 0, 1]]), [0, 1]),
        (scipy.sparse.coo_array([[2, 1, 0, 0], [0, 0, 0, 1]]), [0, 1]),
    ],
)  # fmt: skip
def test_every_form_means_the_same(histories, users):
    assert ask(histories) == (users, [{"a", "c"}, {"d"}], 0)


@pytest.mark.parametrize(
    "users",
    [
        [3, 1, 2],
        ["3", "1", "2"],
        [10**17 + 1, -5, 0],
        [np.int64(3), np.int64(1), 2],
        [3, "1", 2.5],
        [True, False, 7],
        [("x", 1), ("y", 2), ("z", 3)],
        [("x", 1), ("y",), "z"],
    ],
)
def test_users_come_back_as_they_were(users):
    """In the given order and with their types."""
    got, sets, _ = ask({user: ["a"] for user in users})
    assert got == users
    assert [type(u) is bool for u in got] == [type(u) is bool for u in users]
    assert sets == [{"a"}] * 3


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_users_of_a_frame_are_in_order_of_first_appearance(frame):
    got, sets, _ = ask(
        frame({"who": [7, 2**60, 7, -1], "what": ["d", "a", "b", "q"]}),
        user_column="who",
        item_column="what",
    )
    assert got == [7, 2**60, -1]
    assert sets == [{"d", "b"}, {"a"}, set()]


def test_integer_items_by_number_text_and_float():
    got = ask([[30, "10"], [20.0, 10, 10], ["30"], [5, None]], ids=[30, 10, 20])
    assert got == ([0, 1, 2, 3], [{30, 10}, {20, 10}, {30}, set()], 2)


def test_a_list_is_no_column_name():
    with refuses(r"item_column=\['item'\]: name one column"):
        ask(pd.DataFrame(PAIRS), item_column=["item"])


def test_unknown_items_are_counted_each_time():
    assert ask({"x": ["a", "q", "q"], "y": ["p"]}) == (
        ["x", "y"],
        [{"a"}, set()],
        3,
    )


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (7, "histories of type int"),
        (np.eye(4), "histories of type ndarray"),
        ({"x": "abc"}, "history of user 'x' is 'abc': pass a list of items"),
        ({"x": ["a"], "y": 3}, "history of user 'y' is 3"),
        ([["a"], b"b"], "history of user 1 is b'b'"),
        (pd.DataFrame({"usr": ["x"], "item": ["a"]}), "no column 'user'; did you mean usr. .they have usr, item"),
        (pd.DataFrame({"user": ["x"]}), "no column 'item'"),
        (pd.DataFrame({"user": ["x", None], "item": ["a", "b"]}), "row 2, have no user id"),
        (pd.DataFrame({"user": [1.0, np.nan], "item": ["a", "b"]}), "row 2, have no user id"),
        (pl.DataFrame({"user": [None, "x"], "item": ["a", "b"]}), "row 1, have no user id"),
        (scipy.sparse.csr_matrix((4, 2)), "users x items with 2 columns, and the model has 4 items"),
        (scipy.sparse.coo_array([1, 0, 1, 0]), "scipy.sparse matrix of users x items"),
    ],
)  # fmt: skip
def test_wrong_forms(histories, message):
    with refuses(message):
        ask(histories)
