"""What the benchmarks share: settings, the machine, timing and output.

Only the standard library and `vaecf.config` are imported at the top, because
the PyTorch peers run in an interpreter that may have neither JAX nor absl.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vaecf import __version__
from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.errors import VaecfError

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "benchmark" / "results"

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "numpy", "scipy"),
    *("pandas", "polars"),
)

# --- Settings ---------------------------------------------------------------


def define_flags(
    *, batch_size: int, seconds: float = 30.0, repeats: int = 5
) -> None:
    """Defines the flags of every benchmark of a model."""
    from absl import flags

    define_json()
    flags.DEFINE_string("precision", "fp32", "config.precision.policy.")
    flags.DEFINE_integer(
        "batch_size", batch_size, "Users per batch.", lower_bound=1
    )
    flags.DEFINE_float(
        "seconds", seconds, "Time for each thing measured.", lower_bound=0.0
    )
    flags.DEFINE_integer(
        "repeats", repeats, "Turns that this time is split into.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the data and of the model.")
    flags.DEFINE_multi_string(
        "set", [], "Another setting, such as --set=model.input=gather."
    )


def define_json() -> None:
    """Defines --json."""
    from absl import flags

    flags.DEFINE_string("json", None, "File to write the results to.")


def config_from_flags(defaults: Mapping[str, Any] | None = None) -> Config:
    """Returns the default settings (Liang et al. 2018) with those of the flags.

    Args:
      defaults: settings of the benchmark by dotted key, which `--set` may
        override.

    Raises:
      VaecfError: a key is unknown, a value is not allowed, or this device
        lacks the precision.
    """
    from absl import flags

    from vaecf.training import precision

    changes = {
        "seed": flags.FLAGS.seed,
        "data.feed": "resident",
        "precision.policy": flags.FLAGS.precision,
        "train.batch_size": flags.FLAGS.batch_size,
        "eval.batch_size": flags.FLAGS.batch_size,
        **(defaults or {}),
    }
    for assignment in flags.FLAGS.set:
        key, _, text = assignment.partition("=")
        try:
            changes[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            changes[key] = text
    config = config_lib.replace(Config(), changes)
    precision.policy(config.precision.policy)
    return config


# --- The machine ------------------------------------------------------------


def peak_rss_bytes() -> int:
    """Returns the largest resident memory of this process so far.

    Prefers Linux's VmHWM: the `ru_maxrss` of a child process starts with the
    memory of its parent at the time of the fork.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Returns the model name of the host's processor and its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores"


def versions() -> dict[str, str]:
    """Returns the versions of Python, vaecf and the installed packages."""
    found = {"python": platform.python_version(), "vaecf": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(config: Config, mesh: Any) -> dict[str, Any]:
    """Returns what every JSON holds: settings, devices, memory and versions."""
    import jax

    from vaecf.training import precision

    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    kind = processor() if on_cpu else devices[0].device_kind
    return {
        "config": config.to_dict(),
        # The policy that 'amp' stands for on this device.
        "precision": precision.policy(config.precision.policy).name,
        "device": kind if len(devices) == 1 else f"{len(devices)} x {kind}",
        "host": processor(),
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "device_memory": devices[0].memory_stats(),
        "versions": versions(),
    }


# --- Timing -----------------------------------------------------------------


def timings(
    call: Callable[[], Any], seconds: float, group_seconds: float = 0.05
) -> list[float]:
    """Returns the seconds of a call, timed several times.

    Args:
      call: may return arrays that are still being computed.
      seconds: time to spend; at least one call is made.
      group_seconds: shorter calls are timed in groups of this duration, so
        that dispatching and reading the clock do not count.
    """
    import jax

    def run(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / calls

    deadline = time.perf_counter() + seconds
    found = [run(1)]
    calls = min(1000, max(1, round(group_seconds / found[0])))
    if calls > 1:
        found = [run(calls)]
    while time.perf_counter() < deadline:
        found.append(run(calls))
    return found


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median of every key over the rounds."""
    return {
        key: statistics.median(turn[key] for turn in rounds)
        for key in rounds[0]
    }


def run_script(
    script: str, *arguments: str, echo: bool = False, **environment: str
) -> dict[str, float]:
    """Runs a script of experiments/ in a process of its own.

    Args:
      script: path below experiments/.
      arguments: its command line.
      echo: print the output when the script has ended.
      environment: additional environment variables.

    Returns:
      {'seconds', 'peak_rss_bytes'}. The peak includes the memory that this
      process has at the fork, so that it should not be large.

    Raises:
      VaecfError: the script failed; with the last line of its output.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / script), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if echo:
        print(output, end="", flush=True)
    if process.returncode:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise VaecfError(
            f"{script} ended with status {process.returncode}: {last}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * unit}


# --- Output -----------------------------------------------------------------


def markdown(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    titles = list(head)
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    lines[0] = lines[0].replace("|  |", "| |")
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def write(result: Mapping[str, Any]) -> None:
    """Writes a result to the file of --json, if there is one."""
    from absl import flags

    from vaecf import workdir

    if flags.FLAGS.json is not None:
        workdir.write_json(pathlib.Path(flags.FLAGS.json), result)


def main_of(
    benchmark: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> Callable[[Sequence[str]], None]:
    """Returns the main function of a script: measure, print a table, write."""

    def main(argv: Sequence[str]) -> None:
        del argv
        result = benchmark()
        where = result.get("device") or result["processor"]
        print(f"\n{where}\n\n{table(result)}", flush=True)
        write(result)

    return main
