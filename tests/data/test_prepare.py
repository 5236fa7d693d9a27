"""From ratings to a directory, and every way to get it wrong."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from oracles import refuses

from vaecf.data import catalog, in_memory, prepare, synthetic
from vaecf.data.dataset import open_dataset
from vaecf.data.file_settings import Dialect


def shop(n_users=60, seed=0):
    """Customers with 6 to 12 of 30 articles, a rating each, some repeats."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"customer {u}", f"sku-{i:02d}", rng.integers(1, 6))
        for u in range(n_users)
        for i in rng.choice(30, rng.integers(6, 13), replace=False)
    ]
    frame = pd.DataFrame(rows, columns=["customer", "sku", "stars"])
    return pd.concat([frame, frame[:5]], ignore_index=True)


@pytest.fixture
def shop_csv(tmp_path):
    path = tmp_path / "shop.csv"
    shop().to_csv(path, index=False)
    return path


def run(output=None, log=lambda line: None, **settings):
    return prepare.prepare(prepare.Settings(output=output, **settings), log=log)


OWN = {"user_column": "customer", "item_column": "sku"}


def test_own_data(tmp_path, shop_csv):
    lines = []
    made = run(
        tmp_path / "out", lines.append, ratings=shop_csv, held_out_users=10,
        **OWN,
    )  # fmt: skip
    frame = shop().drop_duplicates(["customer", "sku"])
    counts = made.manifest["counts"]
    assert counts["rows_read"] == len(shop())
    assert counts["duplicates_collapsed"] == len(shop()) - len(frame) == 5
    assert counts["users"] == 60 == frame["customer"].nunique()
    assert made.split_sizes == (40, 10, 10)
    assert made.name == "shop" and made.protocol == "vaecf"
    constants = made.manifest["protocol_constants"]
    assert constants["held_out_users"] == 10 and constants["seed"] == 0
    source = made.manifest["source"]
    assert source["file"] == "shop.csv"
    assert source["bytes"] == shop_csv.stat().st_size
    history = frame.groupby("customer")["sku"].agg(set)
    for u in range(40):
        row = set(made.items.ids[made.train.row(u)])
        assert row == history[made.users.ids[u]]
    text = "\n".join(lines)
    for part in ("shop.csv", f"{len(shop())} rows", "40 users"):
        assert part in text
    reopened = open_dataset(tmp_path / "out", verify=True)
    assert reopened.manifest_hash == made.manifest_hash


def test_the_same_from_csv_parquet_and_frame(tmp_path, shop_csv):
    frame = shop()
    frame.to_csv(tmp_path / "shop.tsv.gz", index=False, sep="\t")
    digests = []
    for i, source in enumerate((shop_csv, tmp_path / "shop.tsv.gz", frame)):
        made = run(
            tmp_path / str(i), ratings=source, rating_column="stars",
            min_rating=2, min_items_per_user=3, seed=4, **OWN,
        )  # fmt: skip
        assert (made.manifest["source"] is None) == (source is frame)
        digests.append(made.manifest["arrays"])
    assert digests[0] == digests[1] == digests[2]


def test_filters_and_proportion_reach_the_dataset(tmp_path, shop_csv):
    made = run(
        tmp_path / "out", ratings=shop_csv, rating_column="stars",
        min_rating=3, min_items_per_user=3, min_users_per_item=10,
        iterate_filters=True, fold_in_proportion=0.5, held_out_users=5, **OWN,
    )  # fmt: skip
    frame = shop().drop_duplicates(["customer", "sku"])
    frame = frame[frame["stars"] >= 3]
    while True:
        n = len(frame)
        frame = frame[frame.groupby("sku")["sku"].transform("size") >= 10]
        frame = frame[frame.groupby("customer")["sku"].transform("size") >= 3]
        if len(frame) == n:
            break
    counts = made.manifest["counts"]
    assert counts["interactions_after_filters"] == len(frame)
    assert counts["users_after_filters"] == frame["customer"].nunique()
    assert counts["items_after_filters"] == frame["sku"].nunique()
    folded, held = made.test.fold_in.counts, made.test.held_out.counts
    np.testing.assert_array_equal(held, (folded + held) // 2)


def recipe_tree(root, n_users=80):
    """A ratings.csv where the recipe unpacks MovieLens 20M."""
    rng = np.random.default_rng(1)
    rows = [
        (u + 1, i + 1, rng.integers(1, 11) / 2, 1)
        for u in range(n_users)
        for i in rng.choice(40, rng.integers(10, 30), replace=False)
    ]
    frame = pd.DataFrame(
        rows, columns=["userId", "movieId", "rating", "timestamp"]
    )
    folder = root / "ml-20m" / "extracted" / "ml-20m"
    folder.mkdir(parents=True)
    frame.to_csv(folder / "ratings.csv", index=False)
    return frame


def test_the_recipes_command(tmp_path, monkeypatch):
    frame = recipe_tree(tmp_path)
    with refuses("instead of 20,000,263"):
        run(data_dir=str(tmp_path))
    entry = dataclasses.replace(
        catalog.get("ml-20m"), counts={"ratings": len(frame)}, held_out_users=10
    )
    monkeypatch.setattr(catalog, "CATALOG", {"ml-20m": entry})
    made = run(data_dir=str(tmp_path))
    assert made.path == tmp_path / "ml-20m" / "preprocessed"
    assert made.protocol == "recipe"
    assert made.manifest["protocol_constants"]["seed"] == 0
    paper = run(tmp_path / "p", data_dir=str(tmp_path), protocol="paper")
    assert paper.manifest["protocol_constants"]["seed"] == 98765
    assert paper.users.ids.tolist() != made.users.ids.tolist()
    assert sorted(paper.users.ids) == sorted(made.users.ids)
    with refuses(r"no such file.*ratings=FILE"):
        run(tmp_path / "q", data_dir=str(tmp_path / "x"), dataset="ml-20m")


def test_a_known_dataset_from_a_file_of_another_layout(tmp_path, monkeypatch):
    """The file counts, not what the catalog's archive would hold."""
    frame = recipe_tree(tmp_path).drop(columns="timestamp")
    path = tmp_path / "ratings.csv.gz"
    frame.to_csv(path, index=False)
    monkeypatch.setattr(catalog, "check_counts", lambda *a, **k: None)
    made = run(
        tmp_path / "out", dataset="ml-1m", ratings=path, protocol="paper",
        held_out_users=10,
    )  # fmt: skip
    liked = frame[frame["rating"] > 3.5]
    assert made.manifest["counts"]["below_min_rating"] == (
        len(frame) - len(liked)
    )
    table = tmp_path / "x.csv"
    table.write_text("a,b\n1,2\n")
    with refuses("rating_column=None need each other"):
        run(tmp_path / "no", dataset="ml-1m", ratings=table)


def test_an_entry_is_all_that_a_new_dataset_needs(tmp_path, monkeypatch):
    """Its name, counts, filters, split and columns come from the catalog."""
    frame = shop()
    path = tmp_path / "plays.txt"
    columns = ["stars", "customer", "sku"]
    frame[columns].to_csv(path, sep="|", index=False, header=False)
    entry = catalog.Entry(
        "plays", "Plays", "free", 10, counts={"ratings": len(frame)},
        dialect=Dialect("|", False, {"rating": 0, "user": 1, "item": 2}),
        min_rating=2, min_items_per_user=3, protocol="vaecf",
    )  # fmt: skip
    monkeypatch.setattr(catalog, "CATALOG", {"plays": entry})
    made = run(tmp_path / "a", dataset="plays", ratings=path)
    named = run(
        tmp_path / "b", ratings=frame, rating_column="stars", min_rating=2,
        min_items_per_user=3, held_out_users=10, **OWN,
    )  # fmt: skip
    assert made.name == "plays"
    assert made.manifest["arrays"] == named.manifest["arrays"]


def test_generated_data(tmp_path):
    made = run(tmp_path / "s", dataset="synthetic", held_out_users=50)
    direct = synthetic.make("synthetic", 0, n_held_out_users=50)
    assert made.manifest_hash == direct.manifest_hash
    assert made.oracle is not None
    with refuses("min_rating=4 does not go with"):
        run(tmp_path / "t", dataset="synthetic", min_rating=4)


def test_in_memory():
    frame = shop().rename(columns={"customer": "user", "sku": "item"})
    made = in_memory.without_test(frame, validation_users=0.25)
    assert made.split_sizes == (60 - 15, 15, 0)
    assert made.path is None and made.protocol == "vaecf"


@pytest.mark.parametrize("validation_users", [0, 4])
def test_in_memory_matrix_keeps_its_width(validation_users):
    """Its columns are the items, also number 5, which nobody has."""
    dense = np.random.default_rng(0).random((30, 12)) < 0.4
    dense[:, 5] = False
    dense[7] = False
    matrix = scipy.sparse.coo_array(dense)
    made = in_memory.without_test(matrix, validation_users=validation_users)
    assert made.items.ids.tolist() == list(range(12))
    users = np.flatnonzero(dense.any(axis=1))
    assert sorted(made.users.ids) == users.tolist() and 7 not in users
    n_train = len(users) - validation_users
    assert made.split_sizes == (n_train, validation_users, 0)
    folded = made.validation.fold_in.to_scipy().toarray()
    held = made.validation.held_out.to_scipy().toarray()
    assert (held.sum(axis=1) >= 1).all() and (folded * held == 0).all()
    np.testing.assert_array_equal(
        np.concatenate([made.train.to_scipy().toarray(), folded + held]),
        dense[made.users.ids],
    )


@pytest.mark.parametrize(
    ("interactions", "settings", "message"),
    [
        (7, {}, "of type int: pass a DataFrame"),
        (shop(), {"user_column": shop()}, r"user_column=.* of type str"),
        (
            scipy.sparse.csr_matrix(np.eye(3)),
            {"seed": "x"},
            "seed='x' must be a whole number",
        ),
        ("ratings.csv", {}, "of type str: pass a DataFrame"),
        (scipy.sparse.csr_matrix((3, 4)), {}, "the matrix has no interactions"),
        (shop(), {"user_column": "custmer"}, "did you mean customer"),
        *(
            (
                scipy.sparse.csr_matrix(np.eye(3)),
                {"validation_users": n},
                rf"validation_users={n} must be .* below all 3",
            )
            for n in (3, -1, 1.0, -0.5, float("nan"))
        ),
    ],
)
def test_in_memory_refuses(interactions, settings, message):
    with refuses(message):
        in_memory.without_test(interactions, **settings)


def test_the_output_is_looked_at_before_the_work(tmp_path, shop_csv):
    made = run(tmp_path / "out", ratings=shop_csv, **OWN)
    assert made.split_sizes == (48, 6, 6)  # the default: a tenth each
    with refuses("overwrite"):
        run(tmp_path / "out", ratings=tmp_path / "missing.csv", **OWN)
    run(tmp_path / "out", ratings=shop_csv, overwrite=True, seed=3, **OWN)


@pytest.mark.realdata
def test_ml_1m_is_the_papers_split(tmp_path, realdata_dir):
    """Against the matrices and ids that the notebook itself has written."""
    ratings = realdata_dir / "ml-1m" / "ratings.csv.gz"
    run(
        tmp_path / "ml-1m", dataset="ml-1m", ratings=ratings, protocol="paper",
        held_out_users=500,
    )  # fmt: skip
    made = open_dataset(tmp_path / "ml-1m", verify=True)
    notebook = realdata_dir / "ml-1m" / "paper_split"
    for name, part in made.matrices.items():
        file = notebook / f"{name.replace('.', '_')}.npz"
        expected = scipy.sparse.load_npz(file)
        assert part.to_scipy().shape == expected.shape
        assert (part.to_scipy() != expected).nnz == 0
    for name, table in (("sid", made.items), ("uid", made.users)):
        text = (notebook / f"unique_{name}.txt").read_text().strip()
        assert "\n".join(map(str, table.ids)) == text
    assert made.manifest["counts"]["rows_read"] == 1_000_209


@pytest.mark.realdata
def test_lightgcns_split_of_yelp2018(tmp_path, realdata_dir):
    """The counts that LightGCN's paper and code give for this split."""
    ratings = realdata_dir / "yelp2018" / "interactions.parquet"
    made = run(
        tmp_path / "y", dataset="yelp2018", ratings=ratings, protocol="given",
        split_column="is_test",
    )  # fmt: skip
    assert made.manifest["counts"]["rows_read"] == 1_561_406
    everything = made.everything()
    assert (everything.n_users, made.n_items) == (31_668, 38_048)
    assert (everything.nnz, made.test.held_out.nnz) == (1_237_259, 324_147)
    assert made.split_sizes == (31_668, 3_166, 31_668)
