"""Times and given splits, from every kind of file and frame."""

import datetime
import gzip
import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import refuses

import vaecf
from vaecf.data import prepare
from vaecf.data.readers import collapse_duplicates, read_ratings

ROWS = [(2, 9, 13), (1, 7, 12), (1, 9, 11)]  # user, item, time


def times_of(source, **settings):
    """Returns [(user, item, time)] of a source in its order."""
    found = read_ratings(source, more=("time",), **settings)
    user, item = found.user_ids[found.user], found.item_ids[found.item]
    return list(zip(user.tolist(), item.tolist(), found.time.tolist()))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "more"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n"
         "2,9,4,13\n1,7,3.5,12\n1,9,5,11\n", {}),
        ("ratings.dat", "2::9::4::13\n1::7::3::12\n1::9::5::11\n", {}),
        ("u.data", "2\t9\t4\t13\n1\t7\t3\t12\n1\t9\t5\t11\n", {}),
        ("own.csv", "time,user,item\n13,2,9\n12,1,7\n11,1,9\n", {}),
        ("own.tsv", "user\twhen\titem\n2\t 13 \t9\n1\t12\t7\n1\t11\t9\n",
         {"time_column": "when"}),
        ("bare.csv", "13,2,9\n12,1,7\n11,1,9\n",
         {"no_header": True, "user_column": 2, "item_column": 3,
          "time_column": 1}),
        ("own.json", "".join(
            json.dumps({"user": u, "item": i, "at": t}) + "\n"
            for u, i, t in ROWS), {"time_column": "at"}),
    ],
)  # fmt: skip
def test_whole_times(tmp_path, name, text, more):
    assert times_of(write(tmp_path / name, text), **more) == ROWS


def test_times_of_netflix(tmp_path):
    text = "9:\n2,4,2005-01-02\n1,5,2004-12-31\n7:\n1,3,2005-01-03\n"
    path = write(tmp_path / "combined_data_1.txt", text)
    assert times_of(path) == [
        (2, 9, datetime.datetime(2005, 1, 2)),
        (1, 9, datetime.datetime(2004, 12, 31)),
        (1, 7, datetime.datetime(2005, 1, 3)),
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.datetimes(datetime.datetime(1800, 1, 1)).flatmap(
            lambda time: st.tuples(st.just(time), st.integers(-720, 720))
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([" ", "T"]),
)
@example([(datetime.datetime(2024, 2, 29), 0)], " ")
def test_dates_in_texts_are_utc(tmp_path_factory, times, mark):
    """Naive texts, texts with a zone, and frames agree with Python's."""
    folder = tmp_path_factory.mktemp("dates")
    naive = [time for time, _ in times]
    users = np.arange(len(times))
    zones = [datetime.timezone(datetime.timedelta(minutes=m)) for _, m in times]
    texts = [
        time.replace(tzinfo=datetime.UTC).astimezone(zone).isoformat(mark)
        for time, zone in zip(naive, zones)
    ]
    frame = pl.DataFrame({"user": users, "item": users, "time": naive})
    for column in (
        [str(time) for time in naive],
        texts,
        pl.Series(naive).dt.replace_time_zone("UTC"),
    ):
        path = folder / "x.csv"
        frame.with_columns(time=pl.Series(column)).write_csv(path)
        assert [time for *_, time in times_of(path)] == naive
    for source in (frame, pd.DataFrame(frame.to_dict(as_series=False))):
        assert [time for *_, time in times_of(source)] == naive


def test_numbers_of_other_types():
    wide = [2**62 + 1, 2**62, -5]
    frame = pl.DataFrame({"user": [1, 2, 3], "item": [1, 2, 3], "time": wide})
    assert [t for *_, t in times_of(frame)] == wide
    halves = frame.with_columns(time=pl.Series([0.5, 1e9, -3]))
    assert [t for *_, t in times_of(halves)] == [0.5, 1e9, -3]
    texts = frame.with_columns(time=pl.Series(["1.5", "2", "1e3"]))
    assert [t for *_, t in times_of(texts)] == [1.5, 2, 1000]
    dates = frame.with_columns(time=pl.Series([datetime.date(2024, 2, 29)] * 3))
    assert times_of(dates)[0][2] == datetime.datetime(2024, 2, 29)


@pytest.mark.parametrize(
    ("time", "message"),
    [
        ("12\n1,2,", "line 3: column 'time' holds nothing"),
        ("12\n1,2,NULL", "line 3: column 'time' holds 'NULL'"),
        ("12\n1,2,inf", "holds 'inf', which is not a time"),
        ("12\n1,2,yesterday", "line 3: column 'time' holds 'yesterday'"),
        ("2024-02-29\n1,2,2024-02-30", "line 3: column 'time' holds '2024-02"),
        ("2024-02-29\n1,2,", "line 3: column 'time' holds nothing"),
        ("0001-01-01T00:00+02:00", "line 2: column 'time' holds '0001-01-01T"),
        ("12\n1,2,2024-02-29", "line 2: column 'time' holds '12'"),
    ],
)
def test_bad_times_are_named(tmp_path, time, message):
    path = write(tmp_path / "x.csv", f"user,item,time\n1,1,{time}\n")
    with refuses(message):
        read_ratings(path, more=("time",))


def test_sources_without_times(tmp_path):
    with refuses("have no column 'time'.*choose with time_column"):
        read_ratings(pd.DataFrame({"user": [1], "item": [2]}), more=("time",))
    with refuses("times are numbers or dates"):
        frame = pl.DataFrame({"user": [1], "item": [2], "time": [True]})
        read_ratings(frame, more=("time",))
    path = write(tmp_path / "a.txt", "0 1 2\n1 3\n")
    with refuses("holds no times: choose another protocol"):
        read_ratings(path, more=("time",), layout="lightgcn_txt")
    folder = tmp_path / "parts"
    write(folder / "1.csv", "user,item,time\n1,1,12\n")
    write(folder / "2.csv", "user,item,time\n1,1,2024-02-29\n")
    with refuses("some times are numbers and others are dates"):
        read_ratings(folder, more=("time",))


def test_the_earliest_row_of_a_pair_is_kept():
    rows = [(1, 1, 5), (1, 2, 9), (1, 1, 3), (1, 2, 9), (1, 1, 4)]
    frame = pd.DataFrame(rows, columns=["user", "item", "time"])
    kept, dropped = collapse_duplicates(read_ratings(frame, more=("time",)))
    assert dropped == 3
    assert list(zip(kept.item_ids[kept.item], kept.time)) == [(2, 9), (1, 3)]


GIVEN = pd.DataFrame(
    [(1, 10, 0), (1, 20, 2), (2, 20, 0), (2, 10, 2), (3, 10, 0), (3, 30, 0)],
    columns=["user", "item", "part"],
)


def expected_given():
    return vaecf.split(
        GIVEN.assign(split=GIVEN["part"].map({0: "train", 2: "test"})),
        protocol="given",
    )


@pytest.mark.parametrize(
    "values",
    [
        (False, True), (0, 1), (0.0, 1.0), ("0", "1"), ("False", "TRUE"),
        (" train", "Test "),
    ],
)  # fmt: skip
def test_words_for_the_parts(tmp_path, values):
    wanted = expected_given()
    assert wanted.train.nnz + wanted.validation.held_out.nnz == 4
    assert wanted.test.held_out.nnz == 2
    column = GIVEN["part"].map({0: values[0], 2: values[1]})
    frame = GIVEN[["user", "item"]].assign(is_test=column)
    frame.to_csv(tmp_path / "x.csv", index=False)
    other = pl.DataFrame(frame.to_dict("list"))
    other.write_parquet(tmp_path / "x.parquet")
    frame = frame.astype({"is_test": "category"})
    for source in (frame, other, *tmp_path.iterdir()):
        made = vaecf.split(source, protocol="given", split_column="is_test")
        assert made.manifest["arrays"] == wanted.manifest["arrays"]


def test_parts_in_separate_sources(tmp_path):
    """LightGCN's files, CSV files and frames."""
    wanted = expected_given().manifest["arrays"]
    folder = tmp_path / "lightgcn"
    write(folder / "train.txt", "1 10\n2 20\n3 10 30\n")
    write(folder / "test.txt", "1 20\n2 10\n3\n")
    train, test = GIVEN[GIVEN["part"] == 0], GIVEN[GIVEN["part"] == 2]
    train.to_csv(tmp_path / "a.csv", index=False)
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        test.to_csv(file, index=False)
    for source, other in (
        (folder, None),
        (folder / "train.txt", folder / "test.txt"),
        (tmp_path / "a.csv", tmp_path / "b.csv.gz"),
        (train, test),
    ):
        made = vaecf.split(source, protocol="given", test_ratings=other)
        assert made.manifest["arrays"] == wanted
    source = made = prepare.prepare(
        prepare.Settings(
            ratings=tmp_path / "a.csv", test_ratings=tmp_path / "b.csv.gz",
            protocol="given", output=tmp_path / "out",
        ),
        log=lambda line: None,
    )  # fmt: skip
    assert made.manifest["arrays"] == wanted
    assert made.manifest["source"]["file"] == "a.csv, b.csv.gz"
    # All of the three parts, and a training user for the validation.
    made = vaecf.split(
        train, protocol="given", test_ratings=test, validation_ratings=test[:1]
    )
    assert made.validation.held_out.nnz == 1 == made.test.held_out.nnz
    assert made.manifest["counts"]["pairs_in_several_parts"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"split_column": "part"}, "row 2: column 'part' holds 2, which is not "
         "one of train, validation, test"),
        ({}, "no column 'split'"),
        ({"split_column": "user", "test_ratings": GIVEN}, "both say"),
        ({"protocol": "weak", "test_ratings": GIVEN}, "test_ratings has no effect"),
        ({"protocol": "weak", "test_share": 1.0}, "test_share=1.0 must be"),
        ({"protocol": "weak", "test_items": 2}, "test_items has no effect"),
        ({"protocol": "week"}, "did you mean weak"),
        ({"protocol": "leave_last", "time_column": "part", "test_items": 0},
         "test_items=0 must be a whole number"),
        ({"protocol": "temporal", "time_column": "part", "test_time": "2024-02-29"},
         "test_time='2024-02-29'.*a number, such as 1709164800"),
        ({"protocol": "temporal", "time_column": "part", "test_time": "soon"},
         "test_time='soon' is not a time"),
        ({"protocol": "temporal", "time_column": "part", "test_time": 3},
         "leaves nothing for the training or the test"),
        ({"protocol": "temporal", "time_column": "part", "test_share": 0.2},
         "no test remains"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(more, message):
    more = {"protocol": "given", "min_items_per_user": 0, **more}
    with refuses(message):
        vaecf.split(GIVEN, **more)


def test_arguments_of_split():
    with pytest.raises(TypeError, match=r"test_itms.*did you mean test_items"):
        vaecf.split(GIVEN, protocol="leave_last", test_itms=1)
    with pytest.raises(TypeError, match="no setting 'output'"):
        vaecf.split(GIVEN, protocol="leave_last", output="x")
    dense = np.random.default_rng(0).random((30, 20)) < 0.5
    made = vaecf.split(scipy.sparse.csr_matrix(dense), protocol="weak")
    held = made.test.held_out.counts
    np.testing.assert_array_equal(held, (dense.sum(1) * 0.2 + 1e-9).astype(int))


def test_dates_as_the_start_of_the_test():
    days = pd.date_range("2024-01-01", periods=6)
    frame = pd.DataFrame({"user": [1] * 6, "item": range(6), "time": days})
    frame = pd.concat([frame, frame.assign(user=2, item=range(6)[::-1])])
    for start in ("2024-01-05", datetime.date(2024, 1, 5), days[4]):
        made = vaecf.split(
            frame,
            protocol="temporal",
            test_time=start,
            min_items_per_user=0,
        )
        constants = made.manifest["protocol_constants"]
        assert constants["test_time"].startswith("2024-01-05T00:00")


@pytest.mark.realdata
def test_last_rating_of_movielens(realdata_dir):
    path = realdata_dir / "ml-100k" / "u.data"
    made = vaecf.split(path, protocol="leave_last")
    frame = pd.read_csv(
        path, sep="\t", names=["user", "item", "rating", "time"]
    )
    last = frame.groupby("user")["time"].transform("max") == frame["time"]
    last = set(zip(frame["user"][last], frame["item"][last]))
    users = made.users.ids[sum(made.split_sizes[:2]) :]
    held = made.items.ids[made.test.held_out.indices]
    assert len(users) == made.test.held_out.nnz == 941
    assert set(zip(users, held)) <= last
