"""Random users, and NumPy references that several tests compare with."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import subprocess
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from vaecf.data import synthetic
from vaecf.data.dataset import Dataset
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.models import sparse_item_item
from vaecf.models.sparse_batch import SparseBatch, assemble_on_host
from vaecf.parallel import mesh as mesh_lib
from vaecf.reporting.writers import read_records

ROOT = pathlib.Path(__file__).resolve().parents[2]
USERS, ITEMS, SLOTS = 6, 16, 100
MESHES = [(1, 4), (2, 2), (4, 1)]


@contextlib.contextmanager
def refuses(match: str | None = None):
    """Expects a VaecfError of one line that matches."""
    with pytest.raises(VaecfError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def recorded(workdir, name: str) -> dict[int, float]:
    """{epoch: value} of a metric in metrics.jsonl."""
    records = read_records(workdir / "metrics.jsonl")
    return {r["epoch"]: r[name] for r in records if name in r}


@contextlib.contextmanager
def one_device():
    """A mesh has one device unless its size is given.

    Programs for one device compile faster than those for all eight.
    """
    make_mesh = mesh_lib.make_mesh

    def made(data=-1, item=1):
        return make_mesh(1 if data == -1 else data, item)

    with mock.patch.object(mesh_lib, "make_mesh", made):
        yield


def process(*command, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Runs a command on the CPU and waits for it."""
    return subprocess.run(
        [*map(str, command)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )


histories = st.lists(
    st.sets(st.integers(0, ITEMS - 1)).map(sorted),
    min_size=USERS,
    max_size=USERS,
)


def random_histories(seed, n_users=USERS, n_items=ITEMS) -> list[list[int]]:
    """Histories of random lengths; the second user has none."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, n_items, n_users)
    users = [sorted(rng.permutation(n_items)[:n].tolist()) for n in lengths]
    users[1] = []
    return users


def csr_of(users) -> tuple[np.ndarray, np.ndarray]:
    indptr = np.cumsum([0, *map(len, users)])
    return indptr, np.array([i for items in users for i in items], np.int32)


def batch_of(users, n_slots=SLOTS, shards=1, padding=0) -> SparseBatch:
    """Each shard has n_slots, and its rows count from its own first user."""
    every = np.arange(len(users) + padding)
    return assemble_on_host(*csr_of(users), every, n_slots, shards)


def dense(users, n_items=ITEMS) -> np.ndarray:
    x = np.zeros((len(users), n_items))
    for u, items in enumerate(users):
        x[u, items] = 1
    return x


def from_sets(sets, n_items: int) -> Interactions:
    return Interactions(*csr_of([sorted(items) for items in sets]), n_items)


def generated(users, held_out, items, groups, seed=0) -> Dataset:
    """Users for training, and as many held-out ones of each kind."""
    return synthetic.make(
        *("synthetic", seed),
        n_train_users=users,
        n_held_out_users=held_out,
        n_items=items,
        n_groups=groups,
    )


def random_dense(n_users: int, n_items: int, share=0.3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((n_users, n_items)) < share).astype(float)


def interactions(x: np.ndarray) -> Interactions:
    return Interactions.from_pairs(*np.nonzero(x), *x.shape)[0]


def item_item(params, n_items: int) -> np.ndarray:
    """The item-item weights of a linear model, float64 [I, I]."""
    if "neighbour" in params:
        return sparse_item_item.unpack(params).toarray().astype(float)
    params = float64(params)
    if "item_item" in params:
        return params["item_item"][:, :n_items]
    b = params["input_factors"][:n_items] @ params["output_factors"]
    b = b[:, :n_items]
    np.testing.assert_allclose(
        np.diag(b), params["self_weight"][:n_items], rtol=1e-3, atol=1e-6
    )
    np.fill_diagonal(b, 0)
    return b


def ease(x: np.ndarray, l2: float) -> np.ndarray:
    """Steck 2019, equations 8 and 9, with a plain inverse, float64."""
    p = np.linalg.inv(x.T @ x + l2 * np.eye(x.shape[1]))
    return (np.eye(x.shape[1]) - p / np.diag(p)) * (1 - np.eye(x.shape[1]))


def _keep_largest(weights: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each column, without the diagonal; ties by index."""
    weights = weights * (1 - np.eye(len(weights)))
    for j in range(len(weights)):
        order = np.argsort(-weights[:, j], kind="stable")
        weights[order[k:], j] = 0
    return weights


def item_knn(x: np.ndarray, neighbours: int, shrinkage: float) -> np.ndarray:
    norm = np.sqrt(np.maximum(x.sum(0), 1))
    similar = x.T @ x / (np.outer(norm, norm) + shrinkage)
    return _keep_largest(similar, neighbours)


def rp3beta(x: np.ndarray, neighbours: int, alpha, beta) -> np.ndarray:
    """Paudel et al. 2017: powers of the transition matrices."""
    n_u, n_i = (np.maximum(x.sum(axis), 1) for axis in (1, 0))
    to_users, to_items = (x / n_i).T ** alpha, (x.T / n_u).T ** alpha
    if not alpha:
        to_users, to_items = x.T, x
    return _keep_largest(to_users @ to_items / n_i**beta, neighbours)


def slim(x: np.ndarray, neighbours: int, l2: float) -> np.ndarray:
    """Ridge regressions on the nearest items, as least-squares problems."""
    weights = np.zeros((x.shape[1],) * 2)
    for j, near in enumerate(item_knn(x, neighbours, 0.0).T):
        inputs = np.flatnonzero(near)
        ridge = np.sqrt(l2) * np.eye(len(inputs))
        targets = np.append(x[:, j], np.zeros(len(inputs)))
        rows = np.vstack([x[:, inputs], ridge])
        weights[inputs, j] = np.linalg.lstsq(rows, targets)[0]
    return weights


# --- Lists: the unseen items of a user, and metrics by definition ---


def ranked(score_I: np.ndarray, seen) -> list[int]:
    """Items that are not in `seen`, by descending score; ties by index."""
    order = np.argsort(-score_I, kind="stable").tolist()
    return [i for i in order if i not in seen]


def ndcg(items: list, wanted: set, k: int) -> float:
    gains = [1 / math.log2(r + 1) for r in range(1, k + 1)]
    dcg = sum(g for g, item in zip(gains, items) if item in wanted)
    return dcg / sum(gains[: len(wanted)])


def recall(items: list, wanted: set, k: int) -> float:
    return len(wanted.intersection(items[:k])) / min(k, len(wanted))


# --- Liang et al. 2018, section 2, float64 ---


def layer(p, name: str, h: np.ndarray) -> np.ndarray:
    return h @ p[name]["kernel"] + p[name]["bias"]


def encode(p, x: np.ndarray, act=np.tanh, kept=1.0) -> np.ndarray:
    """The code of x / |x| · kept; the last layer is linear."""
    norm = np.sqrt(np.maximum(x.sum(1, keepdims=True), 1))
    h = x / norm * kept @ p["input_kernel"][: x.shape[1]] + p["input_bias"]
    for k in itertools.count():
        if f"encoder_{k}" not in p:
            return h
        h = layer(p, f"encoder_{k}", act(h))


def decode(p, z: np.ndarray, n_items: int, act=np.tanh) -> np.ndarray:
    for k in itertools.count():
        if f"decoder_{k}" not in p:
            kernel, bias = p["output_kernel"], p["output_bias"]
            return z @ kernel[:, :n_items] + bias[:n_items]
        z = act(layer(p, f"decoder_{k}", z))


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, float), tree)


def threefry(key: np.ndarray, row: np.ndarray, column: np.ndarray):
    """First word of Threefry-2x32-20 (Salmon et al. 2011) at (row, column)."""
    words = [np.uint32(k) for k in np.asarray(key)]
    words.append(words[0] ^ words[1] ^ np.uint32(0x1BD11BDA))
    x, y = (np.asarray(c).astype(np.uint32) for c in (row, column))
    with np.errstate(over="ignore"):
        x, y = x + words[0], y + words[1]
        for block in range(5):
            for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
                x = x + y
                y = (y << np.uint32(turn)) | (y >> np.uint32(32 - turn))
                y = y ^ x
            x = x + words[(block + 1) % 3]
            y = y + words[(block + 2) % 3] + np.uint32(block + 1)
    return x


def kept(key, rows, n_items: int, rate: float) -> np.ndarray:
    """Which interactions dropout keeps, bool [rows, items]."""
    bits = threefry(key, np.asarray(rows)[:, None], np.arange(n_items)[None])
    return bits >= round(rate * 2**32)


def gaussian(key, rows, n_columns: int) -> np.ndarray:
    """The standard normal noise of some rows, float64."""
    bits = threefry(key, np.asarray(rows)[:, None], np.arange(n_columns)[None])
    return np.sqrt(2) * scipy.special.erfinv(((bits >> 9) + 0.5) / 2**22 - 1)


def draws(key, rows, n_items: int, rate: float, latent: int):
    """(dropout factors, noise) that a VAE must draw for its users."""
    dropout_key, noise_key = map(jax.random.key_data, jax.random.split(key))
    factors = kept(dropout_key, rows, n_items, rate) / (1 - rate)
    return factors, gaussian(noise_key, rows, latent)


def weighted_gradients(f, weight, inputs, *rest):
    """(gradients of Σ weight · f by the inputs, f), as one program."""

    def loss(inputs):
        out = f(*inputs, *rest)
        terms = jax.tree.map(lambda w, x: jnp.sum(w * x), weight, out)
        return sum(jax.tree.leaves(terms)), out

    return jax.jit(jax.grad(loss, has_aux=True))(inputs)


def assert_same_on_mesh(many, one, rtol: float, atol: float) -> None:
    """Compares results of four devices with those of one."""
    for tree, devices in ((many[1], 4), (one[1], 1)):
        for x in jax.tree.leaves(tree):
            assert len(x.sharding.device_set) == devices
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_gradients(loss, params, gradients, rtol: float) -> None:
    """Compares with the slope of a float64 loss along random directions.

    One direction per parameter, so that errors cannot cancel.
    """
    leaves, tree = jax.tree.flatten(float64(params))
    for at, gradient in enumerate(jax.tree.leaves(float64(gradients))):
        direction = np.random.default_rng(at).normal(size=gradient.shape)
        moved = [
            [*leaves[:at], leaves[at] + step * direction, *leaves[at + 1 :]]
            for step in (1e-5, -1e-5)
        ]
        up, down = (loss(jax.tree.unflatten(tree, m)) for m in moved)
        np.testing.assert_allclose(
            (gradient * direction).sum(),
            (up - down) / 2e-5,
            rtol=rtol,
            atol=rtol,
        )


def graph_terms(x, rank, neighbours):
    """Both terms of the filter of Shen et al. 2021, dense float64 [I, I].

    Of each row of the first term, the largest weights of other items remain.
    """
    users, items = (np.maximum(x.sum(axis), 1) for axis in (1, 0))
    scaled = x / np.sqrt(users)[:, None] / np.sqrt(items)
    near = scaled.T @ scaled
    np.fill_diagonal(near, 0)
    for row in near:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    _, _, vectors = np.linalg.svd(scaled)
    low = vectors[:rank].T @ vectors[:rank]
    return near, low * np.sqrt(items) / np.sqrt(items)[:, None]
