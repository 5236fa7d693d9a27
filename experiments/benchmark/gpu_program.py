"""What XLA compiles for an NVIDIA GPU, read on a machine that has none.

    make gpu-program                      # its own environment, and all devices
    python experiments/benchmark/gpu_program.py --device=h100 --precision=bf16

Compiles the training steps, the ranking of an evaluation and the query of one
user with JAX's CUDA plugin for a described device, and reads the kernels of the
compiled programs. Times are predictions: a kernel takes as long as its products
or its bytes, whichever is longer, at the assumed rates, and at least `LAUNCH`.
XLA cannot time alternatives without a GPU; there it may choose cuBLAS for
products, and join or divide kernels around them.
"""

from __future__ import annotations

import collections
import pathlib
import sys
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.benchmark import common, gpu_devices, hlo, machine
from vaecf import cli
from vaecf import config as config_lib
from vaecf.config import Config

# Assumptions: the shares of the device's rates that kernels reach, and the
# shortest time of a kernel, in seconds.
PRODUCTS, TRAFFIC, LAUNCH = 0.75, 0.85, 2e-6
LISTED_BYTES, LISTED_FLOP = 5e7, 1e9  # kernels below both are only summed

FLAGS = flags.FLAGS
common.define_json()
flags.DEFINE_enum("device", "h100", list(gpu_devices.GPUS), "The GPU.")
flags.DEFINE_string("precision", "bf16", "config.precision.policy.")
flags.DEFINE_string("input", "auto", "config.model.input.")
flags.DEFINE_enum(
    "model", "mult_vae", ["mult_vae", "mult_dae", "rec_vae"], "The model."
)
flags.DEFINE_string("mesh", "1x1", "Devices along the users x items.")
flags.DEFINE_integer("batch_size", 24_576, "Users per batch.", 1)
flags.DEFINE_integer("users", 116_677, "Training users.", 1)
flags.DEFINE_integer("items", 20_108, "Items.", 1)
flags.DEFINE_integer("history", 73, "Mean interactions of a user.", 1)
flags.DEFINE_multi_string("set", [], "Settings: --set=mesh.reduce=compute.")
flags.DEFINE_string("hlo", None, "Directory to write the HLO text to.")
flags.DEFINE_bool("all", False, "Compile all that runs on a GPU; no figures.")


def main(argv: list[str]) -> None:
    """Compiles and reports."""
    gpu_devices.without_gpu()
    if FLAGS.all:
        from experiments.benchmark import gpu_all

        return gpu_all.main(FLAGS.json)
    from experiments.benchmark import gpu_compile

    data, item = map(int, FLAGS.mesh.split("x"))
    alternating = (3, 1) if FLAGS.model == "rec_vae" else ()
    config = config_lib.replace(
        Config(),
        {
            "model.name": FLAGS.model,
            "model.input": FLAGS.input,
            "precision.policy": FLAGS.precision,
            "train.batch_size": FLAGS.batch_size,
            "train.alternating_epochs": alternating,
            "mesh.data": data,
            "mesh.item": item,
            **common.assignments(FLAGS.set),
        },
    )
    gpu = gpu_devices.GPUS[FLAGS.device]
    mesh = gpu_devices.mesh(gpu, data, item)
    sizes = (FLAGS.items, FLAGS.users, FLAGS.history)
    programs = gpu_compile.train(config, mesh, *sizes)
    programs |= gpu_compile.rankings(config, mesh, FLAGS.items, FLAGS.history)
    read = {}
    for name, (program, users) in programs.items():
        if FLAGS.hlo:
            folder = pathlib.Path(FLAGS.hlo)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text(program.as_text())
        bits = 32 if name in ("evaluation", "query") else None
        width = (bits or (16 if "16" in FLAGS.precision else 32)) // 8
        rows = -(-FLAGS.items // (128 * item)) * 128
        # For a single user the weights are larger than users x items.
        pass_bytes = width * rows * (users // data) if users > data else 0
        read[name] = report(program, gpu, FLAGS.precision, pass_bytes)
        rate = users / read[name]["predicted_seconds"]
        read[name] |= {"users": users, "predicted_users_per_second": rate}
    result = {
        "device": f"{gpu.name} (described)",
        "precision": FLAGS.precision,
        "input": gpu_compile.input_of(config, mesh, FLAGS.items),
        "model": FLAGS.model,
        "batch_size": FLAGS.batch_size,
        "items": FLAGS.items,
        "mesh": {"data": data, "item": item},
        "assumptions": {
            "share_of_flop": PRODUCTS,
            "share_of_bandwidth": TRAFFIC,
            "shortest_kernel_seconds": LAUNCH,
            "gpu": gpu._asdict(),
        },
        "programs": read,
        "versions": machine.versions(),
    }
    common.report("gpu_program", result)


def seconds(kernel: hlo.Kernel, gpu: gpu_devices.Gpu, precision: str) -> float:
    """Returns the predicted time of a kernel.

    A device sends about the whole array of a collective, as around a ring, and
    that of an all-reduce twice.
    """
    if hlo.COLLECTIVE.match(kernel.op):
        # The start of a collective also names its operands as results.
        read, results = sum(kernel.read), sum(kernel.written)
        times = 2 if kernel.op.startswith("all-reduce") else 1
        sent = times * max(read, results - read)
        return max(sent / (PRODUCTS * gpu.link), LAUNCH)
    half = kernel.operand in ("bf16", "f16")
    single = gpu.tf32 if precision == "tf32" else gpu.fp32
    products = kernel.flop / (PRODUCTS * (gpu.half if half else single))
    moved = sum(kernel.read) + sum(kernel.written)
    gathered = kernel.gathered / (TRAFFIC * gpu.l2_bandwidth)
    return max(products, moved / (TRAFFIC * gpu.bandwidth), gathered, LAUNCH)


def elapsed(
    step: list[hlo.Kernel],
    times: dict[str, float],
    beside: dict[str, list[str]],
) -> float:
    """Returns the time of a step in the order of its schedule.

    Kernels run one after another. So do the collectives, which share the links,
    beside the kernels that `beside` names; the next kernel waits for them.
    """
    now = sent = 0.0
    ends: dict[str, float] = {}  # of the collectives that nothing waited for
    for kernel in step:
        for name in [x for x in ends if kernel.name not in beside[x]]:
            now = max(now, ends.pop(name))
        if kernel.name in beside:
            sent = max(sent, now) + times[kernel.name]
            ends[kernel.name] = sent
        else:
            now += times[kernel.name]
    return max(now, sent)


def report(
    program: Any, gpu: gpu_devices.Gpu, precision: str, pass_bytes: int
) -> dict[str, Any]:
    """Returns the figures of a compiled program.

    `pass_bytes` are those of an array of users x items: reading or writing one
    is a pass. 0 counts none.
    """
    module = hlo.Module(program.as_text())
    step, around = module.step()
    memory = program.memory_analysis()
    passes = [
        f"{way} {k.name}: {k.source.rpartition('/')[2]}"
        for k in step
        for way, found in (("reads", k.read), ("writes", k.written))
        for n in found
        for _ in range(round(n / pass_bytes + 0.05) if pass_bytes else 0)
    ]
    moved = [sum(k.read) + sum(k.written) for k in step]
    times = {k.name: seconds(k, gpu, precision) for k in step}
    sends = [k for k in step if hlo.COLLECTIVE.match(k.op)]
    together = elapsed(step, times, module.beside)
    return {
        "kernels": len(step),
        "kernels_outside_the_loop": len(around),
        "in_inner_loops": sum(k.times != 1 for k in step),
        "kinds": dict(collections.Counter(k.op for k in step)),
        "passes": len(passes),
        "passes_by_kernel": passes,
        "bytes": sum(moved),
        "bytes_without_products": sum(
            n for n, k in zip(moved, step) if not k.flop
        ),
        "flop": sum(k.flop for k in step),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": [
            {
                "op": k.op,
                "bytes": sum(k.read),
                "beside": module.beside.get(k.name, []),
            }
            for k in sends
        ],
        "predicted_seconds": together,
        "predicted_seconds_of_collectives": sum(times[k.name] for k in sends),
        "predicted_seconds_hidden": sum(times.values()) - together,
        "predicted_seconds_of_products": sum(
            times[k.name] for k in step if k.flop
        ),
        "largest": [
            {**k._asdict(), "seconds": times[k.name]}
            for k, n in zip(step, moved)
            if n > LISTED_BYTES or k.flop > LISTED_FLOP
        ],
    }


if __name__ == "__main__":
    cli.run(main)
