"""Checkpoints: the latest state to resume from, the best parameters to use.

Orbax (its v0 API, in this file only) saves the arrays with their logical
shapes, so that they restore onto any mesh. Saving is synchronous: on a CPU,
orbax reads the live buffers, which the next step would overwrite.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from vaecf.errors import VaecfError
from vaecf.models import mult_vae, registry
from vaecf.parallel import mesh as mesh_lib

# A checkpoint of a run with at most this many item shards restores onto
# another number of shards.
_MOST_ITEM_SHARDS = 64

LATEST, BEST = "latest", "best"


class Checkpoints:
    """The directory `checkpoints/` of a workdir; the first save creates it.

    `latest/` holds the whole TrainState, `best/` the scoring parameters. Each
    has a `position`, the progress of the run as JSON.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory.absolute()
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def _manager(self, which: str) -> ocp.CheckpointManager:
        if which not in self._managers:
            self._managers[which] = ocp.CheckpointManager(
                self._directory / which,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    create=True,
                    enable_async_checkpointing=False,
                ),
            )
        return self._managers[which]

    def step(self, which: str) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        if not (self._directory / which).is_dir():
            return None
        return self._manager(which).latest_step()

    def save(
        self, which: str, step: int, tree: Any, position: dict[str, Any]
    ) -> None:
        """Saves arrays and JSON values, then removes the previous checkpoint.

        Saving a step again keeps the first checkpoint.

        Raises:
          VaecfError: the files cannot be written.
        """
        try:
            self._manager(which).save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    position=ocp.args.JsonSave(position),
                ),
                force=True,
            )
        except ocp.checkpoint_manager.StepAlreadyExistsError:
            return
        except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
            raise VaecfError(
                f"{self._directory / which}: cannot write a checkpoint "
                f"({str(error).splitlines()[0]})"
            ) from error

    def position(self, which: str) -> dict[str, Any]:
        """Returns the values saved beside the arrays.

        Raises:
          VaecfError: there is no such checkpoint, or it is damaged.
        """
        return self._restore(which, position=ocp.args.JsonRestore())["position"]

    def restore(self, which: str, abstract: Any, n_items: int = 0) -> Any:
        """Returns the arrays, placed as in `abstract`.

        Another number of item shards can mean other padding after the items;
        padding zeros are removed or added. `abstract` is a pytree of
        jax.ShapeDtypeStruct with shardings.

        Raises:
          VaecfError: there is no such checkpoint, or its arrays do not fit.
        """
        step = self._require(which)
        # The handler accepts only orbax's own kind of path.
        directory = self._manager(which).directory / str(step) / "state"
        try:
            saved = ocp.StandardCheckpointHandler().metadata(directory)
            strict = not _same_but_for_padding(saved, abstract, n_items)
        except (OSError, ValueError):
            strict = True  # damaged
        arguments = ocp.args.StandardRestore(abstract, strict=strict)
        return self._restore(which, state=arguments)["state"]

    def _restore(self, which: str, **arguments: Any) -> Any:
        step = self._require(which)
        try:
            return self._manager(which).restore(
                step, args=ocp.args.Composite(**arguments)
            )
        except Exception as error:  # orbax raises it for damaged arrays
            reason = str(error.__cause__ or error).strip() or repr(error)
            first_line = reason.splitlines()[0]
            raise VaecfError(
                f"{self._directory / which / str(step)}: the checkpoint does "
                f"not fit this model or is damaged ({first_line})"
            ) from error

    def _require(self, which: str) -> int:
        step = self.step(which)
        if step is None:
            raise VaecfError(
                f"{self._directory / which}: no checkpoint there; train first"
            )
        return step

    def close(self) -> None:
        """Ends the threads of orbax."""
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()


def _same_but_for_padding(saved: Any, wanted: Any, n_items: int) -> bool:
    """Returns whether shapes differ at most in the padding of the items."""
    paddings = {
        mesh_lib.padded_items(n_items, shards)
        for shards in range(1, _MOST_ITEM_SHARDS + 1)
    }
    saved, wanted = _by_name(saved), _by_name(wanted)

    def fits(old: tuple[int, ...], new: Any) -> bool:
        spec = getattr(new.sharding, "spec", ())
        return len(old) == len(new.shape) and all(
            a == b or (mesh_lib.ITEM in (axes or ()) and a in paddings)
            for a, b, axes in itertools.zip_longest(old, new.shape, spec)
        )

    return wanted.keys() <= saved.keys() and all(
        fits(saved[name].shape, wanted[name]) for name in wanted
    )


def _by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path; orbax replaces NamedTuples by dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_params(
    saved: Checkpoints, model: mult_vae.MultDAE, mesh: Mesh
) -> Any:
    """Returns the best scoring parameters, placed on a mesh.

    `model` is the module over all items, padded for the mesh.

    Raises:
      VaecfError: there is no such checkpoint, or it does not fit the model.
    """
    init = functools.partial(registry.init_params, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shapes = registry.scoring_params(model, shapes)
    specs = mesh_lib.specs(shapes, mult_vae.PARTITION)
    places = mesh_lib.shardings(mesh, specs)
    return saved.restore(BEST, abstract(shapes, places), model.n_items)


def abstract(tree: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with shardings for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings,
    )
