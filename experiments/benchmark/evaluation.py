"""Speed of evaluation, measured against the machine's own ceiling.

    python experiments/benchmark/evaluation.py --json=out.json

Generated held-out users of MovieLens-20M's shape go the way that a validation
of the training loop goes, from histories on the host to metrics with standard
errors, over a model with random weights. Whatever ranks all items computes
their scores: that one product, at the ceiling of the machine, is the floor it
is shown beside. What an epoch of training takes is in training.py's results.

Ceiling, evaluation and its two parts (ranking, metrics) are measured in turns,
because a shared machine drifts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from vaecf import cli

_JSON = flags.DEFINE_string("json", None, "File to write the results to.")
_USERS = flags.DEFINE_integer("users", 10_000, "Held-out users.", lower_bound=1)
_ITEMS = flags.DEFINE_integer("items", 20_108, "Items.", lower_bound=20)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 2000, "Users a block, over all devices.", lower_bound=1
)
_PRECISION = flags.DEFINE_enum(
    "precision", "fp32", ("fp32", "bf16", "fp16", "tf32", "amp"), "Policy."
)
_METRICS = flags.DEFINE_list(
    "metrics",
    ["ndcg@100", "recall@20", "recall@50"],
    "Metrics; the largest cut-off is the length of the lists.",
)
_SECONDS = flags.DEFINE_float(
    "seconds", 30.0, "Time for each thing measured.", lower_bound=0.0
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Turns that this time is divided into.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the data.")

# What JAX reports of a program's way from a traced function to machine code.
_COMPILATION = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """The three things that are timed, ready to be called.

    Attributes:
      evaluate: fold-in users -> their metrics, as the training loop has it;
        the other two are its parts.
      rank: fold-in users -> their lists: blocks are assembled on the host,
        scored and ranked on the device, and fetched.
      score: lists -> metrics, on the host.
    """

    evaluate: Callable[[], Any]
    rank: Callable[[], Any]
    score: Callable[[], Any]


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table and writes the JSON."""
    del argv
    from vaecf import workdir as workdir_lib

    result = benchmark(cli.log)
    cli.log(table(result))
    if _JSON.value is not None:
        text = json.dumps(result, indent=2) + "\n"
        workdir_lib.write_bytes(_JSON.value, text.encode())


def benchmark(log: Callable[[str], None]) -> dict[str, Any]:
    """Generates, compiles, measures in turns: what the JSON holds.

    Raises:
      VaecfError: settings that do not fit, or a precision that this device
        lacks.
    """
    from experiments.benchmark import ceilings, machine, models
    from vaecf.evaluation import metrics
    from vaecf.training import precision

    # Before the seconds of generation: what cannot be measured.
    depth = metrics.depth(_METRICS.value)
    policy = precision.policy(_PRECISION.value)
    model = models.random_model(_ITEMS.value, _PRECISION.value)
    mesh, hidden = model.setup.mesh, model.config.model.hidden[0]
    work, facts = _prepare(model)
    log(
        f"{_USERS.value:,} held-out users, {_ITEMS.value:,} items, "
        f"{facts['interactions_per_user']:.1f} items a history"
    )
    product = ceilings.make_product(
        mesh, policy, _BATCH_SIZE.value, hidden, _ITEMS.value
    )
    with _compilation() as spent:
        first = _seconds(work.evaluate)
    log(f"compiled in {sum(spent):.1f} s")
    flop = 2 * hidden * _ITEMS.value
    rounds = [_turn(product, work, flop, log) for _ in range(_REPEATS.value)]
    middle = {
        key: statistics.median(turn[key] for turn in rounds)
        for key in rounds[0]
    }
    rate = _USERS.value / middle["seconds"]
    return {
        "users_per_second": rate,
        **middle,
        "fraction_of_ceiling": rate * flop / (1e9 * middle["ceiling_gflops"]),
        "first_seconds": first,
        "compile_seconds": sum(spent),
        "users": _USERS.value,
        "items": _ITEMS.value,
        "batch_size": _BATCH_SIZE.value,
        "metrics": list(_METRICS.value),
        "k": depth,
        "hidden": list(model.config.model.hidden),
        "latent": model.config.model.latent,
        "floor": {
            "flop_per_user": flop,
            "seconds": _USERS.value * flop / (1e9 * middle["ceiling_gflops"]),
            "description": "the decoder product: 2 x hidden x items a user",
        },
        "ceiling_shape": list(product.shape),
        **facts,
        "seconds_asked": _SECONDS.value,
        "repeats": _REPEATS.value,
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "device_memory": models.device_memory(),
        **models.describe(policy, mesh),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """A few lines for the person."""
    floor = result["floor"]["seconds"]
    return "\n".join(
        [
            f"{result['device']}, {result['precision']}, blocks of "
            f"{result['batch_size']:,}, lists of {result['k']}",
            f"evaluation          {result['users_per_second']:>12,.0f} users/s",
            f"of all users        {result['seconds']:>12.3f} s",
            f"  ranking           {result['ranking_seconds']:>12.3f} s",
            f"  metrics (host)    {result['metrics_seconds']:>12.3f} s",
            f"decoder product     {floor:>12.3f} s at "
            f"{result['ceiling_gflops']:,.1f} GFLOP/s",
            f"fraction of ceiling {result['fraction_of_ceiling']:>12.1%}",
            f"compilation         {result['compile_seconds']:>12.2f} s",
            f"peak memory (host)  {result['peak_rss_bytes'] / 1e9:>12.2f} GB",
        ]
    )


def _prepare(model: Any) -> tuple[Work, dict[str, Any]]:
    """Generates the users; facts about them are for the JSON."""
    from vaecf.data import synthetic
    from vaecf.evaluation import ranking, scorers
    from vaecf.evaluation.evaluator import Evaluator

    dataset = synthetic.make(
        "ml-20m-shape",
        seed=_SEED.value,
        # Only their item counts are looked at, and every item needs one.
        n_train_users=max(_USERS.value, _ITEMS.value // 10),
        n_held_out_users=_USERS.value,
        n_items=_ITEMS.value,
    )
    held = dataset.validation
    names = tuple(_METRICS.value)
    setup = model.setup
    params = scorers.ModelParams(model.params)
    validation = Evaluator(
        held.fold_in,
        held.held_out,
        dataset.train,
        names,
        names[0],
        _BATCH_SIZE.value,
        setup.mesh,
    )
    ranker = validation.compile(scorers.model(setup.model))

    def rank() -> ranking.RankedLists:
        return ranker(
            params,
            held.fold_in.indptr,
            held.fold_in.indices,
            batch_size=_BATCH_SIZE.value,
        )

    def evaluate() -> Any:
        return validation(ranker, params)

    lists: list[ranking.RankedLists] = []

    def score() -> Any:
        if not lists:
            lists.append(rank())
        return validation.evaluate_lists(lists[0])

    return Work(evaluate, rank, score), {
        "interactions_per_user": held.fold_in.nnz / held.fold_in.n_users,
        "held_out_per_user": held.held_out.nnz / held.held_out.n_users,
        "input": setup.model.input_lowering,
    }


def _turn(
    product: Any, work: Work, flop: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Ceiling, evaluation, its parts, ceiling: one line of the record."""
    turn = _SECONDS.value / _REPEATS.value
    timings = product.measure(turn / 2)
    seconds = _repeated(work.evaluate, turn)
    ranking = _repeated(work.rank, turn)
    work.score()  # the first call ranks
    scoring = _repeated(work.score, min(turn, 1.0))
    timings += product.measure(turn / 2)
    ceiling = statistics.median(timings)
    rate = _USERS.value / seconds
    log(
        f"ceiling {ceiling / 1e9:,.1f} GFLOP/s, evaluation {rate:,.0f} users/s "
        f"({rate * flop / ceiling:.1%})"
    )
    return {
        "seconds": seconds,
        "ranking_seconds": ranking,
        "metrics_seconds": scoring,
        "ceiling_gflops": ceiling / 1e9,
    }


def _repeated(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, the mean over about so long; at least one call."""
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < seconds:
        work()
        calls += 1
    return (time.perf_counter() - began) / calls


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextlib.contextmanager
def _compilation() -> Iterator[list[float]]:
    """Collects the seconds of lowering and compilation, tracing left out."""
    import jax

    spent: list[float] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event in _COMPILATION:
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


if __name__ == "__main__":
    cli.run(main)
