"""The file of the test users' metrics."""

import numpy as np
import polars as pl
from oracles import generated, refuses

from vaecf.evaluation import per_user
from vaecf.evaluation.evaluator import Evaluation


def test_write_and_read(tmp_path):
    data = generated(30, 4, 20, 2)
    # NaN for a user without held-out items.
    values = np.array([0.5, np.nan, 1.0, 0.25])
    evaluation = Evaluation({}, {"ndcg@10": values}, 1, None)
    path = tmp_path / "users.parquet"
    both = [per_user.frame(n, evaluation, data) for n in ("mult_vae", "ease")]
    per_user.write(path, both)
    frame = pl.read_parquet(path)
    assert frame["model"].to_list() == ["mult_vae"] * 4 + ["ease"] * 4
    frame = frame.filter(pl.col("model") == "ease")
    # Raw ids, after 30 training and 4 validation users.
    assert frame["user"].to_list() == [35, 36, 37, 38]
    np.testing.assert_array_equal(frame["ndcg@10"].to_numpy(), values)
    counts = np.diff(data.test.fold_in.indptr)
    np.testing.assert_array_equal(frame["fold_in"], counts)
    assert [p.name for p in tmp_path.iterdir()] == ["users.parquet"]
    read = per_user.read(path)
    assert list(read) == ["mult_vae", "ease"]
    assert read["ease"].equals(both[1], null_equal=True)

    per_user.write(tmp_path / "users.csv", both)
    text = per_user.read(tmp_path / "users.csv")
    assert list(text) == list(read)
    assert text["ease"].equals(both[1], null_equal=True)
    path.write_text("no Parquet")
    with refuses(r"users\.parquet: neither"):
        per_user.read(path)
    with refuses(r"users\.csv"):
        per_user.write(tmp_path / "users.csv" / "u.csv", both)
