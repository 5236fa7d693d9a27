"""Checkpoints: the latest state to resume from, the best parameters to use.

Orbax (its v0 API, in this file only) saves the arrays with their logical
shapes, so that they restore onto any mesh. Saving is synchronous: on a CPU,
orbax reads the live buffers, which the next step would overwrite.

``digests.json`` in a checkpoint's directory has the SHA-256 of its files.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from vaecf import files
from vaecf.errors import VaecfError
from vaecf.models import mult_vae, registry
from vaecf.parallel import mesh as mesh_lib
from vaecf.parallel import processes


@contextlib.contextmanager
def no_root_handler() -> Iterator[None]:
    """Removes the handler that orbax may add to the root logger in the block.

    Its logging library calls `logging.basicConfig`. A later call of the
    application would do nothing.
    """
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in [] if before else list(logging.root.handlers):
            logging.root.removeHandler(handler)


with no_root_handler():
    import orbax.checkpoint as ocp

# A checkpoint of a run with at most this many item shards restores onto
# another number of shards.
_MOST_ITEM_SHARDS = 64

LATEST, BEST = "latest", "best"
# The latest state may be damaged: a run resumes from the one before it.
_KEPT = {LATEST: 2, BEST: 1}
_DIGESTS = "digests.json"


class Checkpoints:
    """The directory `checkpoints/` of a workdir; the first save creates it.

    `latest/` holds the whole TrainState, `best/` the scoring parameters. Each
    has a `position`, the progress of the run as JSON.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = self._for_orbax = directory.absolute()
        # Orbax takes '[', '*' and '?' in a path for a pattern, so it gets a
        # link to the directory.
        if glob.escape(str(self.directory)) != str(self.directory):
            self._link = tempfile.TemporaryDirectory(prefix="vaecf-")
            self._for_orbax = pathlib.Path(self._link.name) / "checkpoints"
            self._for_orbax.symlink_to(self.directory)
        self._managers: dict[tuple[str, bool], ocp.CheckpointManager] = {}
        self._whole: set[tuple[str, int]] = set()  # files have their digests

    def _manager(self, which: str, *, writes: bool) -> ocp.CheckpointManager:
        if (which, writes) in self._managers:
            return self._managers[which, writes]
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT[which] if writes else None,
            create=writes,
            enable_async_checkpointing=False,
        )
        if writes:
            self.directory.mkdir(parents=True, exist_ok=True)
        try:
            manager = ocp.CheckpointManager(
                self._for_orbax / which, options=options
            )
        except OSError as error:
            # It reads the times of all checkpoints, of which a run may remove
            # one meanwhile.
            if writes:
                raise
            raise VaecfError(f"{self.directory / which}: {error}") from None
        self._managers[which, writes] = manager
        return manager

    def steps(self, which: str) -> list[int]:
        """Returns the steps of the checkpoints on the disk, newest first."""
        with contextlib.suppress(OSError):
            names = os.listdir(self.directory / which)
            steps = (int(name) for name in names if name.isdecimal())
            return sorted(steps, reverse=True)
        return []

    def step(self, which: str) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return next(iter(self.steps(which)), None)

    def save(
        self, which: str, step: int, tree: Any, position: dict[str, Any]
    ) -> None:
        """Saves arrays and JSON values, then removes an old checkpoint.

        The best checkpoint is kept, and the latest two. Saving a step again
        keeps the first checkpoint.

        Raises:
          VaecfError: the files cannot be written.
        """
        try:
            self._manager(which, writes=True).save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    position=ocp.args.JsonSave(position),
                ),
                force=True,
            )
            if processes.is_lead():
                directory = self.directory / which / str(step)
                found = _digests(directory)
                files.write_json(directory / _DIGESTS, found, digest=True)
        except ocp.checkpoint_manager.StepAlreadyExistsError:
            return
        except VaecfError:
            raise
        except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
            reason = files.refusal(error) or str(error).splitlines()[0]
            raise VaecfError(
                f"{self.directory / which}: cannot write a checkpoint "
                f"({reason}); free space, or choose another workdir"
            ) from error

    def check(self, which: str, step: int | None = None) -> None:
        """Compares the files of a checkpoint with its digests.

        All processes call this method together. A checkpoint without digests
        passes: its process was killed before it wrote them.

        Raises:
          VaecfError: there is no such checkpoint, or it is damaged.
        """
        step = self._require(which) if step is None else step
        if (which, step) in self._whole:
            return
        directory = self.directory / which / str(step)
        with processes.agreement():
            if processes.is_lead() and (directory / _DIGESTS).exists():
                expected, found = files.read_json(directory / _DIGESTS), {}
                if not (isinstance(expected, dict) and expected):
                    raise VaecfError(f"{directory / _DIGESTS}: damaged")
                with contextlib.suppress(OSError):
                    found = _digests(directory)
                # Other files are those of a person or a file manager.
                for name in sorted(expected):
                    if found.get(name) != expected[name]:
                        raise VaecfError(
                            f"{directory}: the checkpoint is damaged ({name} "
                            "is missing or has another SHA-256)"
                        )
        self._whole.add((which, step))

    def position(self, which: str, step: int | None = None) -> dict[str, Any]:
        """Returns the values saved beside the arrays, by default the newest.

        Raises:
          VaecfError: there is no such checkpoint, or it is damaged.
        """
        arguments = ocp.args.JsonRestore()
        return self._restore(which, step, position=arguments)["position"]

    def restore(
        self,
        which: str,
        abstract: Any,
        n_items: int = 0,
        step: int | None = None,
    ) -> Any:
        """Returns the arrays, placed as in `abstract`, by default the newest.

        Another number of item shards can mean other padding after the items;
        padding zeros are removed or added. `abstract` is a pytree of
        jax.ShapeDtypeStruct with shardings.

        Raises:
          VaecfError: there is no such checkpoint, or its arrays do not fit.
        """
        step = self._require(which) if step is None else step
        self.check(which, step)
        # The handler accepts only orbax's own kind of path.
        manager = self._manager(which, writes=False)
        directory = manager.directory / str(step) / "state"
        try:
            saved = ocp.StandardCheckpointHandler().metadata(directory)
            strict = not _same_but_for_padding(saved, abstract, n_items)
        except Exception:  # damaged: `_restore` raises
            strict = True
        arguments = ocp.args.StandardRestore(abstract, strict=strict)
        return self._restore(which, step, state=arguments)["state"]

    def _restore(self, which: str, step: int | None, **arguments: Any) -> Any:
        step = self._require(which) if step is None else step
        self.check(which, step)
        try:
            return self._manager(which, writes=False).restore(
                step, args=ocp.args.Composite(**arguments)
            )
        except Exception as error:  # orbax raises it for damaged arrays
            reason = str(error.__cause__ or error).strip() or repr(error)
            first_line = reason.splitlines()[0]
            raise VaecfError(
                f"{self.directory / which / str(step)}: the checkpoint does "
                f"not fit this model or is damaged ({first_line})"
            ) from error

    def _require(self, which: str) -> int:
        step = self.step(which)
        if step is None:
            raise VaecfError(
                f"{self.directory / which}: no checkpoint there; train first"
            )
        return step

    def remove_after(self, which: str, step: int) -> None:
        """Removes the checkpoints of later steps, which are damaged."""
        with processes.agreement():
            for later in self.steps(which) if processes.is_lead() else ():
                if later > step:
                    path = self.directory / which / str(later)
                    # Half removed, it must not look like a checkpoint.
                    gone = path.rename(f"{path}.orbax-checkpoint-tmp")
                    if gone.is_dir():
                        shutil.rmtree(gone)
                    else:  # what a damaged disk or a person left there
                        gone.unlink()

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


def _digests(directory: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of the files of a checkpoint by relative path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): files.file_sha256(path)
        for path in paths
        if path.parent != directory or _DIGESTS not in path.name
    }


def restore_params(
    saved: Checkpoints,
    model: mult_vae.MultDAE,
    mesh: Mesh,
    step: int | None = None,
) -> Any:
    """Returns the best scoring parameters, placed on a mesh.

    `model` is the module over all items, padded for the mesh.

    Raises:
      VaecfError: there is no such checkpoint, or it does not fit the model.
    """
    shapes = registry.scoring_params(model, registry.abstract_params(model))
    specs = mesh_lib.specs(shapes, mult_vae.PARTITION)
    places = mesh_lib.shardings(mesh, specs)
    wanted = abstract(shapes, places)
    return saved.restore(BEST, wanted, model.n_items, step)


def abstract(tree: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with shardings for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings,
    )
