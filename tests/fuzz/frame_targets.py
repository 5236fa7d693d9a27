"""Targets of frames, histories, matrices and settings, with brute force.

A target makes one input and returns "read" or "refused"; see `harness`.
"""

import collections
import copy
import ctypes
import datetime
import decimal
import itertools
import random
import re
import uuid
import warnings

import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse

from vaecf import config as config_lib
from vaecf.data import in_memory
from vaecf.data.frames import id_list
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.files import user_path
from vaecf.serving.histories import as_histories, count
from vaecf.serving.keywords import KEYWORDS, make_config

ITEMS = IdTable(["a", "b", "c", "7", "-3", "2024-02-29", str(2**53 + 1)])


def refused(error: VaecfError) -> str:
    """Returns "refused" if the message is short and of one line."""
    text = str(error)
    assert "\n" not in text and 0 < len(text) < 1000, text
    return "refused"


# --- Tables with a known meaning --------------------------------------------


class Stream:
    """What remains of an Arrow table."""

    def __init__(self, frame):
        self._frame = frame

    def __arrow_c_stream__(self, requested_schema=None):
        return self._frame.__arrow_c_stream__(requested_schema)


def make_ids(rng: random.Random) -> list:
    """Some distinct ids of one type, each as (value, text)."""
    day = datetime.date(2024, 2, 29)
    numbers = rng.sample(range(-9, 40), 12)
    wide = rng.choice([2**31, 2**53, 2**62, -(2**62)])
    kinds = {
        "int": [(n, str(n)) for n in numbers],
        "wide": [(wide + n, str(wide + n)) for n in numbers],
        "float": [(float(n), str(n)) for n in numbers],
        "text": [(t, t) for t in ("a", "B", "007", "é", "a b", "-0", "1e3", "a\0")],
        "digits": [(str(n), str(n)) for n in numbers],
        "date": [(day + datetime.timedelta(n), str(day + datetime.timedelta(n))) for n in numbers],
        "decimal": [(decimal.Decimal(n) / 4, str(n // 4) if n % 4 == 0 else str(decimal.Decimal(n) / 4)) for n in numbers],
        "uuid": [(uuid.UUID(int=n + 99), str(uuid.UUID(int=n + 99))) for n in numbers],
        "bool": [(True, "True"), (False, "False")],
    }  # fmt: skip
    ids = kinds[rng.choice(list(kinds))]
    return rng.sample(ids, rng.randint(1, len(ids)))


def as_column(rng: random.Random, values: list):
    """A pandas column of a random dtype that keeps the values."""
    series = pd.Series(values)
    choices = ["object", "category"]
    if all(type(v) is int for v in values):
        choices += ["int64", "Int64", "Float64"] if max(map(abs, values), default=0) < 2**53 else ["int64", "Int64"]  # fmt: skip
    if all(type(v) is str for v in values):
        choices.append("string")
    return series.astype(rng.choice(choices))


def table(rng: random.Random, folder=None) -> str:
    """The same pairs in a random form, for `fit` and for `recommend`."""
    users, items = make_ids(rng), make_ids(rng)
    pairs = [
        (rng.choice(users), rng.choice(items))
        for _ in range(rng.randint(1, 30))
    ]
    truth = collections.defaultdict(set)
    for (user, _), (_, item) in pairs:
        truth[user].add(item)
    left, right = ([pair[i][0] for pair in pairs] for i in (0, 1))
    lists = collections.defaultdict(list)
    for user, item in zip(left, right):
        lists[user].append(item)
    form = rng.choice(
        [
            "mapping",
            "series",
            "cells",
            "pandas",
            "index",
            "polars",
            "lazy",
            "arrow",
            "polars_cells",
        ]
    )
    try:
        if form == "mapping":
            shape = rng.choice([list, tuple, set, np.array, pd.Series, iter])
            # Arrays of booleans are masks, and NumPy cuts "a\\0".
            if items[0][0] in (True, False) or "a\0" in right:
                shape = list
            source = {u: shape(values) for u, values in lists.items()}
        elif form in ("series", "cells"):
            source = pd.Series(list(lists.values()), pd.Index(list(lists), name="user"), name="item")  # fmt: skip
            source = source.reset_index() if form == "cells" else source
        elif form in ("pandas", "index"):
            source = pd.DataFrame({"user": as_column(rng, left), "item": as_column(rng, right)})  # fmt: skip
            source = source.sample(frac=1, random_state=rng.randrange(99))
            source = source.set_index("user") if form == "index" else source
        else:
            source = pl.DataFrame({"user": left, "item": right})
            if form == "arrow" and pl.Object in source.dtypes:
                return "refused"  # Arrow has no objects
            if form == "polars_cells":
                source = source.group_by("user", maintain_order=True).agg("item")  # fmt: skip
            source = {"lazy": source.lazy, "arrow": lambda: Stream(source)}.get(form, lambda: source)()  # fmt: skip
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return "refused"  # polars or pandas does not hold these ids
    if form == "mapping" and shape is iter:
        again = {u: iter(values) for u, values in lists.items()}
    else:
        again = source
    texts = sorted({text for _, text in items})
    asked, matrix, unknown = as_histories(source, IdTable(texts), "user", "item")  # fmt: skip
    found = {
        python(user): {texts[i] for i in matrix.row(u)}
        for u, user in enumerate(asked)
    }
    assert unknown == 0 and found == truth, (form, found, truth)
    made = in_memory.without_test(again, validation_users=0)
    text_of = dict(users)
    found = {
        str(user): {str(made.items.ids[i]) for i in made.train.row(u)}
        for u, user in enumerate(made.users.ids)
    }
    truth = {text_of[user]: items for user, items in truth.items()}
    assert found == truth, (form, found, truth)
    return "read"


def python(value):
    """A value of NumPy or pandas as one of Python."""
    if isinstance(value, (np.datetime64, pd.Timestamp)):
        return pd.Timestamp(value).date()
    return value.item() if isinstance(value, np.generic) else value


# --- Matrices ---------------------------------------------------------------


def matrix(rng: random.Random, folder=None) -> str:
    """CSR, CSC and COO arrays, possibly damaged, against a loop in Python."""
    kind = rng.choice(["csr", "csc", "coo"])
    shape = rng.randint(1, 6), rng.randint(1, 6)
    n = rng.randint(0, 12)
    values = [rng.choice([0, 1, 1, 1, 2, -1, 127]) for _ in range(n)]
    data = np.array(values, rng.choice([np.int8, np.float32, np.int64, bool]))
    row = [rng.randrange(shape[0]) for _ in range(n)]
    column = [rng.randrange(shape[1]) for _ in range(n)]
    made = scipy.sparse.coo_array((data, (row, column)), shape=shape)
    if kind != "coo":
        major, minor = (row, column) if kind == "csr" else (column, row)
        order = sorted(range(n), key=lambda i: major[i])
        n_major = shape[0 if kind == "csr" else 1]
        indptr = [sum(m < j for m in major) for j in range(n_major + 1)]
        arrays = [data[order], np.array([minor[i] for i in order], np.int32), np.array(indptr, np.int32)]  # fmt: skip
        made = scipy.sparse.csr_array(shape) if kind == "csr" else scipy.sparse.csc_array(shape)  # fmt: skip
        made.data, made.indices, made.indptr = arrays
        names = ["data", "indices", "indptr"]
    else:
        names = ["data", "row", "col"]
        made.data, made.row, made.col = made.data.copy(), made.row.copy(), made.col.copy()  # fmt: skip
    damaged = rng.random() < 0.5
    if damaged:
        name = rng.choice(names)
        array = getattr(made, name)
        if array.size and rng.random() < 0.7:
            bad = rng.choice([-1, 7, 99, 2**31 - 1, -(2**31)])
            if name == "data":
                array = array.astype(float)
                bad = rng.choice([np.nan, np.inf, -np.inf])
            array[rng.randrange(array.size)] = bad
        else:
            array = np.append(array, array[:1]) if rng.random() < 0.5 else array[:-1]  # fmt: skip
        setattr(made, name, array)
    expected = cells(made, kind, shape)
    try:
        got = Interactions.from_scipy(made)
    except VaecfError as error:
        assert expected is None, (kind, made.data, expected, str(error))
        return refused(error)
    got.check()
    found = {(u, int(i)) for u in range(got.n_users) for i in got.row(u)}
    assert found == expected, (kind, found, expected)
    return "read"


def cells(made, kind: str, shape: tuple[int, int]) -> set | None:
    """The nonzero cells by the definition of the format; None if damaged."""
    data = made.data.tolist()
    if kind == "coo":
        triples = list(zip(made.row.tolist(), made.col.tolist(), data))
        if len({len(data), made.row.size, made.col.size}) > 1:
            return None
    else:
        starts, minor = made.indptr.tolist(), made.indices.tolist()
        n_major = shape[0 if kind == "csr" else 1]
        if len(starts) != n_major + 1 or starts[0] != 0:
            return None
        triples = []
        for m, (start, stop) in enumerate(itertools.pairwise(starts)):
            if stop < start or stop > min(len(minor), len(data)):
                return None
            for j in range(start, stop):
                pair = (m, minor[j]) if kind == "csr" else (minor[j], m)
                triples.append((*pair, data[j]))
    for row, column, value in triples:
        inside = 0 <= row < shape[0] and 0 <= column < shape[1]
        if not inside or not np.isfinite(value):
            return None
    return {(row, column) for row, column, value in triples if value}


# --- Anything ---------------------------------------------------------------


PLAIN = (
    None, True, 0, -1, 7, 2**63, 10**30, 0.5, 7.0, float("nan"), float("inf"), "", "a",
    "7", "12.0", "nan", "é\n", "\ud800", b"a", 1j, object(), uuid.UUID(int=3), int, len,
    datetime.date(2024, 2, 29), datetime.timedelta(1), decimal.Decimal("7.0"), decimal.Decimal("NaN"),
    np.int8(7), np.float32(7), np.bool_(True), np.datetime64("2024-02-29"), np.str_("a"), np.array(7), np.datetime64("NaT"),
    pd.NA, pd.NaT, pd.Timestamp("2024-02-29", tz="UTC"), range(3), np.eye(2), np.array([], bool), pd.Interval(0, 1),
    scipy.sparse.eye_array(7), np.ma.masked_array([7, 1], [0, 1]), np.array([("a", 1)], "U1,i4"),
)  # fmt: skip


def _ends_the_process(value) -> bool:
    """Returns whether polars aborts when it frees a value."""
    if isinstance(value, pl.Series):
        value = value.to_frame()
    if not isinstance(value, (pl.DataFrame, pl.LazyFrame)):
        return False
    types = [repr(kind) for kind in value.lazy().collect_schema().dtypes()]
    nested = re.compile("List|Array|Struct")
    return any("Object" in t and len(nested.findall(t)) > 1 for t in types)


def anything(rng: random.Random, depth: int = 0):
    """A random value of the kinds that notebooks pass by mistake."""
    if depth > 2 or rng.random() < 0.4:
        return copy.copy(rng.choice(PLAIN))
    some = [anything(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    makers = [
        lambda: some, lambda: tuple(some), lambda: iter(some), lambda: {i: x for i, x in enumerate(some)},
        lambda: {"x": anything(rng, depth + 1)}, lambda: {"user": some, "item": some},
        lambda: set(some), lambda: np.array(some, object), lambda: np.array(some), lambda: pd.Series(some),
        lambda: pd.Series(some, dtype=object), lambda: pl.Series(some), lambda: pl.Series(some, dtype=pl.Object),
        lambda: pd.DataFrame({"user": some, "item": some}), lambda: pd.DataFrame({"user": ["x"] * len(some), "item": some}),
        lambda: pl.DataFrame({"user": some, "item": some}), lambda: pl.DataFrame({"user": range(len(some)), "item": some}).lazy(),
        lambda: pd.DataFrame({"item": some}).groupby("item"), lambda: pd.Series(some, dtype="category"),
    ]  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = rng.choice(makers)()
        if _ends_the_process(made):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
            return some
        return made
    except BaseException:  # there is no such frame; polars panics
        return some


def junk(rng: random.Random, folder=None) -> str:
    """Anything in four of the places of histories, ids and settings."""

    def again():
        rng.setstate(state)
        return anything(rng)

    uses = (
        lambda: as_histories(again(), ITEMS, "user", "item")[1].check(),
        lambda: in_memory.without_test(again(), validation_users=0),
        lambda: ITEMS.index_of(id_list(again(), "deny_items=")),
        lambda: ITEMS.index_of([again()]),
        lambda: make_config({rng.choice(list(KEYWORDS)): again()}, 10),
        lambda: count("k", again()),
        lambda: user_path(again()),
        lambda: in_memory.without_test(
            {1: [2], 3: [4]}, validation_users=again()
        ),
        lambda: in_memory.without_test({1: [2], 3: [4]}, seed=again()),
        lambda: in_memory.without_test({1: [2], 3: [4]}, user_column=again()),
        lambda: config_lib.replace(
            config_lib.Config(),
            {rng.choice(list(config_lib.settings())): again()},
        ),
    )
    chosen, state = rng.sample(uses, 4), rng.getstate()
    outcomes = set()
    for use in chosen:
        try:
            use()
            outcomes.add("read")
        except VaecfError as error:
            outcomes.add(refused(error))
    return min(outcomes)
