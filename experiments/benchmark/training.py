"""Training throughput, in turns with PyTorch and the machine's own ceiling.

    python experiments/benchmark/training.py --json=out.json
    python experiments/benchmark/training.py --json=out.json \\
        --peer=torch_dense --peer=torch_sparse --peer_python=~/torch/bin/python

Trains on generated interactions with the shape of MovieLens-20M, with the data
on the device and many steps per dispatch, as the training loop does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import scipy.sparse
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, machine
from vaecf import cli
from vaecf import config as config_lib
from vaecf.errors import VaecfError

_OWN = "vaecf_fp32"  # our own step, as a peer of another precision
# The variants of torch_mult_vae.py.
_TORCH = ("torch_dense", "torch_sparse", "torch_compile_bf16")

FLAGS = flags.FLAGS
common.define_flags(batch_size=4096)
flags.DEFINE_integer("users", 116_677, "Training users.", lower_bound=1)
flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=1)
flags.DEFINE_integer("epochs", 0, "Also time so many whole epochs.", 0)
flags.DEFINE_multi_enum("peer", [], (_OWN, *_TORCH), "Also measure this one.")
flags.DEFINE_string(
    "peer_python",
    os.environ.get("VAECF_PEER_PYTHON", sys.executable),
    "Interpreter that has PyTorch; also $VAECF_PEER_PYTHON.",
)


def main(argv: list[str]) -> None:
    """Generates the data, compiles, and measures in turns."""
    from experiments.benchmark import gpu_compile, workloads

    if FLAGS.peer:
        # Peers may share the GPU, of which JAX would reserve three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = common.config_from_flags()
    train = common.interactions(FLAGS.users, FLAGS.items, FLAGS.seed)
    batch_size = config.train.batch_size
    trainer = workloads.Trainer(config, train)
    mesh = trainer.setup.mesh
    ceiling = workloads.decoder_product(config, mesh, batch_size, FLAGS.items)
    fp32 = config_lib.replace(config, {"precision.policy": "fp32"})
    others = {
        name: workloads.Trainer(fp32, train)
        if name == _OWN
        else Peer(name, FLAGS.peer_python, config, train)
        for name in FLAGS.peer
    }
    contestants = {"vaecf": trainer, **others}
    rates = common.in_turns(
        {"ceiling": ceiling} | {k: v.measure for k, v in contestants.items()}
    )
    # The logits, the gradient of the hidden layer and that of the weights, with
    # 2 FLOP for each of hidden x items entries: no implementation needs less.
    flop = 3 * 2 * config.model.hidden[0] * FLAGS.items
    fraction = 1e-9 * flop * common.ratio(rates["vaecf"], rates["ceiling"])
    result = {
        "users_per_second": statistics.median(rates["vaecf"]),
        "ceiling_gflops": statistics.median(rates["ceiling"]),
        "fraction_of_ceiling": fraction,
        "flop_per_user": flop,
        "batch_size": batch_size,
        "interactions": train.nnz,
        "input": gpu_compile.input_of(config, mesh, FLAGS.items),
        "microbatch": trainer.setup.microbatch,
        "compile_seconds": trainer.pipeline.compile_seconds,
        "program_bytes": trainer.pipeline.program_bytes(),
        "steps": trainer.steps,
        "loss_first": trainer.losses[0],
        "loss_last": trainer.losses[-1],
        "epochs": FLAGS.epochs,
        "epochs_seconds": trainer.epochs(FLAGS.epochs),
        "peers": {
            name: {
                **other.figures,
                "users_per_second": statistics.median(rates[name]),
                "ratio": common.ratio(rates["vaecf"], rates[name]),
            }
            for name, other in others.items()
        },
        **common.describe(config, mesh),
        "rates": rates,
    }
    if FLAGS.epochs:
        cli.log(f"{FLAGS.epochs} epochs: {result['epochs_seconds']:.1f} s")
    common.report("training", result)


class Peer:
    """A process with a PyTorch model, which trains while ours waits.

    Its memory and threads are separate from ours. It ends when our process ends
    and closes its stdin.

    `name` is one of `_TORCH`, `python` an interpreter that has PyTorch, NumPy
    and SciPy. `figures` holds {'version', 'loss', 'peak_rss_bytes', ...} of the
    process.
    """

    def __init__(
        self, name: str, python: str, config: config_lib.Config, train: Any
    ) -> None:
        self._name = name
        script = pathlib.Path(__file__).with_name("torch_mult_vae.py")
        with tempfile.TemporaryDirectory() as folder:
            matrix = f"{folder}/train.npz"
            settings = json.dumps(config.to_dict())
            scipy.sparse.save_npz(matrix, train.to_scipy(), compressed=False)
            self._process = subprocess.Popen(
                [python, str(script), name, matrix, settings],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(machine.ROOT)},
            )
            self.figures = self._answer()

    def measure(self, seconds: float) -> float:
        """Trains for about `seconds`, at least one step; returns users/s."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(f"{seconds}\n".encode())
        self.figures = self._answer()
        return self.figures["users_per_second"]

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise VaecfError(
            f"--peer={self._name}: the process ended with status "
            f"{self._process.wait()}; its error is above"
        )


if __name__ == "__main__":
    cli.run(main)
