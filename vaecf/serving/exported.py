"""Ranks with an exported model: no Flax, no optimiser, no training code.

The compiled program, the parameters and the raw ids are all in the directory
that `vaecf.export` writes; `vaecf.serving.exporting` describes its files.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vaecf import files
from vaecf.data import array_folder
from vaecf.data.id_table import IdTable
from vaecf.data.interactions import Interactions
from vaecf.errors import VaecfError
from vaecf.evaluation import packing, ranking
from vaecf.models import sparse_batch
from vaecf.serving import lists as lists_lib
from vaecf.serving.histories import allowed_items, as_histories, count

if TYPE_CHECKING:
    import pandas as pd

MANIFEST, PROGRAM, ITEMS = "export.json", "program.bin", "items.json"
ARRAYS = "arrays"
FORMAT, VERSION = "vaecf-export", 1
_FIX = "export the model again"


class ExportedRecommender:
    """A ranking model read from a directory of `vaecf.export`.

    `load_exported` makes it. `recommend` returns the same lists as the
    `Recommender` that was exported.

    >>> directory = vaecf.export(recommender, folder / "ranker", max_k=20)
    >>> ranker = vaecf.load_exported(directory)
    >>> lists = ranker.recommend(frame, k=3)
    >>> lists["item"].equals(recommender.recommend(frame, k=3)["item"])
    True
    """

    def __init__(self, directory: pathlib.Path) -> None:
        manifest = read_manifest(directory)
        self._model, self._max_k = manifest["model"], manifest["max_k"]
        self._title = manifest.get("title", self._model)
        self._has_probabilities = manifest["has_probabilities"]
        program, ids = (
            _read(directory / name, manifest["files"][name])
            for name in (PROGRAM, ITEMS)
        )
        self._items = IdTable(json.loads(ids))
        self._arrays = _on_device(directory, manifest["bfloat16"])
        self._rank = jax.jit(_deserialize(program, directory, manifest).call)

    def __repr__(self) -> str:
        """Returns the model's name and size."""
        return f"ExportedRecommender({self._title}, {len(self.items):,} items)"

    @property
    def items(self) -> np.ndarray:
        """Raw ids of all items, [items], int64 or strings."""
        return self._items.ids

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow_items: Iterable[Any] | None = None,
        deny_items: Iterable[Any] | None = None,
        score: str | None = None,
        user_column: str = "user",
        item_column: str = "item",
        batch_size: int = 512,
    ) -> pd.DataFrame:
        """Returns the k items with the highest scores for every history.

        Arguments, result and errors are those of `Recommender.recommend`, but
        `k` is at most the `max_k` of the export.

        Raises:
          VaecfError: an argument cannot be used, or the model knows no item of
            the histories.
        """
        import pandas as pd

        k, size = count("k", k), count("batch_size", batch_size)
        n_items = len(self._items)
        if self._max_k < min(k, n_items):
            raise VaecfError(
                f"k={k}: the model was exported for lists of at most "
                f"{self._max_k}; export it with a larger max_k"
            )
        users, matrix, unknown = as_histories(
            histories, self._items, user_column, item_column
        )
        allowed_I = allowed_items(self._items, allow_items, deny_items)
        if allowed_I is None:
            allowed_I = np.ones(n_items, bool)
        parts = [
            self._rank(self._arrays, item_BL, allowed_I, bool(exclude_seen))
            for item_BL in _batches(matrix, size)
        ]
        ranked = ranking.RankedLists(
            *(np.concatenate(part)[: len(users)] for part in zip(*parts))
        )
        ranking.require_finite(ranked.log_total_U)
        columns = lists_lib.columns(
            ranked._replace(item_UK=ranked.item_UK[:, :k]),
            self.items,
            score,
            model=self._model,
            has_probabilities=self._has_probabilities,
        )
        frame = pd.DataFrame({"user": users[columns.pop("row")], **columns})
        frame.attrs["unknown_items"] = unknown
        return frame


def load_exported(directory: str | pathlib.Path) -> ExportedRecommender:
    """Reads a model that `vaecf.export` has written.

    Its parameters are copied to JAX's default device, whose platform must be
    one of those of the export. A program is compiled at the first query of
    each size, where sizes are powers of two: of users, and of the longest
    history.

    >>> directory = vaecf.export(recommender, folder / "small", max_k=20)
    >>> vaecf.load_exported(directory)
    ExportedRecommender(mult_vae, 30 items)

    Raises:
      VaecfError: the directory is no exported model, a file is missing,
        damaged or of a newer version, or the model was not exported for the
        platform of the device.
    """
    return ExportedRecommender(files.user_path(directory))


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of an exported model.

    Raises:
      VaecfError: as `load_exported`.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise VaecfError(
            f"{directory} holds no exported model ({MANIFEST} is missing): "
            "name a directory that vaecf.export has written"
        )
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VaecfError(f"{path}: not the manifest of an exported model")
    if manifest["version"] != VERSION:
        raise VaecfError(
            f"{path}: format version {manifest['version']}, and this version "
            f"of vaecf reads version {VERSION}; {_FIX}, or use vaecf "
            f"{manifest['vaecf']}"
        )
    return manifest


def _read(path: pathlib.Path, sha256: str) -> bytes:
    """Returns the content of a file whose digest is known."""
    try:
        matches = files.file_sha256(path) == sha256
    except OSError:
        raise VaecfError(f"{path} is missing; {_FIX}") from None
    if not matches:
        raise VaecfError(f"{path}: damaged (it has another SHA-256); {_FIX}")
    return path.read_bytes()


def _on_device(
    directory: pathlib.Path, bfloat16: Iterable[str]
) -> dict[str, jax.Array]:
    """Returns the parameters, by name; NumPy files have no bfloat16."""
    arrays = array_folder.read(directory / ARRAYS, _FIX)
    for name in bfloat16:
        arrays[name] = arrays[name].view(jnp.dtype(jnp.bfloat16))
    return jax.device_put(arrays)


def _deserialize(
    program: bytes, directory: pathlib.Path, manifest: dict[str, Any]
) -> jax.export.Exported:
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:  # what JAX raises has no common class
        raise VaecfError(
            f"{directory / PROGRAM}: jax {jax.__version__} cannot read the "
            f"program that jax {manifest['jax']} has written "
            f"({str(error).splitlines()[0]}); {_FIX}"
        ) from None
    here = jax.export.default_export_platform()
    if here not in exported.platforms:
        raise VaecfError(
            f"{directory} was exported for {', '.join(exported.platforms)}, "
            f"and JAX runs on {here}: export the model with "
            f"platforms=('{here}',)"
        )
    return exported


def _batches(matrix: Interactions, size: int) -> Iterable[np.ndarray]:
    """Yields int32 [B, L]: the items of B users, filled up with -1.

    B and L are powers of two, so that few programs are compiled. Padding users
    have no items. Without users, one batch of padding is yielded.
    """
    size = min(size, sparse_batch.bucket_users(matrix.n_users))
    counts = matrix.counts
    for first in range(0, max(matrix.n_users, 1), size):
        count_B = counts[first : first + size]
        length = packing.bucket(int(count_B.max(initial=0)))
        item_BL = np.full((size, length), -1, np.int32)
        begin = matrix.indptr[first]
        end = matrix.indptr[first + len(count_B)]
        is_item_BL = np.arange(length) < count_B[:, None]
        item_BL[: len(count_B)][is_item_BL] = matrix.indices[begin:end]
        yield item_BL
