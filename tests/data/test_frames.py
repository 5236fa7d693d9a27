"""Frames, Series, mappings and lists: one meaning in all forms."""

import collections
import datetime
import decimal
import uuid

import numpy as np
import pandas as pd
import polars as pl
import pytest
from oracles import refuses

from vaecf.data import in_memory, prepare
from vaecf.data.id_table import IdTable, text_of
from vaecf.serving.histories import as_histories

ITEMS = ["c", "a", "b", "d"]  # index order is not alphabetical
PAIRS = {"user": ["x", "y", "x", "x"], "item": ["c", "d", "a", "c"]}
WANTED = {"x": {"a", "c"}, "y": {"d"}}
FRAME = pd.DataFrame(PAIRS)
LISTS = FRAME.groupby("user").agg(list)


class Arrow:
    """What vaecf sees of an Arrow table; pyarrow is no dependency."""

    def __init__(self, frame):
        self._frame = frame

    def __arrow_c_stream__(self, requested_schema=None):
        return self._frame.__arrow_c_stream__(requested_schema)


class ArrowArray:
    """What vaecf sees of an Arrow array, which is iterable too."""

    def __init__(self, values):
        self._values = values

    def __arrow_c_array__(self, requested_schema=None):
        raise AssertionError("lists are taken as Python's")

    def __iter__(self):
        return map(repr, self._values)

    def to_pylist(self):
        return self._values


def asked(histories, ids=ITEMS):
    """{user: items} by `as_histories`, and the unknown items."""
    users, matrix, unknown = as_histories(
        histories, IdTable(ids), "user", "item"
    )
    matrix.check()
    rows = [{ids[i] for i in matrix.row(u)} for u in range(len(users))]
    return dict(zip(users.tolist(), rows, strict=True)), unknown


def fitted(interactions):
    """{user: items} of a dataset in memory without held-out users."""
    made = in_memory.without_test(interactions, validation_users=0)
    return {
        user: {made.items.ids[i] for i in made.train.row(u)}
        for u, user in enumerate(made.users.ids)
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: FRAME,
        lambda: FRAME.astype("category"),
        lambda: FRAME.set_index("user"),
        lambda: FRAME.assign(n=1).set_index(["user", "item"]),
        lambda: LISTS,
        lambda: LISTS.reset_index(),
        lambda: LISTS["item"],
        lambda: LISTS["item"].map(tuple),
        lambda: LISTS["item"].map(set),
        lambda: LISTS["item"].map(np.array),
        lambda: pd.concat([LISTS["item"], pd.Series([["a"]], index=["x"])]),
        lambda: pl.DataFrame(PAIRS),
        lambda: pl.DataFrame(PAIRS).cast(pl.Categorical),
        lambda: pl.DataFrame(PAIRS).lazy(),
        lambda: pl.DataFrame(PAIRS).lazy().group_by("user").agg("item"),
        lambda: Arrow(pl.DataFrame(PAIRS)),
        lambda: Arrow(pl.DataFrame(PAIRS).group_by("user").agg("item")),
        lambda: {"x": iter("ca"), "y": pl.Series(["d"])},
        lambda: {"x": ArrowArray(["c", "a"]), "y": pd.Index(["d"])},
    ],
)
def test_every_form_for_fit_and_recommend(make):
    assert asked(make()) == (WANTED, 0)
    assert fitted(make()) == WANTED


@pytest.mark.parametrize(
    "make",
    [
        lambda: [["c", "a"], ["d"]],
        lambda: (iter(items) for items in ("ca", "d")),
        lambda: {"x": ["c", "a"], "y": ["d"]}.values(),
        lambda: LISTS["item"].to_numpy(),
        lambda: pl.Series([["c", "a"], ["d"]]),
        lambda: ArrowArray([["c", "a"], ["d"]]),
    ],
)
def test_users_of_lists_are_numbers(make):
    assert asked(make()) == ({0: {"a", "c"}, 1: {"d"}}, 0)
    assert fitted(make()) == {0: {"a", "c"}, 1: {"d"}}


def test_columns_without_names():
    frame = pd.DataFrame(FRAME.to_numpy())  # columns 0 and 1
    made = in_memory.without_test(
        frame, user_column=0, item_column=1, validation_users=0
    )
    assert sorted(made.users.ids) == ["x", "y"] and made.train.nnz == 3
    users, _, _ = as_histories(frame, IdTable(ITEMS), 0, 1)
    assert users.tolist() == ["x", "y"]


def test_an_empty_list_is_a_user_without_items():
    for frame in (
        pl.DataFrame({"user": ["x", "y", "z"], "item": [["a"], [], ["b"]]}),
        pd.DataFrame({"user": ["x", "y", "z"], "item": [["a"], [], ["b"]]}),
    ):
        assert asked(frame) == ({"x": {"a"}, "y": set(), "z": {"b"}}, 0)
        assert fitted(frame) == {"x": {"a"}, "z": {"b"}}


def test_arrays_of_polars_and_gaps_in_wide_integers():
    """A column of integers with a gap is not rounded to floats."""
    wide = 2**60 + 1
    frame = pl.DataFrame({"user": [1, 1, 2], "item": [wide, None, wide - 1]})
    assert asked(frame, [wide, 7]) == ({1: {wide}, 2: set()}, 2)
    pairs = pl.Series([["a", "b"], ["c", "d"]], dtype=pl.Array(pl.String, 2))
    assert asked(pl.DataFrame({"user": [5, 6], "item": pairs})) == (
        {5: {"a", "b"}, 6: {"c", "d"}},
        0,
    )


BAD = {
    "type ndarray": lambda: np.eye(4),
    "type str": lambda: "abc",
    "type set": lambda: {("a", "b")},
    "type Series": lambda: FRAME.set_index("user")["item"],
    "type DataFrameGroupBy": lambda: FRAME.groupby("user"),
    "type SeriesGroupBy": lambda: FRAME.groupby("user")["item"],
    "a mapping of columns": lambda: PAIRS,
    "several columns 'item'": lambda: FRAME.assign(b=1).set_axis(
        ["user", "item", "item"], axis=1
    ),
    r"have no column 'item' \(they have \('item', 'list'\)": lambda: (
        FRAME.groupby("user").agg({"item": [list]})
    ),
    r"have no column 'user'.*\(40 in all\)": lambda: pd.DataFrame(
        np.zeros((1, 40))
    ),
    "'user'; did you mean usr": lambda: pl.LazyFrame({"usr": [1], "item": [1]}),
    "No such file": lambda: pl.scan_csv("/no/such/file.csv"),
    "user 'x' is {'a': 3}: pass a list": lambda: {"x": {"a": 3}},
    "user 'x' is Counter": lambda: {"x": collections.Counter("a")},
    "user 'x' is user item": lambda: {"x": FRAME},
    "user 'x' is array...'a'": lambda: {"x": np.array(["a"])[None]},
    r"user 'x' is array\('a'": lambda: {"x": np.array("a")},
    "user 0 is 'a'": lambda: ["a", "b"],
    "user 1 is None": lambda: pd.Series([["a"], None]),
    "row 2, have no list": lambda: pl.DataFrame(
        {"user": ["x", "y"], "item": [["a"], None]}
    ),
    "and not a mask": lambda: {"x": np.array([True, False])},
    "type list|unhashable": lambda: [["a", ["b"]]],
    r"id b'a' is of type bytes": lambda: {"x": [b"a"]},
    r"id \('a', 1\) is of type tuple": lambda: {"x": [("a", 1)]},
    "id <object": lambda: {"x": [object()]},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("use", [asked, fitted])
def test_other_forms_are_refused(use, message):
    if (use, message) == (fitted, "type str"):
        message = "of type str: pass a DataFrame"
    with refuses(message) as error:
        use(BAD.get(message, BAD["type str"])())
    assert len(str(error.value)) < 300


# --- Ids --------------------------------------------------------------------

DAY, NOON = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12)
# Raw ids, and the text that `fit` knows them by.
KINDS = {
    "uuid": ([uuid.UUID(int=1), uuid.UUID(int=2)], [f"{'0' * 8}-{'0' * 4}-{'0' * 4}-{'0' * 4}-{n:012}" for n in (1, 2)]),
    "date": ([DAY, datetime.date(1, 1, 1)], ["2024-02-29", "0001-01-01"]),
    "datetime": ([NOON, datetime.datetime(2024, 2, 29)], ["2024-02-29 12:00:00", "2024-02-29"]),
    "decimal": ([decimal.Decimal("1.50"), decimal.Decimal("7.00")], ["1.5", "7"]),
    "float": ([0.5, 7.0], ["0.5", "7"]),
    "bool": ([True, False], ["True", "False"]),
    "wide": ([-1, 2**63], ["-1", str(2**63)]),
    "mixed": ([7, "x"], ["7", "x"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, dict])
def test_ids_of_other_types(kind, frame):
    """Users of histories come back unchanged; items have one text."""
    values, texts = KINDS[kind]
    assert [text_of(value) for value in values] == texts
    if frame is dict:
        by_user = {v: [v] for v in values}
    elif kind in ("wide", "mixed") and frame is pl.DataFrame:
        return  # polars has no such column
    else:
        by_user = frame({"user": values, "item": values})
    assert fitted(by_user) == {text: {text} for text in texts}
    users, _, unknown = as_histories(by_user, IdTable(texts), "user", "item")
    assert unknown == 0
    if kind == "datetime" and frame is not dict:
        users = pd.Series(users).dt.to_pydatetime()
    assert list(users) == values
    assert list(map(type, users.tolist())) == list(map(type, values))
    # Also if they are asked for one by one.
    table = IdTable(texts)
    for i, value in enumerate(values):
        assert table.index_of([value]).tolist() == [i]
        assert table.index_of(pd.Series([value])).tolist() == [i]


def test_a_parquet_file_knows_ids_by_the_same_text(tmp_path):
    for kind in ("date", "datetime", "decimal", "float", "bool"):
        values, texts = KINDS[kind]
        frame = pl.DataFrame({"user": values, "item": values})
        frame.write_parquet(tmp_path / "x.parquet")
        made = prepare.read_ratings(tmp_path / "x.parquet")
        assert sorted(made.item_ids) == sorted(texts), kind


def test_dates_with_a_time_zone_and_of_numpy():
    zone = pd.Timestamp("2024-02-29", tz="Europe/Paris")
    assert text_of(zone) == "2024-02-29 00:00:00+01:00"
    table = IdTable(["2024-02-29", "2024-02-29 00:00:00.000000001"])
    for unit in ("D", "s", "ns"):
        day = np.array(["2024-02-29"], f"M8[{unit}]")
        assert table.index_of(day).tolist() == [0]
        assert table.index_of(list(day)).tolist() == [0]
        assert table.index_of(pd.Series(day).astype("category")) == [0]
    assert table.index_of(day + 1).tolist() == [1]


def test_dates_that_pandas_does_not_hold():
    # pandas refuses arrays without a unit, and years beyond 64 bits of seconds.
    far = np.array([2**62], "M8[Y]")
    table = IdTable(["7", str(far[0])])
    assert table.index_of(far).tolist() == [1]
    assert table.index_of(np.array([np.datetime64("NaT")])).tolist() == [-1]


def test_wide_integers_and_nul_characters_are_kept():
    assert IdTable([1, 2**62 + 1]).index_of([2**62 + 1, -1, 2**63])[0] == 1
    assert IdTable(["a", "a\0"]).index_of(["a\0"]).tolist() == [1]
    masked = np.ma.masked_array([5, 6], [False, True])
    assert IdTable([5, 6]).index_of(masked).tolist() == [0, -1]
    assert IdTable([12, 5]).index_of(["12.0", "12.5", "5"]).tolist() == [0, -1, 1]  # fmt: skip


def test_histories_without_a_known_item_are_an_error():
    with refuses(
        r"none of the 3 items of the histories, such as 'z', 9, None; it "
        r"knows items such as 'c', 'a', 'b'$"
    ):
        asked({"x": ["z"], "y": [9, None]})
    assert asked({"x": [], "y": []}) == ({"x": set(), "y": set()}, 0)
