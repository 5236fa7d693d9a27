"""Ranks with a model that `vaecf.export` has written, with NumPy alone.

This file needs nothing but NumPy, and the directory of the model holds a copy:

    import numpy_ranker
    ranker = numpy_ranker.Ranker("models/exported")
    ranker.recommend([[12, 50], [7]], k=10)

It ranks with every model, one user after the other. It adds float32 numbers in
another order than the compiled program does, so that scores differ by rounding,
and items of almost equal scores may change places.

Shapes in names: I items, H units, F factors. x is a history: item indices [N].
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

_FORMAT, _VERSION = "vaecf-export", 1
_TILE = 16  # entries of a tile of item-item weights
_EPSILON = 0.1  # of RecVAE's layer normalisation


class Ranker:
    """An exported model; float32 parameters stay memory-mapped files."""

    def __init__(self, directory: str | pathlib.Path) -> None:
        """Reads the model of a directory.

        Raises:
          ValueError: the directory is no exported model, is of another version,
            or a file is missing or damaged.
        """
        folder = pathlib.Path(directory)
        try:
            about = json.loads((folder / "export.json").read_bytes())
            entries = json.loads((folder / "arrays/arrays.json").read_bytes())
            version = about["format"], about["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} holds no exported model") from None
        if version != (_FORMAT, _VERSION):
            raise ValueError(f"{folder}: another version has written the model")
        ids = _checked(folder / "items.json", about["files"]["items.json"])
        self.items: list[int | str] = json.loads(ids.read_bytes())
        self._index = {item: i for i, item in enumerate(self.items)}
        self._about, self._params = about, {}
        for name, entry in entries.items():
            if name == "sha256":
                continue
            path = _checked(folder / f"arrays/{name}.npy", entry["sha256"])
            array = np.load(path, mmap_mode="r")
            if name in about["bfloat16"]:
                array = (array.astype(np.uint32) << 16).view(np.float32)
            elif array.dtype == np.float16:
                array = array.astype(np.float32)
            self._params[name] = array

    def recommend(
        self,
        histories: Iterable[Iterable[int | str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
    ) -> list[list[tuple[int | str, float]]]:
        """Returns the k best (item, score) of each history, best first.

        Scores are natural logarithms of probabilities if the model has them,
        like those of `Recommender.recommend`. Items of a history that the model
        does not know are ignored; ids have the type of those in `items`.

        Raises:
          ValueError: a history is a text, or the model knows no item of all
            histories.
        """
        histories = [_listed(history) for history in histories]
        asked = {item for history in histories for item in history}
        if asked and not asked & self._index.keys():
            raise ValueError(
                f"the model knows none of the {len(asked):,} items of the "
                f"histories, such as {min(asked, key=repr)!r}; it knows items "
                f"such as {self.items[0]!r}"
            )
        lists = []
        for history in histories:
            x = self._indices(history)
            score_I = self._scores(x)
            if self._about["has_probabilities"]:
                score_I -= score_I.max()
                score_I -= np.log(np.exp(score_I).sum())
            if exclude_seen:
                score_I[x] = -np.inf
            # A stable sort ranks ties by item index.
            best = np.argsort(-score_I, kind="stable")[:k]
            best = best[score_I[best] > -np.inf]
            lists.append([(self.items[i], float(score_I[i])) for i in best])
        return lists

    def scores(self, history: Iterable[int | str]) -> np.ndarray:
        """Returns the scores of all items for a history, float32 [I]."""
        return self._scores(self._indices(history))

    def _indices(self, history: Iterable[int | str]) -> np.ndarray:
        items = _listed(history)
        known = {self._index[item] for item in items if item in self._index}
        return np.array(sorted(known), np.int64)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        if not self._about["has_probabilities"]:
            return self._real(_fitted(self._params, x))
        model, linear = (
            {
                name.removeprefix(prefix): array
                for name, array in self._params.items()
                if name.startswith(prefix)
            }
            for prefix in ("model.", "linear.")
        )
        score_I = self._real(_autoencoder(model, x, self._about))
        if not len(x):  # the experts know nothing without a history
            return score_I
        for expert, about in self._about.get("experts", {}).items():
            positive_I = np.maximum(_expert(expert, linear, x), 0)
            log_I = np.log(positive_I + np.float32(about["floor"]))
            log_I -= linear["prior"] * linear["log_share"]
            score_I += np.float32(about["gain"]) * self._real(log_I)
        return score_I

    def _real(self, score_I: np.ndarray) -> np.ndarray:
        """Returns a copy of the scores without those of padding items."""
        return np.array(score_I[: len(self.items)], np.float32)


def _listed(history: Iterable[int | str]) -> list[int | str]:
    if isinstance(history, str):
        raise ValueError(f"history {history!r}: pass a list of items")
    return list(history)


def _checked(path: pathlib.Path, sha256: str) -> pathlib.Path:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise ValueError(f"{path} is missing") from None
    if found != sha256:
        raise ValueError(f"{path}: damaged (it has another SHA-256)")
    return path


def _autoencoder(
    p: dict[str, np.ndarray], x: np.ndarray, about: dict[str, Any]
) -> np.ndarray:
    """Returns the logits of Mult-VAE, Mult-DAE or RecVAE."""

    def dense(name: str, h_H: np.ndarray) -> np.ndarray:
        return h_H @ p[f"{name}.kernel"] + p[f"{name}.bias"]

    def layers(name: str) -> list[str]:
        names = [f"{name}_{n}" for n in range(len(p))]
        return [n for n in names if f"{n}.kernel" in p]

    def activate(h_H: np.ndarray) -> np.ndarray:
        is_tanh = about["activation"] == "tanh"
        return np.tanh(h_H) if is_tanh else np.maximum(h_H, 0)

    def norm(k: int, h_H: np.ndarray) -> np.ndarray:
        h_H = h_H * (0.5 + 0.5 * np.tanh(0.5 * h_H))  # swish
        h_H = (h_H - h_H.mean()) / np.sqrt(h_H.var() + _EPSILON)
        name = f"posterior.norm_{k}"
        return h_H * p[f"{name}.scale"] + p[f"{name}.bias"]

    root = np.sqrt(np.float32(max(len(x), 1)))
    if about["model"] == "rec_vae":
        h_H = p["posterior.input_kernel"][x].sum(axis=0) / root
        sum_H = h_H = norm(1, h_H + p["posterior.input_bias"])
        for k, layer in enumerate(layers("posterior.layer"), 2):
            h_H = norm(k, dense(layer, h_H) + sum_H)
            sum_H = sum_H + h_H
        z = dense("posterior.mean", h_H)
    else:
        z = p["input_kernel"][x].sum(axis=0) / root + p["input_bias"]
        for layer in layers("encoder"):
            z = dense(layer, activate(z))
        # The second half of Mult-VAE's code is the log-variance.
        is_dae = about["model"] == "mult_dae"
        z = activate(z) if is_dae else z[: len(z) // 2]
        for layer in layers("decoder"):
            z = activate(dense(layer, z))
    return z @ p["output_kernel"] + p["output_bias"]


def _fitted(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Returns the scores of a model that is fitted in one go."""
    if "item_score" in p:
        return p["item_score"]
    if "item_item" in p:
        return p["item_item"][x].sum(axis=0)
    return _ials(p, x) if "item_factor" in p else _sparse(p, x)


def _expert(name: str, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Returns the scores of an expert of a blend."""
    if name == "ials":
        return _ials(p, x)
    if name == "slim":
        return _sparse(p, x, "slim_")
    if name == "graph":
        low_F = p["low_input"][x].sum(axis=0)
        return _sparse(p, x) + p["low_pass"] * (low_F @ p["low_output"])
    if "item_item" in p:
        return p["item_item"][x].sum(axis=0)
    score_I = p["input_factors"][x].sum(axis=0) @ p["output_factors"]
    score_I[x] -= p["self_weight"][x]
    return score_I


def _sparse(
    p: dict[str, np.ndarray], x: np.ndarray, prefix: str = ""
) -> np.ndarray:
    """Returns the sum of sparse item-item weights, stored in tiles."""
    first, neighbour, weight = (
        p[f"{prefix}{key}"] for key in ("first_tile", "neighbour", "weight")
    )
    tiles = neighbour.reshape(-1, _TILE), weight.reshape(-1, _TILE)
    score_I = np.zeros(len(neighbour), np.float32)
    for i in x:
        own = slice(*first[i : i + 2])
        neighbours, weights = (tile[own].ravel() for tile in tiles)
        is_real = neighbours < len(score_I)
        score_I[neighbours[is_real]] += weights[is_real]
    return score_I


def _ials(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Returns the scores of the user's least-squares factors."""
    own_NF = p["item_factor"][x].astype(np.float64)
    ridge = p["ridge"][0] * (len(x) + p["ridge"][1])
    system_FF = own_NF.T @ own_NF + np.diag(p["unobserved"] + ridge)
    user_F = np.linalg.solve(system_FF, own_NF.sum(axis=0))
    return p["item_factor"] @ user_F.astype(np.float32)
