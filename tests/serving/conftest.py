"""A small trained model for all tests of serving."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from oracles import decode, encode, float64, one_device

from vaecf.serving.recommender import Recommender

N_ITEMS = 30
SETTINGS = dict(
    model="mult_vae", hidden=(12,), latent=4, batch_size=32, patience=None
)


class Shop(NamedTuple):
    recommender: Recommender
    frame: pd.DataFrame
    workdir: object


def purchases(n_users=60, seed=0):
    """Customers with 4 to 9 of 30 articles; one customer has them all."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"customer {u:02d}", f"sku-{i:02d}")
        for u in range(n_users)
        for i in rng.choice(N_ITEMS, rng.integers(4, 10), replace=False)
    ]
    rows += [("customer all", f"sku-{i:02d}") for i in range(N_ITEMS)]
    return pd.DataFrame(rows, columns=["user", "item"])


@pytest.fixture(scope="package", autouse=True)
def on_one_device():
    with one_device():
        yield


@pytest.fixture(scope="package")
def shop(tmp_path_factory):
    frame = purchases()
    workdir = tmp_path_factory.mktemp("shop") / "run"
    recommender = Recommender(epochs=4, learning_rate=0.03, **SETTINGS)
    recommender.fit(frame, workdir=workdir, validation_users=0)
    return Shop(recommender, frame, workdir)


def logits(params, history_UI):
    """(codes, logits) of Mult-VAE in NumPy."""
    p, n_items = float64(params), history_UI.shape[1]
    mean = encode(p, history_UI)[:, : SETTINGS["latent"]]
    return mean, decode(p, mean, n_items)


@pytest.fixture(scope="package")
def expected(shop):
    """(users, histories, codes, logits) of the shop in NumPy."""
    model = shop.recommender._model
    users = shop.frame["user"].unique()
    history_UI = np.zeros((len(users), len(model.items)))
    item_of = {item: i for i, item in enumerate(model.items.ids)}
    user_of = {user: u for u, user in enumerate(users)}
    for user, item in zip(shop.frame["user"], shop.frame["item"]):
        history_UI[user_of[user], item_of[item]] = 1
    return users, history_UI, *logits(model.params, history_UI)


@pytest.fixture(scope="session")
def numpy_logits():
    return logits
