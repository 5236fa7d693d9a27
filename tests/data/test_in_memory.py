"""Datasets from Python: `split`, `load_dataset`, and their cards."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from oracles import refuses

import vaecf
from vaecf.data import prepare, synthetic
from vaecf.data.dataset import write_dataset
from vaecf.data.prepare_settings import Settings


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:02d}", f"i{item:02d}")
        for user in range(60)
        for item in rng.permutation(30)[: rng.integers(5, 10)]
    ]
    return pd.DataFrame(rows, columns=["user", "item"])


def pairs_of(dataset):
    """{split: set of (user, item)}, of all matrices."""
    n_train, n_validation, _ = dataset.split_sizes
    first = {"train": 0, "validation": n_train, "test": n_train + n_validation}
    found = {name: set() for name in first}
    for part, matrix in dataset.matrices.items():
        name = part.split(".")[0]
        found[name] |= {
            (dataset.users.ids[first[name] + user], dataset.items.ids[item])
            for user in range(matrix.n_users)
            for item in matrix.row(user)
        }
    return found


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (48, 6, 6)),  # a tenth each
        ({"test_users": 0.25}, (39, 6, 15)),
        ({"test_users": 7, "validation_users": 0.2}, (41, 12, 7)),
        ({"validation_users": 0}, (54, 0, 6)),
        ({"held_out_users": 4, "test_users": np.int64(9)}, (47, 4, 9)),
    ],
)
def test_strong_generalisation(frame, sizes, expected):
    made = vaecf.split(frame, seed=3, **sizes)
    assert made.split_sizes == expected
    parts = pairs_of(made)
    users = [{user for user, _ in part} for part in parts.values()]
    assert sum(map(len, users)) == len(set().union(*users)) == 60
    # Items that no training user has are not in the vocabulary.
    known = {item for _, item in parts["train"]}
    everything = set(frame.itertuples(index=False, name=None))
    assert set().union(*parts.values()) == {
        (user, item) for user, item in everything if item in known
    }
    # Of 5 to 9 items, one is held out: 20 %, rounded down.
    assert set(made.test.held_out.counts) == {1}


def test_strong_is_the_name_of_a_protocol_of_old(frame):
    made = [
        vaecf.split(frame, protocol=name, held_out_users=6, seed=1)
        for name in ("strong", "vaecf")
    ]
    assert made[0].manifest == made[1].manifest
    assert "vaecf (strong)" in made[0]._repr_html_()


def test_forms_of_interactions(frame):
    made = vaecf.split(frame, seed=2)
    again = vaecf.split(made, test_users=0.5)
    assert again.split_sizes == (24, 6, 30) and again.name == made.name
    all_pairs = set().union(*pairs_of(made).values())
    assert set().union(*pairs_of(again).values()) <= all_pairs
    # The test of known users repeats what they did before.
    weak = vaecf.split(frame, protocol="weak")
    assert vaecf.split(weak).manifest["counts"]["rows_read"] == len(frame)
    dense = np.random.default_rng(0).random((40, 12)) < 0.6
    matrix = scipy.sparse.csr_matrix(dense)
    interactions = vaecf.Interactions.from_scipy(matrix)
    digests = {vaecf.split(m).manifest_hash for m in (matrix, interactions)}
    assert len(digests) == 1


def test_load_dataset(frame, tmp_path):
    made = vaecf.split(frame)
    assert vaecf.load_dataset(frame).manifest == made.manifest
    assert vaecf.load_dataset(made) is made
    write_dataset(tmp_path / "data", made)
    opened = vaecf.load_dataset(str(tmp_path / "data"))
    assert opened.path == tmp_path / "data"
    assert opened.manifest == made.manifest
    frame.to_csv(tmp_path / "shop.csv", index=False)
    from_file = vaecf.load_dataset(tmp_path / "shop.csv", seed=1)
    assert from_file.name == "shop" and pairs_of(from_file) == pairs_of(
        vaecf.split(frame, seed=1)
    )
    small = vaecf.load_dataset("synthetic", held_out_users=5, seed=4)
    direct = synthetic.make("synthetic", 4, n_held_out_users=5)
    assert small.manifest_hash == direct.manifest_hash


@pytest.mark.realdata
def test_a_known_dataset_in_the_cache(tmp_path, monkeypatch, realdata_dir):
    """The same as the command prepares, without a network."""
    ratings = tmp_path / "ml-100k" / "ratings"
    ratings.mkdir(parents=True)
    shutil.copy(realdata_dir / "ml-100k" / "u.data", ratings)
    monkeypatch.setenv("VAECF_CACHE", str(tmp_path))
    made = vaecf.load_dataset("ml-100k")
    own = vaecf.load_dataset("ml-100k", ratings=ratings / "u.data")
    assert own.manifest == made.manifest
    settings = Settings(
        dataset="ml-100k",
        ratings=ratings / "u.data",
        output=tmp_path / "out",
    )
    prepared = prepare.prepare(settings, log=lambda line: None)
    assert made.manifest == prepared.manifest
    assert made.protocol == "paper" and made.path is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: vaecf.split(f, test_users=60), "test_users=60 must be a"),
        (lambda f: vaecf.split(f, validation_users=1.0), "validation_users=1.0"),
        (lambda f: vaecf.split(f, test_users=True), "test_users=True must be"),
        (lambda f: vaecf.split(f, "weak", test_users=3),
         "test_users has no effect with protocol=weak"),
        (lambda f: vaecf.split(f, "strng"), "did you mean strong"),
        (lambda f: vaecf.load_dataset("ml1m"), "did you mean ml-1m"),
        (lambda f: vaecf.load_dataset("/"), "no dataset in /"),
        (lambda f: vaecf.load_dataset(""), "is no path"),
        (lambda f: vaecf.load_dataset(7), "of type int: pass a DataFrame"),
        (lambda f: vaecf.split(f, test_users=0.95), "lower one of these"),
        (lambda f: vaecf.load_dataset("netflix"), "by a program: sign in"),
        (lambda f: vaecf.load_dataset("ml-1m", ratings="x", test_users=3),
         "test_users has no effect with protocol=paper"),
        (lambda f: vaecf.load_dataset("synthetic", test_users=3),
         "use held_out_users"),
        (lambda f: vaecf.load_dataset(vaecf.split(f), seed=1),
         "seed has no effect: the dataset is prepared"),
    ],
)  # fmt: skip
def test_refusals(frame, call, message):
    with refuses(message):
        call(frame)


def test_cards_escape_what_strangers_wrote(frame):
    made = vaecf.split(frame, name="<b>shop</b>")
    text = made._repr_html_()
    assert "&lt;b&gt;shop" in text and "<b>shop" not in text
    assert "48 + 6 + 6 users" in repr(made)
