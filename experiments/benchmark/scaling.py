"""Training on many devices, on paper: what is counted and what follows.

    python experiments/benchmark/scaling.py \\
        --json=experiments/benchmark/results/scaling.json
    python experiments/benchmark/scaling.py --markdown=docs/scaling.md

Compiles the training step for meshes of virtual CPU devices, counts in the
compiled program what every device computes, holds and sends, and predicts
from it what a step takes on GPUs (`hardware.py`; no GPU is needed, and none is
measured). Nothing of the step's size is allocated. `--markdown` puts the tables
of results/*.json between the marks of a file instead.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

RESULTS = pathlib.Path(__file__).with_name("results")

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_MARKDOWN = flags.DEFINE_string(
    "markdown", None, "File whose tables to replace by those of --results."
)
_RESULTS = flags.DEFINE_string(
    "results", str(RESULTS), "Folder that --markdown takes JSON files from."
)
_ITEMS = flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
_HIDDEN = flags.DEFINE_list(
    "hidden", ["600"], "Widths of the hidden layers, from the items inwards."
)
_LATENT = flags.DEFINE_integer("latent", 200, "Bottleneck.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 24_576, "Users a step, over all devices.", lower_bound=1
)
_MICROBATCH = flags.DEFINE_integer(
    "microbatch", 0, "Users whose activations a device holds; 0: all its own."
)
_ITEM_BLOCK = flags.DEFINE_integer(
    "item_block", 0, "Items a block of the likelihood; 0: all at once."
)
_INPUT = flags.DEFINE_enum(
    "input", "dense", ("dense", "gather"), "Lowering of the input layer."
)
_PRECISION = flags.DEFINE_enum("precision", "bf16", ("bf16", "fp32"), "Policy.")
_ZERO = flags.DEFINE_bool("zero", False, "config.mesh.zero.")
_HISTORY = flags.DEFINE_integer("history", 73, "Interactions of a user.")
_DEVICES = flags.DEFINE_list(
    "devices", ["1", "2", "4", "8", "16", "32", "64"], "Numbers of devices."
)
_MESHES = flags.DEFINE_list(
    "meshes", [], "Meshes such as 4x2 (users x items), instead of --devices."
)
_MOST_ITEMS = flags.DEFINE_integer(
    "most_item_shards", 8, "Devices along the items at most."
)
_WEAK = flags.DEFINE_bool(
    "weak", True, "Also with --batch_size users for every device."
)


def main(argv: Sequence[str]) -> None:
    """Counts, predicts, prints, writes."""
    del argv
    from experiments.benchmark import scaling_tables
    from vaecf import workdir as workdir_lib
    from vaecf.errors import VaecfError

    if _MARKDOWN.value is not None:

        def load(name: str) -> dict[str, Any]:
            path = pathlib.Path(_RESULTS.value) / f"{name}.json"
            return json.loads(path.read_text())

        page = pathlib.Path(_MARKDOWN.value)
        text = scaling_tables.replace(page.read_text(), load)
        workdir_lib.write_bytes(page, text.encode())
        return
    try:
        hidden = tuple(int(width) for width in _HIDDEN.value)
        devices = [int(n) for n in _DEVICES.value]
        sizes = [map(int, mesh.split("x")) for mesh in _MESHES.value]
        meshes = [(data, item) for data, item in sizes]
    except ValueError:
        raise VaecfError(
            "--hidden and --devices are whole numbers, --meshes like 4x2,8x1"
        ) from None
    from experiments.benchmark import virtual

    virtual.ask_for_devices(max([*devices, *(a * b for a, b in meshes)]))
    from experiments.benchmark import compiled, machine

    settings = compiled.Settings(
        items=_ITEMS.value,
        hidden=hidden,
        latent=_LATENT.value,
        batch_size=_BATCH_SIZE.value,
        microbatch=_MICROBATCH.value,
        item_block=_ITEM_BLOCK.value,
        input=_INPUT.value,
        precision=_PRECISION.value,
        history=_HISTORY.value,
        zero=_ZERO.value,
    )
    meshes = meshes or [
        mesh for n in devices for mesh in compiled.meshes(n, _MOST_ITEMS.value)
    ]
    result = scaling_tables.count(settings, meshes, _WEAK.value, cli.log)
    result["versions"] = machine.versions(("jax", "jaxlib", "flax", "optax"))
    cli.log(scaling_tables.text(result))
    if _JSON.value is not None:
        text = json.dumps(result, indent=1) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


if __name__ == "__main__":
    cli.run(main)
