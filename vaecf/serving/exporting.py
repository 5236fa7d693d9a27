"""Writes a trained model as a program that ranks without this library's models.

export.json      manifest: sizes, platforms, versions, digests; see `_manifest`
program.bin      StableHLO of the ranking, serialised by `jax.export`
arrays/          the parameters, the program's first argument: one .npy each,
                 and their digests in arrays.json
items.json       raw ids of the items, a list in index order
numpy_ranker.py  ranks the directory with NumPy alone

The program maps

  (parameters, items int32 [B, L], allowed bool [I], exclude_seen bool [])

to (items int32 [B, K], scores float32 [B, K], log_total float32 [B]), for any
number B of users and any length L of their histories, which are filled up with
-1. I is the number of items and K the length of lists. `ranking.RankedLists`
describes the results, and `rank_local` how ties are broken.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import vaecf
from vaecf import files
from vaecf.data import array_folder
from vaecf.errors import VaecfError, short
from vaecf.evaluation import ranking, scorers
from vaecf.models import blend
from vaecf.models.sparse_batch import SparseBatch
from vaecf.parallel import mesh as mesh_lib
from vaecf.serving import exported, keywords, numpy_ranker
from vaecf.serving.histories import count
from vaecf.serving.queries import Queries
from vaecf.serving.trained_model import TrainedModel

if TYPE_CHECKING:
    from vaecf.serving.recommender import Recommender

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# One program serves all platforms, with the kernels that suit a CPU. They do
# not depend on the machine that exports.
_KERNELS = "cpu"


def export(
    recommender: Recommender,
    directory: str | pathlib.Path,
    *,
    max_k: int = 100,
    platforms: Sequence[str] | str = ("cpu", "cuda"),
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model as a directory that ranks without the training code.

    `load_exported` ranks with the directory, and `numpy_ranker.py` inside it
    does so with NumPy alone. The directory is written atomically.

    >>> directory = vaecf.export(recommender, folder / "exported", max_k=20)
    >>> sorted(path.name for path in directory.iterdir())
    ['arrays', 'export.json', 'items.json', 'numpy_ranker.py', 'program.bin']

    Args:
      recommender: a fitted or loaded model of any kind.
      directory: a new or empty directory; with `overwrite` it may also hold an
        exported model.
      max_k: longest lists that the program can return, at least 1; no more
        than the number of items are possible.
      platforms: where the program can run, of 'cpu', 'cuda', 'rocm', 'tpu'.
        Its kernels are those that suit a CPU.

    Returns:
      The directory.

    Raises:
      VaecfError: nothing is fitted, an argument cannot be used, or the
        directory holds other files or cannot be written.
    """
    if not isinstance(recommender, Queries):
        raise VaecfError(
            f"cannot export {short(recommender)}: pass a Recommender, such as "
            "Recommender.load(workdir) or run.recommender()"
        )
    model = recommender._fitted()
    max_k = min(count("max_k", max_k), len(model.items))
    platforms = (platforms,) if isinstance(platforms, str) else platforms
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise VaecfError(
            f"platforms={platforms!r}: name some of {', '.join(PLATFORMS)}"
        )
    target = files.user_path(directory)
    files.recover(target)
    files.remove_leftovers(target)
    if target.exists():
        _require_replaceable(target, overwrite)
    scorer, params = _on_one_device(model)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }
    rank = _program(scorer, structure, [*arrays], max_k)
    users, length = jax.export.symbolic_shape("users, length")
    program = jax.export.export(jax.jit(rank), platforms=tuple(platforms))(
        {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()},
        jax.ShapeDtypeStruct((users, length), jnp.int32),
        jax.ShapeDtypeStruct((len(model.items),), jnp.bool_),
        jax.ShapeDtypeStruct((), jnp.bool_),
    )
    with files.atomic_directory(target, replace=overwrite) as fresh:
        (fresh / exported.PROGRAM).write_bytes(program.serialize())
        ids = json.dumps(model.items.ids.tolist())
        (fresh / exported.ITEMS).write_text(ids)
        (fresh / exported.ARRAYS).mkdir()
        host = {name: np.asarray(x) for name, x in arrays.items()}
        bfloat16 = [n for n, x in host.items() if x.dtype == jnp.bfloat16]
        for name in bfloat16:
            host[name] = host[name].view(np.uint16)
        array_folder.write(fresh / exported.ARRAYS, host)
        shutil.copyfile(numpy_ranker.__file__, fresh / "numpy_ranker.py")
        manifest = {
            **_manifest(model, program, max_k),
            "bfloat16": bfloat16,
            "files": {
                name: files.file_sha256(fresh / name)
                for name in (exported.PROGRAM, exported.ITEMS)
            },
        }
        files.write_json(fresh / exported.MANIFEST, manifest, digest=True)
    return target


def _require_replaceable(directory: pathlib.Path, overwrite: bool) -> None:
    if not directory.is_dir():
        raise VaecfError(f"{directory} is a file: name a directory")
    if not any(directory.iterdir()):
        return
    exported.read_manifest(directory)  # replaces nothing else
    if not overwrite:
        raise VaecfError(
            f"{directory} holds an exported model: pass overwrite=True to "
            "replace it, or choose another directory"
        )


def _on_one_device(
    model: TrainedModel,
) -> tuple[ranking.Scorer, Any]:
    """Returns the scorer of a single device and its parameters."""
    n_items = len(model.items)
    if model.module is None:
        scorer = scorers.fitted(model.config.model.name, n_items, _KERNELS)
    else:
        module = model.module.clone(
            item_rows=mesh_lib.padded_items(n_items),
            input_lowering="gather",
            platform=_KERNELS,
        )
        scorer = scorers.model(module)
    ranker = ranking.Ranker(scorer, mesh_lib.make_mesh(1, 1), k=1)
    params = ranker.place(jax.device_get(model.scorer_params))
    return scorer, ranker.resident(params)[0]


def _program(
    scorer: ranking.Scorer, structure: Any, names: list[str], max_k: int
) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the function of the module's docstring."""

    def rank(
        arrays: dict[str, jax.Array],
        item_BL: jax.Array,
        allowed_I: jax.Array,
        exclude_seen: jax.Array,
    ) -> tuple[jax.Array, ...]:
        params = jax.tree.unflatten(structure, [arrays[n] for n in names])
        n_users, _ = item_BL.shape
        user_B = jnp.arange(n_users, dtype=jnp.int32)
        is_item_BL = item_BL >= 0
        batch = SparseBatch(
            jnp.where(is_item_BL, item_BL, 0).reshape(-1),
            jnp.where(is_item_BL, user_B[:, None], n_users).reshape(-1),
            jnp.sum(is_item_BL, axis=1, dtype=jnp.int32),
        )
        scores_BI = scorer.apply(params, batch, user_B)
        n_padded = scores_BI.shape[1]
        # Masks drop items out of bounds.
        seen_N = jnp.where(exclude_seen, batch.item_N, n_padded)
        return tuple(
            ranking.rank_local(
                scores_BI,
                batch._replace(item_N=seen_N),
                jnp.pad(allowed_I, (0, n_padded - scorer.n_items)),
                k=max_k,
                n_items=scorer.n_items,
                platform=_KERNELS,
            )
        )

    return rank


def _manifest(
    model: TrainedModel, program: jax.export.Exported, max_k: int
) -> dict[str, Any]:
    config = model.config
    about: dict[str, Any] = {
        "format": exported.FORMAT,
        "version": exported.VERSION,
        "vaecf": vaecf.__version__,
        "jax": jax.__version__,
        "calling_convention": program.calling_convention_version,
        "platforms": list(program.platforms),
        "inputs": [str(aval) for aval in program.in_avals[-3:]],
        "outputs": [str(aval) for aval in program.out_avals],
        "model": config.model.name,
        "title": keywords.name_of(config.title),
        "items": len(model.items),
        "max_k": max_k,
        "has_probabilities": model.module is not None,
    }
    if model.module is not None:
        about["activation"] = config.model.activation
    if model.branch is not None:
        about["experts"] = {
            name: {
                "gain": float(model.branch[blend.GAINS[name]]),
                "floor": float(blend.floor(name, model.branch)),
            }
            for name in blend.experts_of(model.branch)
        }
    return about
